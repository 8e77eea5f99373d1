"""Strategies by name: Flower's own, ready for one flat array and whoever is online, and ours."""

import inspect
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from flowerbed.strategies.fedbuff import FedBuff
from flowerbed.strategies.oort import Oort
from flowerbed.strategies.paced import Paced
from flowerbed.strategies.pacing import Pacing
from flowerbed.strategies.tifl import TiFL

# Left out: FedXgb* exchange trees, DifferentialPrivacy* wrap another strategy.
_FLOWER = (
    flower.Bulyan,
    flower.FedAdagrad,
    flower.FedAdam,
    flower.FedAvg,
    flower.FedAvgM,
    flower.FedMedian,
    flower.FedProx,
    flower.FedTrimmedAvg,
    flower.FedYogi,
    flower.Krum,
    flower.MultiKrum,
    flower.QFedAvg,
)
_OURS = (
    FedBuff,
    Oort,
    Paced,
    TiFL,
)
STRATEGIES = {strategy.__name__.lower(): strategy for strategy in (*_FLOWER, *_OURS)}


class StrategyError(ValueError):
    """Unknown strategy or parameter; the message says what there is."""


def make_strategy(name: str, parameters: dict[str, Any]) -> Strategy:
    """Build a strategy.

    Args:
        name: a key of STRATEGIES.
        parameters: arguments of its constructor, over the defaults below.

    Raises:
        StrategyError: no such strategy or parameter, or a parameter out of its range.
    """
    if name not in STRATEGIES:
        raise StrategyError(f"strategy = {name!r}: choose one of {', '.join(sorted(STRATEGIES))}")
    cls = STRATEGIES[name]
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    if unknown := set(parameters) - known:
        raise StrategyError(
            f"strategy-parameters: {name} has no {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(known))}"
        )
    # Devices evaluate the received model in the training exchange: no round of its own for that.
    # Whether enough devices are there is the run's to decide; Flower would wait for ever.
    defaults = {
        "fraction_evaluate": 0.0,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 0,
        "min_available_nodes": 1,
    }
    try:
        return cls(**{k: v for k, v in defaults.items() if k in known} | parameters)
    except (TypeError, ValueError) as error:
        raise StrategyError(f"strategy-parameters: {name}: {error}") from None


def pacing_of(strategy: Strategy) -> Pacing:
    """When rounds of a strategy are over; Flower's wait for everybody."""
    return strategy if isinstance(strategy, Pacing) else Pacing()
