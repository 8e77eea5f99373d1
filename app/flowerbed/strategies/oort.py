"""Guided selection by utility and speed."""

import math
from collections.abc import Sequence

import numpy as np

from flowerbed.fleet import Device, Reply
from flowerbed.strategies.pacing import Selective

_EXPLORATION, _DECAY, _LEAST = 0.9, 0.98, 0.2
_CUT_OFF = 0.95
_PATIENCE, _STEP = 20, 0.05
"""Of the pacer: rounds that it compares, and what it adds to the quantile."""


def utility(
    statistical: float,
    *,
    since: int,
    server_round: int,
    seconds: float,
    preferred: float,
    penalty: float,
) -> float:
    """Oort's utility of a device: what its data are worth, and less where it is slow.

    Args:
        statistical: examples times the root mean square of their losses.
        since: round in which that was measured, from 1.
        seconds, preferred: of a round: its own, and those from which on it is penalized.
        penalty: exponent.
    """
    uncertain = math.sqrt(0.1 * math.log(server_round) / since)
    slowness = (preferred / seconds) ** penalty if seconds > preferred else 1.0
    return (statistical + uncertain) * slowness


class Oort(Selective):
    """Each round asks the devices of highest utility, and some that are not known yet.

    Lai et al. 2021 (https://arxiv.org/abs/2010.06081), Algorithm 1 with the authors' constants. Of
    the preferred duration the quantile of the devices' is kept, which the pacer raises when the
    utility gathered falls. Left out: asking more devices than wanted, and blocklists.

    Args:
        fraction: of the devices that are asked each round.
        penalty: exponent by which slowness counts.
        quantile: of the devices' durations beyond which a device is slow.

    Raises:
        ValueError: a parameter is out of its range.
    """

    def __init__(self, fraction: float = 0.5, penalty: float = 2.0, quantile: float = 0.3) -> None:
        for name, value in (("fraction", fraction), ("quantile", quantile)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} = {value}: write a number above 0 and up to 1")
        if penalty < 0:
            raise ValueError(f"penalty = {penalty}: write 0 or more")
        super().__init__()
        self.fraction, self.penalty, self.quantile = fraction, penalty, quantile
        self._round = 0
        self._utility: dict[str, tuple[float, int]] = {}
        """Statistical utility, and the round in which it was measured."""
        self._gathered: list[float] = [0.0]

    def observe(self, reply: Reply) -> None:
        """Learn what a device's data are worth."""
        super().observe(reply)
        if reply.model:
            worth = reply.device.examples * reply.metrics["train-loss-rms"]
            self._utility[reply.device.name] = (worth, reply.flight.server_round)
            self._gathered[-1] += worth

    def _pace(self) -> None:
        """Prefer longer rounds once those in sight bring less."""
        if len(self._gathered) % _PATIENCE == 0 and len(self._gathered) >= 2 * _PATIENCE:
            before = sum(self._gathered[-2 * _PATIENCE : -_PATIENCE])
            if before > sum(self._gathered[-_PATIENCE:]):
                self.quantile = min(1.0, self.quantile + _STEP)
        self._gathered.append(0.0)

    def _worth(self, name: str, seconds: float, preferred: float) -> float:
        statistical, since = self._utility[name]
        return utility(
            statistical,
            since=since,
            server_round=self._round,
            seconds=seconds,
            preferred=preferred,
            penalty=self.penalty,
        )

    def _exploit(self, known: list[str], count: int, seconds: dict[str, float]) -> list[str]:
        """Draw by utility among those that come near the last one of the best."""
        preferred = float(np.quantile(list(seconds.values()), self.quantile))
        worth = np.array([self._worth(name, seconds[name], preferred) for name in known])
        near = worth >= _CUT_OFF * np.sort(worth)[-count]
        chances = np.where(near, np.maximum(worth, 1e-9), 0)
        return list(self.rng.choice(known, count, replace=False, p=chances / chances.sum()))

    def select(self, devices: Sequence[Device], longest: float) -> Sequence[Device]:
        """Those of highest utility, and a decaying share of unknown ones, the fastest rather."""
        del longest
        if self._round:
            self._pace()
        self._round += 1
        seconds = {d.name: self.profiles.seconds(d, d.settings.local_epochs) for d in devices}
        known = [name for name in seconds if name in self._utility]
        new = [name for name in seconds if name not in self._utility]
        wanted = max(1, round(self.fraction * len(devices)))
        exploration = max(_EXPLORATION * _DECAY ** (self._round - 1), _LEAST)
        # As many new ones as exploration asks for, and as the known ones leave to be filled.
        exploring = min(len(new), max(round(exploration * wanted), wanted - len(known)))
        chosen: list[str] = []
        if exploring:
            speeds = np.array([1 / seconds[name] for name in new])
            chances = speeds / speeds.sum()
            chosen += list(self.rng.choice(new, exploring, replace=False, p=chances))
        if count := wanted - exploring:
            chosen += self._exploit(known, count, seconds)
        return [device for device in devices if device.name in chosen]
