"""The devices of a run as the server sees them: who is online, and messages to and from them.

Flower's server knows nodes by number; which device a node is, only the device can say. It is
asked once, and the same question warms its trainer up.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from flowerbed.config import DeviceSettings

log = logging.getLogger("flwr")

POLL_INTERVAL = 0.5
"""Seconds between looks for replies; Grid.send_and_receive takes 3."""
_NODE_INTERVAL = 2.0


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

    @property
    def name(self) -> str:
        """Its inventory name."""
        return self.settings.device


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


@dataclass
class Reply:
    """What became of one message.

    Attributes:
        outcome: completed, partial, out_of_memory, timeout, offline or error.
        sent, received: seconds of the monotonic clock; received is the round's end where
            nothing came.
    """

    device: Device
    outcome: str
    sent: float
    received: float
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    times: Times = field(default_factory=Times)
    message: Message | None = None


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


def _read_reply(device: Device, sent: float, message: Message) -> Reply:
    now = time.monotonic()
    if message.has_error():
        offline = message.error.code == _NODE_UNAVAILABLE
        reason = message.error.reason or f"Flower error {message.error.code}"
        return Reply(device, "offline" if offline else "error", sent, now, reason)
    content = message.content
    told = content.config_records["outcome"]
    del content["outcome"]
    reply = Reply(device, str(told["outcome"]), sent, now, str(told["reason"]), message=message)
    if "metrics" in content.metric_records:
        record = content.metric_records["metrics"]
        reply.metrics = {key: float(value) for key, value in record.items()}
        reply.times = divide(now - sent, time.time() - float(told["started"]), reply.metrics)
    return reply


class Fleet:
    """Devices that are online, and the exchange of messages with them.

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
        self._online: set[int] = set()
        self._left: set[int] = set()
        self._questions: dict[str, int] = {}
        self._next_nodes = 0.0

    # --- who is there ---------------------------------------------------------------------

    def online(self) -> list[Device]:
        """Devices that are online and have introduced themselves, by name."""
        here = [self._devices[node] for node in self._online if node in self._devices]
        return sorted(here, key=lambda device: device.name)

    def refresh(self) -> None:
        """Look for new nodes, ask them who they are, and read what others have answered."""
        now = time.monotonic()
        if now >= self._next_nodes:
            self._next_nodes = now + _NODE_INTERVAL
            self._online = set(self._grid.get_node_ids())
            asked = set(self._questions.values())
            for node in self._online - asked - self._left - set(self._devices):
                content = RecordDict({"config": ConfigRecord(self._prepare)})
                question = Message(content, node, "query", ttl=self._ttl)
                for message_id in self._push([question]):
                    self._questions[message_id] = node
        for message in self._pull(self._questions):
            node = self._questions.pop(message.metadata.reply_to_message_id)
            self._introduce(node, message)
        names = {device.name for device in self.online()}
        if names != self._names:
            self._names = names
            self._on_change(names)

    def _introduce(self, node: int, message: Message) -> None:
        if message.has_error():
            log.warning("node %d cannot say who it is: %s", node, message.error.reason)
            return
        told = message.content.config_records
        if "device" not in told:
            log.warning("node %d is not ready: %s", node, told["outcome"]["reason"])
            return
        settings = DeviceSettings.model_validate(json.loads(str(told["device"]["settings"])))
        # A device that came back has a new node; its old one will never answer.
        for old, device in list(self._devices.items()):
            if device.name == settings.device:
                log.info("%s is back", device.name)
                del self._devices[old]
                self._left.add(old)
        self._devices[node] = Device(
            node_id=node,
            settings=settings,
            shard=str(told["device"]["shard"]),
            examples=int(message.content.metric_records["metrics"]["num-examples"]),
            labels=tuple(told["device"]["labels"]),
        )
        log.info("%s is ready (%s)", settings.device, settings.device_class)

    def wait_for(
        self, names: Iterable[str], timeout: float, progress: Callable[[str], None]
    ) -> None:
        """Wait until all of `names` (or, if none are given, any device) are ready.

        Raises:
            MissingDevicesError: after `timeout` seconds.
        """
        wanted = set(names)
        deadline = time.monotonic() + timeout
        known = -1
        while True:
            self.refresh()
            ready = {device.name for device in self.online()}
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
        return [str(message_id) for message_id in self._grid.push_messages(messages)]

    def _pull(self, pending: Iterable[str]) -> Iterable[Message]:
        ids = list(pending)
        return self._grid.pull_messages(ids) if ids else ()

    def exchange(
        self,
        messages: Iterable[Message],
        timeout: float,
        on_reply: Callable[[Reply], None],
    ) -> list[Reply]:
        """Send messages to devices and wait for what becomes of each, at most `timeout` seconds.

        A device that comes back as another node while it is waited for is `offline`: the old
        node's answer will not come.
        """
        messages = list(messages)
        sent = time.monotonic()
        addressed = [self._devices[message.metadata.dst_node_id] for message in messages]
        pending = dict(zip(self._push(messages), addressed, strict=True))
        replies: list[Reply] = []

        def settle(message_id: str, reply: Reply) -> None:
            del pending[message_id]
            replies.append(reply)
            on_reply(reply)

        while pending and time.monotonic() < sent + timeout:
            for message in self._pull(pending):
                message_id = message.metadata.reply_to_message_id
                settle(message_id, _read_reply(pending[message_id], sent, message))
            self.refresh()
            for message_id, device in list(pending.items()):
                if device.node_id not in self._devices:
                    now = time.monotonic()
                    settle(message_id, Reply(device, "offline", sent, now, "came back anew"))
            if pending:
                time.sleep(POLL_INTERVAL)
        for message_id, device in list(pending.items()):
            now = time.monotonic()
            settle(message_id, Reply(device, "timeout", sent, now, f"no answer in {timeout:.0f} s"))
        return replies
