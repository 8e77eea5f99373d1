"""Flower's strategies on one flat array, as the run uses them."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from flowerbed.strategies import STRATEGIES, StrategyError, make_strategy

PARAMETERS: dict[str, dict[str, Any]] = {
    "fedprox": {"proximal_mu": 0.1},
    "bulyan": {"num_malicious_nodes": 0},
    "krum": {"num_malicious_nodes": 0},
    "multikrum": {"num_malicious_nodes": 0, "num_nodes_to_select": 3},
}


@pytest.fixture(autouse=True)
def _in_a_run() -> None:
    """Messages carry the run and node that they come from, which Flower's executor sets."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


class _Nodes:
    def get_node_ids(self) -> list[int]:
        return [1, 2, 3]


def _play(name: str, values: list[float], examples: list[int]) -> np.ndarray:
    strategy = make_strategy(name, PARAMETERS.get(name, {}))
    start = ArrayRecord({"weights": Array(np.zeros(4, np.float32))})
    messages = list(strategy.configure_train(1, start, ConfigRecord({}), _Nodes()))
    assert {m.metadata.dst_node_id for m in messages} == {1, 2, 3}
    replies = []
    for message, value, count in zip(messages, values, examples, strict=True):
        message.metadata.__dict__["_message_id"] = "x"
        content = RecordDict(
            {
                "arrays": ArrayRecord({"weights": Array(np.full(4, value, np.float32))}),
                "metrics": MetricRecord({"num-examples": count, "train-loss": 1.0}),
            }
        )
        replies.append(Message(content, reply_to=message))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return np.asarray(arrays["weights"].numpy())


def test_fedavg_weighs_by_examples() -> None:
    result = _play("fedavg", [1.0, 2.0, 4.0], [100, 100, 200])
    np.testing.assert_allclose(result, 2.75)


def test_fedmedian_ignores_the_outlier() -> None:
    np.testing.assert_allclose(_play("fedmedian", [1.0, 2.0, 400.0], [1, 1, 1]), 2.0)


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"bulyan", "qfedavg"}))
def test_each_aggregates_a_flat_array(name: str) -> None:
    result = _play(name, [1.0, 1.0, 1.0], [10, 10, 10])
    assert result.shape == (4,)
    assert np.isfinite(result).all()
    assert (result > 0).all()


def test_an_unknown_strategy_is_named_with_the_known_ones() -> None:
    with pytest.raises(StrategyError, match=r"'fedbest'.*fedavg"):
        make_strategy("fedbest", {})


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(StrategyError, match="fedavg has no speed"):
        make_strategy("fedavg", {"speed": 1})
