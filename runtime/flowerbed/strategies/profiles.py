"""How fast devices are, by what they have reported and done."""

from collections import deque
from collections.abc import Mapping
from statistics import median, median_low
from typing import TYPE_CHECKING, Any

from flowerbed.results import MODEL_OUTCOMES

if TYPE_CHECKING:
    from flowerbed.server.fleet import Device, Reply

_FIRST_OVERHEAD = 2.0
"""Seconds of a round in which a device that has its message does not train, until measured."""
_LAST = 3
"""Measurements that count: of these the middle one, so that a single odd one changes nothing."""


def metric_of(metrics: Mapping[str, Any], *names: str) -> float | None:
    """Return the first of some metrics, however it is spelled (`-` or `_`, case).

    Args:
        names: in lower case, with `-`.

    Returns:
        None if none of them is a number.
    """
    spelled = {str(key).lower().replace("_", "-"): value for key, value in metrics.items()}
    for name in names:
        if isinstance(spelled.get(name), int | float):
            return float(spelled[name])
    return None


class Profiles:
    """What is known of the devices' speed.

    An app's `query.warm_up` may report it before the first round. Without that, a device's speed
    is unknown until it has replied once.
    """

    def __init__(self) -> None:
        self._speed: dict[str, deque[float]] = {}
        self._overhead: dict[str, deque[float]] = {}
        self._round: dict[str, deque[float]] = {}
        self._examples: dict[str, float] = {}

    def observe(self, reply: "Reply") -> None:
        """Learn from a reply to a training message."""
        train = reply.times.train_seconds
        examples = metric_of(reply.metrics, "num-examples")
        if not reply.message_type.startswith("train") or train <= 0 or not examples:
            return
        name = reply.device.name
        measured = [(self._speed, examples / train), (self._overhead, reply.seconds - train)]
        if reply.outcome in MODEL_OUTCOMES:
            measured.append((self._round, reply.seconds))
        for known, seen in measured:
            known.setdefault(name, deque(maxlen=_LAST)).append(seen)
        # The first reply of a device whose speed is unknown is the work of a round without limit.
        if reply.outcome == "completed":
            self._examples.setdefault(name, examples)

    def overhead(self, device: "Device") -> float:
        """Return the seconds of a round in which a device does not train.

        Of two measurements it is the shorter one: a message that was late by chance, because the
        device had just asked for one, shortens the training of a single round.
        """
        if measured := self._overhead.get(device.name):
            return median_low(measured)
        return device.receive_seconds + _FIRST_OVERHEAD

    def epoch_seconds(self, device: "Device", epochs: int = 1) -> float | None:
        """Return the seconds of a round in which a device trains on all of its data.

        Where the app does not say how much data a device holds, one epoch is what the device has
        done in its first complete round.

        Returns:
            None if that is unknown.
        """
        measured = self._speed.get(device.name)
        speed = median(measured) if measured else device.examples_per_second
        examples = device.examples or self._examples.get(device.name, 0.0)
        if speed <= 0 or examples <= 0:
            return None
        return self.overhead(device) + epochs * examples / speed

    def round_seconds(self, device: "Device") -> float | None:
        """Return the seconds that a device takes for a round: measured, or else estimated.

        Returns:
            None if that is unknown.
        """
        if measured := self._round.get(device.name):
            return median(measured)
        return self.epoch_seconds(device, device.settings.local_epochs)
