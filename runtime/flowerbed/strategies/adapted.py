"""Flower's strategies as the lab offers them."""

import inspect
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy
from numpy.typing import NDArray

from flowerbed.strategies.base import Sampled, as_record, combine, is_statistic, shares

log = logging.getLogger("flwr")

_OPTIMISERS = (
    flower.FedAdagrad,
    flower.FedAdam,
    flower.FedAvgM,
    flower.FedYogi,
    flower.QFedAvg,
)
"""Strategies that take a step instead of a mean. A step spoils normalisation statistics: FedAdam's
moves a variance by `eta`, whatever its scale. The others average, or select, whole models."""


class _Apart(Strategy):
    """Keeps some arrays from the strategy that follows in the bases: those are averaged.

    Replies are sorted by device, and their arrays as they were sent, so that nothing depends on the
    order of arrival. Arrays keep their types.
    """

    _arrays: ArrayRecord
    _order: dict[int, int]

    @abstractmethod
    def _seen(self) -> list[str]:
        """Return the keys of the arrays that the strategy sees."""

    @abstractmethod
    def _names(self) -> FedAvg:
        """Return the strategy that names records and metrics."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See `flwr.serverapp.strategy.Strategy`."""
        self._arrays = arrays
        seen = self._part(arrays, self._seen())
        messages = list(super().configure_train(server_round, seen, config, grid))
        for message in messages:
            message.content[self._names().arrayrecord_key] = arrays
        nodes = [message.metadata.dst_node_id for message in messages]
        self._order = {node: position for position, node in enumerate(nodes)}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate replies; see `flwr.serverapp.strategy.Strategy`.

        Returns:
            The next global model is None if nothing was aggregated: no device has replied, or the
            strategy wants more replies (Bulyan). The model stays as it is then.
        """
        last = len(self._order)
        replies = sorted(replies, key=lambda r: self._order.get(r.metadata.src_node_id, last))
        usable = [reply for reply in replies if not reply.has_error()]
        seen = self._seen()
        models = []
        for reply in usable:
            for name, record in list(reply.content.array_records.items()):
                if set(record) == set(self._arrays):
                    reply.content[name] = self._part(record, seen)
                models.append(record)
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is None:
            log.warning(
                "round %d: %s has aggregated none of %d replies; the model stays as it is",
                server_round,
                type(self).__name__,
                len(usable),
            )
            return None, metrics
        averaged: dict[str, NDArray[Any]] = {}
        if others := [key for key in self._arrays if key not in seen]:
            # Flower has checked that each reply has one record of each kind, with this metric.
            records = [next(iter(reply.content.metric_records.values())) for reply in usable]
            weights = shares(float(record[self._names().weighted_by_key]) for record in records)
            averaged = combine(zip(weights, models, strict=True), others)
        new = {key: array.numpy() for key, array in arrays.items()} | averaged
        return as_record(new, self._arrays), metrics

    @staticmethod
    def _part(arrays: ArrayRecord, keys: Iterable[str]) -> ArrayRecord:
        return ArrayRecord({key: arrays[key] for key in keys})


class Adapted(_Apart, FedAvg):
    """What the lab changes about a strategy of Flower; stands before it in the bases.

    Optimisers do not see normalisation statistics: those are averaged by examples.
    """

    def _seen(self) -> list[str]:
        whole = not isinstance(self, _OPTIMISERS)
        return [key for key in self._arrays if whole or not is_statistic(key)]

    def _names(self) -> FedAvg:
        return self


def adapt(strategy: type[FedAvg]) -> type[Adapted]:
    """Return a class of Flower as the lab offers it, under the same name.

    `Sampled` stands between the class and Flower's FedAvg, from which all are derived, so the
    class's own `super().configure_train` reaches the lab's sampling.
    """
    between = () if strategy is FedAvg else (strategy,)
    bases = (Adapted, *between, Sampled)
    return type(strategy.__name__, bases, {"__doc__": strategy.__doc__})


class Private(_Apart):
    """What the lab changes about a wrapper for differential privacy of Flower.

    Statistics of normalisation layers are averaged by examples, neither clipped nor with noise, of
    which a variance could become negative. A guarantee does not cover them.
    """

    strategy: FedAvg
    not_repeatable = "the noise of differential privacy is not drawn from the run's seed"

    def _seen(self) -> list[str]:
        return [key for key in self._arrays if not is_statistic(key)]

    def _names(self) -> FedAvg:
        return self.strategy

    @property
    def rng(self) -> np.random.Generator:
        """Generator of all draws of the wrapped strategy, but not of the noise."""
        return self.strategy.rng  # type: ignore[no-any-return]

    @rng.setter
    def rng(self, rng: np.random.Generator) -> None:
        self.strategy.rng = rng


def privatise(
    wrapper: type[Strategy], make: Callable[[str, Mapping[str, Any]], Strategy]
) -> type[Private]:
    """Return a wrapper for differential privacy that takes the name of what it wraps.

    Its parameters are those of the wrapper, `strategy` (a name) and `strategy_parameters`.

    Args:
        make: builds the wrapped strategy.
    """
    own = inspect.signature(wrapper.__init__).parameters
    kept = [p for name, p in own.items() if name not in ("strategy", "accountant")]
    more = [
        inspect.Parameter(
            "strategy", inspect.Parameter.KEYWORD_ONLY, default="fedavg", annotation=str
        ),
        inspect.Parameter(
            "strategy_parameters", inspect.Parameter.KEYWORD_ONLY, default={}, annotation=dict
        ),
    ]

    def init(
        self: Any,
        *,
        strategy: str = "fedavg",
        strategy_parameters: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        wrapper.__init__(self, make(strategy, strategy_parameters or {}), **arguments)

    init.__signature__ = inspect.Signature([*kept, *more])  # type: ignore[attr-defined]
    members = {"__init__": init, "__doc__": wrapper.__doc__}
    return type(wrapper.__name__, (Private, wrapper), members)
