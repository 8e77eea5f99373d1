"""The course of a run: which round it is, what belongs to it, and the rows that it leaves.

A strategy that runs by `Strategy.start` is observed (`flowerbed.server.observe`), so that begin and
end of a round are known exactly. For any other ServerApp a round begins with the first message of
training and ends when the next one begins, or with the app.
"""

import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from flowerbed.results import DeviceRow, RoundRow
from flowerbed.server.fleet import Device, PendingMessage, Reply, metrics_as_json
from flowerbed.server.metric_names import MetricReader
from flowerbed.server.recorder import Recorder

log = logging.getLogger("flwr")


@dataclass
class _Round:
    """What a round has brought so far; times are seconds of the monotonic clock."""

    number: int
    started: float
    """Seconds of the wall clock."""
    begin: float
    configured: float | None = None
    closed: float | None = None
    """When the last exchange of training ended."""
    aggregated: float | None = None
    evaluate_seconds: float = 0.0
    evaluation_exchange_seconds: float = 0.0
    """Of exchanges in which devices only evaluate."""
    closings: dict[int, float] = field(default_factory=dict)
    """When the exchange of a message was over, by the message's identity."""
    asked: list[PendingMessage] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    """All replies that came in the round, those to earlier rounds' messages included."""
    absent: list[Reply] = field(default_factory=list)
    working: list[PendingMessage] = field(default_factory=list)
    """Messages still pending when training was closed."""


def _mean(pairs: Iterable[tuple[float | None, int]]) -> float | None:
    """Mean weighted by examples; equal weights where no examples are known."""
    known = [(value, weight) for value, weight in pairs if value is not None]
    if not known:
        return None
    values, weights = zip(*known, strict=True)
    return float(np.average(values, weights=weights if any(weights) else None))


def _resumed(reply: Reply, ended: _Round, asked: Iterable[float], end: float) -> float:
    """When a device was asked again (`asked`: all times), or its exchange was over."""
    closed = max(ended.closings.get(id(reply.pending), end), reply.received)
    return min((sent for sent in asked if sent >= reply.received), default=closed)


class Rounds:
    """Keeps the record of a run's rounds and messages."""

    def __init__(self, recorder: Recorder, names: MetricReader) -> None:
        self.recorder = recorder
        self.names = names
        self.planned = 0
        """Rounds that the run will have; 0 where that is unknown."""
        self.models = 0
        """Models that were aggregated in all rounds."""
        self.last_trained: list[Reply] = []
        """Replies of training in the last round that has ended."""
        self.on_end: Callable[[int], None] = lambda _: None
        """Called with the number of each round that has ended."""
        self._round: _Round | None = None
        self._last = 0
        self._lock = threading.RLock()

    @property
    def number(self) -> int:
        """The round under way, or the last one."""
        return self._round.number if self._round else self._last

    @property
    def next_number(self) -> int:
        """The round that the next message of training belongs to if nobody says otherwise."""
        if self._round and self._round.closed is None:
            return self._round.number
        return self.number + 1

    def resume(self, number: int, models: int) -> None:
        """Go on after a round of a run that was interrupted."""
        self._last, self.models = number, models

    # --- begin and end --------------------------------------------------------------------

    def begin(self, number: int) -> None:
        """Begin a round; one that is under way ends."""
        with self._lock:
            if self._round:
                if self._round.number == number:
                    return
                self.finish()
            self._round = _Round(number, time.time(), time.monotonic())
            self.recorder.begin_round(number, self._round.started)

    def absent(self, replies: list[Reply]) -> None:
        """Record devices that could not be asked when the round began."""
        with self._lock:
            if self._round:
                self._round.absent += replies

    def sent(self, messages: Iterable[PendingMessage]) -> None:
        """Record messages."""
        with self._lock:
            messages = list(messages)
            if self._round and messages:
                self._round.asked += messages
                self._round.configured = self._round.configured or messages[0].sent
            self.recorder.doing([each.device.name for each in messages], "working")

    def received(self, replies: Iterable[Reply]) -> None:
        """Record replies, in whatever round they come."""
        with self._lock:
            for reply in replies:
                if self._round:
                    self._round.replies.append(reply)
                else:
                    self.recorder.add([self._row(reply, time.monotonic())])
                self.recorder.doing(
                    [reply.device.name], "waiting" if reply.usable else reply.outcome
                )
                _log_reply(reply)

    def closed(
        self,
        exchanged: Sequence[PendingMessage],
        working: list[PendingMessage],
        *,
        trains: bool,
        used: Sequence[Reply],
    ) -> None:
        """Record that an exchange is over.

        Args:
            exchanged: its messages.
            working: those of them that are still pending.
            trains: whether it asked for training.
            used: the replies that the app is given.
        """
        with self._lock:
            now = time.monotonic()
            if self._round:
                self._round.closings |= {id(pending): now for pending in exchanged}
                if trains:
                    self._round.closed = now
                    self._round.working = working
                else:
                    begin = min(pending.sent for pending in exchanged)
                    self._round.evaluation_exchange_seconds += now - begin
            # In a message of training, the received model is that after the round before.
            number = self.number - 1 if trains else self.number
            found = [self.names.evaluated(r.metrics, trains=trains) for r in used]
            weights = [self.names.evaluation_examples(r.metrics) for r in used]
            accuracy = _mean(zip([each[0] for each in found], weights, strict=True))
            loss = _mean(zip([each[1] for each in found], weights, strict=True))
            if accuracy is not None or loss is not None:
                self.recorder.on_devices(number, accuracy, loss)

    def aggregated(self, used: Iterable[Reply]) -> None:
        """Record that these replies were aggregated in the round under way."""
        with self._lock:
            if self._round:
                for reply in used:
                    reply.aggregated = self._round.number
                self._round.aggregated = time.monotonic()

    def evaluated(self, number: int, metrics: Any, seconds: float) -> None:
        """Record the app's central evaluation; `seconds` of it were waited for."""
        values = dict(metrics or {})
        accuracy, loss = self.names.evaluated(values, trains=False)
        self.recorder.central(number, accuracy, loss)
        with self._lock:
            if self._round and self._round.number == number:
                self._round.evaluate_seconds += seconds
        shown = (f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float))
        log.info("central evaluation after round %d: %s", number, ", ".join(shown) or "nothing")

    def finish(self) -> None:
        """End the round that is under way, if any."""
        with self._lock:
            if (ended := self._round) is None:
                return
            self._round, self._last = None, ended.number
            if ended.asked or ended.absent:
                self._record(ended)
        self.on_end(ended.number)

    # --- rows -----------------------------------------------------------------------------

    def _record(self, ended: _Round) -> None:
        end = time.monotonic()
        configured = ended.configured or ended.begin
        closed = ended.closed or end
        aggregated = ended.aggregated or closed
        training = [r for r in ended.replies if r.pending.trains]
        fresh = [r for r in training if r.server_round == ended.number]
        useful = [r for r in training if r.aggregated == ended.number]
        self.last_trained, self.models = training, self.models + len(useful)
        current = fresh if any(r.server_round == ended.number for r in training) else training
        waited_for = [(r.seconds, r.device.name) for r in current]
        waited_for += [(closed - p.sent, p.device.name) for p in ended.working]
        slowest_seconds, slowest_device = max(waited_for, default=(0.0, ""))
        offline = [r for r in ended.absent if r.outcome == "offline"]
        failed = sum(not r.usable or r.outcome == "late" for r in current)
        row = RoundRow(
            round=ended.number,
            started=ended.started,
            accuracy=None,
            loss=None,
            central_accuracy=None,
            central_loss=None,
            seconds=end - ended.begin,
            configure_seconds=configured - ended.begin,
            devices_seconds=closed - configured + ended.evaluation_exchange_seconds,
            aggregate_seconds=aggregated - closed,
            evaluate_seconds=ended.evaluate_seconds,
            examples=sum(self.names.examples(r.metrics) for r in useful),
            devices=len(useful),
            failed=failed + len(ended.working) + len(offline),
            slowest_device=slowest_device,
            slowest_seconds=slowest_seconds,
        )
        asked: defaultdict[str, list[float]] = defaultdict(list)
        for pending in ended.asked:
            asked[pending.device.name].append(pending.sent)
        rows = [self._row(r, _resumed(r, ended, asked[r.device.name], end)) for r in ended.replies]
        rows += [self._row(r, r.received) for r in ended.absent]
        self.recorder.finish_round(row, rows)
        for reply in useful:
            reply.message = None  # the models of a large fleet take gigabytes
        log.info(
            "round %d%s: %.1f s, %d models, slowest %s (%.1f s)",
            ended.number,
            f"/{self.planned}" if self.planned else "",
            row.seconds,
            row.devices,
            slowest_device or "none",
            slowest_seconds,
        )

    def _row(self, reply: Reply, resumed: float) -> DeviceRow:
        """The row of a message and its reply; `resumed` by the monotonic clock."""
        names, metrics, header = self.names, reply.metrics, reply.header
        pending = reply.pending
        accuracy, loss = names.evaluated(metrics, trains=pending.trains)
        train = names.trained(metrics) if pending.trains else (None, None)
        seconds = reply.times.train_seconds
        examples = names.examples(metrics) if pending.trains else 0
        batch = names.batch_size(metrics) or header.get("batch_size")
        return DeviceRow(
            round=pending.server_round,
            type=pending.type,
            started=pending.sent + time.time() - time.monotonic(),
            device=reply.device.name,
            device_class=reply.device.device_class,
            outcome=reply.outcome,
            reason=reply.reason,
            aggregated=reply.aggregated,
            examples=examples,
            seconds=reply.seconds,
            **asdict(reply.times),
            # A device that has not replied does not wait.
            wait_seconds=max(0.0, resumed - reply.received) if header else 0.0,
            bytes_received=pending.bytes_sent if header else 0,
            bytes_sent=int(header.get("bytes_sent") or 0),
            examples_per_second=examples / seconds if seconds else 0.0,
            batch_size=batch if pending.trains and header else None,
            throttled_share=header.get("throttled_share"),
            throttled_seconds=header.get("throttled_seconds"),
            loss=loss,
            accuracy=accuracy,
            train_loss=train[1],
            train_accuracy=train[0],
            metrics=metrics_as_json(metrics),
        )

    def settle(self, replies: Iterable[Reply]) -> None:
        """Record what became of messages after the last round."""
        now = time.monotonic()
        self.recorder.add([self._row(reply, now) for reply in replies])


def could_not_be_asked(device: Device, number: int, outcome: str, reason: str) -> Reply:
    """The record of a device that a round could not ask."""
    from flwr.app import Message, MessageType, RecordDict

    now = time.monotonic()
    message = Message(RecordDict(), device.node_id, MessageType.TRAIN, group_id=str(number))
    return Reply(PendingMessage(device, number, message, now, math.inf), outcome, now, reason)


def _log_reply(reply: Reply) -> None:
    log.info(
        "%s: %s %s after %.1f s%s",
        reply.device.name,
        reply.message_type,
        reply.outcome,
        reply.seconds,
        f" ({reply.reason})" if reply.reason else "",
    )
