"""The lab as a Grid: Flower's own strategies, and others, over devices that answer in memory."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from link import ClientFunction, Node
from played import Played, fedavg, start

from flowerbed import evaluate_beside
from flowerbed.provenance import DataMismatchError
from flowerbed.server.fleet import AppError, MissingDevicesError, is_available
from flowerbed.server.grid import LabGrid, RoundError
from flowerbed.server.metrics import StatusCollector
from flowerbed.settings import DeviceSettings
from flowerbed.strategies import make_strategy
from flowerbed.strategies.base import RoundPolicy

EXAMPLES = {1: 10, 2: 30, 3: 60}


def client(
    message: Message, config: Mapping[str, Any], *, examples: int = 10, step: float = 1.0
) -> RecordDict:
    """Add `step` to every weight; evaluate to the mean of the weights."""
    arrays = message.content.array_records["arrays"]
    weights = arrays["w"].numpy()
    metrics: dict[str, Any] = {"num-examples": examples}
    if message.metadata.message_type == "evaluate":
        metrics |= {"eval_acc": float(weights.mean()), "eval_loss": 1.0}
        return RecordDict({"metrics": MetricRecord(metrics)})
    metrics |= {"train_loss": 0.5, "train_acc": 0.25}
    trained = ArrayRecord({key: Array(a.numpy() + step) for key, a in arrays.items()})
    return RecordDict({"arrays": trained, "metrics": MetricRecord(metrics)})


def clients(**more: Any) -> dict[int, Node]:
    """Three devices with unequal numbers of examples."""

    def of(number: int) -> ClientFunction:
        return lambda message, config: client(message, config, examples=EXAMPLES[number], **more)

    return {number: Node(of(number)) for number in EXAMPLES}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Played]:
    """Makes a run over nodes; nothing is played yet."""

    def make(nodes: dict[int, Node], main: Any, **settings: Any) -> Played:
        return Played(tmp_path, nodes, main, monkeypatch, **settings)

    return make


def test_flowers_strategy_runs_unchanged_and_everything_is_recorded(lab: Any) -> None:
    seen = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(number)
        return MetricRecord({"accuracy": float(arrays["w"].numpy().mean()) / 10, "loss": 2.0})

    played = lab(clients(), start(fedavg(min_evaluate_nodes=1), evaluate_fn=evaluate))
    played.play()
    assert seen == [0, 1, 2]
    assert np.allclose(played.result.arrays["w"].numpy(), 2.0)
    rounds = played.rows("rounds.csv")
    assert [row["round"] for row in rounds] == ["1", "2"]
    assert [float(row["accuracy"]) for row in rounds] == [1.0, 2.0]
    assert [float(row["central_accuracy"]) for row in rounds] == [0.1, 0.2]
    assert [row["examples"] for row in rounds] == ["100", "100"]
    assert {row["devices"] for row in rounds} == {"3"}
    for row in rounds:
        parts = ("configure", "devices", "aggregate", "evaluate")
        assert sum(float(row[f"{part}_seconds"]) for part in parts) <= float(row["seconds"]) + 1e-6
    rows = played.rows("devices.csv")
    assert [(r["round"], r["type"]) for r in rows if r["device"] == "d1"] == [
        ("1", "train"),
        ("1", "evaluate"),
        ("2", "train"),
        ("2", "evaluate"),
    ]
    assert {r["aggregated"] for r in rows if r["type"] == "train"} == {"1", "2"}
    trained = next(r for r in rows if r["type"] == "train")
    assert (trained["train_loss"], trained["train_accuracy"]) == ("0.5", "0.25")
    assert json.loads(trained["metrics"])["num-examples"] == int(trained["examples"])
    assert trained["bytes_received"] == trained["bytes_sent"] == "152"
    status = played.status
    assert (status["state"], status["rounds"], status["settled"]) == ("completed", 2, 2)
    assert status["devices"]["d1"]["outcomes"] == {"completed": 2}
    assert sorted(played.link.goodbyes) == [1, 2, 3]
    assert {group for _, _, group in played.link.asked} == {"1", "2"}


def test_the_final_model_on_each_device_is_kept(lab: Any) -> None:
    """An app evaluates it after the last round, as the default app does."""
    train = start(fedavg(fraction_evaluate=0.0))

    def unequal(number: int) -> ClientFunction:
        def work(message: Message, config: Mapping[str, Any]) -> RecordDict:
            reply = client(message, config)
            if message.metadata.message_type == "evaluate":
                reply["metrics"]["eval_acc"] = number / 10
            return reply

        return work

    def main(grid: Grid, context: Context) -> None:
        train(grid, context)
        content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros((2, 3), np.float32))})})
        messages = [Message(content, node, "evaluate") for node in grid.get_node_ids()]
        assert len(list(grid.send_and_receive(messages, timeout=5))) == 3

    played = lab({number: Node(unequal(number)) for number in (1, 2, 3)}, main)
    played.play()
    rows = [row for row in played.rows("devices.csv") if row["type"] == "evaluate"]
    assert {row["device"]: row["accuracy"] for row in rows} == {
        "d1": "0.1",
        "d2": "0.2",
        "d3": "0.3",
    }
    assert {row["round"] for row in rows} == {"2"}
    assert {row["loss"] for row in rows} == {"1.0"}
    assert float(played.rows("rounds.csv")[-1]["accuracy"]) == pytest.approx(0.2)
    served = {family.name: family for family in StatusCollector(played.directory.parent).collect()}
    samples = served["flowerbed_device_accuracy"].samples
    assert {s.labels["device"]: s.value for s in samples} == {"d1": 0.1, "d2": 0.2, "d3": 0.3}


def test_an_evaluation_in_the_training_reply_is_that_of_the_round_before(lab: Any) -> None:
    def fused(message: Message, config: Mapping[str, Any]) -> RecordDict:
        reply = client(message, config)
        before = float(message.content["arrays"]["w"].numpy().mean())
        reply["metrics"]["eval-accuracy"] = before
        reply["metrics"]["eval-loss"] = 1.0
        return reply

    played = lab({1: Node(fused)}, start(fedavg(fraction_evaluate=0.0), num_rounds=3))
    played.play()
    assert [row["accuracy"] for row in played.rows("rounds.csv")] == ["1.0", "2.0", ""]
    rows = played.rows("devices.csv")
    assert [row["accuracy"] for row in rows] == ["0.0", "1.0", "2.0"]
    assert played.rows("rounds.csv")[0]["central_accuracy"] == ""


@pytest.mark.parametrize(
    ("bad", "outcome", "reason"),
    [
        ("nan", "diverged", "not finite"),
        ("loss", "diverged", "train_loss is nan"),
        ("shape", "error", "came back with shape (2,), and was sent with (2, 3)"),
        ("metrics", "error", "other metrics than those of 2 other devices"),
        ("keys", "error", "other arrays"),
        ("raise", "error", "ZeroDivisionError: on purpose"),
    ],
)
def test_a_bad_reply_is_an_outcome_and_not_the_end(
    lab: Any, bad: str, outcome: str, reason: str
) -> None:
    def misbehave(message: Message, config: Mapping[str, Any]) -> RecordDict:
        reply = client(message, config, examples=10)
        if message.metadata.group_id != "1" or message.metadata.message_type != "train":
            return reply
        if bad == "nan":
            reply["arrays"]["w"] = Array(np.full((2, 3), np.nan, np.float32))
        elif bad == "loss":
            reply["metrics"]["train_loss"] = math.nan
        elif bad == "shape":
            reply["arrays"]["w"] = Array(np.zeros(2, np.float32))
        elif bad == "metrics":
            del reply["metrics"]
        elif bad == "keys":
            reply["arrays"]["more"] = Array(np.zeros(2, np.float32))
        else:
            raise ZeroDivisionError("on purpose")
        return reply

    nodes = clients() | {1: Node(misbehave)}
    played = lab(nodes, start(fedavg(fraction_evaluate=0.0)))
    played.play()
    first, second = (
        next(r for r in played.rows("devices.csv") if r["device"] == "d1" and r["round"] == number)
        for number in ("1", "2")
    )
    assert first["outcome"] == outcome
    assert reason in first["reason"]
    assert first["aggregated"] == ""
    assert second["outcome"] == "completed"
    assert np.allclose(played.result.arrays["w"].numpy(), 2.0)
    rounds = played.rows("rounds.csv")
    assert [row["failed"] for row in rounds] == ["1", "0"]
    assert [row["examples"] for row in rounds] == ["90", "100"]
    json.loads((played.directory / "status.json").read_text(), parse_constant=pytest.fail)


def test_a_run_in_which_all_fail_at_first_shows_the_apps_traceback(lab: Any) -> None:
    def broken(message: Message, config: Mapping[str, Any]) -> RecordDict:
        raise KeyError("learning-rate")

    played = lab({1: Node(broken), 2: Node(broken)}, start(fedavg()))
    with pytest.raises(RoundError, match=r"(?s)d1: error KeyError.*Traceback: in the app"):
        played.play()


def test_an_aggregate_that_is_not_finite_leaves_nothing_behind(
    lab: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The momentum of the step that overflowed would make every later model infinite."""

    def far(message: Message, config: Mapping[str, Any]) -> RecordDict:
        reply = client(message, config)
        if message.metadata.group_id == "2":
            reply["arrays"]["w"] = Array(np.full((2, 3), 3e38, np.float32))
        return reply

    strategy = make_strategy("fedavgm", {"server_learning_rate": 2.0, "server_momentum": 0.5})
    played = lab({1: Node(far), 2: Node(far)}, start(strategy, num_rounds=4))
    played.play()
    assert "round 2: the aggregated model is not finite: it is dropped" in caplog.text
    assert [row["devices"] for row in played.rows("rounds.csv")] == ["2", "0", "2", "2"]
    # Steps of 1, as if the second round had not been: momenta 1, 1.5, 1.75, each twice.
    np.testing.assert_allclose(played.result.arrays["w"].numpy(), 2 * (1 + 1.5 + 1.75))


def test_a_later_round_in_which_all_fail_is_survived_once(lab: Any) -> None:
    def moody(message: Message, config: Mapping[str, Any]) -> RecordDict:
        if message.metadata.group_id in ("2", "4", "5"):
            raise ZeroDivisionError("on purpose")
        return client(message, config)

    strategy = fedavg(fraction_evaluate=0.0)
    played = lab({1: Node(moody)}, start(strategy, num_rounds=6))
    with pytest.raises(RoundError, match="round 5: no device returned a model"):
        played.play()
    rounds = played.rows("rounds.csv")
    assert [row["devices"] for row in rounds] == ["1", "0", "1", "0", "0"]


def test_an_app_that_cannot_be_loaded_is_told_at_once(lab: Any) -> None:
    trace = "Traceback\n  File 'app.py'\nModuleNotFoundError: No module named 'nope'"
    nodes = clients() | {2: Node(client, broken=trace)}
    played = lab(nodes, start(fedavg()), device_wait=60.0)
    started = time.monotonic()
    with pytest.raises(AppError, match=r"(?s)d2: ModuleNotFoundError.*File 'app.py'"):
        played.play()
    assert time.monotonic() - started < 10


def test_missing_devices_are_named(lab: Any) -> None:
    played = lab(clients(), start(fedavg()), devices=["d1", "d9"], device_wait=1.0)
    with pytest.raises(MissingDevicesError, match="not ready after 1 s: d9"):
        played.play()


ORIGIN = {
    "dataset": "digits",
    "asked": {"dataset": "digits", "partitioner": "iid", "seed": 42},
    "fingerprint": "abc",
    "revision": "",
}


def with_data(**origins: Any) -> dict[int, Node]:
    """Devices with data of one origin; keyword arguments are those of some (d2)."""
    nodes = clients()
    for number, node in nodes.items():
        node.shard = {"origin": origins.get(f"d{number}", ORIGIN), "labels": [5, 5]}
    return nodes


def asks(played: Played, **data: Any) -> None:
    """Have a run ask for data, as the control node writes it."""
    (played.directory / "lab.yml").write_text(yaml.safe_dump({"asked_data": data}))


def test_the_origin_of_the_data_is_in_the_results(lab: Any) -> None:
    played = lab(with_data(), start(fedavg()))
    asks(played, dataset="digits", seed="42")
    played.play()
    described = yaml.safe_load((played.directory / "run.yml").read_text())
    assert described["data"] == ORIGIN
    assert described["devices"]["d1"]["labels"] == [5, 5]
    assert played.status["data"] == {"dataset": "digits", "partitioner": ""}


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (ORIGIN | {"dataset": "cifar10"}, r"\(d1, d3: dataset digits; d2: dataset cifar10\)"),
        (
            ORIGIN | {"fingerprint": "xyz"},
            r"d1, d3: dataset digits, fingerprint abc; d2: dataset digits, fingerprint xyz",
        ),
        ({}, "d1, d3: dataset digits.*; d2: no data of the lab"),
    ],
)
def test_devices_with_data_of_another_origin_are_refused_by_name(
    lab: Any, other: dict[str, Any], text: str
) -> None:
    played = lab(with_data(d2=other), start(fedavg()))
    with pytest.raises(DataMismatchError, match=text + r".*`make lab`"):
        played.play()
    assert played.link.asked == []


def test_one_content_may_have_two_revisions(lab: Any) -> None:
    played = lab(with_data(d2=ORIGIN | {"revision": "later"}), start(fedavg()))
    played.play()
    assert played.rows("rounds.csv")[-1]["devices"] == "3"


def test_the_servers_data_must_be_of_the_same_origin(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = SimpleNamespace(origin=ORIGIN | {"dataset": "cifar10"}, fingerprint="f")
    monkeypatch.setattr("flowerbed.server.app.placed_data", lambda: test)
    with pytest.raises(DataMismatchError, match=r"d1, d2, d3: .*; the server: dataset cifar10"):
        lab(with_data(), start(fedavg())).play()


def test_a_run_that_asks_for_other_data_than_lie_there_is_refused(lab: Any) -> None:
    played = lab(with_data(), start(fedavg()))
    asks(played, partitioner="dirichlet", seed=42)
    text = r"training_partitioner is 'dirichlet' \(the data were dealt with 'iid'\)\. `make lab`"
    with pytest.raises(DataMismatchError, match=text):
        played.play()
    assert played.link.asked == []


def test_a_device_with_other_data_cannot_join_later(
    lab: Any, caplog: pytest.LogCaptureFixture
) -> None:
    late = Node(client, shard={"origin": ORIGIN | {"dataset": "cifar10"}})
    nodes = with_data()

    def joining(message: Message, config: Mapping[str, Any]) -> RecordDict:
        nodes[4] = late
        time.sleep(2.5)
        return client(message, config)

    nodes[1].client = joining
    played = lab(nodes, start(fedavg(), num_rounds=2))
    played.play()
    assert {node for node, *_ in played.link.asked} == {1, 2, 3}
    assert caplog.text.count("d4 cannot take part") == 1


def test_a_device_that_dies_while_it_gets_ready_is_asked_again(lab: Any) -> None:
    nodes = clients()
    nodes[2].deaths = 2
    played = lab(nodes, start(fedavg()), devices=["d1", "d2"], device_wait=60.0)
    played.play()
    assert played.rows("rounds.csv")[0]["devices"] == "3"


def test_the_server_does_not_wait_for_a_device_that_always_dies(lab: Any) -> None:
    nodes = clients()
    nodes[2].deaths = 1000
    played = lab(nodes, start(fedavg()), devices=["d1", "d2"], device_wait=60.0)
    started = time.monotonic()
    with pytest.raises(
        MissingDevicesError,
        match=r"not ready after 3 attempts: d2: the worker died: out_of_memory$",
    ):
        played.play()
    assert time.monotonic() - started < 20


def test_a_slow_device_is_timed_out_and_late(lab: Any) -> None:
    nodes = clients()
    nodes[3].delays = [3.0]
    strategy = fedavg(fraction_evaluate=0.0)
    played = lab(nodes, start(strategy, num_rounds=4, timeout=1.0), round_timeout=20.0)

    def slow(message: Message, config: Mapping[str, Any]) -> RecordDict:
        time.sleep(0.4)
        return client(message, config, examples=10)

    nodes[1].client = slow
    played.play()
    rows = [row for row in played.rows("devices.csv") if row["device"] == "d3"]
    assert next((row["round"], row["outcome"], row["aggregated"]) for row in rows) == (
        "1",
        "late",
        "",
    )
    # While it was at work, it was not asked.
    assert "2" not in {row["round"] for row in rows}
    assert played.rows("rounds.csv")[0]["slowest_device"] == "d3"


def test_a_message_whose_time_is_up_is_a_timeout(lab: Any) -> None:
    nodes = clients()
    nodes[2].delays = [60.0]
    played = lab(nodes, start(fedavg(fraction_evaluate=0.0)), round_timeout=1.0)
    played.play()
    first = next(row for row in played.rows("devices.csv") if row["device"] == "d2")
    assert (first["outcome"], first["reason"]) == ("timeout", "no reply in 1 s")


def test_a_device_that_connects_anew_is_offline_once(lab: Any) -> None:
    played = lab(clients(), start(fedavg(fraction_evaluate=0.0), num_rounds=3))
    played.link.lost = {2}
    played.play()
    rows = [row for row in played.rows("devices.csv") if row["device"] == "d2"]
    assert rows[0]["outcome"] == "offline"
    assert rows[-1]["outcome"] == "completed"


def test_all_devices_offline_at_once_do_not_end_the_run(lab: Any) -> None:
    strategy = fedavg(fraction_evaluate=0.0)
    played = lab(clients(), start(strategy, num_rounds=3))
    played.link.lost = {1, 2, 3}
    played.play()
    assert [row["devices"] for row in played.rows("rounds.csv")] == ["0", "3", "3"]


def test_a_superlink_that_stands_still_is_waited_for(
    lab: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Flower itself gives up where a TLS handshake times out."""
    monkeypatch.setattr("flowerbed.server.fleet._RECONNECT", 0.05)
    monkeypatch.setattr("flowerbed.server.fleet._NODE_INTERVAL", 0.1)
    played = lab(clients(), start(fedavg(fraction_evaluate=0.0), num_rounds=3))
    calls = ("get_nodes", "push_messages", "pull_messages")

    def stand_still(message: Message, config: Mapping[str, Any]) -> RecordDict:
        if message.metadata.group_id == "2":
            played.link.unreachable = dict.fromkeys(calls, 3)
        return client(message, config)

    played.link.nodes[3].client = stand_still
    played.link.nodes[3].delays = [0.0, 0.5]
    played.play()
    assert not any(played.link.unreachable.values())
    assert [row["devices"] for row in played.rows("rounds.csv")] == ["3", "3", "3"]
    assert caplog.text.count("the SuperLink does not answer") == 9
    assert played.status["state"] == "completed"


def test_a_superlink_that_does_not_come_back_ends_the_run(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowerbed.server.fleet._RECONNECT", 0.05)
    monkeypatch.setattr("flowerbed.server.fleet._PATIENCE", 0.3)
    played = lab(clients(), start(fedavg(fraction_evaluate=0.0)))
    played.link.unreachable = {"push_messages": 1000}
    with pytest.raises(httpx.ConnectTimeout):
        played.play()


def test_a_device_that_joins_in_the_last_round_takes_part_in_what_follows(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowerbed.server.fleet._NODE_INTERVAL", 0.1)
    train, nodes = start(fedavg(fraction_evaluate=0.0), num_rounds=2), clients()

    def joining(message: Message, config: Mapping[str, Any]) -> RecordDict:
        if message.metadata.group_id == "2":
            nodes[4] = Node(client)
        return client(message, config)

    def main(grid: Grid, context: Context) -> None:
        train(grid, context)
        content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros((2, 3), np.float32))})})
        messages = [Message(content, node, "evaluate") for node in grid.get_node_ids()]
        assert len(list(grid.send_and_receive(messages, timeout=5))) == 4

    nodes[1].client, nodes[1].delays = joining, [0.0, 1.0]
    played = lab(nodes, main, devices=["d1", "d2", "d3"])
    played.play()
    assert played.status["state"] == "completed"
    rows = [
        (row["round"], row["type"], row["outcome"])
        for row in played.rows("devices.csv")
        if row["device"] == "d4"
    ]
    assert rows == [("2", "evaluate", "completed")]


def test_the_books_of_a_run_that_dies_are_complete(lab: Any) -> None:
    """Each message has its row, those that nobody waits for any more included."""

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        if number == 1:
            raise ValueError("no such file")
        return None

    nodes = clients()
    nodes[3].delays = [9.0]
    strategy = fedavg(fraction_evaluate=0.0)
    played = lab(nodes, start(strategy, evaluate_fn=evaluate), round_timeout=1.0)
    with pytest.raises(ValueError, match="no such file"):
        played.play()
    outcomes = {row["device"]: row["outcome"] for row in played.rows("devices.csv")}
    assert outcomes.pop("d3") in ("late", "timeout")
    assert outcomes == {"d1": "completed", "d2": "completed"}
    assert [row["devices"] for row in played.rows("rounds.csv")] == ["2"]
    assert yaml.safe_load((played.directory / "run.yml").read_text())["repeatable"]["because"]


def test_a_device_is_told_how_long_its_replies_take(lab: Any) -> None:
    nodes = clients()
    nodes[2].transit = 0.8
    played = lab(nodes, start(fedavg(fraction_evaluate=0.0), num_rounds=3))
    played.play()
    told = {
        number: [s for node, s in played.link.reply_seconds if node == number] for number in nodes
    }
    assert told[2][0] == 0.0  # nothing is known yet
    assert all(0.7 < seconds < 1.5 for seconds in told[2][1:])
    assert all(seconds < 0.7 for seconds in told[1])


def test_messages_that_flower_does_not_take_are_sent_again(lab: Any) -> None:
    played = lab(clients(), start(fedavg(fraction_evaluate=0.0)))
    played.link.refusals = 2
    played.play()
    assert {row["outcome"] for row in played.rows("devices.csv")} == {"completed"}


def _draws(availability: float, rounds: int) -> list[bool]:
    device = DeviceSettings(device="d2", device_class="c", machine="m", availability=availability)
    return [is_available(device, 42, number) for number in range(1, rounds + 1)]


def test_unavailable_devices_are_not_asked_and_recorded(lab: Any) -> None:
    nodes = clients()
    nodes[2].availability = 0.5
    played = lab(nodes, start(fedavg(fraction_evaluate=0.0), num_rounds=6))
    played.play()
    outcomes = [r["outcome"] for r in played.rows("devices.csv") if r["device"] == "d2"]
    assert [outcome == "completed" for outcome in outcomes] == _draws(0.5, 6)
    assert set(outcomes) == {"completed", "unavailable"}


def test_a_round_for_which_nobody_is_available_is_drawn_anew(lab: Any) -> None:
    nodes = {2: Node(client, availability=0.2)}
    played = lab(nodes, start(fedavg(fraction_evaluate=0.0), num_rounds=3))
    played.play()
    assert False in _draws(0.2, 3)
    assert [row["devices"] for row in played.rows("rounds.csv")] == ["1", "1", "1"]


def test_a_strategy_that_wants_more_devices_than_there_are_is_ended(lab: Any) -> None:
    strategy = FedAvg(min_train_nodes=5, min_available_nodes=5)
    played = lab(clients(), start(strategy), device_wait=2.0, round_timeout=1.0)
    with pytest.raises(RoundError, match=r"online: d1, d2, d3.*min_available_nodes"):
        played.play()


def test_central_evaluation_beside_the_next_round(lab: Any) -> None:
    threads = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        threads.append(threading.current_thread().name)
        time.sleep(0.6)
        return MetricRecord({"accuracy": float(arrays["w"].numpy().mean()), "loss": 1.0})

    strategy = fedavg(fraction_evaluate=0.0)
    played = lab(clients(), start(strategy, num_rounds=3, evaluate_fn=evaluate_beside(evaluate)))
    played.play()
    assert all(name.startswith("evaluation") for name in threads)
    rounds = played.rows("rounds.csv")
    assert [row["central_accuracy"] for row in rounds] == ["1.0", "2.0", "3.0"]
    assert [float(row["evaluate_seconds"]) for row in rounds] == [0.0, 0.0, 0.0]
    assert sorted(played.result.evaluate_metrics_serverapp) == [0, 1, 2, 3]
    assert played.status["settled"] == 3


class FirstTwo(RoundPolicy, FedAvg):
    """A user's strategy that waits for two replies."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        self.seen: list[str] = []

    def is_over(self, replies: int, pending: int) -> bool:
        return replies >= 2 or not pending

    def observe(self, reply: Any) -> None:
        self.seen.append(f"{reply.device.name} {reply.outcome}")


def test_a_users_policy_ends_rounds(lab: Any) -> None:
    nodes = clients()
    nodes[3].delays = [0.5]
    strategy = FirstTwo()
    played = lab(nodes, start(strategy, num_rounds=4))

    def slow(message: Message, config: Mapping[str, Any]) -> RecordDict:
        time.sleep(0.2)
        return client(message, config)

    nodes[1].client = slow
    played.play()
    assert played.rows("rounds.csv")[0]["devices"] == "2"
    assert "d3 late" in strategy.seen
    assert np.allclose(played.result.arrays["w"].numpy(), 4.0)


class Buffered(RoundPolicy, FedAvg):
    """Asks each device again as soon as it has replied, and ends a round with two replies."""

    asynchronous = True

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        self.record = RecordDict()
        self.attempts = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.record = RecordDict({"arrays": arrays, "config": config})
        return list(super().configure_train(server_round, arrays, config, grid))

    def is_over(self, replies: int, pending: int) -> bool:
        return replies >= 2 or not pending

    def more(self, devices: Sequence[Any]) -> Iterable[Message]:
        self.attempts += len(devices)
        return [Message(self.record, device.node_id, MessageType.TRAIN) for device in devices]


def test_an_asynchronous_strategy_uses_replies_of_earlier_rounds(lab: Any) -> None:
    nodes = clients()
    for number, delay in ((1, 0.3), (2, 0.3), (3, 1.1)):
        nodes[number].delays = [delay] * 20
    strategy = Buffered()
    played = lab(nodes, start(strategy, num_rounds=5))
    played.play()
    rounds = played.rows("rounds.csv")
    assert all(int(row["devices"]) >= 2 for row in rounds)
    slow = [row for row in played.rows("devices.csv") if row["device"] == "d3"]
    assert slow[0]["round"] == "1"
    assert int(slow[0]["aggregated"]) > 1
    for row in rounds:
        counted = [r for r in played.rows("devices.csv") if r["aggregated"] == row["round"]]
        assert int(row["examples"]) == sum(int(r["examples"]) for r in counted)


def test_replies_are_in_the_order_of_names_and_not_of_arrival(lab: Any) -> None:
    orders = []

    class Watching(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            orders.append([reply.metadata.src_node_id for reply in replies])
            return super().aggregate_train(server_round, replies)

    nodes = clients()
    nodes[1].delays = [0.8, 0.0]
    nodes[2].delays = [0.0, 0.8]
    strategy = Watching(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    lab(nodes, start(strategy)).play()
    assert orders == [[1, 2, 3], [1, 2, 3]]


def test_an_app_with_a_loop_of_its_own_and_named_messages(lab: Any) -> None:
    def main(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
        for number in (1, 2):
            content = RecordDict(
                {"arrays": arrays, "config": ConfigRecord({"server-round": number})}
            )
            nodes = list(grid.get_node_ids())
            messages = [Message(content, node, "train.personalise") for node in nodes]
            replies = list(grid.send_and_receive(messages))
            assert len(replies) == 3
            arrays = replies[0].content["arrays"]
        query = RecordDict({"arrays": arrays})
        ids = list(grid.push_messages([Message(query, n, "query") for n in grid.get_node_ids()]))
        got: list[Message] = []
        while len(got) < len(ids):
            got += grid.pull_messages(ids)
        assert {message.metadata.reply_to_message_id for message in got} == set(ids)

    played = lab(clients(), main)
    played.play()
    rows = played.rows("devices.csv")
    assert [(r["round"], r["type"]) for r in rows if r["device"] == "d2"] == [
        ("1", "train.personalise"),
        ("2", "train.personalise"),
        ("2", "query"),
    ]
    assert [row["devices"] for row in played.rows("rounds.csv")] == ["3", "3"]
    assert isinstance(played.hosting.grid, LabGrid)


def test_flowers_older_server_runs_too(lab: Any) -> None:
    """Its threads send one message each, and central values stand in its log alone."""
    from flwr.common import ndarrays_to_parameters
    from flwr.compat.server import ServerAppComponents  # the older interface
    from flwr.server import ServerApp as OlderServerApp
    from flwr.server import ServerConfig
    from flwr.server.strategy import FedAvg as OlderFedAvg

    def older_client(message: Message, config: Mapping[str, Any]) -> RecordDict:
        content = message.content
        if message.metadata.message_type == "evaluate":
            return RecordDict(
                {
                    "evaluateres.loss": MetricRecord({"loss": 0.5}),
                    "evaluateres.num_examples": MetricRecord({"num_examples": 10}),
                    "evaluateres.metrics": ConfigRecord({"accuracy": 0.75}),
                    "evaluateres.status": ConfigRecord({"code": 0, "message": ""}),
                }
            )
        arrays = content.array_records["fitins.parameters"]
        return RecordDict(
            {
                "fitres.parameters": arrays,
                "fitres.num_examples": MetricRecord({"num_examples": 10}),
                "fitres.metrics": ConfigRecord({"train_loss": 0.25, "note": "text"}),
                "fitres.status": ConfigRecord({"code": 0, "message": ""}),
            }
        )

    def evaluate(number: int, parameters: Any, config: Any) -> tuple[float, dict[str, Any]]:
        return 1.0 / (number + 1), {"accuracy": 0.5 + number / 10}

    def server_fn(context: Context) -> ServerAppComponents:
        initial = ndarrays_to_parameters([np.zeros((2, 2), np.float32), np.ones(2, np.float32)])
        strategy = OlderFedAvg(initial_parameters=initial, evaluate_fn=evaluate)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

    played = lab({n: Node(older_client) for n in (1, 2, 3)}, OlderServerApp(server_fn=server_fn))
    played.play()
    rounds = played.rows("rounds.csv")
    assert [row["round"] for row in rounds] == ["1", "2"]
    assert [row["accuracy"] for row in rounds] == ["0.75", "0.75"]
    assert [float(row["central_accuracy"]) for row in rounds] == [0.6, 0.7]
    assert [row["devices"] for row in rounds] == ["3", "3"]
    types = {(row["type"], row["outcome"]) for row in played.rows("devices.csv")}
    assert types == {("train", "completed"), ("evaluate", "completed")}


def test_flowers_older_server_ends_where_every_client_fails(lab: Any) -> None:
    from flwr.common import ndarrays_to_parameters
    from flwr.compat.server import ServerAppComponents
    from flwr.server import ServerApp as OlderServerApp
    from flwr.server import ServerConfig
    from flwr.server.strategy import FedAvg as OlderFedAvg

    def broken(message: Message, config: Mapping[str, Any]) -> RecordDict:
        raise ZeroDivisionError("on purpose")

    def server_fn(context: Context) -> ServerAppComponents:
        strategy = OlderFedAvg(initial_parameters=ndarrays_to_parameters([np.zeros(2)]))
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=50))

    played = lab({n: Node(broken) for n in (1, 2, 3)}, OlderServerApp(server_fn=server_fn))
    with pytest.raises(RoundError, match=r"(?s)round 1.*ZeroDivisionError.*Traceback: in the app"):
        played.play()
    assert {row["round"] for row in played.rows("devices.csv")} == {"1"}
