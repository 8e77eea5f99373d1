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

from flowerbed.strategies.adapted import adapt, privatise
from flowerbed.strategies.base import RoundPolicy, Selective, StrategyError, is_statistic
from flowerbed.strategies.fedbuff import FedBuff
from flowerbed.strategies.oort import Oort
from flowerbed.strategies.paced import Paced
from flowerbed.strategies.tifl import TiFL

__all__ = [
    "PRIVACY",
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

# Left out: FedXgb* exchange trees.
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

_PRIVACY = (
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
    flower.DifferentialPrivacyClientSideFixedClipping,
    flower.DifferentialPrivacyServerSideAdaptiveClipping,
    flower.DifferentialPrivacyServerSideFixedClipping,
)


def _make_wrapped(name: str, parameters: Mapping[str, Any]) -> Strategy:
    names = sorted(strategy.__name__.lower() for strategy in _FLOWER)
    if name not in names:
        raise StrategyError(
            f"strategy = {name!r}: differential privacy wraps a strategy of Flower; write one of "
            f"{', '.join(names)}"
        )
    return make_strategy(name, parameters)


PRIVACY: dict[str, type[Any]] = {
    wrapper.__name__.lower(): privatise(wrapper, _make_wrapped) for wrapper in _PRIVACY
}
"""Flower's wrappers for differential privacy. Which strategy they wrap is a parameter."""

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
_LIMITS: tuple[tuple[str, dict[str, float]], ...] = (
    ("fraction fraction_train quantile share", {"above": 0, "maximum": 1}),
    ("fraction_evaluate target_clipped_quantile", {"minimum": 0, "maximum": 1}),
    ("beta_1 beta_2", {"minimum": 0, "below": 1}),
    ("buffer_size pacer_rounds tiers", {"minimum": 1}),
    ("client_learning_rate server_learning_rate eta tau num_nodes_to_select", {"above": 0}),
    ("clipping_norm initial_clipping_norm clip_norm_lr num_sampled_clients", {"above": 0}),
    ("box devices grace penalty proximal_mu", {"minimum": 0}),
    ("eta_l q server_momentum num_malicious_nodes", {"minimum": 0}),
    ("noise_multiplier clipped_count_stddev", {"minimum": 0}),
)
RANGES = {name: limits for names, limits in _LIMITS for name in names.split()}
"""Ranges of parameters; a name means the same in all strategies."""
_TYPES = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "a text",
    dict: "a dictionary",
    list: "a list of numbers",
}


def parameters_of(name: str) -> dict[str, inspect.Parameter]:
    """Return the parameters that a strategy offers, by their names.

    Raises:
        StrategyError: there is no such strategy.
    """
    if name not in STRATEGIES | PRIVACY:
        known = ", ".join(sorted(STRATEGIES | PRIVACY))
        raise StrategyError(f"strategy {name!r}: choose one of {known}")
    found = _accepted(name)
    return {key: value for key, value in found.items() if key not in _NOT_OFFERED}


def make_strategy(name: str, parameters: Mapping[str, Any], *, seed: int = 0) -> Strategy:
    """Build a strategy.

    Args:
        name: a key of STRATEGIES or PRIVACY: the name of the class in lower case.
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
        strategy = (STRATEGIES | PRIVACY)[name](**arguments)
    except ValueError as error:
        raise StrategyError(f"strategy {name}: {error}") from None
    strategy.rng = np.random.default_rng(seed)
    return strategy


def _accepted(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature((STRATEGIES | PRIVACY)[name].__init__).parameters


def type_of(annotation: Any) -> tuple[type, bool]:
    """Return the type of a parameter by its annotation, and whether it may be None."""
    if annotation == float | None:
        return float, True
    return annotation if annotation in _TYPES else list, False


def _is_of(value: Any, wanted: type) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is float:
        return number and math.isfinite(value)
    if wanted is int:
        return number and isinstance(value, int)
    if wanted is list:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and all(isinstance(each, int | float) for each in value)
    return isinstance(value, wanted)


def _range_problem(value: float, limits: Mapping[str, float]) -> str:
    """Return what to write where a value is out of its range; empty: it is not."""
    low = limits.get("minimum", limits.get("above", -math.inf))
    right = value > low or (value == low and "above" not in limits)
    if right and value <= limits.get("maximum", math.inf) and value < limits.get("below", math.inf):
        return ""
    begin = f"a number above {low}" if "above" in limits else f"a number from {low}"
    if "below" in limits:
        return f"{begin} to below {limits['below']}"
    if "maximum" in limits:
        return f"{begin} {'and up ' * ('above' in limits)}to {limits['maximum']}"
    return begin if "above" in limits else f"{low} or more"


def _check(name: str, key: str, value: Any, annotation: Any) -> None:
    """Check a parameter's type and range.

    Raises:
        StrategyError: it is wrong.
    """
    wanted, optional = type_of(annotation)
    if value is None and optional:
        return
    expected = "" if _is_of(value, wanted) else _TYPES[wanted]
    if not expected and wanted in (int, float):
        expected = _range_problem(value, RANGES.get(key, {}))
    if expected:
        raise StrategyError(f"strategy {name}: {key} = {value!r}: write {expected}")
