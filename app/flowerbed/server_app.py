"""The ServerApp: one run from the first device online to the saved model."""

import contextlib
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from flowerbed.client_app import WEIGHTS
from flowerbed.config import RunSettings, Task
from flowerbed.data import Shard, load_shard
from flowerbed.fleet import Device, Fleet, Reply
from flowerbed.results import DeviceRow, Recorder, RoundRow
from flowerbed.strategies import make_strategy

app = ServerApp()
log = logging.getLogger("flwr")

_CONTAINER_LOG = Path("/proc/1/fd/1")
TEST_SHARD = Path(os.environ.get("FLOWERBED_TEST_SHARD", "/test/shard"))
_VERSIONS = ("flwr", "flwr-datasets", "tensorflow", "tensorflow-cpu", "keras", "numpy")
_TIME_BOX = 0.9
"""Share of the round's timeout after which a device returns what it has: partial work counts,
an answer that comes too late does not."""


class RoundError(RuntimeError):
    """A round brought nothing to aggregate; the message says what became of each device."""


class _Online(Grid):
    """The grid as strategies see it: only devices that are online and known."""

    def __init__(self, grid: Grid, fleet: Fleet) -> None:
        self._grid = grid
        self._fleet = fleet

    def get_node_ids(self) -> Iterable[int]:
        return [device.node_id for device in self._fleet.online()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


# Strategies only ask who is there; the rest of the interface stays the grid's own.
_Online.__abstractmethods__ = frozenset()


def _mean(replies: list[Reply], key: str) -> float | None:
    """Mean of a metric over replies that have it, weighted by the test examples behind it."""
    told = [(r.metrics[key], r.metrics["eval-examples"]) for r in replies if key in r.metrics]
    if not told:
        return None
    values, weights = zip(*told, strict=True)
    return float(np.average(values, weights=weights))


def _device_row(server_round: int, reply: Reply, end: float) -> DeviceRow:
    metrics = reply.metrics
    train = reply.times.train_seconds
    examples = int(metrics["num-examples"]) if train else 0
    return DeviceRow(
        round=server_round,
        device=reply.device.name,
        device_class=reply.device.settings.device_class,
        outcome=reply.outcome,
        reason=reply.reason,
        examples=examples,
        **asdict(reply.times),
        # A device that is not there does not wait.
        wait_seconds=max(0.0, end - reply.received) if reply.message else 0.0,
        bytes_received=int(metrics.get("bytes-received", 0)),
        bytes_sent=int(metrics.get("bytes-sent", 0)),
        examples_per_second=examples / train if train else 0.0,
        loss=metrics.get("eval-loss"),
        accuracy=metrics.get("eval-accuracy"),
        train_loss=metrics.get("train-loss"),
        train_accuracy=metrics.get("train-accuracy"),
    )


class Run:
    """Everything a run needs, and its rounds."""

    def __init__(
        self,
        settings: RunSettings,
        strategy: Strategy,
        grid: Grid,
        recorder: Recorder,
        test: Shard,
    ) -> None:
        from flowerbed.network import NetworkLearner  # imports TensorFlow

        self.settings = settings
        self.strategy = strategy
        self.recorder = recorder
        self.test = test
        self.learner = NetworkLearner(
            settings.model_settings, test.image_shape, test.classes, seed=settings.seed
        )
        self.weights = self.learner.get_weights()
        self.fleet = Fleet(grid, self._task(0), settings.device_wait, recorder.online)
        self.grid = _Online(grid, self.fleet)
        self._met: dict[str, Device] = {}

    def _task(self, server_round: int, **more: Any) -> dict[str, Any]:
        task = Task(
            **self.settings.model_settings.model_dump(),
            server_round=server_round,
            seed=self.settings.seed,
            **more,
        )
        return task.as_config()

    def _meet(self) -> None:
        """Record devices that are new, or came back changed."""
        for device in self.fleet.online():
            if self._met.get(device.name) != device:
                self._met[device.name] = device
                info = device.settings.model_dump(exclude={"device", "device_class"})
                info |= {"examples": device.examples, "shard": device.shard}
                self.recorder.meet(device.name, device.settings.device_class, info)

    def wait_for_devices(self) -> None:
        """Wait for the devices that the run is meant for; see `Fleet.wait_for`."""

        def progress(message: str) -> None:
            log.info(message)
            self.recorder.state("waiting", message)

        self.fleet.wait_for(self.settings.devices, self.settings.device_wait, progress)
        self._meet()

    def _evaluate_centrally(self) -> tuple[float, float]:
        result = self.learner.evaluate(self.weights, self.test.test_images, self.test.test_labels)
        return result.accuracy, result.loss

    def _arrays(self) -> ArrayRecord:
        return ArrayRecord({WEIGHTS: Array(self.weights)})

    def _configure(self, server_round: int) -> list[Message]:
        config = ConfigRecord(
            self._task(server_round, time_limit=self.settings.round_timeout * _TIME_BOX)
        )
        configured = self.strategy.configure_train(server_round, self._arrays(), config, self.grid)
        # Flower's strategies leave time to live and group open; a message that outlives its
        # round would be worked on for nothing.
        return [
            Message(
                message.content,
                message.metadata.dst_node_id,
                message.metadata.message_type,
                ttl=self.settings.round_timeout,
                group_id=str(server_round),
            )
            for message in configured
        ]

    def _absent(self) -> list[Reply]:
        """Known devices that are not online when the round begins."""
        now = time.monotonic()
        online = {device.name for device in self.fleet.online()}
        return [
            Reply(device, "offline", now, now, "not online when the round began")
            for name, device in self._met.items()
            if name not in online
        ]

    def _exchange(self, messages: list[Message]) -> list[Reply]:
        """Send messages and wait for the replies, and tell those who watch."""

        def replied(reply: Reply) -> None:
            done = reply.outcome in ("completed", "partial")
            self.recorder.doing([reply.device.name], "waiting" if done else reply.outcome)
            _log_reply(reply)

        names = {device.node_id: device.name for device in self.fleet.online()}
        self.recorder.doing([names[m.metadata.dst_node_id] for m in messages], "working")
        return self.fleet.exchange(messages, self.settings.round_timeout, replied)

    def play_round(self, server_round: int) -> None:
        """Configure, exchange, aggregate, evaluate, record.

        Raises:
            RoundError: no device returned a model.
        """
        settings = self.settings
        started, begin = time.time(), time.monotonic()
        self.recorder.begin_round(started)
        if not self.fleet.online():
            self.fleet.wait_for((), settings.device_wait, log.info)
        self._meet()
        absent = self._absent()
        messages = self._configure(server_round)
        configured = time.monotonic()
        replies = self._exchange(messages)
        exchanged = time.monotonic()
        self.recorder.device_accuracy(_mean(replies, "eval-accuracy"), _mean(replies, "eval-loss"))
        useful = [r for r in replies if r.message is not None and "arrays" in r.message.content]
        if not useful:
            became = "; ".join(f"{r.device.name}: {r.outcome} {r.reason}" for r in replies)
            raise RoundError(f"round {server_round}: no device returned a model ({became})")
        arrays, _ = self.strategy.aggregate_train(
            server_round, [r.message for r in useful if r.message is not None]
        )
        if arrays is not None:
            self.weights = np.asarray(arrays[WEIGHTS].numpy(), np.float32)
        aggregated = time.monotonic()
        central_accuracy, central_loss = self._evaluate_centrally()
        end = time.monotonic()
        slowest = max(replies, key=lambda reply: reply.received)
        rows = [_device_row(server_round, reply, exchanged) for reply in [*replies, *absent]]
        row = RoundRow(
            round=server_round,
            started=started,
            accuracy=None,
            loss=None,
            central_accuracy=central_accuracy,
            central_loss=central_loss,
            seconds=end - begin,
            configure_seconds=configured - begin,
            devices_seconds=exchanged - configured,
            aggregate_seconds=aggregated - exchanged,
            evaluate_seconds=end - aggregated,
            examples=sum(row.examples for row in rows),
            devices=len(useful),
            failed=len(rows) - len(useful),
            slowest_device=slowest.device.name,
            slowest_seconds=slowest.received - slowest.sent,
        )
        self.recorder.finish_round(row, rows)
        log.info(
            "round %d/%d: accuracy %.4f, loss %.4f, %.1f s, slowest %s (%.1f s)",
            server_round,
            settings.num_server_rounds,
            central_accuracy,
            central_loss,
            row.seconds,
            row.slowest_device,
            row.slowest_seconds,
        )

    def evaluate_on_devices(self) -> None:
        """The closing exchange: the final model on the devices' test splits."""
        config = ConfigRecord(self._task(self.settings.num_server_rounds))
        content = RecordDict({"arrays": self._arrays(), "config": config})
        messages = [
            Message(content, device.node_id, MessageType.EVALUATE, ttl=self.settings.round_timeout)
            for device in self.fleet.online()
        ]
        replies = self._exchange(messages)
        accuracy, loss = _mean(replies, "eval-accuracy"), _mean(replies, "eval-loss")
        if accuracy is not None:
            self.recorder.device_accuracy(accuracy, loss)

    def describe(self) -> None:
        """Write run.yml with what is known now."""
        self.recorder.describe(
            {
                "run": self.settings.model_dump(mode="json"),
                "devices": {
                    name: {
                        **device.settings.model_dump(exclude={"device"}),
                        "examples": device.examples,
                        "shard": device.shard,
                        "labels": list(device.labels),
                    }
                    for name, device in sorted(self._met.items())
                },
                "test": {"shard": self.test.fingerprint, "examples": len(self.test.test_labels)},
                "versions": _versions(),
            }
        )

    def play(self) -> None:
        """The run from first to last."""
        self.wait_for_devices()
        self.recorder.central(*self._evaluate_centrally())
        self.describe()
        self.recorder.state("running")
        for server_round in range(1, self.settings.num_server_rounds + 1):
            self.play_round(server_round)
        self.evaluate_on_devices()
        self.learner.save(self.weights, self.recorder.directory / "model.keras")
        self.describe()
        self.recorder.state("completed")


def _versions() -> dict[str, str]:
    versions = {}
    for package in _VERSIONS:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _log_reply(reply: Reply) -> None:
    log.info(
        "%s: %s after %.1f s%s",
        reply.device.name,
        reply.outcome,
        reply.received - reply.sent,
        f" ({reply.reason})" if reply.reason else "",
    )


def _log_to_container() -> None:
    """Flower keeps what an app prints to itself; the container's log is where people look."""
    with contextlib.suppress(OSError):  # started by hand, the first process is somebody else's
        handler = logging.StreamHandler(_CONTAINER_LOG.open("a"))
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        log.addHandler(handler)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Check the configuration, then run; a failure is written to the results by its message."""
    _log_to_container()
    settings = RunSettings.parse(context.run_config)
    recorder = Recorder(settings.run_name, settings.num_server_rounds, settings.round_timeout)
    try:
        strategy = make_strategy(settings.strategy, settings.strategy_parameters)
        Run(settings, strategy, grid, recorder, load_shard(TEST_SHARD)).play()
    except BaseException as error:
        log.exception("the run has failed")
        recorder.state("failed", str(error) or type(error).__name__)
        raise
