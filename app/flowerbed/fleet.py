"""The devices of a run as the server sees them: who is online, and messages to and from them.

Flower's server knows nodes by number; which device a node is, only the device can say. It is
asked once, and the same question warms its trainer up.
"""

import json
import logging
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from flowerbed.config import DeviceSettings
from flowerbed.results import MODEL_OUTCOMES

log = logging.getLogger("flwr")

POLL_INTERVAL = 0.5
"""Seconds between looks for replies; Grid.send_and_receive takes 3."""
_NODE_INTERVAL = 2.0
_PUSHES = 3
_MARGIN = 10.0
"""Seconds by which a message outlives its time here: when Flower's ends, it answers for the device
with an error like others."""


@dataclass(frozen=True)
class Device:
    """A device that has introduced itself."""

    node_id: int
    settings: DeviceSettings
    shard: str
    """Fingerprint of its shard."""
    examples: int
    labels: tuple[int, ...]
    """Training images of each class."""
    examples_per_second: float
    """How fast it trains, measured when it introduced itself."""
    receive_seconds: float
    """What the question who it is took on its way."""

    @property
    def name(self) -> str:
        """Its inventory name."""
        return self.settings.device


def is_available(device: DeviceSettings, seed: int, server_round: int) -> bool:
    """Whether a device may be asked in a round, drawn by its availability.

    From nothing but its arguments: the same whatever else is drawn, and whoever else is there.
    """
    name = zlib.crc32(device.device.encode())
    return bool(np.random.default_rng((seed, server_round, name)).random() < device.availability)


@dataclass(frozen=True)
class Times:
    """Where the seconds between a message and its reply went; all 0 where no model came back.

    Receive and send meet between two machines' clocks: their sum is exact, the border between
    them as good as the clocks.
    """

    receive_seconds: float = 0.0
    """Until a ClientApp had it: the SuperNode's poll, transport, start of the process."""
    queue_seconds: float = 0.0
    """Until the trainer began: handoff, waiting for the trainer."""
    evaluate_seconds: float = 0.0
    train_seconds: float = 0.0
    send_seconds: float = 0.0
    """From the trainer's end until the server had read the reply."""


@dataclass(frozen=True)
class Flight:
    """A message on its way, and the reply that is to come.

    Attributes:
        server_round: round that the message is of.
        sent, expires: seconds of the monotonic clock.
    """

    device: Device
    server_round: int
    sent: float
    expires: float


@dataclass
class Reply:
    """What became of one message. There is one of each message, whatever happens.

    Attributes:
        outcome: one of `flowerbed.results.OUTCOMES`.
        received: seconds of the monotonic clock; where nothing came, when it was given up.
    """

    flight: Flight
    outcome: str
    received: float
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    times: Times = field(default_factory=Times)
    message: Message | None = None

    @property
    def device(self) -> Device:
        """Who was asked."""
        return self.flight.device

    @property
    def seconds(self) -> float:
        """From the message to its reply."""
        return self.received - self.flight.sent

    @property
    def model(self) -> Message | None:
        """The reply itself, where it brought a model that counts."""
        brought = self.message is not None and "arrays" in self.message.content
        return self.message if brought and self.outcome in MODEL_OUTCOMES else None


class MissingDevicesError(RuntimeError):
    """Devices did not come online in time; the message names them."""


# Flower's error codes (flwr.common.constant.ErrorCode is not public).
_NODE_UNAVAILABLE = 5


def divide(seconds: float, since_started: float, metrics: dict[str, float]) -> Times:
    """Divide the time that a reply took.

    Args:
        seconds: from message sent to reply read, by the server's clock.
        since_started: from the ClientApp's start, by the device's wall clock, to now, by the
            server's.
        metrics: of the reply.
    """
    queue = metrics.get("queue-seconds", 0.0)
    evaluate = metrics.get("evaluate-seconds", 0.0)
    train = metrics.get("train-seconds", 0.0)
    transport = max(0.0, seconds - queue - evaluate - train)
    receive = min(max(0.0, seconds - since_started), transport)
    return Times(receive, queue, evaluate, train, transport - receive)


def _read_reply(flight: Flight, message: Message) -> Reply:
    now = time.monotonic()
    if message.has_error():
        offline = message.error.code == _NODE_UNAVAILABLE
        reason = message.error.reason or f"Flower error {message.error.code}"
        return Reply(flight, "offline" if offline else "error", now, reason)
    content = message.content
    told = content.config_records["outcome"]
    del content["outcome"]
    reply = Reply(flight, str(told["outcome"]), now, str(told["reason"]), message=message)
    if "metrics" in content.metric_records:
        record = content.metric_records["metrics"]
        reply.metrics = {key: float(value) for key, value in record.items()}
        reply.times = divide(reply.seconds, time.time() - float(told["started"]), reply.metrics)
    return reply


class Available(Grid):
    """The grid as strategies see it: only devices that may be asked now.

    Args:
        devices: online, known, and not at work on an earlier message.
    """

    def __init__(self, grid: Grid, devices: list[Device]) -> None:
        self._grid = grid
        self.devices = devices

    def get_node_ids(self) -> Iterable[int]:
        """Their nodes."""
        return [device.node_id for device in self.devices]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


# Strategies only ask who is there; the rest of the interface stays the grid's own.
Available.__abstractmethods__ = frozenset()


class Fleet:
    """Devices that are online, and the messages that are on their way to and from them.

    A message is on its way until it is answered, given up or expired, over as many rounds as that
    takes. A device has one at a time.

    Args:
        prepare: configuration of the message that asks a new node who it is.
        ttl: seconds in which it may answer.
        on_change: told the names of the devices online whenever one comes or goes.
    """

    def __init__(
        self,
        grid: Grid,
        prepare: dict[str, Any],
        ttl: float,
        on_change: Callable[[set[str]], None],
    ) -> None:
        self._grid = grid
        self._prepare = prepare
        self._ttl = ttl
        self._on_change = on_change
        self._names: set[str] = set()
        self._devices: dict[int, Device] = {}
        self._questions: dict[str, tuple[int, float]] = {}
        self._sessions: dict[int, str] = {}
        self._flights: dict[str, Flight] = {}
        self._settled: list[Reply] = []
        self._next_nodes = 0.0

    # --- who is there ---------------------------------------------------------------------

    def online(self) -> list[Device]:
        """Devices that are online and have introduced themselves, by name."""
        return sorted(self._devices.values(), key=lambda device: device.name)

    def free(self) -> list[Device]:
        """Those of them that are not at work on a message."""
        busy = {flight.device.node_id for flight in self._flights.values()}
        return [device for device in self.online() if device.node_id not in busy]

    def refresh(self) -> None:
        """Look for new nodes, ask them who they are, and read what others have answered."""
        now = time.monotonic()
        if now >= self._next_nodes:
            self._next_nodes = now + _NODE_INTERVAL
            online = {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}
            self._forget_all_but(online)
            asked = {node for node, _ in self._questions.values()}
            for node in online.keys() - asked - set(self._devices):
                self._sessions[node] = online[node]
                content = RecordDict({"config": ConfigRecord(self._prepare)})
                question = Message(content, node, "query", ttl=self._ttl)
                (message_id,) = self._push([question])
                if message_id:
                    self._questions[message_id] = node, time.time()
        for message in self._pull(self._questions):
            node, asked_at = self._questions.pop(message.metadata.reply_to_message_id)
            self._introduce(node, message, asked_at)
        self._settle()
        names = {device.name for device in self.online()}
        if names != self._names:
            self._names = names
            self._on_change(names)

    def _forget_all_but(self, online: dict[int, str]) -> None:
        """Forget devices that are gone, if only for a moment.

        One that comes back is the same node, but knows nothing of what it was sent.

        Args:
            online: when each node that is online has connected.
        """
        gone = {node for node, since in self._sessions.items() if online.get(node) != since}
        for node in gone & set(self._devices):
            log.info("%s is gone", self._devices.pop(node).name)
        self._questions = {ask: to for ask, to in self._questions.items() if to[0] not in gone}
        for node in gone:
            del self._sessions[node]

    def _introduce(self, node: int, message: Message, asked_at: float) -> None:
        if message.has_error():
            log.warning("node %d cannot say who it is: %s", node, message.error.reason)
            return
        told = message.content.config_records
        if "device" not in told:
            log.warning("node %d is not ready: %s", node, told["outcome"]["reason"])
            return
        settings = DeviceSettings.model_validate(json.loads(str(told["device"]["settings"])))
        metrics = message.content.metric_records["metrics"]
        self._devices[node] = Device(
            node_id=node,
            settings=settings,
            shard=str(told["device"]["shard"]),
            examples=int(metrics["num-examples"]),
            labels=tuple(told["device"]["labels"]),
            examples_per_second=float(metrics["examples-per-second"]),
            receive_seconds=max(0.0, float(told["outcome"]["started"]) - asked_at),
        )
        log.info("%s is ready (%s)", settings.device, settings.device_class)

    def wait_for(
        self, names: Iterable[str], timeout: float, progress: Callable[[str], None]
    ) -> None:
        """Wait until all of `names` (or, if none are given, any device) are free to be asked.

        Raises:
            MissingDevicesError: after `timeout` seconds.
        """
        wanted = set(names)
        deadline = time.monotonic() + timeout
        known = -1
        while True:
            self.refresh()
            ready = {device.name for device in self.free()}
            if ready >= wanted and ready:
                return
            if len(ready) != known:
                known = len(ready)
                progress(f"{known} of {len(wanted) or 'any'} devices are ready")
            if time.monotonic() > deadline:
                missing = ", ".join(sorted(wanted - ready)) or "every one"
                raise MissingDevicesError(
                    f"not ready after {timeout:.0f} s: {missing}. Look at the log of their "
                    "containers (docker logs flowerbed-device-NAME) on their machines; a slow "
                    "machine may need a longer training_device_wait."
                )
            time.sleep(POLL_INTERVAL)

    # --- messages -------------------------------------------------------------------------

    def _push(self, messages: list[Message]) -> list[str]:
        """Hand messages to Flower; their ids, empty where it has not taken one."""
        for _ in range(_PUSHES):
            try:
                return [str(message_id or "") for message_id in self._grid.push_messages(messages)]
            except ObjectPushError as error:
                # The SuperLink has been restarted between a message and its parts, or is so slow
                # that they have expired.
                log.warning("messages are sent again: %s", error)
        return [""] * len(messages)

    def _pull(self, pending: Iterable[str]) -> Iterable[Message]:
        ids = list(pending)
        return self._grid.pull_messages(ids) if ids else ()

    def flights(self) -> list[Flight]:
        """The messages that are on their way."""
        return list(self._flights.values())

    def send(self, messages: Iterable[Message], server_round: int, ttl: float) -> list[Flight]:
        """Send messages of a round to devices that are free; they expire after `ttl` seconds."""
        # Flower's strategies leave time to live and group open.
        addressed = [
            Message(
                message.content,
                message.metadata.dst_node_id,
                message.metadata.message_type,
                ttl=ttl + _MARGIN,
                group_id=str(server_round),
            )
            for message in messages
        ]
        now = time.monotonic()
        flights = [
            Flight(self._devices[message.metadata.dst_node_id], server_round, now, now + ttl)
            for message in addressed
        ]
        for message_id, flight in zip(self._push(addressed), flights, strict=True):
            if message_id:
                self._flights[message_id] = flight
            else:
                self._settled.append(Reply(flight, "offline", now, "Flower knows it no more"))
        return flights

    def _settle(self) -> None:
        """Read the replies that are there, and give up those that will not come."""
        for message in self._pull(self._flights):
            flight = self._flights.pop(message.metadata.reply_to_message_id)
            self._settled.append(_read_reply(flight, message))
        now = time.monotonic()
        for message_id, flight in list(self._flights.items()):
            if self._devices.get(flight.device.node_id) is not flight.device:
                reply = Reply(flight, "offline", now, "its connection was lost")
            elif now >= flight.expires:
                patience = flight.expires - flight.sent
                reply = Reply(flight, "timeout", now, f"no answer in {patience:.0f} s")
            else:
                continue
            del self._flights[message_id]
            self._settled.append(reply)

    def collect(self) -> list[Reply]:
        """What has become of messages since the last time, each once."""
        self.refresh()
        replies, self._settled = self._settled, []
        return replies
