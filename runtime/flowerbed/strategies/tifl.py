"""Tiers by measured speed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flowerbed.strategies.base import Selective, StrategyError

if TYPE_CHECKING:
    from flowerbed.server.fleet import Device


def tiers_of(
    seconds: Mapping[str, float | None], tiers: int, rng: np.random.Generator
) -> list[list[str]]:
    """Return devices in tiers of equal size (as far as their number allows), the fastest first.

    Args:
        seconds: of a round, by device; None: unknown. Such a device gets a random place.
        tiers: at most so many; fewer if there are fewer devices.
    """
    known = {name: value for name, value in seconds.items() if value is not None}
    ordered = sorted(known, key=lambda name: (known[name], name))
    for name in seconds:
        if name not in known:
            ordered.insert(int(rng.integers(len(ordered) + 1)), name)
    parts = np.array_split(np.arange(len(ordered)), min(tiers, len(ordered)))
    return [[ordered[index] for index in part] for part in parts]


class TiFL(Selective):
    """Each round asks devices of one tier of speed, so that none waits for a much slower one.

    The static selection of TiFL (Chai et al. 2020, https://arxiv.org/abs/2001.09249): a tier is
    drawn, then devices in it. Tiers are formed anew in each round, by what has been measured
    since. The paper profiles all devices before the first round. Here the app's `query.warm_up`
    may do that; a device of unknown speed is in a random tier until it has replied.

    Args:
        tiers: number of tiers.
        devices: number of devices drawn from the tier; 0: all of it.
        probabilities: of the tiers, the fastest first; empty: equal.
        fraction_evaluate: see `Selective`.

    Raises:
        StrategyError: a parameter is out of its range.
    """

    not_repeatable = "devices are selected by the time that they were measured to take"

    def __init__(
        self,
        tiers: int = 3,
        devices: int = 0,
        probabilities: Sequence[float] = (),
        *,
        fraction_evaluate: float = 0.0,
    ) -> None:
        if tiers < 1:
            raise StrategyError(f"tiers = {tiers}: write 1 or more")
        if devices < 0:
            raise StrategyError(f"devices = {devices}: write 0 or more")
        if probabilities and not (len(probabilities) == tiers and min(probabilities) > 0):
            raise StrategyError(
                f"probabilities = {list(probabilities)}: write {tiers} numbers above 0, one a tier"
            )
        super().__init__(fraction_evaluate)
        self.tiers, self.devices = tiers, devices
        self.probabilities = np.array(probabilities or [1.0] * tiers)

    def select(self, server_round: int, devices: Sequence["Device"]) -> Sequence["Device"]:
        """Select the devices of one tier, or some of them."""
        del server_round
        seconds = {device.name: self.profiles.round_seconds(device) for device in devices}
        tiers = tiers_of(seconds, self.tiers, self.rng)
        chances = self.probabilities[: len(tiers)]
        tier = tiers[self.rng.choice(len(tiers), p=chances / chances.sum())]
        if 0 < self.devices < len(tier):
            drawn = self.rng.choice(len(tier), self.devices, replace=False)
            tier = [tier[index] for index in drawn]
        return [device for device in devices if device.name in tier]
