"""The metrics endpoint: the names of all metrics, and a server that stays up between runs.

    python -m flowerbed.server.metrics --port 8000

It serves the status file of the newest run: Prometheus sees what the results say, also after a
SuperLink or ServerApp has died. A value that is not known has no sample.
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
    "model_central_accuracy": ("central_accuracy", "Accuracy by the app's central evaluation."),
    "model_central_loss": ("central_loss", "Loss by the app's central evaluation."),
    "flowerbed_round": ("round", "Last finished round."),
    "flowerbed_rounds": ("rounds", "Rounds that the run will have, if the app says so."),
    "flowerbed_run_started_seconds": ("started", "When the run started, Unix time."),
    "flowerbed_round_started_seconds": (
        "round_started",
        "When the newest round started, Unix time.",
    ),
    "flowerbed_round_timeout_seconds": (
        "round_timeout",
        "Seconds after which a round is closed without the devices that have not replied.",
    ),
}
"""Name of each metric, its key in status.json and its help text."""

ROUND_METRICS = {
    "flowerbed_round_seconds": ("seconds", "Duration of the last finished round."),
    "flowerbed_round_configure_seconds": (
        "configure_seconds",
        "Of these, before the first message.",
    ),
    "flowerbed_round_devices_seconds": ("devices_seconds", "Of these, until the last reply."),
    "flowerbed_round_aggregate_seconds": ("aggregate_seconds", "Of these, for aggregation."),
    "flowerbed_round_evaluate_seconds": (
        "evaluate_seconds",
        "Of these, for central evaluation while devices wait.",
    ),
    "flowerbed_round_examples": ("examples", "Training examples behind its aggregated models."),
    "flowerbed_round_devices": (
        "devices",
        "Models that were aggregated in the last finished round.",
    ),
    "flowerbed_round_failed": (
        "failed",
        "Devices that had returned no model when the last finished round was closed.",
    ),
}
"""Name of each metric, its column in rounds.csv and its help text."""

DEVICE_METRICS = {
    "flowerbed_device_receive_seconds": (
        "receive_seconds",
        "Until the device had received the last round's message.",
    ),
    "flowerbed_device_queue_seconds": ("queue_seconds", "From there until its worker began."),
    "flowerbed_device_evaluate_seconds": ("evaluate_seconds", "Evaluation in the last round."),
    "flowerbed_device_train_seconds": ("train_seconds", "Training in the last round."),
    "flowerbed_device_send_seconds": (
        "send_seconds",
        "From the end of its work until the server had read the reply.",
    ),
    "flowerbed_device_wait_seconds": (
        "wait_seconds",
        "Idle from its reply until the next message, or until the round was closed.",
    ),
    "flowerbed_device_bytes_received": ("bytes_received", "Arrays received in the last round."),
    "flowerbed_device_bytes_sent": ("bytes_sent", "Arrays sent in the last round."),
    "flowerbed_device_examples": ("examples", "Examples trained on in the last round."),
    "flowerbed_device_examples_per_second": (
        "examples_per_second",
        "Training speed in the last round.",
    ),
    "flowerbed_device_throttled_share": (
        "throttled_share",
        "Share of the scheduler's periods during its work in which it had used up its quota.",
    ),
    "flowerbed_device_throttled_seconds": (
        "throttled_seconds",
        "Seconds for which its quota held its work back in the last round.",
    ),
    "flowerbed_device_accuracy": ("accuracy", "Accuracy of the received model on the device."),
    "flowerbed_device_loss": ("loss", "Loss of the received model on the device."),
    "flowerbed_device_train_accuracy": (
        "train_accuracy",
        "Accuracy of its own model during training.",
    ),
    "flowerbed_device_train_loss": ("train_loss", "Loss of its own model during training."),
}
"""Name of each metric, its column in devices.csv and its help text."""

RUN_LABELS = ("run", "state", "dataset", "partitioner")
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
    """A gauge for each line of a table whose value is known."""
    for name, (key, text) in table.items():
        if values[key] is not None:
            yield GaugeMetricFamily(name, text, value=values[key])


def _devices(devices: dict[str, Any]) -> Iterable[Metric]:
    """The metrics with a sample for each device."""
    info = GaugeMetricFamily(
        "flowerbed_device_info",
        "Limits and hyperparameters of a device.",
        labels=(*DEVICE_LABELS, *INFO_LABELS),
    )
    cpus = GaugeMetricFamily(
        "flowerbed_device_cpus",
        "Cores that the device may use; absent where it has no limit.",
        labels=DEVICE_LABELS,
    )
    online = GaugeMetricFamily(
        "flowerbed_device_online",
        "Whether the device is connected to Flower, or was when the run ended.",
        labels=DEVICE_LABELS,
    )
    last = GaugeMetricFamily(
        "flowerbed_device_last_outcome",
        "Outcome of the device's last training message.",
        labels=(*DEVICE_LABELS, "outcome"),
    )
    outcomes = CounterMetricFamily(
        "flowerbed_device_outcomes",
        "Training messages to the device in this run, by outcome.",
        labels=(*DEVICE_LABELS, "outcome"),
    )
    for device, entry in devices.items():
        labels = (device, entry["device_class"])
        info.add_metric((*labels, *(_label(entry["info"].get(label)) for label in INFO_LABELS)), 1)
        if entry["info"].get("cpus"):
            cpus.add_metric(labels, entry["info"]["cpus"])
        online.add_metric(labels, entry["online"])
        if entry["last"]:
            last.add_metric((*labels, entry["last"]["outcome"]), 1)
        for outcome in OUTCOMES:
            outcomes.add_metric((*labels, outcome), entry["outcomes"].get(outcome, 0))
    yield from (info, cpus, online, last, outcomes)
    for name, (column, text) in DEVICE_METRICS.items():
        gauge = GaugeMetricFamily(name, text, labels=DEVICE_LABELS)
        for device, entry in devices.items():
            if entry["last"] and entry["last"][column] is not None:
                gauge.add_metric((device, entry["device_class"]), entry["last"][column])
        yield gauge


def _faults(directory: Path) -> Iterable[Metric]:
    """When each fault was injected last; dashboards mark that time."""
    injected = GaugeMetricFamily(
        "flowerbed_fault_seconds",
        "When this fault was last injected into the run, Unix time.",
        labels=("fault", "target", "machine"),
    )
    last = {(row.fault, row.target, row.machine): row.time for row in read_faults(directory)}
    for labels, when in last.items():
        injected.add_metric(labels, when)
    yield injected


class StatusCollector(Collector):
    """Turns the newest run's status into metrics at each scrape.

    Args:
        root: directory of the results.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics; none before the first run."""
        status = read_status(self._root)
        if status is None:
            return
        run = GaugeMetricFamily(
            "flowerbed_run_info",
            "The newest run: waiting, running, completed or failed; and the data that it uses.",
            labels=RUN_LABELS,
        )
        # Results of an earlier version have no data.
        named = {"run": status["run"], "state": status["state"]} | status.get("data", {})
        run.add_metric([named.get(label, "") for label in RUN_LABELS], 1)
        yield run
        # 0 rounds: the app has not said how many there will be.
        yield from _gauges(RUN_METRICS, status | {"rounds": status["rounds"] or None})
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
