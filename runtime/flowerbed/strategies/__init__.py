"""Strategies by name: Flower's own, made safe for a lab, and the lab's.

All keep to Flower's interface. `aggregate_train` returns None for the model if it has aggregated
nothing; whoever calls it, or wraps it, must not count the replies as aggregated then.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from flowerbed.strategies.adapted import adapt
from flowerbed.strategies.base import RoundPolicy, Selective, StrategyError, is_statistic
from flowerbed.strategies.fedbuff import FedBuff
from flowerbed.strategies.oort import Oort
from flowerbed.strategies.paced import Paced
from flowerbed.strategies.tifl import TiFL

__all__ = [
    "STRATEGIES",
    "FedBuff",
    "Oort",
    "Paced",
    "RoundPolicy",
    "Selective",
    "StrategyError",
    "TiFL",
    "is_statistic",
    "make_strategy",
    "parameters_of",
]

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
STRATEGIES: dict[str, type[Any]] = {
    **{strategy.__name__.lower(): adapt(strategy) for strategy in _FLOWER},
    **{strategy.__name__.lower(): strategy for strategy in _OURS},
}

_DEFAULTS = {
    "fraction_evaluate": 0.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
    "train_loss_key": "train-loss",
}
"""Where the lab's defaults differ from Flower's."""
_NOT_OFFERED = {
    "self",
    # The lab asks the devices that there are; Flower would wait for ever for others.
    "min_train_nodes",
    "min_evaluate_nodes",
    "min_available_nodes",
    # Functions cannot be written in a configuration.
    "train_metrics_aggr_fn",
    "evaluate_metrics_aggr_fn",
    "selection_rule",
    # The names of records and metrics are those that the lab knows.
    "arrayrecord_key",
    "configrecord_key",
    "weighted_by_key",
}
_ABOVE_0 = {"client_learning_rate", "eta", "num_nodes_to_select", "server_learning_rate", "tau"}
_AT_LEAST_0 = {"eta_l", "num_malicious_nodes", "proximal_mu", "q", "server_momentum"}
_TYPES = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}


def parameters_of(name: str) -> dict[str, inspect.Parameter]:
    """Return the parameters that a strategy offers, by their names.

    Raises:
        StrategyError: there is no such strategy.
    """
    if name not in STRATEGIES:
        raise StrategyError(f"strategy {name!r}: choose one of {', '.join(sorted(STRATEGIES))}")
    found = inspect.signature(STRATEGIES[name].__init__).parameters
    return {key: value for key, value in found.items() if key not in _NOT_OFFERED}


def make_strategy(name: str, parameters: Mapping[str, Any], *, seed: int = 0) -> Strategy:
    """Build a strategy.

    Args:
        name: a key of STRATEGIES: the name of the class in lower case.
        parameters: arguments of its constructor; see `parameters_of`.
        seed: of all draws of the strategy.

    Raises:
        StrategyError: there is no such strategy or parameter, or a parameter is missing, has the
            wrong type or is out of its range.
    """
    offered = parameters_of(name)
    if unknown := sorted(set(parameters) - set(offered)):
        raise StrategyError(
            f"strategy {name} has no parameter {', '.join(unknown)}; it has {', '.join(offered)}"
        )
    arguments = {key: _DEFAULTS[key] for key in _accepted(name) if key in _DEFAULTS} | dict(
        parameters
    )
    for key, parameter in offered.items():
        if key in arguments:
            _check(name, key, arguments[key], parameter.annotation)
        elif parameter.default is inspect.Parameter.empty:
            raise StrategyError(f"strategy {name} needs the parameter {key}")
    try:
        strategy = STRATEGIES[name](**arguments)
    except ValueError as error:
        raise StrategyError(f"strategy {name}: {error}") from None
    strategy.rng = np.random.default_rng(seed)
    return strategy


def _accepted(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(STRATEGIES[name].__init__).parameters


def _check(name: str, key: str, value: Any, annotation: Any) -> None:
    """Check a parameter's type, and the range of Flower's; the lab's strategies check theirs.

    Raises:
        StrategyError: it is wrong.
    """
    expected = ""
    if annotation is float:
        right = isinstance(value, int | float) and not isinstance(value, bool)
        right = right and math.isfinite(value)
    elif annotation is int:
        right = isinstance(value, int) and not isinstance(value, bool)
    elif annotation in (bool, str):
        right = isinstance(value, annotation)
    else:
        expected = "a list of numbers"
        right = isinstance(value, Sequence) and all(isinstance(v, int | float) for v in value)
    if not right:
        expected = expected or _TYPES[annotation]
    elif key in _ABOVE_0 and value <= 0:
        expected = "a number above 0"
    elif key in _AT_LEAST_0 and value < 0:
        expected = "0 or more"
    elif key == "fraction_train" and not 0 < value <= 1:
        expected = "a number above 0 and up to 1"
    elif key == "fraction_evaluate" and not 0 <= value <= 1:
        expected = "a number from 0 to 1"
    elif key in ("beta_1", "beta_2") and not 0 <= value < 1:
        expected = "a number from 0 to below 1"
    else:
        return
    raise StrategyError(f"strategy {name}: {key} = {value!r}: write {expected}")
