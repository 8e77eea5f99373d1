"""Results and metrics: what is written is what is served."""

import csv
import json
import threading
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from flowerbed.follow import memory, wait
from flowerbed.metrics import DEVICE_METRICS, ROUND_METRICS, RUN_METRICS, StatusCollector
from flowerbed.prometheus import Prometheus
from flowerbed.results import MODEL_OUTCOMES, DeviceRow, Recorder, RoundRow, read_status


def _round(number: int) -> RoundRow:
    return RoundRow(
        round=number,
        started=1.75e9 + 12.5 * number,
        accuracy=None,
        loss=None,
        central_accuracy=0.3 + number / 100,
        central_loss=2.0,
        seconds=12.5,
        configure_seconds=0.1,
        devices_seconds=10.0,
        aggregate_seconds=0.1,
        evaluate_seconds=2.3,
        examples=160,
        devices=1,
        failed=1,
        slowest_device="pi",
        slowest_seconds=9.0,
    )


def _device(number: int, name: str, outcome: str) -> DeviceRow:
    return DeviceRow(
        round=number,
        device=name,
        device_class="phone",
        outcome=outcome,
        reason="",
        started=1.75e9 + 12.5 * number,
        aggregated=number if outcome in MODEL_OUTCOMES else None,
        examples=160,
        seconds=6.5,
        receive_seconds=1.25,
        queue_seconds=0.25,
        evaluate_seconds=0.5,
        train_seconds=4.0,
        send_seconds=0.5,
        wait_seconds=3.5,
        bytes_received=1000,
        bytes_sent=1000,
        examples_per_second=40.0,
        batch_size=16,
        throttled_share=0.75,
        throttled_seconds=2.5,
        loss=2.1,
        accuracy=0.25,
        train_loss=1.9,
        train_accuracy=0.3,
    )


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    recorder = Recorder("run-1", 2, 60.0, tmp_path)
    for name in ("pi", "phone-1"):
        cpus = 0.5 if name == "pi" else None
        recorder.meet(name, "phone", {"machine": "local", "cpus": cpus, "memory": None})
    recorder.state("running")
    recorder.begin_round(1.75e9)
    recorder.finish_round(
        _round(1), [_device(1, "pi", "completed"), _device(1, "phone-1", "offline")]
    )
    recorder.device_accuracy(0.21, 2.2)
    recorder.finish_round(
        _round(2), [_device(2, "pi", "completed"), _device(2, "phone-1", "partial")]
    )
    return recorder


def test_a_rounds_accuracy_comes_with_the_next_round(recorder: Recorder) -> None:
    rows = list(csv.DictReader((recorder.directory / "rounds.csv").open()))
    assert [row["accuracy"] for row in rows] == ["0.21", ""]
    assert [row["central_accuracy"] for row in rows] == ["0.31", "0.32"]
    recorder.device_accuracy(0.22, 2.1)
    rows = list(csv.DictReader((recorder.directory / "rounds.csv").open()))
    assert [row["accuracy"] for row in rows] == ["0.21", "0.22"]


def test_every_device_and_round_has_a_row(recorder: Recorder) -> None:
    rows = list(csv.DictReader((recorder.directory / "devices.csv").open()))
    assert [(row["round"], row["device"], row["outcome"]) for row in rows] == [
        ("1", "pi", "completed"),
        ("1", "phone-1", "offline"),
        ("2", "pi", "completed"),
        ("2", "phone-1", "partial"),
    ]


def test_nothing_is_overwritten(recorder: Recorder, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="run-1"):
        Recorder("run-1", 2, 60.0, tmp_path)


def test_the_inventorys_part_is_kept(recorder: Recorder) -> None:
    (recorder.directory / "lab.yml").write_text("commit: abc\n")
    recorder.describe({"run": {"seed": 1}})
    told = yaml.safe_load((recorder.directory / "run.yml").read_text())
    assert told == {"run": {"seed": 1}, "lab": {"commit": "abc"}}


def test_waiting_ends_with_a_round_or_with_the_run(recorder: Recorder, tmp_path: Path) -> None:
    assert wait("run-1", 1, 0, tmp_path)["round"] == 2
    assert wait("run-1", 2, 0.1, tmp_path)["state"] == "running"
    threading.Timer(0.3, recorder.state, ("failed", "no device")).start()
    assert wait("run-1", 2, 30, tmp_path)["message"] == "no device"
    assert wait("run-2", 0, 0, tmp_path)["state"] == "starting"


def test_who_watches_sees_what_devices_do(recorder: Recorder, tmp_path: Path) -> None:
    def doing() -> dict[str, str]:
        return {k: v["doing"] for k, v in wait("run-1", 0, 0, tmp_path)["devices"].items()}

    recorder.doing(["pi", "phone-1"], "working")
    recorder.doing(["pi"], "out_of_memory")
    assert doing() == {"pi": "out_of_memory", "phone-1": "working"}


def test_watching_needs_no_prometheus() -> None:
    assert memory(Prometheus("http://127.0.0.1:9", timeout=1)) == {}


def test_the_endpoint_serves_the_newest_run(recorder: Recorder, tmp_path: Path) -> None:
    recorder.device_accuracy(0.22, 2.1)
    recorder.online({"pi"})
    registry = CollectorRegistry()
    registry.register(StatusCollector(tmp_path))
    server, thread = start_http_server(0, "127.0.0.1", registry)
    url = f"http://127.0.0.1:{server.server_port}/metrics"
    with urllib.request.urlopen(url) as answer:
        families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
    server.shutdown()
    thread.join()
    assert set(RUN_METRICS) | set(ROUND_METRICS) | set(DEVICE_METRICS) < set(families)
    assert families["model_accuracy"].samples[0].value == 0.22
    assert families["flowerbed_round"].samples[0].value == 2
    outcomes = {
        (s.labels["device"], s.labels["outcome"]): s.value
        for s in families["flowerbed_device_outcomes"].samples
    }
    assert outcomes["pi", "completed"] == 2
    assert outcomes["phone-1", "offline"] == outcomes["phone-1", "partial"] == 1
    assert families["flowerbed_round_aggregate_seconds"].samples[0].value == 0.1
    assert families["flowerbed_run_info"].samples[0].labels == {"run": "run-1", "state": "running"}
    last = families["flowerbed_device_last_outcome"].samples
    assert {s.labels["device"]: s.labels["outcome"] for s in last} == {
        "pi": "completed",
        "phone-1": "partial",
    }
    online = {s.labels["device"]: s.value for s in families["flowerbed_device_online"].samples}
    assert online == {"pi": 1, "phone-1": 0}
    cpus = {s.labels["device"]: s.value for s in families["flowerbed_device_cpus"].samples}
    assert cpus == {"pi": 0.5}
    info = families["flowerbed_device_info"].samples[0]
    assert (info.labels["device_class"], info.labels["cpus"], info.labels["memory"]) == (
        "phone",
        "0.5",
        "",
    )


def test_before_the_first_run_there_is_nothing_and_no_error(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    assert list(StatusCollector(tmp_path).collect()) == []


def test_status_is_whole_json(recorder: Recorder) -> None:
    status = json.loads((recorder.directory / "status.json").read_text())
    assert status["history"][0]["accuracy"] == 0.21
    assert not list(recorder.directory.glob(".*.draft"))
