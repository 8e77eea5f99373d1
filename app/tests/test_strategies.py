"""Strategies on one flat array, as the run uses them, and ours against worked examples."""

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from flowerbed.config import DeviceSettings
from flowerbed.fleet import Available, Device, Flight, Reply, Times
from flowerbed.strategies import STRATEGIES, StrategyError, make_strategy
from flowerbed.strategies.fedbuff import buffered_update
from flowerbed.strategies.oort import Oort, utility
from flowerbed.strategies.paced import Paced, normalised_mean
from flowerbed.strategies.pacing import Pacing
from flowerbed.strategies.tifl import TiFL, tiers_of

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
    """What there is of a grid when nobody is reached through it."""


def _device(node: int, speed: float = 10.0, examples: int = 100, receive: float = 2.0) -> Device:
    settings = DeviceSettings(device=f"d{node}", device_class="c", machine="m")
    return Device(node, settings, "", examples, (), speed, receive)


def _reply(
    device: Device, train: float, overhead: float, *, examples: int = 100, rms: float = 1.0
) -> Reply:
    """An answer in round 1 that came after both times together."""
    content = RecordDict({"arrays": ArrayRecord({"weights": Array(np.zeros(4, np.float32))})})
    return Reply(
        Flight(device, 1, 0.0, 600.0),
        "completed",
        train + overhead,
        metrics={"num-examples": examples, "train-loss-rms": rms},
        times=Times(train_seconds=train),
        message=Message(content, device.node_id, "train"),
    )


def _play(
    name: str,
    values: list[float],
    examples: list[int],
    steps: tuple[float, ...] = (5.0, 5.0, 5.0),
    **parameters: Any,
) -> np.ndarray:
    strategy = make_strategy(name, PARAMETERS.get(name, {}) | parameters)
    start = ArrayRecord({"weights": Array(np.zeros(4, np.float32))})
    if isinstance(strategy, Pacing):
        strategy.begin(np.ones(4, np.bool_), seed=1)
    grid = Available(_Nodes(), [_device(node) for node in (1, 2, 3)])
    config = ConfigRecord({"time-limit": 60.0})
    messages = list(strategy.configure_train(1, start, config, grid))
    asked = {m.metadata.dst_node_id for m in messages}
    assert asked <= {1, 2, 3} if name in ("oort", "tifl") else asked == {1, 2, 3}
    replies = []
    for message, value, count, taken in zip(messages, values, examples, steps, strict=False):
        message.metadata.__dict__["_message_id"] = "x"
        message.metadata.group_id = "1"
        metrics = {"num-examples": count, "train-loss": 1.0, "effective-steps": taken}
        content = RecordDict(
            {
                "arrays": ArrayRecord({"weights": Array(np.full(4, value, np.float32))}),
                "metrics": MetricRecord(metrics),
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


def test_a_parameter_out_of_its_range_is_named() -> None:
    with pytest.raises(StrategyError, match="paced: share = 2: write a number above 0"):
        make_strategy("paced", {"share": 2})


# --- paced ---------------------------------------------------------------------------------------


def test_normalised_mean_is_fednovas() -> None:
    """Two devices: 40 examples in 4 steps to 4 and 10 in 1 step to -2; weights from 1.

    Shares 0.8 and 0.2, 3.4 effective steps, mean update a step 0.8 * 3/4 - 0.2 * 3 = 0. With the
    second at 2: 0.8 * 3/4 + 0.2 * 1 = 0.8, times 3.4. The statistic is the mean by examples.
    """
    start = np.array([1.0, 1.0, 1.0])
    models = np.array([[4.0, 4.0, 4.0], [-2.0, 2.0, 2.0]])
    trainable = np.array([True, True, False])
    result = normalised_mean(start, models, np.array([40, 10]), np.array([4, 1]), trainable)
    np.testing.assert_allclose(result, [1.0, 1 + 3.4 * 0.8, 0.8 * 4 + 0.2 * 2])


def test_equal_steps_make_fedavg_of_it(rng: np.random.Generator) -> None:
    start, models = rng.normal(size=6), rng.normal(size=(3, 6))
    examples, everywhere = np.array([10, 20, 70]), np.ones(6, np.bool_)
    result = normalised_mean(start, models, examples, np.full(3, 9), everywhere)
    np.testing.assert_allclose(result, np.average(models, axis=0, weights=examples))


@pytest.mark.parametrize(("asked", "expected"), [({"normalise": True}, 7 / 3), ({}, 2.5)])
def test_the_correction_is_made_if_asked(asked: dict[str, bool], expected: float) -> None:
    """Half of the examples in 6 steps to 4, half in 2 steps each to 1.

    A half of 4/6 and of 1/2 a step, times 4 effective steps: 7/12 * 4 = 7/3.
    """
    result = _play("paced", [4.0, 1.0, 1.0], [200, 100, 100], (6, 2, 2), **asked)
    np.testing.assert_allclose(result, expected)


def test_variances_stay_positive(rng: np.random.Generator) -> None:
    """Where the plain correction would take them below zero."""
    start, models = np.array([5.0]), np.array([[0.1], [0.1]])
    examples, steps = np.array([1, 99]), np.array([1, 99])
    everywhere = np.array([True])
    assert normalised_mean(start, models, examples, steps, everywhere)[0] < 0
    assert normalised_mean(start, models, examples, steps, ~everywhere)[0] > 0


def test_the_box_lets_a_share_finish_an_epoch_and_answers_come_together() -> None:
    """100 images at 10, 5 and 1 a second, with 2, 4 and 6 s for the rest: 12, 24 and 106 s."""
    strategy = Paced(share=0.6, grace=7)
    devices = [_device(1, 10), _device(2, 5), _device(3, 1)]
    for device, overhead in zip(devices, (2, 4, 6), strict=True):
        seconds = 100 / device.examples_per_second
        strategy.observe(_reply(device, seconds, overhead))
    assert strategy.select(devices, longest=540) == devices
    assert strategy.patience() == pytest.approx(24 + 7)
    limits = [strategy.task(device)["time-limit"] for device in devices]
    assert limits == pytest.approx([22, 20, 18])
    strategy.select(devices, longest=10)
    assert strategy.patience() == pytest.approx(17)


def test_a_fixed_box_is_kept() -> None:
    strategy = Paced(box=30, grace=5, proximal_mu=0.1)
    strategy.select([_device(1)], longest=540)
    assert strategy.patience() == 35
    assert strategy.task(_device(1)) == {"time-limit": 26, "fill-time": True, "proximal-mu": 0.1}
    # One that a question takes long to reach is not given more than it can answer in time.
    assert strategy.task(_device(1, receive=12.0))["time-limit"] == 16


# --- the others ----------------------------------------------------------------------------------


def test_tiers_are_of_equal_size_and_the_fastest_first() -> None:
    seconds = {"a": 9.0, "b": 1.0, "c": 5.0, "d": 7.0, "e": 3.0}
    assert tiers_of(seconds, 2) == [["b", "e", "c"], ["d", "a"]]
    assert tiers_of({"a": 1.0}, 3) == [["a"]]


def test_a_round_asks_one_tier() -> None:
    strategy = TiFL(tiers=2, probabilities=[1, 3])
    strategy.begin(np.ones(1, np.bool_), seed=1)
    devices = [_device(node, speed) for node, speed in enumerate((10, 1, 9, 2), 1)]
    asked = [tuple(d.name for d in strategy.select(devices, 60)) for _ in range(400)]
    assert set(asked) == {("d1", "d3"), ("d2", "d4")}
    assert asked.count(("d2", "d4")) == pytest.approx(300, abs=40)


def test_utility_is_oorts() -> None:
    """100 examples with losses of 3 and 4 by halves; 20 s where 10 are preferred."""
    statistical = 100 * math.sqrt((9 + 16) / 2)
    told: dict[str, Any] = {"since": 2, "server_round": 5, "preferred": 10.0, "penalty": 2.0}
    uncertain = math.sqrt(0.1 * math.log(5) / 2)
    assert utility(statistical, seconds=10, **told) == pytest.approx(statistical + uncertain)
    assert utility(statistical, seconds=20, **told) == pytest.approx((statistical + uncertain) / 4)


def test_oort_prefers_what_is_worth_most_in_its_time() -> None:
    strategy = Oort(fraction=0.25, quantile=0.5)
    strategy.begin(np.ones(1, np.bool_), seed=1)
    devices = [_device(node) for node in (1, 2, 3, 4)]
    strategy.select(devices, 60)
    # d4 has the highest losses, but is ten times slower.
    for device, rms, train in zip(devices, (1, 2, 1, 3), (10, 10, 10, 100), strict=True):
        strategy.observe(_reply(device, train, 0, rms=rms))
    assert {d.name for _ in range(20) for d in strategy.select(devices, 60)} == {"d2"}


def test_oort_explores_what_it_does_not_know() -> None:
    strategy = Oort(fraction=0.5)
    strategy.begin(np.ones(1, np.bool_), seed=1)
    devices = [_device(node) for node in (1, 2, 3, 4)]
    for device in devices[:2]:
        strategy.observe(_reply(device, 10, 0))
    assert [d.name for d in strategy.select(devices, 60)] == ["d3", "d4"]


def test_buffered_updates_count_less_the_staler_they_are() -> None:
    """Weights at 10; updates of +2 from the newest and +4 from 3 versions before: 10 + (2 + 2)/2.

    The statistic goes from 10 towards 3 by a half and towards 6 by a quarter.
    """
    result = buffered_update(
        np.array([10.0, 10.0]),
        starts=np.array([[10.0, 10.0], [1.0, 1.0]]),
        models=np.array([[12.0, 3.0], [5.0, 6.0]]),
        staleness=np.array([0, 3]),
        trainable=np.array([True, False]),
    )
    np.testing.assert_allclose(result, [12.0, 10 - 7 / 2 - 4 / 4])
