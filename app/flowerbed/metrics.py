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

from flowerbed.results import RESULTS, read_status

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
    "flowerbed_round_seconds": ("round_seconds", "Duration of the last finished round."),
}
"""Metric name: key in status.json, help."""

DEVICE_METRICS = {
    "flowerbed_device_train_seconds": ("train_seconds", "Training in the last round."),
    "flowerbed_device_wait_seconds": ("wait_seconds", "Idle until the last round's last reply."),
    "flowerbed_device_examples": ("examples", "Examples trained on in the last round."),
    "flowerbed_device_examples_per_second": ("examples_per_second", "Speed in the last round."),
    "flowerbed_device_accuracy": ("accuracy", "Accuracy of the received model on the device."),
    "flowerbed_device_loss": ("loss", "Loss of the received model on the device."),
}
"""Metric name: column of devices.csv, help."""

DEVICE_LABELS = ("device", "device_class")
OUTCOMES = ("completed", "partial", "out_of_memory", "timeout", "offline", "error")
INFO_LABELS = (
    "machine",
    "cpus",
    "memory",
    "batch_size",
    "learning_rate",
    "optimizer",
    "local_epochs",
    "data_fraction",
    "examples",
)


def _label(value: Any) -> str:
    return "" if value is None else str(value)


class StatusCollector(Collector):
    """Turns the newest run's status into metrics at each scrape."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics; none before the first run."""
        status = read_status(self._root)
        if status is None:
            return
        for name, (key, text) in RUN_METRICS.items():
            if status[key] is not None:
                yield GaugeMetricFamily(name, text, value=status[key])
        devices = status["devices"]
        info = GaugeMetricFamily(
            "flowerbed_device_info",
            "Limits and hyperparameters of a device.",
            labels=(*DEVICE_LABELS, *INFO_LABELS),
        )
        outcomes = CounterMetricFamily(
            "flowerbed_device_outcomes",
            "What became of a device's rounds in this run.",
            labels=(*DEVICE_LABELS, "outcome"),
        )
        for device, entry in devices.items():
            who = (device, entry["device_class"])
            values = [_label(entry["info"].get(label)) for label in INFO_LABELS]
            info.add_metric((*who, *values), 1)
            for outcome in OUTCOMES:
                outcomes.add_metric((*who, outcome), entry["outcomes"].get(outcome, 0))
        yield info
        yield outcomes
        for name, (column, text) in DEVICE_METRICS.items():
            gauge = GaugeMetricFamily(name, text, labels=DEVICE_LABELS)
            for device, entry in devices.items():
                if entry["last"] and entry["last"][column] is not None:
                    gauge.add_metric((device, entry["device_class"]), entry["last"][column])
            yield gauge


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
