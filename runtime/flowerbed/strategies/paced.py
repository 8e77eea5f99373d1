"""Time-boxed rounds: all devices train for the same time, and none waits for another."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from flowerbed.strategies.base import (
    Selective,
    StrategyError,
    Update,
    combine,
    is_statistic,
    shares,
)
from flowerbed.strategies.profiles import metric_of

if TYPE_CHECKING:
    from flowerbed.server.fleet import Device

log = logging.getLogger("flwr")

_SHORTEST = 1.0
"""Seconds of training for a device that needs the whole box for everything else."""


def fednova_factors(
    held: Sequence[float], steps: Sequence[float], rates: Sequence[float]
) -> list[float]:
    """Return the factors of the devices' local changes in FedNova's update.

    Wang et al. 2020 (https://arxiv.org/abs/2007.07481); in the authors' code
    (https://github.com/JYWa/FedNova), `FedNova.average`. The new global model is
    x + sum_i factor_i * (x_i - x), where x_i is the model of device i.

    Args:
        held: examples that each device holds.
        steps: effective local steps of each device.
        rates: learning rate of each device.
    """
    # Data share of a device. In the authors' code: `ratio`, the relative sample size.
    p = shares(held)
    # The paper's local change is Delta_i = -eta G_i a_i. `steps` is the L1 norm of the accumulation
    # vector a_i (`local_normalizing_vec`): the number of steps for plain SGD, more with momentum.
    # The paper has one eta. With one for each device, eta_i ||a_i||_1 takes the place of
    # eta ||a_i||_1: how far the device goes along a constant gradient of 1.
    distance = [rate * count for rate, count in zip(rates, steps, strict=True)]
    # Effective steps tau_eff = sum_i p_i ||a_i||_1 (here with eta), as in the authors' code without
    # FedProx's term, where equal devices get FedAvg. With that term they take the plain steps.
    effective = math.fsum(share * far for share, far in zip(p, distance, strict=True))
    # Normalised gradient d_i = -Delta_i / (eta_i ||a_i||_1), and FedNova's update
    # x' - x = -tau_eff sum_i p_i eta d_i = sum_i (tau_eff p_i / (eta_i ||a_i||_1)) Delta_i.
    return [effective * share / far for share, far in zip(p, distance, strict=True)]


class Paced(Selective):
    """The same time box for all devices; partial work counts by what it is worth.

    A device trains until the box ends, for less or more than its local epochs, and the round is
    closed a grace time later. Models are averaged by the examples that devices have seen.

    The app must keep to the message's `time-limit` (`flowerbed.TimeLimit`). With one that does
    not, the round still ends on time, and the slow devices' replies are late.

    If no device's speed is known, the first round has no time limit and measures it.

    Args:
        box: seconds of a round for each device, from message to reply. 0: chosen in each round so
            that `share` of the devices can finish an epoch of their data.
        share: above 0 and up to 1.
        grace: seconds beyond the box after which a round is closed without the missing devices.
        proximal_mu: weight of FedProx's term (Li et al. 2020, https://arxiv.org/abs/1812.06127).
        normalise: FedNova (Wang et al. 2020, https://arxiv.org/abs/2007.07481) instead of the mean
            by examples: devices count by the data that they hold, not by the steps that they take.
            It needs replies with `effective-steps`, devices that report how many examples they
            hold (`num-examples` of `query.warm_up`, or placed data), and one optimizer for all. The
            learning rate is the reply's `learning-rate`, or else the device's setting.
            Normalisation statistics stay means by examples.
        fraction_evaluate: see `Selective`.

    Raises:
        StrategyError: a parameter is out of its range.
    """

    not_repeatable = "devices train for a time, which is not the same number of steps each time"

    def __init__(
        self,
        box: float = 0.0,
        share: float = 0.5,
        grace: float = 10.0,
        proximal_mu: float = 0.0,
        *,
        normalise: bool = False,
        fraction_evaluate: float = 0.0,
    ) -> None:
        for name, value in (("box", box), ("grace", grace), ("proximal_mu", proximal_mu)):
            if not value >= 0:
                raise StrategyError(f"{name} = {value}: write 0 or more")
        if not 0 < share <= 1:
            raise StrategyError(f"share = {share}: write a number above 0 and up to 1")
        super().__init__(fraction_evaluate)
        self.box, self.share, self.grace, self.proximal_mu = box, share, grace, proximal_mu
        self.normalise = normalise
        self._box = math.inf
        """Seconds of the current round's box."""

    def select(self, server_round: int, devices: Sequence["Device"]) -> Sequence["Device"]:
        """Select all devices, and set the round's box.

        Raises:
            StrategyError: the devices do not allow FedNova's average.
        """
        if self.normalise:
            _check_comparable(devices)
        epochs = sorted(
            seconds
            for device in devices
            if (seconds := self.profiles.epoch_seconds(device)) is not None
        )
        if self.box:
            self._box = self.box
        elif epochs:
            self._box = epochs[math.ceil(self.share * len(epochs)) - 1]
        else:
            self._box = math.inf
            log.info(
                "round %d: no device's speed is known; devices train without a time limit",
                server_round,
            )
        return devices

    def device_config(self, device: "Device") -> dict[str, Any]:
        """Return a limit of training such that all replies come at the end of the box."""
        config: dict[str, Any] = {"proximal-mu": float(self.proximal_mu)}
        if math.isfinite(self._box):
            seconds = max(self._box - self.profiles.overhead(device), _SHORTEST)
            config |= {"time-limit": float(seconds), "fill-time": True}
        return config

    def round_seconds(self) -> float:
        """Return box and grace."""
        return self._box + self.grace

    def aggregate(
        self, server_round: int, updates: Sequence[Update]
    ) -> Mapping[str, NDArray[Any]] | None:
        """Average by examples, or by FedNova's rule; see `fednova_factors`."""
        if not self.normalise:
            return super().aggregate(server_round, updates)
        use = "for FedNova's average (paced with normalise)"
        steps = [update.metric("effective-steps", use) for update in updates]
        # A device whose time was up before its first step has no direction to contribute.
        updates = [update for update, count in zip(updates, steps, strict=True) if count > 0]
        if not updates:
            log.warning("round %d: no device has taken a step; the model stays", server_round)
            return None
        factors = fednova_factors(
            held=[update.device.examples for update in updates],
            steps=[count for count in steps if count > 0],
            rates=[
                metric_of(update.metrics, "learning-rate") or update.device.settings.learning_rate
                for update in updates
            ],
        )
        changes = [(f, update.arrays) for f, update in zip(factors, updates, strict=True)]
        terms = [(1 - math.fsum(factors), self.arrays), *changes]
        return {
            **combine(terms, [key for key in self.arrays if not is_statistic(key)]),
            **self.average(updates, [key for key in self.arrays if is_statistic(key)]),
        }


def _check_comparable(devices: Sequence["Device"]) -> None:
    """Refuse devices whose updates FedNova cannot compare.

    Raises:
        StrategyError: a device does not say how much data it holds, or optimizers differ.
    """
    if unknown := [device.name for device in devices if device.examples <= 0]:
        raise StrategyError(
            f"paced with normalise: {', '.join(unknown)} did not report how many examples they "
            "hold, by which FedNova weighs devices. Return num-examples from the app's "
            "query.warm_up, or set normalise to false."
        )
    optimizers: dict[str, str] = {d.settings.optimizer: d.name for d in devices}
    if len(optimizers) > 1:
        found = ", ".join(f"{name} has {optimizer}" for optimizer, name in optimizers.items())
        raise StrategyError(
            f"paced with normalise: devices have different optimizers ({found}), and FedNova "
            "cannot compare their steps. Give all devices one device_optimizer, or set normalise "
            "to false."
        )
