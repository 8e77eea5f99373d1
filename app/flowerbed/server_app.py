"""The ServerApp: one run from the first device online to the saved model."""

import contextlib
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
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
from flowerbed.fleet import (
    POLL_INTERVAL,
    Available,
    Device,
    Fleet,
    Flight,
    Reply,
    is_available,
)
from flowerbed.results import MODEL_OUTCOMES, DeviceRow, Recorder, RoundRow
from flowerbed.strategies import make_strategy, pacing_of

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


def _mean(replies: list[Reply], key: str) -> float | None:
    """Mean of a metric over replies that have it, weighted by the test examples behind it."""
    told = [(r.metrics[key], r.metrics["eval-examples"]) for r in replies if key in r.metrics]
    if not told:
        return None
    values, weights = zip(*told, strict=True)
    return float(np.average(values, weights=weights))


def _device_row(reply: Reply, aggregated: int | None, resumed: float) -> DeviceRow:
    """A device's row.

    Args:
        aggregated: round in which its model was.
        resumed: when it was asked again or the round was closed, by the monotonic clock.
    """
    metrics = reply.metrics
    train = reply.times.train_seconds
    examples = int(metrics["num-examples"]) if train else 0
    return DeviceRow(
        round=reply.flight.server_round,
        started=reply.flight.sent + time.time() - time.monotonic(),
        device=reply.device.name,
        device_class=reply.device.settings.device_class,
        outcome=reply.outcome,
        reason=reply.reason,
        aggregated=aggregated,
        examples=examples,
        seconds=reply.seconds,
        **asdict(reply.times),
        # A device that is not there does not wait.
        wait_seconds=max(0.0, resumed - reply.received) if reply.message else 0.0,
        bytes_received=int(metrics.get("bytes-received", 0)),
        bytes_sent=int(metrics.get("bytes-sent", 0)),
        examples_per_second=examples / train if train else 0.0,
        batch_size=int(metrics["batch-size"]) if train else None,
        throttled_share=metrics.get("throttled-share"),
        throttled_seconds=metrics.get("throttled-seconds"),
        loss=metrics.get("eval-loss"),
        accuracy=metrics.get("eval-accuracy"),
        train_loss=metrics.get("train-loss"),
        train_accuracy=metrics.get("train-accuracy"),
    )


@dataclass(frozen=True)
class _Exchange:
    """What went to devices and came back from them in a round."""

    asked: list[Flight]
    replies: list[Reply]
    """All that came, those to earlier messages too."""
    working: list[Flight]
    """Messages of the round that nobody waits for any more."""
    end: float

    def rows(self, server_round: int) -> list[DeviceRow]:
        """A row a reply."""
        return [
            _device_row(
                reply,
                server_round if reply.model else None,
                min(
                    (
                        flight.sent
                        for flight in self.asked
                        if flight.device.name == reply.device.name and flight.sent >= reply.received
                    ),
                    default=self.end,
                ),
            )
            for reply in self.replies
        ]


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
        self.pacing = pacing_of(strategy)
        self.recorder = recorder
        self.test = test
        self.learner = NetworkLearner(
            settings.model_settings, test.image_shape, test.classes, seed=settings.seed
        )
        self.weights = self.learner.get_weights()
        self.fleet = Fleet(grid, self._task(0), settings.device_wait, recorder.online)
        self.grid = grid
        self.pacing.begin(self.learner.trainable() > 0, settings.seed)
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

    def _available(self, device: Device, server_round: int) -> bool:
        return is_available(device.settings, self.settings.seed, server_round)

    def _ask(self, server_round: int, devices: list[Device]) -> list[Flight]:
        """Send devices what the strategy wants of them, and tell those who watch.

        Those that are not available are not shown to it: no strategy has to know of them.
        """
        self._meet()
        devices = [device for device in devices if self._available(device, server_round)]
        if not devices:
            return []
        config = ConfigRecord(
            self._task(server_round, time_limit=self.settings.round_timeout * _TIME_BOX)
        )
        messages = self.strategy.configure_train(
            server_round, self._arrays(), config, Available(self.grid, devices)
        )
        return self._send(messages, server_round)

    def _send(self, messages: Iterable[Message], server_round: int) -> list[Flight]:
        flights = self.fleet.send(messages, server_round, self.settings.round_timeout)
        self.recorder.doing([flight.device.name for flight in flights], "working")
        return flights

    def _absent(self, server_round: int) -> list[Reply]:
        """Known devices that are not online when the round begins."""
        now = time.monotonic()
        online = {device.name for device in self.fleet.online()}
        return [
            Reply(
                Flight(device, server_round, now, now),
                "offline",
                now,
                "not online when the round began",
            )
            for name, device in self._met.items()
            if name not in online
        ]

    def _unavailable(self, server_round: int) -> list[Reply]:
        """Devices that could be asked when the round begins, and are not available."""
        now = time.monotonic()
        return [
            Reply(
                Flight(device, server_round, now, now),
                "unavailable",
                now,
                f"by its availability of {device.settings.availability:g}",
            )
            for device in self.fleet.free()
            if not self._available(device, server_round)
        ]

    def _collect(self, server_round: int, counting: int) -> list[Reply]:
        """Replies that have come; those to messages of rounds before `counting` are late."""
        replies = self.fleet.collect()
        for reply in replies:
            if reply.model and reply.flight.server_round < counting:
                reply.outcome, reply.reason = "late", f"answered in round {server_round}"
            self.pacing.observe(reply)
            done = reply.outcome in MODEL_OUTCOMES
            self.recorder.doing([reply.device.name], "waiting" if done else reply.outcome)
            _log_reply(reply)
        return replies

    def _exchange(self, server_round: int) -> _Exchange:
        """Ask devices and collect replies until the strategy has what it wants."""
        pacing = self.pacing
        counting = 0 if pacing.asynchronous else server_round
        asked = self._ask(server_round, self.fleet.free())
        deadline = time.monotonic() + min(pacing.patience(), self.settings.round_timeout)
        replies: list[Reply] = []
        while True:
            replies += self._collect(server_round, counting)
            working = [f for f in self.fleet.flights() if f.server_round >= counting]
            models = sum(reply.model is not None for reply in replies)
            if pacing.is_over(models, len(working)) or time.monotonic() >= deadline:
                left = [] if pacing.asynchronous else working
                return _Exchange(asked, replies, left, time.monotonic())
            if pacing.asynchronous:
                # One that has failed would fail again at once: it is asked in the next round.
                failed = {reply.device.name for reply in replies if not reply.model}
                free = [d for d in self.fleet.free() if d.name not in failed]
                asked += self._ask(server_round, free) if free else []
            time.sleep(min(POLL_INTERVAL, max(0.0, deadline - time.monotonic())))

    def _aggregate(self, server_round: int, exchange: _Exchange, *, more: bool) -> list[Reply]:
        """Aggregate what has come; the weights stay as they are where nothing has.

        Args:
            more: whether there are devices that were not asked and may be in the next round.

        Raises:
            RoundError: nothing has, and nobody is left who might bring something.
        """
        useful = [reply for reply in exchange.replies if reply.model]
        if useful:
            arrays, _ = self.strategy.aggregate_train(server_round, [r.model for r in useful])
            if arrays is not None:
                self.weights = np.asarray(arrays[WEIGHTS].numpy(), np.float32)
        elif not self.fleet.flights() and not more:
            became = "; ".join(f"{r.device.name}: {r.outcome} {r.reason}" for r in exchange.replies)
            raise RoundError(f"round {server_round}: no device returned a model ({became})")
        else:
            log.warning("round %d: no device returned a model in time", server_round)
        return useful

    def play_round(self, server_round: int) -> None:
        """Ask devices, collect their models, aggregate, evaluate, record.

        Raises:
            RoundError: no device returned a model, and none will.
        """
        settings = self.settings
        # Where all are at work on earlier messages, they come back or their messages expire.
        self.fleet.wait_for((), settings.device_wait + settings.round_timeout, log.info)
        started, begin = time.time(), time.monotonic()
        self.recorder.begin_round(started)
        self._meet()
        absent, unavailable = self._absent(server_round), self._unavailable(server_round)
        exchange = self._exchange(server_round)
        configured = exchange.asked[0].sent if exchange.asked else begin
        fresh = [r for r in exchange.replies if r.flight.server_round == server_round]
        if (accuracy := _mean(fresh, "eval-accuracy")) is not None:
            self.recorder.device_accuracy(accuracy, _mean(fresh, "eval-loss"))
        useful = self._aggregate(server_round, exchange, more=bool(unavailable))
        aggregated = time.monotonic()
        central_accuracy, central_loss = self._evaluate_centrally()
        end = time.monotonic()
        current = exchange.replies if self.pacing.asynchronous else fresh
        waited_for = [(r.seconds, r.device.name) for r in current]
        waited_for += [(exchange.end - f.sent, f.device.name) for f in exchange.working]
        slowest_seconds, slowest_device = max(waited_for, default=(0.0, ""))
        absent_rows = [_device_row(r, None, r.received) for r in (*absent, *unavailable)]
        row = RoundRow(
            round=server_round,
            started=started,
            accuracy=None,
            loss=None,
            central_accuracy=central_accuracy,
            central_loss=central_loss,
            seconds=end - begin,
            configure_seconds=configured - begin,
            devices_seconds=exchange.end - configured,
            aggregate_seconds=aggregated - exchange.end,
            evaluate_seconds=end - aggregated,
            examples=sum(int(reply.metrics["num-examples"]) for reply in useful),
            devices=len(useful),
            failed=len(current) - len(useful) + len(exchange.working) + len(absent),
            slowest_device=slowest_device,
            slowest_seconds=slowest_seconds,
        )
        self.recorder.finish_round(row, [*exchange.rows(server_round), *absent_rows])
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
        """The closing exchange: the final model on the test splits of the devices that are free.

        Models that come meanwhile, or not at all, are late.
        """
        closing = self.settings.num_server_rounds + 1
        config = ConfigRecord(self._task(self.settings.num_server_rounds))
        content = RecordDict({"arrays": self._arrays(), "config": config})
        self.fleet.refresh()
        asked = self._send(
            [
                Message(content, device.node_id, MessageType.EVALUATE)
                for device in self.fleet.free()
            ],
            closing,
        )
        replies = self._collect(closing, closing)
        while any(flight.server_round == closing for flight in self.fleet.flights()):
            time.sleep(POLL_INTERVAL)
            replies += self._collect(closing, closing)
        now = time.monotonic()
        evaluated = [reply for reply in replies if reply.flight in asked]
        late = [reply for reply in replies if reply.flight not in asked]
        late += [Reply(f, "late", now, "at work when the run ended") for f in self.fleet.flights()]
        self.recorder.settle(_device_row(reply, None, now) for reply in late)
        accuracy, loss = _mean(evaluated, "eval-accuracy"), _mean(evaluated, "eval-loss")
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
        reply.seconds,
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
