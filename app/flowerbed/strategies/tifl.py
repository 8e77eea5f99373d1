"""Tiers by measured speed."""

from collections.abc import Mapping, Sequence

import numpy as np

from flowerbed.fleet import Device
from flowerbed.strategies.pacing import Selective


def tiers_of(seconds: Mapping[str, float], tiers: int) -> list[list[str]]:
    """Devices in tiers of equal size as far as they go, the fastest first.

    Args:
        seconds: of a round, by device.
        tiers: at most so many; fewer where there are fewer devices.
    """
    ordered = sorted(seconds, key=lambda name: (seconds[name], name))
    parts = np.array_split(np.arange(len(ordered)), min(tiers, len(ordered)))
    return [[ordered[index] for index in part] for part in parts]


class TiFL(Selective):
    """Each round asks devices of one tier of speed, so that none waits for a much slower one.

    The static selection of TiFL (Chai et al. 2020, https://arxiv.org/abs/2001.09249): a tier is
    drawn, then devices in it. Tiers are formed anew each round, by what has been measured since.

    Args:
        tiers: number of them.
        devices: drawn from the tier; 0: all of it.
        probabilities: of each tier, the fastest first; none: equal.

    Raises:
        ValueError: a parameter is out of its range.
    """

    def __init__(
        self, tiers: int = 3, devices: int = 0, probabilities: Sequence[float] = ()
    ) -> None:
        if tiers < 1:
            raise ValueError(f"tiers = {tiers}: write 1 or more")
        if devices < 0:
            raise ValueError(f"devices = {devices}: write 0 or more")
        if probabilities and (len(probabilities) != tiers or min(probabilities) <= 0):
            raise ValueError(
                f"probabilities = {list(probabilities)}: write {tiers} numbers above 0, one a tier"
            )
        super().__init__()
        self.tiers, self.devices = tiers, devices
        self.probabilities = np.array(probabilities or [1.0] * tiers)

    def select(self, devices: Sequence[Device], longest: float) -> Sequence[Device]:
        """The devices of one tier, or some of them."""
        del longest
        seconds = {d.name: self.profiles.seconds(d, d.settings.local_epochs) for d in devices}
        tiers = tiers_of(seconds, self.tiers)
        chances = self.probabilities[: len(tiers)]
        tier = tiers[self.rng.choice(len(tiers), p=chances / chances.sum())]
        if self.devices:
            tier = list(self.rng.choice(tier, min(self.devices, len(tier)), replace=False))
        return [device for device in devices if device.name in tier]
