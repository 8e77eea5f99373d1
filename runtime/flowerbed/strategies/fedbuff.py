"""Buffered asynchronous aggregation: no device waits for another."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from flowerbed.strategies.base import Selective, StrategyError, Update, combine, is_statistic

if TYPE_CHECKING:
    from flowerbed.server.fleet import Device

log = logging.getLogger("flwr")


class FedBuff(Selective):
    """A round ends when the buffer is full; the other devices go on with what they have.

    Nguyen et al. 2022 (https://arxiv.org/abs/2106.06639), without secure aggregation. A round is a
    version of the global model. A device that has replied is asked again at once, from the newest
    version. If that is the version it has had before, its configuration has another `attempt`
    (0, 1, ...), which the app must make part of its seed: the same work twice would count twice.

    Args:
        buffer_size: replies that end a round.
        server_learning_rate: factor of the mean update.
        fraction_evaluate: see `Selective`.

    Raises:
        StrategyError: a parameter is out of its range.
    """

    asynchronous = True
    not_repeatable = "the order in which replies arrive decides what is aggregated"

    def __init__(
        self,
        buffer_size: int = 3,
        server_learning_rate: float = 1.0,
        *,
        fraction_evaluate: float = 0.0,
    ) -> None:
        if buffer_size < 1:
            raise StrategyError(f"buffer_size = {buffer_size}: write 1 or more")
        if not server_learning_rate > 0:
            raise StrategyError(f"server_learning_rate = {server_learning_rate}: write more than 0")
        super().__init__(fraction_evaluate)
        self.buffer_size, self.server_learning_rate = buffer_size, server_learning_rate
        self._versions: dict[int, ArrayRecord] = {}
        """Global models by version: those from which a reply may still come."""
        self._started: dict[int, int] = {}
        """Version that each node has last been sent."""
        self._attempts: Counter[int] = Counter()
        """Messages to each node from the current version."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask all devices that are free; see `Selective`."""
        self._versions[server_round] = arrays
        self._attempts.clear()
        return super().configure_train(server_round, arrays, config, grid)

    def select(self, server_round: int, devices: Sequence["Device"]) -> Sequence["Device"]:
        """Select all."""
        del server_round
        return devices

    def device_config(self, device: "Device") -> dict[str, Any]:
        """Return the number of earlier messages to the device from this version."""
        return {"attempt": self._attempts[device.node_id]}

    def message(self, device: "Device") -> Message:
        """Return the next message to a device, and remember from which version it starts."""
        message = super().message(device)
        self._attempts[device.node_id] += 1
        self._started[device.node_id] = self.server_round
        return message

    def is_over(self, replies: int, pending: int) -> bool:
        """Return whether the buffer is full, or nothing can fill it."""
        return replies >= self.buffer_size or not pending

    def more(self, devices: Sequence["Device"]) -> Iterable[Message]:
        """Ask free devices again; see `RoundPolicy`."""
        return [self.message(device) for device in devices]

    def aggregate(
        self, server_round: int, updates: Sequence[Update]
    ) -> Mapping[str, NDArray[Any]] | None:
        """Add the mean of the buffered updates, each scaled by 1 / sqrt(1 + staleness).

        Normalisation statistics move towards those of the models by the same scale instead, so
        that variances stay positive.
        """
        known = [update for update in updates if update.version in self._versions]
        if len(known) < len(updates):
            log.warning("round %d: replies from unknown versions are ignored", server_round)
        if not known:
            return None
        scales = [1 / math.sqrt(1 + server_round - u.version) / len(known) for u in known]
        changes: list[tuple[float, ArrayRecord]] = [(1.0, self.arrays)]
        for scale, update in zip(scales, known, strict=True):
            rate = self.server_learning_rate * scale
            changes += [(rate, update.arrays), (-rate, self._versions[update.version])]
        moves = [(1 - math.fsum(scales), self.arrays)]
        moves += [(s, update.arrays) for s, update in zip(scales, known, strict=True)]
        needed = set(self._started.values())
        self._versions = {v: kept for v, kept in self._versions.items() if v in needed}
        return {
            **combine(changes, [key for key in self.arrays if not is_statistic(key)]),
            **combine(moves, [key for key in self.arrays if is_statistic(key)]),
        }
