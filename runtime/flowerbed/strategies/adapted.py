"""Flower's strategies as the lab offers them."""

import logging
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg
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


class Adapted(FedAvg):
    """What the lab changes about a strategy of Flower; stands before it in the bases.

    Optimisers do not see normalisation statistics: those are averaged by examples. Replies are
    sorted by device, and their arrays as they were sent, so that nothing depends on the order of
    arrival. Arrays keep their types.
    """

    _arrays: ArrayRecord
    _order: dict[int, int]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See `flwr.serverapp.strategy.Strategy`."""
        self._arrays = arrays
        optimised = self._part(arrays, self._optimised())
        messages = list(super().configure_train(server_round, optimised, config, grid))
        for message in messages:
            message.content[self.arrayrecord_key] = arrays
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
        optimised = self._optimised()
        models = []
        for reply in usable:
            for name, record in list(reply.content.array_records.items()):
                if set(record) == set(self._arrays):
                    reply.content[name] = self._part(record, optimised)
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
        if statistics := [key for key in self._arrays if key not in optimised]:
            # Flower has checked that each reply has one record of each kind, with this metric.
            records = [next(iter(reply.content.metric_records.values())) for reply in usable]
            weights = shares(float(record[self.weighted_by_key]) for record in records)
            averaged = combine(zip(weights, models, strict=True), statistics)
        new = {key: array.numpy() for key, array in arrays.items()} | averaged
        return as_record(new, self._arrays), metrics

    def _optimised(self) -> list[str]:
        """Return the keys of the arrays that Flower's strategy sees."""
        whole = not isinstance(self, _OPTIMISERS)
        return [key for key in self._arrays if whole or not is_statistic(key)]

    @staticmethod
    def _part(arrays: ArrayRecord, keys: Iterable[str]) -> ArrayRecord:
        return ArrayRecord({key: arrays[key] for key in keys})


def adapt(strategy: type[FedAvg]) -> type[Adapted]:
    """Return a class of Flower as the lab offers it, under the same name.

    `Sampled` stands between the class and Flower's FedAvg, from which all are derived, so the
    class's own `super().configure_train` reaches the lab's sampling.
    """
    between = () if strategy is FedAvg else (strategy,)
    bases = (Adapted, *between, Sampled)
    return type(strategy.__name__, bases, {"__doc__": strategy.__doc__})
