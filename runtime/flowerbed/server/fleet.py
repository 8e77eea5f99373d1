"""The devices of a run as the server sees them: who is online, and messages to and from them.

Flower's server knows nodes by number. Which device a node is, only the device can say: it is asked
once, and the same question makes it load the app. All messages are envelopes, see
`flowerbed.messages`.
"""

import json
import logging
import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from flowerbed.flower import NODE_UNAVAILABLE, ObjectPushError
from flowerbed.messages import (
    array_bytes,
    as_numpy,
    block,
    is_sealed,
    pack,
    seal,
    unpack,
    unseal,
)
from flowerbed.provenance import DataMismatchError, common_origin
from flowerbed.results import MODEL_OUTCOMES
from flowerbed.server.metric_names import MetricReader
from flowerbed.settings import DeviceSettings

log = logging.getLogger("flwr")
T = TypeVar("T")

INTRODUCTION = "query.flowerbed"
"""Type of the lab's own messages; no app's function has this name."""
_NODE_INTERVAL = 2.0
_PUSHES = 3
_MARGIN = 10.0
"""Seconds by which a message outlives its time here: when Flower's own time to live ends, Flower
replies for the device with an error."""
_READERS = 4
_READ_AT_ONCE = 32
"""Messages that one reader asks for at once; the time of their arrival is taken together."""
_FAREWELL = 30.0
_RECONNECT = 1.0
"""Seconds between two attempts to reach the SuperLink."""
_PATIENCE = 600.0
"""Seconds after which a SuperLink that cannot be reached ends the run."""
_LAST = 3
"""Replies of a device by which the time of the next one is judged."""
_INTRODUCTIONS = 3
"""Attempts of a device to get ready, after which the server no longer waits for it."""


@dataclass(frozen=True)
class Device:
    """A device that has introduced itself.

    Attributes:
        shard: the record of the data that the lab has placed on it; empty where there is none.
        metrics: what the app's `query.warm_up` has reported.
        environment: processor, versions and the like.
        receive_seconds: time that the introduction took on its way.
    """

    node_id: int
    settings: DeviceSettings
    shard: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    receive_seconds: float = 0.0

    @property
    def name(self) -> str:
        """Name in the inventory."""
        return self.settings.device

    @property
    def device_class(self) -> str:
        """Class in the inventory."""
        return self.settings.device_class

    @property
    def examples(self) -> int:
        """Training examples that it holds; 0 where that is unknown."""
        return int(self.metrics.get("num-examples", self.shard.get("train_examples", 0)))

    @property
    def origin(self) -> Mapping[str, Any]:
        """What its data were made from; empty where the lab has placed none."""
        return self.shard.get("origin") or {}

    @property
    def examples_per_second(self) -> float:
        """Speed of its training before the first round; 0 where that is unknown."""
        return float(self.metrics.get("examples-per-second", 0.0))


def is_available(device: DeviceSettings, seed: int, server_round: int, draw: int = 0) -> bool:
    """Draw whether a device may be asked in a round, by its availability.

    The result depends on nothing but the arguments: it is the same whatever else is drawn, and
    whichever other devices there are.
    """
    if device.availability >= 1:
        return True
    name = zlib.crc32(device.device.encode())
    seeds = (seed, server_round, name, draw) if draw else (seed, server_round, name)
    return bool(np.random.default_rng(seeds).random() < device.availability)


@dataclass(frozen=True)
class ReplyTimes:
    """Where the seconds between a message and its reply went; all 0 where there was no reply.

    `receive` and `send` meet between two machines' clocks: their sum is exact, the border between
    them as good as the clocks.
    """

    receive_seconds: float = 0.0
    """Until Flower's process for the message ran on the device."""
    queue_seconds: float = 0.0
    """From there until the worker began: hand-off, loading the app, waiting for the worker."""
    evaluate_seconds: float = 0.0
    train_seconds: float = 0.0
    send_seconds: float = 0.0
    """From the end of the work until the server had read the reply."""


@dataclass(frozen=True, eq=False)
class PendingMessage:
    """A message that was sent, and the reply that is to come.

    Attributes:
        message: as Flower has sent it.
        shapes: record and key of each array that it carries, with its shape.
        sent, expires: seconds of the monotonic clock.
    """

    device: Device
    server_round: int
    message: Message
    sent: float
    expires: float
    bytes_sent: int = 0
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def type(self) -> str:
        """Type of the message."""
        return str(self.message.metadata.message_type)

    @property
    def trains(self) -> bool:
        """Whether it asks for training."""
        return self.type.partition(".")[0] == str(MessageType.TRAIN)


@dataclass(eq=False)
class Reply:
    """What became of one message. There is exactly one for each message, whatever happens.

    Attributes:
        outcome: one of `flowerbed.results.OUTCOMES`.
        received: seconds of the monotonic clock at which it was read, or at which the server gave
            the message up.
        metrics: numbers of the reply by name.
        message: the reply with the app's own content, where there is a usable one.
        aggregated: round in which the strategy has aggregated it.
    """

    pending: PendingMessage
    outcome: str
    received: float
    reason: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    times: ReplyTimes = field(default_factory=ReplyTimes)
    message: Message | None = None
    aggregated: int | None = None

    @property
    def device(self) -> Device:
        """The device that was asked."""
        return self.pending.device

    @property
    def server_round(self) -> int:
        """Round in which it was asked."""
        return self.pending.server_round

    @property
    def message_type(self) -> str:
        """Type of the message."""
        return self.pending.type

    @property
    def seconds(self) -> float:
        """Seconds from the message to its reply."""
        return self.received - self.pending.sent

    @property
    def usable(self) -> bool:
        """Whether the strategy may have it."""
        return self.outcome in MODEL_OUTCOMES

    def reject(self, outcome: str, reason: str) -> None:
        """Give it another outcome, so that no strategy uses it."""
        self.outcome, self.reason, self.message = outcome, reason, None


class MissingDevicesError(RuntimeError):
    """Devices did not come online in time; the message names them."""


class AppError(RuntimeError):
    """The app cannot be loaded on a device; the message has the app's own traceback."""


def divide(seconds: float, since_started: float, busy: float) -> tuple[float, float]:
    """Divide the time that a reply was on its way into receiving and sending.

    Args:
        seconds: from message sent to reply read, by the server's clock.
        since_started: from the start of the device's process for the message, by the device's wall
            clock, until now, by the server's.
        busy: seconds on the device in between.
    """
    transport = max(0.0, seconds - busy)
    receive = min(max(0.0, seconds - since_started), transport)
    return receive, transport - receive


def _times(pending: PendingMessage, reply: Reply, names: MetricReader) -> ReplyTimes:
    """The parts of a reply's time."""
    queue, work = float(reply.header["queue_seconds"]), float(reply.header["work_seconds"])
    train, evaluate = names.work_seconds(reply.metrics, work, trains=pending.trains)
    since_started = time.time() - float(reply.header["started"])
    receive, send = divide(reply.seconds, since_started, queue + train + evaluate)
    return ReplyTimes(receive, queue, evaluate, train, send)


def numbers_of(records: RecordDict) -> dict[str, Any]:
    """All metrics of a reply, numbers and lists of them, by name.

    Flower's older clients put theirs into a ConfigRecord. Where records share a name, the later
    one's is prefixed with the record's name.
    """
    found: dict[str, Any] = {}
    sources = list(records.metric_records.items())
    sources += [item for item in records.config_records.items() if item[0].endswith("metrics")]
    for name, record in sources:
        for key, value in record.items():
            if isinstance(value, int | float | list):
                found[f"{name}.{key}" if key in found else str(key)] = value
    return found


def _problem(pending: PendingMessage, content: RecordDict) -> tuple[str, str] | None:
    """Why a reply of training must not reach a strategy: its outcome and the reason."""
    arrays = as_numpy(content)
    for name, record in arrays.items():
        for key, array in record.items():
            if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
                return "diverged", f"array {key!r} of {name!r} holds numbers that are not finite"
    if len(arrays) == len(pending.shapes) == 1:
        (sent,), (got,) = pending.shapes.values(), arrays.values()
        if len(sent) == len(got):
            # Flower's older clients number their arrays anew.
            keys = zip(sent, sent if set(sent) == set(got) else got, strict=True)
            for key, its_key in keys:
                if sent[key] != got[its_key].shape:
                    return "error", (
                        f"array {its_key!r} came back with shape {got[its_key].shape}, and was "
                        f"sent with {sent[key]}"
                    )
    return None


class Fleet:
    """Devices that are online, and the messages on their way to and from them.

    A message is pending until it is answered, given up or expired, over as many rounds as that
    takes. A device has one at a time.

    Args:
        names: finds the app's metrics.
        ttl: seconds in which a device may introduce itself.
        on_change: called with the names of the devices online whenever one comes or goes.
    """

    def __init__(
        self,
        grid: Grid,
        names: MetricReader,
        ttl: float,
        on_change: Callable[[set[str]], None] = lambda _: None,
    ) -> None:
        self._grid = grid
        self._names = names
        self._ttl = ttl
        self._on_change = on_change
        self._online: set[str] = set()
        self._devices: dict[int, Device] = {}
        self._questions: dict[str, tuple[int, float]] = {}
        self._refused: set[int] = set()
        """Nodes with other data than those of the run."""
        self._sessions: dict[int, str] = {}
        self._failures: dict[str, list[str]] = {}
        """Name of a device to why each of its attempts to get ready has failed."""
        self._pending: dict[str, PendingMessage] = {}
        self._settled: list[Reply] = []
        self._send_seconds: dict[str, deque[float]] = {}
        """What replies of each device have taken on their way lately."""
        self._next_nodes = 0.0
        self._readers = ThreadPoolExecutor(_READERS, "reader")
        self.origin: Mapping[str, Any] | None = None
        """Of the run's data, once it is known: devices with other data cannot join."""
        self.app_error = ""
        """Why a device could not load the app; empty where none has failed."""

    # --- who is there ---------------------------------------------------------------------

    def online(self) -> list[Device]:
        """Devices that are online and have introduced themselves, by name."""
        return sorted(self._devices.values(), key=lambda device: device.name)

    def free(self) -> list[Device]:
        """Those of them that are not at work on a message."""
        busy = {pending.device.node_id for pending in self._pending.values()}
        return [device for device in self.online() if device.node_id not in busy]

    def device(self, node_id: int) -> Device | None:
        """The device of a node, if it is online."""
        return self._devices.get(node_id)

    def refresh(self) -> None:
        """Look for new nodes, ask them who they are, and read what has been answered."""
        now = time.monotonic()
        if now >= self._next_nodes:
            self._next_nodes = now + _NODE_INTERVAL
            nodes = self.patiently(self._grid.get_nodes)
            online = {node.node_id: node.last_activated_at for node in nodes}
            self._forget_all_but(online)
            asked = {node for node, _ in self._questions.values()} | self._refused
            new = [node for node in online if node not in asked and node not in self._devices]
            self._sessions |= {node: online[node] for node in new}
            question = seal({"introduce": True})
            questions = [Message(question, node, INTRODUCTION, ttl=self._ttl) for node in new]
            for message_id, node in zip(self._push(questions), new, strict=True):
                if message_id:
                    self._questions[message_id] = node, time.time()
        for message in self._pull(self._questions):
            node, asked_at = self._questions.pop(message.metadata.reply_to_message_id)
            self._introduce(node, message, asked_at)
        self._settle()
        names = {device.name for device in self._devices.values()}
        if names != self._online:
            self._online = names
            self._on_change(names)

    def _forget_all_but(self, online: Mapping[int, str]) -> None:
        """Forget devices that are gone, if only for a moment.

        A device that comes back is the same node, but knows nothing of what it was sent.

        Args:
            online: when each node that is online has connected.
        """
        gone = {node for node, since in self._sessions.items() if online.get(node) != since}
        for node in gone & set(self._devices):
            log.info("%s is gone", self._devices.pop(node).name)
        self._questions = {ask: to for ask, to in self._questions.items() if to[0] not in gone}
        self._refused -= gone
        for node in gone:
            del self._sessions[node]

    def _introduce(self, node: int, message: Message, asked_at: float) -> None:
        if message.has_error() or not is_sealed(message.content):
            reason = message.error.reason if message.has_error() else "it answered as an app does"
            log.warning("node %d cannot say who it is: %s", node, reason)
            return
        header, _ = unseal(message.content)
        settings = DeviceSettings.parse(header["node_config"])
        if header["outcome"] not in MODEL_OUTCOMES:
            log.warning("%s is not ready: %s", settings.device, header["reason"])
            self._failures.setdefault(settings.device, []).append(header["reason"])
            if trace := header.get("traceback"):
                self.app_error = f"{settings.device}: {header['reason']}\n{trace}"
            return
        self._failures.pop(settings.device, None)
        device = Device(
            node_id=node,
            settings=settings,
            shard=header.get("shard") or {},
            metrics=header.get("warm_up") or {},
            environment=header.get("environment") or {},
            receive_seconds=max(0.0, float(header["started"]) - asked_at),
        )
        if self.origin is not None:
            try:
                common_origin({"the run": self.origin, device.name: device.origin})
            except DataMismatchError as error:
                log.warning("%s cannot take part: %s", device.name, error)
                self._refused.add(node)
                return
        self._devices[node] = device
        log.info("%s is ready (%s)", settings.device, settings.device_class)

    def wait_for(
        self, names: Iterable[str], timeout: float, progress: Callable[[str], None]
    ) -> None:
        """Wait until all devices of `names` (if there are none: any device) are free to be asked.

        Raises:
            MissingDevicesError: after `timeout` seconds.
            AppError: a device cannot load the app.
        """
        wanted = set(names)
        deadline = time.monotonic() + timeout
        known = -1
        while True:
            self.refresh()
            ready = {device.name for device in self.free()}
            if ready >= wanted and ready:
                return
            if self.app_error:
                raise AppError(f"the app cannot be loaded on {self.app_error}")
            if len(ready) != known:
                known = len(ready)
                progress(f"{known} of {len(wanted) or 'any'} devices are ready")
            missing = sorted(wanted - ready)
            failures = {name: self._failures.get(name, []) for name in missing}
            if missing and all(len(each) >= _INTRODUCTIONS for each in failures.values()):
                reasons = "; ".join(f"{name}: {each[-1]}" for name, each in failures.items())
                raise MissingDevicesError(f"not ready after {_INTRODUCTIONS} attempts: {reasons}")
            if time.monotonic() > deadline:
                reasons = ", ".join(
                    f"{name} ({each[-1]})" if each else name for name, each in failures.items()
                )
                raise MissingDevicesError(
                    f"not ready after {timeout:.0f} s: {reasons or 'every device'}. Look at the "
                    "log of their containers (docker logs flowerbed-device-NAME) on their "
                    "machines; a slow machine may need a longer training_device_wait."
                )
            time.sleep(0.25)

    def say_goodbye(self) -> None:
        """Tell the devices that the run is over, so that each can make itself ready for the next.

        Nobody waits for a reply.
        """
        end = seal({"end": True})
        self._push([Message(end, d.node_id, INTRODUCTION, ttl=_FAREWELL) for d in self.free()])
        self._readers.shutdown(wait=False)

    # --- messages -------------------------------------------------------------------------

    def patiently(self, call: Callable[..., Iterable[T]], *arguments: Any) -> Iterable[T]:
        """Call Flower's Grid, again and again while the SuperLink cannot be reached.

        Flower tries again by itself where a connection is refused or breaks. It gives up where a
        TLS handshake times out because the SuperLink stands still: it takes any error that has to
        do with TLS for a wrong certificate.

        Raises:
            httpx.TransportError: the SuperLink was out of reach for `_PATIENCE` seconds.
        """
        begin = time.monotonic()
        while True:
            try:
                return call(*arguments)
            except httpx.TransportError as error:
                waited = time.monotonic() - begin
                if waited > _PATIENCE:
                    raise
                log.warning("the SuperLink does not answer (%.0f s): %r", waited, error)
                time.sleep(_RECONNECT)

    def _push(self, messages: list[Message]) -> list[str]:
        """Hand messages to Flower; return their ids, empty where Flower has not taken one."""
        if not messages:
            return []
        for _ in range(_PUSHES):
            try:
                ids = self.patiently(self._grid.push_messages, messages)
                return [str(message_id or "") for message_id in ids]
            except ObjectPushError as error:
                # The SuperLink was restarted between a message and its parts, or is so slow that
                # they have expired.
                log.warning("messages are sent again: %s", error)
        return [""] * len(messages)

    def _pull(self, wanted: Iterable[str]) -> list[Message]:
        """Read the replies that have come; several are read at the same time."""
        ids = list(wanted)
        if len(ids) <= 1:
            return self._read_from_grid(ids) if ids else []
        size = min(_READ_AT_ONCE, math.ceil(len(ids) / _READERS))
        parts = [ids[start : start + size] for start in range(0, len(ids), size)]
        return [m for part in self._readers.map(self._read_from_grid, parts) for m in part]

    def _read_from_grid(self, ids: list[str]) -> list[Message]:
        return list(self.patiently(self._grid.pull_messages, ids))

    def pending(self) -> list[PendingMessage]:
        """The messages on their way."""
        return list(self._pending.values())

    def send(
        self, messages: Iterable[Message], server_round: int, ttl: float
    ) -> dict[str, PendingMessage]:
        """Send an app's messages of a round; they expire after `ttl` seconds.

        Returns:
            Pending messages by their ids. A message to a node that is gone is settled at once.
        """
        now = time.monotonic()
        packed: dict[tuple[int, ...], tuple[Any, int, dict[str, dict[str, tuple[int, ...]]]]] = {}
        addressed: list[Message] = []
        entries: list[PendingMessage] = []
        for message in messages:
            content, metadata = message.content, message.metadata
            device = self._devices.get(metadata.dst_node_id)
            if device is None:
                raise ValueError(f"a message to node {metadata.dst_node_id}, which is not online")
            header, blocks = pack(content)
            # Strategies send the same model to all devices: it is put together once.
            key = tuple(map(id, blocks))
            if key not in packed:
                shapes = {
                    name: {key: array.shape for key, array in record.items()}
                    for name, record in as_numpy(content).items()
                }
                packed[key] = block(b"".join(blocks)), array_bytes(content), shapes
            data, size, shapes = packed[key]
            outgoing = Message(
                seal(
                    {"records": header, "reply_seconds": self._reply_seconds(device)},
                    data if blocks else b"",
                ),
                metadata.dst_node_id,
                metadata.message_type,
                # Flower's strategies set neither time to live nor group.
                ttl=ttl + _MARGIN,
                group_id=str(server_round),
            )
            addressed.append(outgoing)
            entries.append(
                PendingMessage(device, server_round, outgoing, now, now + ttl, size, shapes)
            )
        sent: dict[str, PendingMessage] = {}
        for message_id, pending in zip(self._push(addressed), entries, strict=True):
            if message_id:
                sent[message_id] = pending
            else:
                self._settled.append(Reply(pending, "offline", now, "Flower has lost the device"))
        self._pending |= sent
        return sent

    def _reply_seconds(self, device: Device) -> float:
        """Seconds that a device must be ready before its message expires, for its reply."""
        return max(self._send_seconds.get(device.name, ()), default=0.0)

    def _read(self, pending: PendingMessage, message: Message) -> Reply:
        now = time.monotonic()
        if message.has_error():
            offline = message.error.code == NODE_UNAVAILABLE
            reason = message.error.reason or f"Flower error {message.error.code}"
            return Reply(pending, "offline" if offline else "error", now, reason)
        header, data = unseal(message.content)
        reply = Reply(pending, header["outcome"], now, header["reason"], header=header)
        if header.get("records") is None:
            return reply
        message.content = unpack(header.pop("records"), data)
        reply.message = message
        reply.metrics = numbers_of(message.content)
        reply.times = _times(pending, reply, self._names)
        sent = self._send_seconds.setdefault(reply.device.name, deque(maxlen=_LAST))
        sent.append(reply.times.send_seconds)
        if header.get("recycled"):
            reply.reason = "; ".join(filter(None, (reply.reason, header["recycled"])))
        if not pending.trains:
            return reply
        if problem := _problem(pending, message.content) or self._names.problem(reply.metrics):
            reply.reject(*problem)
        elif self._names.partial(reply.metrics):
            reply.outcome = "partial"
        return reply

    def _settle(self) -> None:
        """Read the replies that are there, and give up those that will not come."""
        for message in self._pull(self._pending):
            pending = self._pending.pop(message.metadata.reply_to_message_id)
            self._settled.append(self._read(pending, message))
        now = time.monotonic()
        for message_id, pending in list(self._pending.items()):
            if self._devices.get(pending.device.node_id) is not pending.device:
                reply = Reply(pending, "offline", now, "its connection was lost")
            elif now >= pending.expires:
                waited = pending.expires - pending.sent
                reply = Reply(pending, "timeout", now, f"no reply in {waited:.0f} s")
            else:
                continue
            del self._pending[message_id]
            self._settled.append(reply)

    def collect(self) -> list[Reply]:
        """What has become of messages since the last call, each once."""
        self.refresh()
        replies, self._settled = self._settled, []
        return replies


def metrics_as_json(metrics: Mapping[str, Any]) -> str:
    """A reply's metrics as devices.csv holds them; what is not finite becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(each) for each in value]
        return value if not isinstance(value, float) or math.isfinite(value) else None

    return json.dumps({key: plain(value) for key, value in metrics.items()})
