"""Results, the status of a run, and metrics: what is written is what is served."""

import csv
import json
import math
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from rows import evaluation_row, message_row, round_row

from flowerbed.prometheus import Prometheus
from flowerbed.results import OUTCOMES, DeviceRow, read_rows, read_status
from flowerbed.server.follow import memory, wait
from flowerbed.server.metrics import (
    DEVICE_METRICS,
    ROUND_METRICS,
    RUN_METRICS,
    StatusCollector,
)
from flowerbed.server.recorder import Recorder


def _start(root: Path, run: str = "run-1", *, central: bool = True) -> Recorder:
    recorder = Recorder(run, 60.0, root)
    for name in ("pi", "phone-1"):
        cpus = 0.5 if name == "pi" else None
        recorder.meet(name, "phone", {"machine": "local", "cpus": cpus, "memory": None})
    recorder.state("running")
    recorder.plan(2, central=central)
    return recorder


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    """Two rounds; the central evaluation of the second one is still under way."""
    recorder = _start(tmp_path)
    recorder.begin_round(1, 1.75e9)
    measured: dict[str, Any] = {
        "accuracy": 0.25,
        "loss": 2.1,
        "train_accuracy": 0.3,
        "train_loss": 1.9,
    }
    recorder.finish_round(
        round_row(1, central_accuracy=None, central_loss=None),
        [message_row(1, "pi", **measured), message_row(1, "phone-1", 0, "offline")],
    )
    recorder.central(1, 0.31, 2.0)
    recorder.begin_round(2, 1.75e9 + 25)
    recorder.on_devices(1, 0.21, 2.2)
    recorder.finish_round(
        round_row(2, central_accuracy=None, central_loss=None),
        [message_row(2, "pi", **measured), message_row(2, "phone-1", 0, "diverged")],
    )
    recorder.flush()
    return recorder


def _rounds(recorder: Recorder) -> list[dict[str, str]]:
    with (recorder.directory / "rounds.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def _status(recorder: Recorder) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((recorder.directory / "status.json").read_text())
    return status


def test_evaluations_are_entered_when_they_are_known(recorder: Recorder) -> None:
    assert [row["accuracy"] for row in _rounds(recorder)] == ["0.21", ""]
    assert [row["central_accuracy"] for row in _rounds(recorder)] == ["0.31", ""]
    recorder.on_devices(2, 0.22, 2.1)
    recorder.central(2, 0.32, 1.9)
    assert [row["accuracy"] for row in _rounds(recorder)] == ["0.21", "0.22"]
    assert [row["central_accuracy"] for row in _rounds(recorder)] == ["0.31", "0.32"]


def test_a_round_is_settled_with_its_central_evaluation(recorder: Recorder) -> None:
    assert _status(recorder)["settled"] == 1
    recorder.central(2, 0.32, 1.9)
    recorder.state("running")
    assert _status(recorder)["settled"] == 2


def test_without_central_evaluation_a_round_is_settled_at_once(tmp_path: Path) -> None:
    recorder = _start(tmp_path, central=False)
    recorder.finish_round(round_row(1, central_accuracy=None, central_loss=None), [])
    assert _status(recorder)["settled"] == 1


def test_all_rounds_of_a_failed_run_are_settled(recorder: Recorder) -> None:
    recorder.state("failed", "RuntimeError: no more disk space")
    assert _status(recorder)["settled"] == 2


def test_every_message_has_a_row(recorder: Recorder) -> None:
    recorder.add([evaluation_row(2, "pi"), evaluation_row(2, "pi", type="query.hello")])
    rows: list[DeviceRow] = read_rows(DeviceRow, recorder.directory / "devices.csv")
    assert [(row.round, row.type, row.device, row.outcome) for row in rows] == [
        (1, "train", "pi", "completed"),
        (1, "train", "phone-1", "offline"),
        (2, "train", "pi", "completed"),
        (2, "train", "phone-1", "diverged"),
        (2, "evaluate", "pi", "completed"),
        (2, "query.hello", "pi", "completed"),
    ]
    assert json.loads(rows[4].metrics) == {"accuracy": 0.2, "loss": 2.0}
    assert rows[0].reason == ""
    assert rows[1].batch_size is None


def test_existing_results_are_not_overwritten(recorder: Recorder, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="run-1"):
        Recorder("run-1", 60.0, tmp_path)


def test_run_yml_keeps_the_part_of_the_control_node(recorder: Recorder) -> None:
    (recorder.directory / "lab.yml").write_text("commit: abc\n")
    recorder.describe({"run": {"seed": 1}})
    described = yaml.safe_load((recorder.directory / "run.yml").read_text())
    assert described == {"run": {"seed": 1}, "lab": {"commit": "abc"}}


def test_the_status_is_one_line_of_json(recorder: Recorder) -> None:
    """Also where an app's losses are not finite: JSON has no NaN."""
    recorder.central(2, math.nan, math.inf)
    recorder.state("running")
    text = (recorder.directory / "status.json").read_text()
    assert "\n" not in text
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert not list(recorder.directory.glob(".*.draft"))


# --- following ---------------------------------------------------------------------------------


def test_waiting_ends_with_a_settled_round_or_with_the_run(
    recorder: Recorder, tmp_path: Path
) -> None:
    assert wait("run-1", 0, 0, tmp_path)["settled"] == 1
    assert wait("run-1", 1, 0.1, tmp_path)["settled"] == 1  # the time was up
    threading.Timer(0.3, recorder.central, (2, 0.32, 1.9)).start()
    threading.Timer(0.6, recorder.flush).start()
    threading.Timer(1.2, recorder.flush).start()
    assert wait("run-1", 1, 30, tmp_path)["settled"] == 2
    threading.Timer(0.3, recorder.state, ("failed", "no device")).start()
    assert wait("run-1", 2, 30, tmp_path)["message"] == "no device"


def test_waiting_ends_when_a_round_has_begun(recorder: Recorder, tmp_path: Path) -> None:
    assert wait("run-1", 1, 30, tmp_path, begun=2)["begun"] == 2


def test_a_run_without_a_status_is_starting(recorder: Recorder, tmp_path: Path) -> None:
    status = wait("run-2", 0, 0, tmp_path)
    assert (status["state"], status["settled"], status["history"]) == ("starting", 0, [])
    of_times = {"started", "round_started", "round_timeout"}
    assert set(_status(recorder)) - set(status) == of_times


def test_the_status_has_what_each_device_does(recorder: Recorder, tmp_path: Path) -> None:
    recorder.doing(["pi", "phone-1"], "working")
    recorder.doing(["pi"], "out_of_memory")
    recorder.state("running")
    status = wait("run-1", 0, 0, tmp_path)
    doing = {name: entry["doing"] for name, entry in status["devices"].items()}
    assert doing == {"pi": "out_of_memory", "phone-1": "working"}


def test_memory_is_unknown_without_prometheus() -> None:
    assert memory(Prometheus("http://127.0.0.1:9", timeout=1)) == {}


# --- metrics -----------------------------------------------------------------------------------


def _served(root: Path) -> dict[str, Metric]:
    """The metrics as Prometheus gets them."""
    registry = CollectorRegistry()
    registry.register(StatusCollector(root))
    server, thread = start_http_server(0, "127.0.0.1", registry)
    url = f"http://127.0.0.1:{server.server_port}/metrics"
    with urllib.request.urlopen(url) as response:
        families = {f.name: f for f in text_string_to_metric_families(response.read().decode())}
    server.shutdown()
    thread.join()
    return families


def test_the_endpoint_serves_the_newest_run(recorder: Recorder, tmp_path: Path) -> None:
    recorder.on_devices(2, 0.22, 2.1)
    recorder.online({"pi"})
    recorder.data({"dataset": "digits", "partitioner": "iid", "seed": 4})
    recorder.state("running")
    families = _served(tmp_path)
    assert set(RUN_METRICS) | set(ROUND_METRICS) | set(DEVICE_METRICS) < set(families)
    assert families["model_accuracy"].samples[0].value == 0.22
    assert families["model_central_accuracy"].samples[0].value == 0.31
    assert families["flowerbed_round"].samples[0].value == 2
    assert families["flowerbed_rounds"].samples[0].value == 2
    outcomes = {
        (s.labels["device"], s.labels["outcome"]): s.value
        for s in families["flowerbed_device_outcomes"].samples
    }
    assert outcomes["pi", "completed"] == 2
    assert outcomes["phone-1", "offline"] == outcomes["phone-1", "diverged"] == 1
    assert {outcome for _, outcome in outcomes} == set(OUTCOMES)
    assert families["flowerbed_round_aggregate_seconds"].samples[0].value == 1.0
    assert families["flowerbed_run_info"].samples[0].labels == {
        "run": "run-1",
        "state": "running",
        "dataset": "digits",
        "partitioner": "iid",
    }
    last = families["flowerbed_device_last_outcome"].samples
    assert {s.labels["device"]: s.labels["outcome"] for s in last} == {
        "pi": "completed",
        "phone-1": "diverged",
    }
    online = {s.labels["device"]: s.value for s in families["flowerbed_device_online"].samples}
    assert online == {"pi": 1, "phone-1": 0}
    cpus = {s.labels["device"]: s.value for s in families["flowerbed_device_cpus"].samples}
    assert cpus == {"pi": 0.5}
    labels = families["flowerbed_device_info"].samples[0].labels
    assert (labels["device_class"], labels["cpus"], labels["memory"], labels["optimizer"]) == (
        "phone",
        "0.5",
        "",
        "",
    )


def test_values_that_an_app_does_not_report_have_no_sample(tmp_path: Path) -> None:
    """An app without any metrics, whose number of rounds nobody knows."""
    recorder = _start(tmp_path, central=False)
    recorder.plan(0, central=False)
    bare: dict[str, Any] = {"throttled_share": None, "throttled_seconds": None}
    recorder.finish_round(
        round_row(1, central_accuracy=None, central_loss=None), [message_row(1, "pi", **bare)]
    )
    families = _served(tmp_path)
    unknown = {"model_accuracy", "model_loss", "model_central_accuracy", "model_central_loss"}
    assert not (unknown | {"flowerbed_rounds"}) & set(families)
    for name in ("accuracy", "loss", "train_accuracy", "train_loss", "throttled_share"):
        assert families[f"flowerbed_device_{name}"].samples == [], name
    assert families["flowerbed_device_train_seconds"].samples[0].value == 10.0


def test_a_message_of_another_kind_is_not_counted_as_training(tmp_path: Path) -> None:
    recorder = _start(tmp_path)
    recorder.add([message_row(1, "pi"), evaluation_row(1, "pi", outcome="error")])
    recorder.state("running")
    families = _served(tmp_path)
    counted = {
        s.labels["outcome"]: s.value
        for s in families["flowerbed_device_outcomes"].samples
        if s.labels["device"] == "pi"
    }
    assert (counted["completed"], counted["error"]) == (1, 0)
    assert families["flowerbed_device_train_seconds"].samples[0].value == 10.0


def test_before_the_first_run_there_are_no_metrics(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    assert list(StatusCollector(tmp_path).collect()) == []
