"""The run's rounds over a link in memory, with devices that train for real and answer when told."""

import csv
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.task_identity import TaskIdentity

from flowerbed.config import DeviceSettings, RunSettings, Task
from flowerbed.data import load_shard
from flowerbed.fleet import is_available
from flowerbed.results import Recorder
from flowerbed.server_app import RoundError, Run
from flowerbed.strategies import make_strategy
from flowerbed.trainer import Trainer

BATCH = 16


def _device(node: int, availability: float) -> DeviceSettings:
    return DeviceSettings(
        device=f"d{node}",
        device_class="c",
        machine="m",
        batch_size=BATCH,
        learning_rate=0.001,
        availability=availability,
    )


class _Link(Grid):
    """Nodes 1 to n, each a device on a shard; `delays` seconds pass before each answer."""

    def __init__(self, shard: Path, delays: dict[int, list[float]]) -> None:
        self.delays = delays
        self.availability = 1.0
        self.refusals = 0
        """Times that messages are not taken."""
        self.look = 0.0
        """Seconds that a look for answers takes while devices train."""
        self.lost: set[int] = set()
        """Nodes that connect anew once they have been asked to train."""
        self.trainer = Trainer(load_shard(shard))
        self.asked: list[tuple[int, int]] = []
        self._replies: dict[str, tuple[float, Message]] = {}
        self._sent = 0

    def get_node_ids(self) -> list[int]:
        return list(self.delays)

    def get_nodes(self) -> list[NodeInfo]:
        lost = {node for _, node in self.asked if node in self.lost}
        return [
            NodeInfo(node_id=node, last_activated_at="later" if node in lost else "at first")
            for node in self.delays
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        if self.refusals:
            self.refusals -= 1
            raise ObjectPushError("object", 1, "session")
        ids = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)
            due, reply = self._answer(message)
            self._replies[str(self._sent)] = due, reply
            ids.append(str(self._sent))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        if self.asked:
            time.sleep(self.look)
        now = time.monotonic()
        ready = [m for m in message_ids if m in self._replies and self._replies[m][0] <= now]
        return [self._replies.pop(m)[1] for m in ready]

    def _answer(self, message: Message) -> tuple[float, Message]:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        task = Task.parse(dict(message.content["config"]))
        device = _device(node, self.availability)
        delay, data = 0.0, b""
        if kind == "query":
            answer = self.trainer.prepare(task, device)
        else:
            weights = message.content["arrays"]["weights"].numpy()
            if kind == "train":
                self.asked.append((task.server_round, node))
                delays = self.delays[node]
                delay = delays.pop(0) if delays else 0.0
                # The time box is the learner's to keep, and tested there.
                quick = task.model_copy(update={"time_limit": 1e-9})
                answer, data = self.trainer.train(quick, device, weights)
            else:
                answer = self.trainer.evaluate(task, device, weights)
        content = RecordDict({"metrics": MetricRecord(answer["metrics"])})
        content["outcome"] = ConfigRecord(
            {"outcome": answer["outcome"], "reason": "", "started": time.time()}
        )
        if kind == "query":
            told = {
                "settings": device.model_dump_json(),
                "shard": answer["shard"],
                "labels": answer["labels"],
            }
            content["device"] = ConfigRecord(told)
        if data:
            vector = np.frombuffer(data, np.float32)
            content["arrays"] = ArrayRecord({"weights": Array(vector)})
        return time.monotonic() + delay, Message(content, reply_to=message)


# What is not defined above, the run does not need.
_Link.__abstractmethods__ = frozenset()


@pytest.fixture(autouse=True)
def _in_a_run() -> None:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def _play(
    root: Path,
    shards: Path,
    delays: dict[int, list[float]],
    strategy: str,
    *,
    rounds: int = 3,
    timeout: float = 20.0,
    lost: Iterable[int] = (),
    availability: float = 1.0,
    refusals: int = 0,
    look: float = 0.0,
    **parameters: Any,
) -> tuple[_Link, list[dict[str, str]], list[dict[str, str]]]:
    """Play a run; the link, and the rows of rounds.csv and devices.csv."""
    settings = RunSettings(
        run_name="run",
        devices=tuple(f"d{node}" for node in delays),
        num_server_rounds=rounds,
        strategy=strategy,
        strategy_parameters=parameters,
        seed=1,
        model="linear",
        round_timeout=timeout,
        device_wait=20,
    )
    link = _Link(shards / "devices" / "phone", delays)
    link.lost.update(lost)
    link.availability, link.refusals, link.look = availability, refusals, look
    recorder = Recorder("run", rounds, timeout, root)
    test = load_shard(shards / "test" / "shard")
    Run(settings, make_strategy(strategy, parameters), link, recorder, test).play()

    def rows(file: str) -> list[dict[str, str]]:
        with (root / "run" / file).open() as lines:
            return list(csv.DictReader(lines))

    return link, rows("rounds.csv"), rows("devices.csv")


def _check_books(link: _Link, rounds: list[dict[str, str]], devices: list[dict[str, str]]) -> None:
    """Every message has one row, and what counts is what was aggregated."""
    asked = [row for row in devices if row["outcome"] != "unavailable"]
    told = sorted((int(row["round"]), int(row["device"][1:])) for row in asked)
    assert told == sorted(link.asked)
    for row in rounds:
        counted = [r for r in devices if r["aggregated"] == row["round"]]
        assert int(row["examples"]) == sum(int(r["examples"]) for r in counted)
        assert int(row["devices"]) == len(counted)


def test_a_late_answer_neither_blocks_nor_corrupts(tmp_path: Path, shards: Path) -> None:
    """d2's first answer takes 3 s, in rounds of 1 s and half a second of grace."""
    link, rounds, devices = _play(
        tmp_path, shards, {1: [0.8] * 9, 2: [3.2]}, "paced", rounds=5, box=1.0, grace=0.5
    )
    _check_books(link, rounds, devices)
    (late,) = (row for row in devices if row["outcome"] == "late")
    assert (late["device"], late["round"], late["aggregated"]) == ("d2", "1", "")
    assert int(late["examples"]) == BATCH
    assert late["reason"].startswith("answered in round ")
    assert all(float(row["devices_seconds"]) < 1.5 + 0.5 for row in rounds)
    # It is asked again when it has answered, and not before.
    assert (2, 2) not in link.asked
    assert [node for number, node in link.asked if number == 5] == [1, 2]
    assert (rounds[0]["failed"], rounds[0]["slowest_device"]) == ("1", "d2")
    assert rounds[-1]["failed"] == "0"


def test_what_is_under_way_when_the_run_ends_is_late(tmp_path: Path, shards: Path) -> None:
    link, rounds, devices = _play(
        tmp_path, shards, {1: [], 2: [60.0]}, "paced", rounds=1, box=0.5, grace=0.5
    )
    _check_books(link, rounds, devices)
    assert [(row["device"], row["outcome"]) for row in devices][-1] == ("d2", "late")


def test_a_round_is_over_when_its_time_is_up_in_the_middle_of_a_look(
    tmp_path: Path, shards: Path
) -> None:
    """Looks begin after 0 and 1.4 s, and 1.5 s are there."""
    _, rounds, _ = _play(
        tmp_path, shards, {1: [], 2: [60.0]}, "paced", rounds=1, look=0.9, box=1.0, grace=0.5
    )
    assert 2.3 <= float(rounds[0]["devices_seconds"]) < 2.8


def test_flowers_strategies_wait_for_all_until_the_timeout(tmp_path: Path, shards: Path) -> None:
    link, rounds, devices = _play(
        tmp_path, shards, {1: [], 2: [1.5, 60.0]}, "fedavg", rounds=2, timeout=3.0
    )
    _check_books(link, rounds, devices)
    assert [(r["device"], r["outcome"]) for r in devices if r["round"] == "2"] == [
        ("d1", "partial"),
        ("d2", "timeout"),
    ]
    waited = next(r for r in devices if (r["device"], r["round"]) == ("d1", "1"))
    assert 1.0 < float(waited["wait_seconds"]) < 2.5


def test_a_device_that_has_connected_anew_is_not_waited_for(tmp_path: Path, shards: Path) -> None:
    link, rounds, devices = _play(
        tmp_path, shards, {1: [], 2: [60.0]}, "fedavg", rounds=2, timeout=30.0, lost=[2]
    )
    _check_books(link, rounds, devices)
    assert [(r["device"], r["outcome"]) for r in devices if r["round"] == "1"] == [
        ("d1", "partial"),
        ("d2", "offline"),
    ]
    assert float(rounds[0]["devices_seconds"]) < 10
    assert (2, 2) in link.asked


def test_a_run_that_nobody_answers_fails(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(RoundError, match=r"round 1: no device returned a model \(d1: timeout"):
        _play(tmp_path, shards, {1: [60.0]}, "fedavg", timeout=1.0)


def test_nobody_waits_for_a_slow_device_in_a_buffer(tmp_path: Path, shards: Path) -> None:
    """d1 answers at once, again and again; d2's stale answer counts when it comes."""
    link, rounds, devices = _play(
        tmp_path, shards, {1: [], 2: [1.2]}, "fedbuff", rounds=5, buffer_size=2
    )
    _check_books(link, rounds, devices)
    first = next(row for row in devices if (row["device"], row["round"]) == ("d2", "1"))
    assert first["outcome"] == "partial"
    assert int(first["aggregated"]) > 1
    assert sum(row["device"] == "d1" and row["round"] == "1" for row in devices) == 2
    assert all(float(row["devices_seconds"]) < 2 for row in rounds)


@pytest.mark.parametrize(
    ("strategy", "parameters"),
    [
        ("fedavg", {}),
        ("fedadam", {}),
        ("fedbuff", {"buffer_size": 1}),
        ("oort", {}),
        ("paced", {"box": 1.0}),
        ("tifl", {"tiers": 1}),
    ],
)
def test_nobody_is_asked_who_is_not_available(
    tmp_path: Path, shards: Path, strategy: str, parameters: dict[str, Any]
) -> None:
    """Of the seed's eight rounds there is one in which nobody is; the run goes on after it."""
    there = {
        (number, node)
        for number in range(1, 9)
        for node in (1, 2)
        if is_available(_device(node, 0.5), 1, number)
    }
    assert {number for number, _ in there} < set(range(1, 9))
    link, rounds, devices = _play(
        tmp_path, shards, {1: [], 2: []}, strategy, rounds=8, availability=0.5, **parameters
    )
    _check_books(link, rounds, devices)
    assert len(rounds) == 8
    assert set(link.asked) <= there
    if strategy != "oort":  # which asks some of those that it may
        assert set(link.asked) == there
    away = {
        (int(row["round"]), int(row["device"][1:]))
        for row in devices
        if row["outcome"] == "unavailable"
    }
    assert away == {(number, node) for number in range(1, 9) for node in (1, 2)} - there
    assert {row["failed"] for row in rounds} == {"0"}


def test_rows_tell_of_batch_and_throttling(tmp_path: Path, shards: Path) -> None:
    _, _, devices = _play(tmp_path, shards, {1: [0.4]}, "fedavg", rounds=1)
    (row,) = devices
    assert int(row["batch_size"]) == BATCH
    assert 0 <= float(row["throttled_share"]) <= 1
    assert float(row["throttled_seconds"]) >= 0
    assert float(row["seconds"]) >= 0.4


def test_messages_that_are_not_taken_are_sent_again(tmp_path: Path, shards: Path) -> None:
    link, rounds, devices = _play(tmp_path, shards, {1: [], 2: []}, "fedavg", refusals=4)
    _check_books(link, rounds, devices)
    assert {row["outcome"] for row in devices} == {"partial"}
