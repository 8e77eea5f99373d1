"""The metrics endpoint: every metric's name, once, and a server that stays up between runs.

    python -m flowerbed.metrics --port 8000

Serves the status file of the newest run, so that what Prometheus sees is what the results say,
and a SuperLink or ServerApp that dies takes no metric with it.
"""

import argparse
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from flowerbed.faults import read_faults
from flowerbed.results import OUTCOMES, RESULTS, read_status

RUN_METRICS = {
    "model_accuracy": ("accuracy", "Accuracy, mean over devices weighted by examples."),
    "model_loss": ("loss", "Loss, mean over devices weighted by examples."),
    "model_central_accuracy": (
        "central_accuracy",
        "Accuracy of the global model on the test split.",
    ),
    "model_central_loss": ("central_loss", "Loss of the global model on the test split."),
    "flowerbed_round": ("round", "Last finished round."),
    "flowerbed_rounds": ("rounds", "Rounds that the run will have."),
    "flowerbed_run_started_seconds": ("started", "When the run began, Unix time."),
    "flowerbed_round_started_seconds": ("round_started", "When the newest round began, Unix time."),
    "flowerbed_round_timeout_seconds": (
        "round_timeout",
        "After which a round goes on without the devices that have not answered.",
    ),
}
"""Metric name: key in status.json, help."""

ROUND_METRICS = {
    "flowerbed_round_seconds": ("seconds", "Duration of the last finished round."),
    "flowerbed_round_configure_seconds": ("configure_seconds", "Its part before the devices'."),
    "flowerbed_round_devices_seconds": ("devices_seconds", "Its part with the devices."),
    "flowerbed_round_aggregate_seconds": ("aggregate_seconds", "Its part for aggregation."),
    "flowerbed_round_evaluate_seconds": ("evaluate_seconds", "Its part for central evaluation."),
    "flowerbed_round_examples": ("examples", "Examples trained on in it by all devices."),
    "flowerbed_round_devices": ("devices", "Models that were aggregated in it."),
    "flowerbed_round_failed": ("failed", "Devices that had returned none when it was closed."),
}
"""Metric name: column of rounds.csv, help."""

DEVICE_METRICS = {
    "flowerbed_device_receive_seconds": (
        "receive_seconds",
        "Until the device had the last round's message.",
    ),
    "flowerbed_device_queue_seconds": ("queue_seconds", "From there until its trainer began."),
    "flowerbed_device_evaluate_seconds": ("evaluate_seconds", "Evaluation in the last round."),
    "flowerbed_device_train_seconds": ("train_seconds", "Training in the last round."),
    "flowerbed_device_send_seconds": ("send_seconds", "From there until the reply was read."),
    "flowerbed_device_wait_seconds": ("wait_seconds", "Idle until the last round was closed."),
    "flowerbed_device_bytes_received": ("bytes_received", "Arrays received in the last round."),
    "flowerbed_device_bytes_sent": ("bytes_sent", "Arrays sent in the last round."),
    "flowerbed_device_examples": ("examples", "Examples trained on in the last round."),
    "flowerbed_device_examples_per_second": ("examples_per_second", "Speed in the last round."),
    "flowerbed_device_throttled_share": (
        "throttled_share",
        "Share of the periods of its work in the last round in which it had used up its quota.",
    ),
    "flowerbed_device_throttled_seconds": (
        "throttled_seconds",
        "That its work was held back by its quota in the last round.",
    ),
    "flowerbed_device_accuracy": ("accuracy", "Accuracy of the received model on the device."),
    "flowerbed_device_loss": ("loss", "Loss of the received model on the device."),
    "flowerbed_device_train_accuracy": ("train_accuracy", "Accuracy while it trained."),
    "flowerbed_device_train_loss": ("train_loss", "Loss while it trained."),
}
"""Metric name: column of devices.csv, help."""

DEVICE_LABELS = ("device", "device_class")
INFO_LABELS = (
    "machine",
    "cpus",
    "memory",
    "batch_size",
    "learning_rate",
    "optimizer",
    "local_epochs",
    "data_fraction",
    "availability",
    "examples",
)


def _label(value: Any) -> str:
    return "" if value is None else str(value)


def _gauges(table: dict[str, tuple[str, str]], values: dict[str, Any]) -> Iterable[Metric]:
    """A gauge for each line of a table; none where there is no value yet."""
    for name, (key, text) in table.items():
        if values[key] is not None:
            yield GaugeMetricFamily(name, text, value=values[key])


def _devices(devices: dict[str, Any]) -> Iterable[Metric]:
    """The metrics by device and class."""
    info = GaugeMetricFamily(
        "flowerbed_device_info",
        "Limits and hyperparameters of a device.",
        labels=(*DEVICE_LABELS, *INFO_LABELS),
    )
    cpus = GaugeMetricFamily(
        "flowerbed_device_cpus",
        "Cores that the device may use; not there without a limit.",
        labels=DEVICE_LABELS,
    )
    online = GaugeMetricFamily(
        "flowerbed_device_online",
        "Whether Flower hears of the device; of the end of the run, where that is over.",
        labels=DEVICE_LABELS,
    )
    last = GaugeMetricFamily(
        "flowerbed_device_last_outcome",
        "What became of the device's last round.",
        labels=(*DEVICE_LABELS, "outcome"),
    )
    outcomes = CounterMetricFamily(
        "flowerbed_device_outcomes",
        "What became of a device's rounds in this run.",
        labels=(*DEVICE_LABELS, "outcome"),
    )
    for device, entry in devices.items():
        who = (device, entry["device_class"])
        info.add_metric((*who, *(_label(entry["info"].get(label)) for label in INFO_LABELS)), 1)
        if entry["info"].get("cpus"):
            cpus.add_metric(who, entry["info"]["cpus"])
        online.add_metric(who, entry["online"])
        if entry["last"]:
            last.add_metric((*who, entry["last"]["outcome"]), 1)
        for outcome in OUTCOMES:
            outcomes.add_metric((*who, outcome), entry["outcomes"].get(outcome, 0))
    yield from (info, cpus, online, last, outcomes)
    for name, (column, text) in DEVICE_METRICS.items():
        gauge = GaugeMetricFamily(name, text, labels=DEVICE_LABELS)
        for device, entry in devices.items():
            if entry["last"] and entry["last"][column] is not None:
                gauge.add_metric((device, entry["device_class"]), entry["last"][column])
        yield gauge


def _faults(directory: Path) -> Iterable[Metric]:
    """When each fault was struck last; its annotation is put there."""
    struck = GaugeMetricFamily(
        "flowerbed_fault_seconds",
        "When a fault was last struck on purpose in this run, Unix time.",
        labels=("fault", "target", "machine"),
    )
    last = {(row.fault, row.target, row.machine): row.time for row in read_faults(directory)}
    for labels, when in last.items():
        struck.add_metric(labels, when)
    yield struck


class StatusCollector(Collector):
    """Turns the newest run's status into metrics at each scrape."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics; none before the first run."""
        status = read_status(self._root)
        if status is None:
            return
        run = GaugeMetricFamily(
            "flowerbed_run_info",
            "The newest run: waiting, running, completed or failed.",
            labels=("run", "state"),
        )
        run.add_metric((status["run"], status["state"]), 1)
        yield run
        yield from _gauges(RUN_METRICS, status)
        if status["history"]:
            yield from _gauges(ROUND_METRICS, status["history"][-1])
        yield from _devices(status["devices"])
        yield from _faults(self._root / status["run"])


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="Serve the metrics of the newest run.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    registry = CollectorRegistry()
    registry.register(StatusCollector(arguments.results))
    start_http_server(arguments.port, registry=registry)
    threading.Event().wait()


if __name__ == "__main__":
    main()
