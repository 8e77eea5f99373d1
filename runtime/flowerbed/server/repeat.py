"""Whether a run repeats bit for bit: the same weights from the same configuration and machines."""

from collections.abc import Iterable
from typing import Any

from flwr.app import Message

from flowerbed.results import MODEL_OUTCOMES
from flowerbed.server.fleet import Device, PendingMessage, Reply

LIMITS = ("time-limit",)
"""Keys of a message's configuration that make the training depend on time."""


class Repeatability:
    """Collects what keeps a run from being repeated bit for bit, as far as the lab can see it.

    An app that draws from generators which it has not seeded is not seen.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, set[str]] = {}
        """Each with the devices that it is about."""

    def note(self, reason: str, who: str = "") -> None:
        """Add a reason, and a device that it is about."""
        self.reasons.setdefault(reason, set()).update({who} - {""})

    def met(self, device: Device, number: int) -> None:
        """Look at a device that takes part from round `number` on; 0: from the beginning."""
        if int(device.environment.get("threads") or 1) > 1:
            self.note("sums of several threads have no fixed order", device.name)
        if number:
            self.note("a device joined or came back while the run was under way", device.name)

    def sent(self, messages: Iterable[Message]) -> None:
        """Look at what is asked."""
        for message in messages:
            configs = message.content.config_records.values()
            if any(config.get(key) for config in configs for key in LIMITS):
                self.note("a time limit ends the training")

    def received(self, replies: Iterable[Reply]) -> None:
        """Look at what has become of messages."""
        for reply in replies:
            if not reply.pending.trains or reply.outcome in ("completed", "unavailable"):
                continue
            if reply.outcome in MODEL_OUTCOMES:
                self.note("a time limit ends the training")
            else:
                outcome = reply.outcome.replace("_", " ")
                self.note(f"a reply was lost ({outcome})", reply.device.name)

    def closed(self, working: Iterable[PendingMessage]) -> None:
        """Look at messages that are pending when their round is closed."""
        for pending in working:
            if pending.trains:
                self.note("a round was closed before the reply", pending.device.name)

    def describe(self) -> dict[str, Any]:
        """Return what run.yml says."""
        because = [
            f"{reason}: {', '.join(sorted(who))}" if who else reason
            for reason, who in self.reasons.items()
        ]
        return {"bitwise": not because, "because": because}
