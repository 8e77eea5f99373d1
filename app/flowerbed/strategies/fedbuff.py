"""Buffered asynchronous aggregation: nobody waits for anybody."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray

from flowerbed.fleet import Device
from flowerbed.strategies.pacing import Selective, aggregated, models_of, weights_of


def buffered_update(
    now: NDArray[Any],
    *,
    starts: NDArray[Any],
    models: NDArray[Any],
    staleness: NDArray[Any],
    trainable: NDArray[np.bool_],
    rate: float = 1.0,
) -> NDArray[Any]:
    """The global weights after the updates in a buffer, each scaled by 1 / sqrt(1 + staleness).

    Statistics of normalization are drawn towards those of the models instead, so that variances
    stay positive.

    Args:
        now: the global weights.
        starts, models: what each device began with and what became of it, a row each.
        staleness: versions of the global weights since each began.
        trainable: where the weights are trained.
        rate: the server's learning rate.
    """
    scale = 1 / np.sqrt(1 + staleness) / len(models)
    trained = now + rate * (scale @ (models - starts))
    updated: NDArray[Any] = np.where(trainable, trained, now + scale @ (models - now))
    return updated


class FedBuff(Selective):
    """A round ends when some answers have come; the other devices go on, whatever they began with.

    Nguyen et al. 2022 (https://arxiv.org/abs/2106.06639), without secure aggregation. A round is a
    version of the global weights, and a device that has answered begins anew from the newest.

    Args:
        buffer_size: answers that end a round.
        server_learning_rate: by which their mean update is scaled.

    Raises:
        ValueError: a parameter is out of its range.
    """

    asynchronous = True

    def __init__(self, buffer_size: int = 3, server_learning_rate: float = 1.0) -> None:
        if buffer_size < 1:
            raise ValueError(f"buffer_size = {buffer_size}: write 1 or more")
        if server_learning_rate <= 0:
            raise ValueError(f"server_learning_rate = {server_learning_rate}: write more than 0")
        super().__init__()
        self.buffer_size, self.server_learning_rate = buffer_size, server_learning_rate
        self._now: NDArray[np.float32] = np.zeros(0, np.float32)
        self._versions: dict[int, NDArray[np.float32]] = {}
        self._held: dict[int, int] = {}
        """Node to the version that it has last begun from."""

    def is_over(self, models: int, working: int) -> bool:
        """See `Pacing`."""
        return models >= self.buffer_size or not working

    def select(self, devices: Sequence[Device], longest: float) -> Sequence[Device]:
        """All that are free."""
        del longest
        return devices

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See `Selective`."""
        self._now = weights_of(arrays)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        # Of a buffer that is open, a device's earlier answer may be of the version before.
        self._versions[server_round] = self._now
        self._held |= {message.metadata.dst_node_id: server_round for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """See `buffered_update`."""
        replies = list(replies)
        began = [int(reply.metadata.group_id) for reply in replies]
        weights = buffered_update(
            self._now,
            starts=np.stack([self._versions[version] for version in began]),
            models=models_of(replies),
            staleness=server_round - np.array(began),
            trainable=self.trainable,
            rate=self.server_learning_rate,
        )
        needed = set(self._held.values())
        self._versions = {v: kept for v, kept in self._versions.items() if v in needed}
        return aggregated(weights)
