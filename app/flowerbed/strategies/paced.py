"""Time-boxed rounds: every device has the same time, and none waits for another."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray

from flowerbed.fleet import Device
from flowerbed.strategies.pacing import Selective, aggregated, metric_of, models_of, weights_of

_SHORTEST = 1.0
"""Seconds of training, where a device needs the whole box for the rest."""


def normalised_mean(
    start: NDArray[Any],
    models: NDArray[Any],
    examples: NDArray[Any],
    steps: NDArray[Any],
    trainable: NDArray[np.bool_],
) -> NDArray[Any]:
    """FedNova's average of models that have taken unequal numbers of steps (Wang et al. 2020).

    Statistics of normalization are no sums of steps, and what is extrapolated from few steps may
    make a variance negative: they are averaged as they are.

    Args:
        start: weights that all have started from.
        models: what became of them, a row a device.
        examples: that each device has seen, its weight.
        steps: effective local steps of each, see `flowerbed.optimizer.effective_steps`.
        trainable: where the weights are trained.
    """
    share = examples / examples.sum()
    update = (share * steps).sum() * ((share / steps) @ (models - start))
    mean: NDArray[Any] = np.where(trainable, start + update, share @ models)
    return mean


class Paced(Selective):
    """The same time box for every device; partial work counts by what it is worth.

    A device trains until the box ends, less or more than its local epochs, and its answer is
    awaited for a grace time beyond. Models are averaged by examples seen, and corrected for unequal
    local steps if asked: FedNova (Wang et al. 2020, https://arxiv.org/abs/2007.07481). The
    correction keeps fast devices' data from counting more than by the examples seen, and pays for
    it with the noise of few steps that it scales up. That is more than it has been measured to be
    worth, with data dealt evenly or by a Dirichlet distribution (benchmarks/README.md).

    Args:
        box: seconds of a round for each device, from message to answer; 0: chosen each round so
            that `share` of the devices can finish an epoch of their shard.
        share: above 0 and up to 1.
        grace: seconds beyond the box after which a round is closed without those who are missing.
        proximal_mu: weight of FedProx's term (Li et al. 2020, https://arxiv.org/abs/1812.06127).
        normalise: correct for unequal steps.

    Raises:
        ValueError: a parameter is out of its range.
    """

    def __init__(
        self,
        box: float = 0.0,
        share: float = 0.5,
        grace: float = 10.0,
        proximal_mu: float = 0.0,
        *,
        normalise: bool = False,
    ) -> None:
        for name, value in (("box", box), ("grace", grace), ("proximal_mu", proximal_mu)):
            if value < 0:
                raise ValueError(f"{name} = {value}: write 0 or more")
        if not 0 < share <= 1:
            raise ValueError(f"share = {share}: write a number above 0 and up to 1")
        super().__init__()
        self.box, self.share, self.grace, self.proximal_mu = box, share, grace, proximal_mu
        self.normalise = normalise
        self._now = box
        self._start: NDArray[np.float32] = np.zeros(0, np.float32)

    def select(self, devices: Sequence[Device], longest: float) -> Sequence[Device]:
        """All of them, in a box of this round's length."""
        epochs = sorted(self.profiles.seconds(device, 1) for device in devices)
        chosen = self.box or epochs[math.ceil(self.share * len(epochs)) - 1]
        self._now = min(chosen, longest)
        return devices

    def task(self, device: Device) -> dict[str, Any]:
        """Training for what is left of the box: so that all answers come at the same time."""
        seconds = max(self._now - self.profiles.overhead(device), _SHORTEST)
        return {"time-limit": seconds, "fill-time": True, "proximal-mu": float(self.proximal_mu)}

    def patience(self) -> float:
        """Box and grace."""
        return self._now + self.grace

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See `Selective`."""
        self._start = weights_of(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """FedAvg's mean, or see `normalised_mean`; with equal steps they are the same."""
        del server_round
        replies = list(replies)
        steps = metric_of(replies, "effective-steps")
        return aggregated(
            normalised_mean(
                self._start,
                models_of(replies),
                metric_of(replies, "num-examples"),
                steps if self.normalise else np.ones_like(steps),
                self.trainable,
            )
        )
