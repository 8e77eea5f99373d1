"""Guided selection by utility and speed."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flowerbed.results import MODEL_OUTCOMES
from flowerbed.strategies.base import Selective, StrategyError
from flowerbed.strategies.profiles import metric_of

if TYPE_CHECKING:
    from flowerbed.server.fleet import Device, Reply

_EXPLORATION, _DECAY, _LEAST = 0.9, 0.98, 0.2
_CUT_OFF = 0.95
_CLIP = 0.95
_STEP = 0.05
"""What the pacer adds to the quantile."""
_AWAY = ("offline", "unavailable")
"""Outcomes that say nothing about a device's worth."""


def normalised(utilities: Sequence[float]) -> list[float]:
    """Return statistical utilities clipped at their 95th percentile and scaled to 0..1.

    As `get_norm` of the authors' code (https://github.com/SymbioticLab/Oort) does. Without it, the
    bonus for devices not asked for long (at most 1) would be nothing beside examples times losses.
    Devices without utility do not count in the range.
    """
    ordered = sorted(value for value in utilities if value > 0)
    if not ordered:
        return [0.0] * len(utilities)
    clip = ordered[min(int(len(ordered) * _CLIP), len(ordered) - 1)]
    low = ordered[0] * 0.999
    width = max(ordered[-1] - low, 1e-4)
    return [max(0.0, (min(value, clip) - low) / width) for value in utilities]


def utility(
    statistical: float,
    *,
    since: int,
    server_round: int,
    seconds: float,
    preferred: float,
    penalty: float,
) -> float:
    """Return Oort's utility of a device: what its data are worth, and less if it is slow.

    Args:
        statistical: statistical utility as `normalised` returns it.
        since: round in which it was measured, from 1.
        seconds: of a round of the device.
        preferred: seconds of a round beyond which a device is penalised.
        penalty: exponent of the penalty.
    """
    uncertain = math.sqrt(0.1 * math.log(server_round) / since)
    slowness = (preferred / seconds) ** penalty if seconds > preferred else 1.0
    return (statistical + uncertain) * slowness


class Oort(Selective):
    """Each round asks the devices of highest utility, and some that have not been asked yet.

    Lai et al. 2021 (https://arxiv.org/abs/2010.06081), Algorithm 1 with the constants and the
    normalisation of the authors' code. The statistical utility of a device is its number of
    examples times the root mean square of their losses: `train-loss-rms` of the reply, or else its
    `train-loss` or `loss`. A device that has failed has none until it succeeds.

    The preferred duration of a round is a quantile of the devices' durations. The pacer raises the
    quantile when two successive windows of `pacer_rounds` rounds show that the utility gathered
    falls. It thus needs twice as many rounds; a shorter run keeps the quantile.

    Left out: asking more devices than wanted, and the list of devices asked too often.

    Args:
        fraction: share of the devices that are asked in each round.
        penalty: exponent by which slowness counts.
        quantile: of the devices' durations beyond which a device is slow.
        pacer_rounds: rounds of a window of the pacer.
        fraction_evaluate: see `Selective`.

    Raises:
        StrategyError: a parameter is out of its range.
    """

    not_repeatable = "devices are selected by the time that they were measured to take"

    def __init__(
        self,
        fraction: float = 0.5,
        penalty: float = 2.0,
        quantile: float = 0.3,
        pacer_rounds: int = 20,
        *,
        fraction_evaluate: float = 0.0,
    ) -> None:
        for name, value in (("fraction", fraction), ("quantile", quantile)):
            if not 0 < value <= 1:
                raise StrategyError(f"{name} = {value}: write a number above 0 and up to 1")
        if not penalty >= 0:
            raise StrategyError(f"penalty = {penalty}: write 0 or more")
        if pacer_rounds < 1:
            raise StrategyError(f"pacer_rounds = {pacer_rounds}: write 1 or more")
        super().__init__(fraction_evaluate)
        self.fraction, self.penalty, self.quantile = fraction, penalty, quantile
        self.pacer_rounds = pacer_rounds
        self._utility: dict[str, tuple[float, int]] = {}
        """Statistical utility, and the round in which it was measured."""
        self._gathered: list[float] = []
        """Utility of each round."""
        self._without_loss = ""
        """A device whose reply has no loss."""

    def observe(self, reply: "Reply") -> None:
        """Learn what a device's data are worth; see `RoundPolicy`."""
        super().observe(reply)
        if not reply.message_type.startswith("train"):
            return
        device, metrics = reply.device, reply.metrics
        if reply.outcome not in MODEL_OUTCOMES:
            if reply.outcome not in _AWAY:
                self._utility.setdefault(device.name, (0.0, reply.server_round))
            return
        loss = metric_of(metrics, "train-loss-rms", "train-loss", "loss")
        if loss is None:
            self._without_loss = device.name
            return
        worth = (device.examples or metric_of(metrics, "num-examples") or 0.0) * loss
        # A loss that is not finite is worth nothing; it must not decide about other devices.
        worth = max(worth, 0.0) if math.isfinite(worth) else 0.0
        self._utility[device.name] = (worth, reply.server_round)
        if self._gathered:
            self._gathered[-1] += worth

    def _pace(self) -> None:
        """Prefer longer rounds if the devices that are fast enough bring less than before."""
        window = self.pacer_rounds
        if self._gathered and len(self._gathered) % window == 0:
            before = sum(self._gathered[-2 * window : -window])
            if before > sum(self._gathered[-window:]):
                self.quantile = min(1.0, self.quantile + _STEP)
        self._gathered.append(0.0)

    def _exploit(
        self, server_round: int, known: list[str], count: int, seconds: dict[str, float]
    ) -> list[str]:
        """Draw by utility among those that come near the last one of the best."""
        preferred = float(np.quantile(list(seconds.values()), self.quantile))
        statistical = normalised([self._utility[name][0] for name in known])
        worth = np.array(
            [
                utility(
                    value,
                    since=self._utility[name][1],
                    server_round=server_round,
                    seconds=seconds[name],
                    preferred=preferred,
                    penalty=self.penalty,
                )
                for name, value in zip(known, statistical, strict=True)
            ]
        )
        near = worth >= _CUT_OFF * np.sort(worth)[-count]
        return self._draw(known, count, np.where(near, np.maximum(worth, 1e-9), 0))

    def _draw(self, names: list[str], count: int, weights: NDArray[Any]) -> list[str]:
        drawn = self.rng.choice(len(names), count, replace=False, p=weights / weights.sum())
        return [names[index] for index in drawn]

    def _seconds(self, devices: Sequence["Device"]) -> dict[str, float]:
        """Return the duration of a round of each device; the mean for those of unknown speed."""
        measured = {device.name: self.profiles.round_seconds(device) for device in devices}
        known = [value for value in measured.values() if value is not None]
        mean = sum(known) / len(known) if known else 1.0
        return {name: mean if value is None else value for name, value in measured.items()}

    def select(self, server_round: int, devices: Sequence["Device"]) -> Sequence["Device"]:
        """Select by utility, and a decaying share of unknown devices, preferably fast ones.

        Raises:
            StrategyError: the app's replies have no loss.
        """
        if self._without_loss:
            raise StrategyError(
                f"oort: the reply of {self._without_loss} has no train-loss-rms, train-loss or "
                "loss, by which Oort selects devices. Return one from the app's train function, or "
                "choose another strategy."
            )
        self._pace()
        seconds = self._seconds(devices)
        known = [name for name in seconds if name in self._utility]
        new = [name for name in seconds if name not in self._utility]
        wanted = max(1, round(self.fraction * len(devices)))
        exploration = max(_EXPLORATION * _DECAY ** (server_round - 1), _LEAST)
        # As many new devices as exploration asks for, and as the known ones leave to be filled.
        exploring = min(len(new), max(round(exploration * wanted), wanted - len(known)))
        chosen: list[str] = []
        if exploring:
            speeds = np.array([1 / seconds[name] for name in new])
            chosen += self._draw(new, exploring, speeds)
        if count := wanted - exploring:
            chosen += self._exploit(server_round, known, count, seconds)
        return [device for device in devices if device.name in chosen]
