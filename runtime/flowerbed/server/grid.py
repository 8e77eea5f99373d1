"""The lab as a Grid: Flower's interface to the devices, for any ServerApp.

`LabGrid` shows only devices that may be asked, never waits for ever, looks for replies several
times a second, records every message, and keeps from the app what would break it: a reply that
holds no finite numbers, or that does not fit the others, becomes an error of its device.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from flowerbed.flower import NODE_UNAVAILABLE
from flowerbed.server.fleet import Device, Fleet, PendingMessage, Reply, is_available
from flowerbed.server.repeat import Repeatability
from flowerbed.server.rounds import Rounds, could_not_be_asked
from flowerbed.settings import LabSettings

log = logging.getLogger("flwr")

POLL_INTERVAL = 0.25
"""Seconds between two looks for replies; Flower's own Grid takes 3."""
_PATIENT_CALLS = 3
"""Calls of `get_node_ids` in a row from which a strategy is taken to wait for more devices."""
_APP_ERROR = 100
"""Error code of a reply that the lab has turned into an error; Flower's own are below."""


class Policy(Protocol):
    """What a strategy decides beyond Flower's interface, see `flowerbed.strategies.RoundPolicy`."""

    asynchronous: bool

    def round_seconds(self) -> float:
        """Seconds after which the round is closed at the latest."""

    def is_over(self, replies: int, pending: int) -> bool:
        """Whether the round has what it needs."""

    def more(self, devices: Sequence[Device]) -> Iterable[Message]:
        """Further messages to devices that are free while the round is open."""

    def observe(self, reply: Reply) -> None:
        """Learn from a reply."""


class _WaitForAll:
    """The policy of a strategy that has none: a round is over when every reply has come."""

    asynchronous = False

    def round_seconds(self) -> float:
        return math.inf

    def is_over(self, replies: int, pending: int) -> bool:
        del replies
        return not pending

    def more(self, devices: Sequence[Device]) -> Iterable[Message]:
        del devices
        return ()

    def observe(self, reply: Reply) -> None:
        pass


class RoundError(RuntimeError):
    """Rounds bring nothing; the message says what became of each device."""


@dataclass
class _Exchange:
    """Messages that were sent together, and the replies so far."""

    trains: bool
    pending: dict[str, PendingMessage]
    replies: list[Reply] = field(default_factory=list)

    def usable(self) -> list[Reply]:
        """Replies for the app."""
        return [reply for reply in self.replies if reply.usable]


def _signature(reply: Reply) -> tuple[Any, ...]:
    """What replies of one exchange must have in common to be aggregated."""
    content = reply.message.content if reply.message else RecordDict()
    arrays = [
        (name, str(key), tuple(array.shape))
        for name, record in content.array_records.items()
        for key, array in record.items()
    ]
    metrics = [(name, str(key)) for name, m in content.metric_records.items() for key in m]
    return (tuple(sorted(arrays)), tuple(sorted(metrics)))


def reject_misfits(replies: Sequence[Reply]) -> None:
    """Reject replies whose arrays or metrics are not those that most of the others have.

    Flower's strategies end the run with an exception when replies differ.
    """
    usable = [reply for reply in replies if reply.usable]
    counts = Counter(_signature(reply) for reply in usable)
    if len(counts) < 2:  # noqa: PLR2004 - they are all alike
        return
    common, times = counts.most_common(1)[0]
    for reply in usable:
        if (signature := _signature(reply)) != common:
            parts = ("arrays", "metrics")
            differ = [p for p, a, b in zip(parts, signature, common, strict=True) if a != b]
            reply.reject(
                "error",
                f"its reply has other {' and '.join(differ)} than those of {times} other devices",
            )


def _became(replies: Iterable[Reply]) -> str:
    """What became of the messages of a round that brought nothing, with the app's own traceback."""
    replies = list(replies)
    became = "; ".join(f"{r.device.name}: {r.outcome} {r.reason}" for r in replies)
    trace = next((r.header["traceback"] for r in replies if r.header.get("traceback")), "")
    text = f"no device returned a model ({became or 'none was asked'})"
    if any(reply.usable for reply in replies):
        text = f"the strategy has aggregated none of the replies ({became})"
    return f"{text}\n{trace}" if trace else text


class LabGrid(Grid):
    """Flower's Grid over the lab's devices.

    Args:
        grid: Flower's own.
        settings: of the run.
        fleet: the devices.
        rounds: the record.
    """

    def __init__(self, grid: Grid, settings: LabSettings, fleet: Fleet, rounds: Rounds) -> None:
        self._grid = grid
        self._settings = settings
        self._fleet = fleet
        self.rounds = rounds
        self.repeat = Repeatability()
        self.policy: Policy = _WaitForAll()
        self.observed = False
        """Whether `Strategy.start` runs and tells when rounds begin and end."""
        self._lock = threading.RLock()
        self._exchanges: list[_Exchange] = []
        self._own: dict[str, PendingMessage] = {}
        """Messages that the app has sent by `push_messages`, by their ids."""
        self._answered: dict[str, Reply] = {}
        """Replies to them that the app has not pulled yet."""
        self._late: list[Reply] = []
        """Replies that count in the next exchange of an asynchronous strategy."""
        self._met: dict[str, Device] = {}
        self._draw = 0
        self._calls = 0
        self._asked_since = math.inf
        self._fruitless = 0
        self._failure: RoundError | None = None
        """Why nothing is sent any more: threads of Flower's older server hide what they raise."""
        self._handed: list[Reply] = []
        """The replies of the last exchange of training."""

    # --- Flower's interface that is passed on ---------------------------------------------

    @property
    def run(self) -> Any:
        """See `flwr.serverapp.Grid`."""
        return self._grid.run

    def set_run(self, run: Any) -> None:
        """See `flwr.serverapp.Grid`."""
        self._grid.set_run(run)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See `flwr.serverapp.Grid`."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    # --- who may be asked -----------------------------------------------------------------

    def _available(self, device: Device) -> bool:
        number = self.rounds.next_number
        return is_available(device.settings, self._settings.seed, number, self._draw)

    def devices(self) -> list[Device]:
        """The devices that may be asked now: online, free, and available in this round."""
        with self._lock:
            self._meet()
            return [device for device in self._fleet.free() if self._available(device)]

    def get_nodes(self) -> Iterable[Any]:
        """See `flwr.serverapp.Grid`."""
        shown = set(self.get_node_ids())
        nodes = self._fleet.patiently(self._grid.get_nodes)
        return [node for node in nodes if node.node_id in shown]

    def get_node_ids(self) -> list[int]:
        """The nodes of `devices`; waits for the first one if there is none.

        A strategy may call this again and again until there are as many devices as it wants. The
        lab then draws their availability anew, and gives up in the end.

        Raises:
            RoundError: there are not enough devices for a strategy for too long.
        """
        now = time.monotonic()
        self._asked_since = min(self._asked_since, now)
        self._calls += 1
        if self._calls > _PATIENT_CALLS:
            self._draw += 1
        deadline = self._asked_since + self._settings.device_wait + self._settings.round_timeout
        while True:
            self._collect()
            devices = self.devices()
            if time.monotonic() > deadline:
                online = ", ".join(d.name for d in self._fleet.online()) or "none"
                raise RoundError(
                    f"the strategy has waited {time.monotonic() - self._asked_since:.0f} s for "
                    f"enough devices; online: {online}. Start the missing ones, or have the "
                    "strategy ask fewer (min_available_nodes, min_train_nodes)."
                )
            # An app with a loop of its own waits in its own way, and after its rounds for nobody.
            if devices or not self.observed:
                return [device.node_id for device in devices]
            if self._fleet.free():
                self._draw += 1  # all are online, and by their availability none may be asked
            time.sleep(POLL_INTERVAL)

    def _meet(self) -> None:
        """Record devices that are new, or that came back changed."""
        for device in self._fleet.online():
            if self._met.get(device.name) != device:
                self._met[device.name] = device
                self.repeat.met(device, self.rounds.number)
                info = device.settings.model_dump(exclude={"device", "device_class"})
                info |= {"examples": device.examples, "shard": device.shard.get("fingerprint", "")}
                self.rounds.recorder.meet(device.name, device.device_class, info)

    @property
    def met(self) -> dict[str, Device]:
        """Every device that has taken part, by name."""
        return dict(sorted(self._met.items()))

    def _not_asked(self, number: int) -> list[Reply]:
        """Devices that are known and cannot be asked when a round begins."""
        online = {device.name for device in self._fleet.online()}
        absent = [
            could_not_be_asked(device, number, "offline", "not online when the round began")
            for name, device in self._met.items()
            if name not in online
        ]
        reason = "by its availability of {:g}"
        return absent + [
            could_not_be_asked(d, number, "unavailable", reason.format(d.settings.availability))
            for d in self._fleet.free()
            if not self._available(d)
        ]

    # --- messages -------------------------------------------------------------------------

    def _number(self, message: Message) -> int:
        """The round that a message belongs to."""
        if self.observed:
            return self.rounds.number
        if (group := message.metadata.group_id).isdigit():
            return int(group)
        for record in message.content.config_records.values():
            if isinstance(found := record.get("server-round"), int):
                return found
        trains = message.metadata.message_type.startswith(MessageType.TRAIN)
        return self.rounds.next_number if trains else self.rounds.number

    def _send(self, messages: Iterable[Message], *, begins: bool) -> dict[str, PendingMessage]:
        """Send messages of one round.

        Args:
            begins: whether these messages begin the round, if they ask for training.
        """
        messages = list(messages)
        if not messages:
            return {}
        if self._failure:
            raise self._failure
        self._calls, self._asked_since = 0, math.inf
        number = self._number(messages[0])
        trains = messages[0].metadata.message_type.startswith(MessageType.TRAIN)
        if trains and begins:
            not_asked = self._not_asked(number)
            self.repeat.received(not_asked)
            first = self.observed or self.rounds.number != number
            self.rounds.begin(number)
            if first:
                self.rounds.absent(not_asked)
            if first and not self.observed and number > 1:
                self._check_fruit(number - 1, self.rounds.last_trained)
            self._draw = 0
        self.repeat.sent(messages)
        sent = self._fleet.send(messages, number, self._settings.round_timeout)
        self.rounds.sent(sent.values())
        return sent

    def _collect(self) -> None:
        """Read what has come, and give it to the exchange that waits for it."""
        with self._lock:
            for reply in self._fleet.collect():
                self._deliver(reply)
            self._meet()
            self.rounds.recorder.flush()

    def _deliver(self, reply: Reply) -> None:
        exchange = next((e for e in self._exchanges if reply.pending in e.pending.values()), None)
        if exchange:
            exchange.replies.append(reply)
        elif reply.pending.trains and self.policy.asynchronous:
            self.policy.observe(reply)
            self._late.append(reply)  # recorded with the exchange that uses it
            return
        elif reply.usable and not self._pushed(reply):
            number = self.rounds.number
            reply.reject("late", f"replied in round {number}, when its round was closed")
        self.policy.observe(reply)
        self.rounds.received([reply])

    def _pushed(self, reply: Reply) -> bool:
        """Keep the reply to a message that the app has pushed; False if it has not."""
        for message_id, pending in self._own.items():
            if pending is reply.pending:
                self._answered[message_id] = reply
                return True
        return False

    def _as_message(self, reply: Reply) -> Message:
        """A reply as the app sees it."""
        if reply.usable and reply.message:
            return reply.message
        code = NODE_UNAVAILABLE if reply.outcome == "offline" else _APP_ERROR
        reason = f"{reply.outcome}: {reply.reason}" if reply.reason else reply.outcome
        return Message(Error(code, reason), reply_to=reply.pending.message)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """See `flwr.serverapp.Grid`."""
        self.repeat.note("the app reads replies itself, in the order in which they arrive")
        with self._lock:
            sent = self._send(messages, begins=True)
            self._own |= sent
            return list(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """See `flwr.serverapp.Grid`."""
        with self._lock:
            self._collect()
            found = [m for m in message_ids if m in self._answered]
            replies = [self._answered.pop(message_id) for message_id in found]
            for message_id in found:
                del self._own[message_id]
            trained = [reply for reply in replies if reply.pending.trains]
            self.rounds.aggregated(reply for reply in trained if reply.usable)
            return [self._as_message(reply) for reply in replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and wait for their replies, at most until the round times out.

        Replies are in the order of the devices' names, and errors are among them. A message that
        is still pending when this returns has none.

        Raises:
            RoundError: two exchanges of training in a row have brought no usable reply, or the
                first one has failed on every device.
        """
        messages = list(messages)
        if not messages:
            return []
        trains = messages[0].metadata.message_type.startswith(MessageType.TRAIN)
        policy: Policy = self.policy if trains and self.observed else _WaitForAll()
        with self._lock:
            exchange = _Exchange(trains, self._send(messages, begins=True))
            self._exchanges.append(exchange)
            if policy.asynchronous:
                exchange.pending |= self._others(exchange)
                exchange.replies, self._late = self._late, []
                self.rounds.received(exchange.replies)
        limit = min(policy.round_seconds(), self._settings.round_timeout, timeout or math.inf)
        deadline = time.monotonic() + limit
        while True:
            self._collect()
            with self._lock:
                answered = {id(reply.pending) for reply in exchange.replies}
                working = [p for p in exchange.pending.values() if id(p) not in answered]
                over = policy.is_over(len(exchange.usable()), len(working))
                if over or time.monotonic() >= deadline:
                    self._exchanges.remove(exchange)
                    return self._close(exchange, [] if policy.asynchronous else working)
                failed = {r.device.name for r in exchange.replies if not r.usable}
                free = [device for device in self.devices() if device.name not in failed]
                if free and (further := list(policy.more(free))):
                    exchange.pending |= self._send(further, begins=False)
            time.sleep(min(POLL_INTERVAL, max(0.0, deadline - time.monotonic())))

    def _others(self, exchange: _Exchange) -> dict[str, PendingMessage]:
        """Pending messages of training from earlier rounds, each under a key of its own."""
        mine = set(map(id, exchange.pending.values()))
        others = [p for p in self._fleet.pending() if p.trains and id(p) not in mine]
        return {f"earlier-{index}": pending for index, pending in enumerate(others)}

    def _close(self, exchange: _Exchange, working: list[PendingMessage]) -> list[Message]:
        reject_misfits(exchange.replies)
        replies = sorted(exchange.replies, key=lambda r: (r.device.name, r.pending.sent))
        self.repeat.received(replies)
        self.repeat.closed(working)
        used = [reply for reply in replies if reply.usable]
        exchanged = list(exchange.pending.values())
        if exchanged:
            self.rounds.closed(exchanged, working, trains=exchange.trains, used=used)
        if exchange.trains:
            self._handed = replies
            if self.observed:
                self._check_fruit(self.rounds.number, replies)
            else:
                self.rounds.aggregated(used)
        return [self._as_message(reply) for reply in replies]

    def _check_fruit(self, number: int, replies: Sequence[Reply]) -> None:
        """End a run that brings nothing.

        Args:
            number: of the round.
            replies: to its messages of training.

        Raises:
            RoundError: see `send_and_receive`.
        """
        if any(reply.usable for reply in replies):
            self._fruitless = 0
            return
        self._fruitless += 1
        log.warning("round %d: no device returned a model in time", number)
        failed = [reply for reply in replies if reply.outcome in ("error", "diverged")]
        at_once = number <= 1 and len(failed) == len(replies) > 0
        if at_once or self._fruitless > 1:
            self._failure = RoundError(f"round {number}: {_became(replies)}")
            raise self._failure

    def plan(self, rounds: int, *, central: bool) -> None:
        """Set how many rounds the run will have, and whether each has a central evaluation."""
        self.rounds.planned = rounds
        self.rounds.recorder.plan(rounds, central=central)

    def aggregated(self, messages: Iterable[Message]) -> None:
        """Record that the strategy has aggregated these replies of the last exchange."""
        taken = {id(message) for message in messages}
        self.rounds.aggregated(r for r in self._handed if r.message and id(r.message) in taken)

    def check_models(self) -> None:
        """Refuse a run whose app has ended although no round has brought a model.

        Raises:
            RoundError: this is one.
        """
        self._collect()
        if self._failure or (self.rounds.last_trained and not self.rounds.models):
            raise self._failure or RoundError(_became(self.rounds.last_trained))

    def settle(self) -> None:
        """Record what is still pending when the run ends, however it ends."""
        with self._lock:
            now = time.monotonic()
            self.rounds.settle(self._late)
            self.rounds.settle(
                Reply(pending, "late", now, "at work when the run ended")
                for pending in self._fleet.pending()
            )
