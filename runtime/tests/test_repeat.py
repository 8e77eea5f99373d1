"""A run is played again, bit for bit, and run.yml says when that is not so."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from line import described, learn, weights
from link import Node
from played import Played, fedavg, start

from flowerbed.strategies import make_strategy


def nodes(*delays: float) -> dict[int, Node]:
    """Four devices whose replies take these seconds in each round."""
    return {n: Node(learn, delays=[delay] * 9) for n, delay in enumerate(delays, 1)}


Again = Callable[..., Played]


@pytest.fixture
def again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Again:
    """Play a run of four rounds in a directory of its own."""

    def play(name: str, devices: dict[int, Node], strategy: FedAvg, **settings: Any) -> Played:
        (tmp_path / name).mkdir()
        initial = {"w": np.full(3, 0.1, np.float32)}
        main = start(strategy, initial=initial, num_rounds=4)
        played = Played(tmp_path / name, devices, main, monkeypatch, **settings)
        played.play()
        return played

    return play


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_fedavg_repeats_bit_for_bit_in_whatever_order_replies_come(
    again: Again, share: float
) -> None:
    """Flower's own class, which samples by itself."""
    options = {"fraction_train": share, "fraction_evaluate": 0.0}
    first = again("first", nodes(0.0, 0.1, 0.2, 0.3), fedavg(**options))
    second = again("second", nodes(0.3, 0.2, 0.1, 0.0), fedavg(**options))
    assert weights(first) == weights(second)
    assert [row["devices"] for row in first.rows("rounds.csv")] == [str(int(4 * share))] * 4
    chosen = [[(r["round"], r["device"]) for r in p.rows("devices.csv")] for p in (first, second)]
    assert sorted(chosen[0]) == sorted(chosen[1])
    assert described(first)["repeatable"] == {"bitwise": True, "because": []}
    other = again("other", nodes(0.0, 0.0, 0.0, 0.0), fedavg(**options), seed=1)
    assert (weights(other) == weights(first)) == (share == 1.0)


def test_the_order_of_a_sum_would_be_seen() -> None:
    """The check above would notice it: these models have another sum in another order."""
    values = np.array([1e8, 1.0, -1e8], np.float32)
    assert np.float32(sum(values)) != np.float32(sum(values[[0, 2, 1]]))


@pytest.mark.parametrize(
    ("name", "parameters", "reason"),
    [
        ("paced", {"box": 1.0}, "devices train for a time"),
        ("fedbuff", {"buffer_size": 2}, "the order in which replies arrive"),
        ("tifl", {}, "devices are selected by the time"),
        ("oort", {}, "devices are selected by the time"),
    ],
)
def test_strategies_that_do_not_repeat_say_why(
    again: Again, name: str, parameters: dict[str, Any], reason: str
) -> None:
    told = described(again("run", nodes(0, 0, 0, 0), make_strategy(name, parameters)))
    assert told["repeatable"]["bitwise"] is False
    assert any(text.startswith(reason) for text in told["repeatable"]["because"])


def test_threads_lost_replies_and_limits_are_named(again: Again) -> None:
    devices = nodes(0, 0, 0, 0)
    devices[2].threads = 2

    def failing(message: Message, config: Mapping[str, Any]) -> RecordDict:
        reply = learn(message, config)
        if message.metadata.group_id == "2":
            reply["arrays"]["w"] = Array(np.full(3, math.nan, np.float32))
        return reply

    def boxed(message: Message, config: Mapping[str, Any]) -> RecordDict:
        reply = learn(message, config)
        reply["metrics"]["partial"] = 1
        return reply

    devices[3].client, devices[4].client = failing, boxed
    found = described(again("run", devices, fedavg(fraction_evaluate=0.0)))["repeatable"]["because"]
    assert sorted(found) == [
        "a reply was lost (diverged): d3",
        "a time limit ends the training",
        "sums of several threads have no fixed order: d2",
    ]
