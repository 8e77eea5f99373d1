"""What strategies share: their interface to the lab's Grid, sampling, and sums of models.

RoundPolicy   what a strategy may decide beyond Flower's interface; for users' own strategies, too
Sampled       FedAvg with sampling that is repeatable and never waits
Selective     a strategy that knows devices by name and sends each its own configuration
"""

import logging
import math
import operator
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from flowerbed.strategies.profiles import Profiles, metric_of

if TYPE_CHECKING:
    from flowerbed.server.fleet import Device, Reply

log = logging.getLogger("flwr")

STATISTICS = frozenset(
    (
        "statistics",
        "moving_mean",
        "moving_variance",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    )
)


class StrategyError(ValueError):
    """A strategy cannot work as it is configured; the message says why and what to change."""


def is_statistic(key: str) -> bool:
    """Return whether an array holds statistics of a normalisation layer.

    They are averaged, never optimised: an optimiser's step can make a variance negative.

    Args:
        key: of an ArrayRecord; its last part, after `/` or `.`, counts.
    """
    return re.split(r"[/.]", key)[-1] in STATISTICS


class RoundPolicy:
    """What a strategy may decide beyond Flower's interface.

    This is a public interface. The lab's Grid follows the policy of the strategy whose `start` is
    called, if that strategy is a RoundPolicy. Without one, a round ends when all devices have
    replied or the round's timeout is over, which no policy can extend.

        class Half(RoundPolicy, FedAvg):
            def is_over(self, replies, pending):
                return replies >= pending  # the round ends when half of the devices have replied
    """

    asynchronous = False
    """Whether replies to messages of earlier rounds count in the round in which they arrive, and
    pending messages outlive their round. Otherwise such a reply is late and not aggregated."""
    not_repeatable = ""
    """Why a run with this strategy does not repeat bit for bit; empty: it does. For `run.yml`."""

    def round_seconds(self) -> float:
        """Return the seconds after which the round just configured is closed at the latest."""
        return math.inf

    def is_over(self, replies: int, pending: int) -> bool:
        """Return whether the round has what it needs.

        Args:
            replies: usable replies so far.
            pending: messages whose reply would still count.
        """
        del replies
        return not pending

    def more(self, devices: Sequence["Device"]) -> Iterable[Message]:
        """Return further messages of the open round.

        Args:
            devices: those that may be asked now, for example because they have replied; without
                those that have failed in this round.
        """
        del devices
        return ()

    def observe(self, reply: "Reply") -> None:
        """Learn from a reply. Every message has one, whatever its outcome and whenever it comes."""


# --- sums of models ------------------------------------------------------------------------------


def shares(values: Iterable[float]) -> list[float]:
    """Return values divided by their sum; equal shares if the sum is 0."""
    values = list(values)
    total = math.fsum(values)
    return [value / total if total > 0 else 1 / len(values) for value in values]


def combine(
    terms: Iterable[tuple[float, ArrayRecord]], keys: Iterable[str]
) -> dict[str, NDArray[Any]]:
    """Return the weighted sum of models, array by array, in double precision.

    Models are read one after the other, so the sum needs the memory of one model, however many
    there are.

    Args:
        terms: weights and models.
        keys: of the arrays.
    """
    keys = list(keys)
    total: dict[str, NDArray[Any]] = {}
    for weight, model in terms:
        for key in keys:
            array = model[key].numpy()
            term = np.multiply(array, weight, dtype=np.result_type(array, np.float64))
            if key in total:
                total[key] += term
            else:
                total[key] = np.asarray(term)
    return total


def as_record(arrays: Mapping[str, NDArray[Any]], like: ArrayRecord) -> ArrayRecord:
    """Return arrays in the order and with the types of another record.

    Sums are taken in double precision, and some of Flower's strategies return it. Devices get the
    types that they had.
    """
    record = ArrayRecord()
    for key in [
        *(key for key in like if key in arrays),
        *(key for key in arrays if key not in like),
    ]:
        array = arrays[key]
        if key in like:
            wanted = np.dtype(like[key].dtype)
            array = np.asarray(np.rint(array) if wanted.kind in "iu" else array, wanted)
        record[key] = Array(np.asarray(array))
    return record


# --- strategies ----------------------------------------------------------------------------------


class Sampled(FedAvg):
    """FedAvg with sampling that is repeatable and never waits.

    Flower's sampling uses Python's global generator, and waits for ever if there are fewer nodes
    than it wants. This one takes the nodes that the grid lists, even if there is none.

    Attributes:
        rng: generator of all draws.
    """

    rng: np.random.Generator

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask `fraction_train` of the nodes; see `flwr.serverapp.strategy.Strategy`."""
        config["server-round"] = server_round
        return self._ask(MessageType.TRAIN, self.fraction_train, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask `fraction_evaluate` of the nodes; see `flwr.serverapp.strategy.Strategy`."""
        config["server-round"] = server_round
        return self._ask(MessageType.EVALUATE, self.fraction_evaluate, arrays, config, grid)

    def _ask(
        self,
        message_type: str,
        fraction: float,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> list[Message]:
        if not fraction:
            return []
        nodes = list(grid.get_node_ids())
        total = len(nodes)
        count = max(1, int(fraction * total))
        if count < total:
            drawn = self.rng.choice(total, count, replace=False)
            nodes = [nodes[index] for index in sorted(drawn)]
        log.info("configure_%s: asks %d nodes (out of %d)", message_type, len(nodes), total)
        # All messages share one content: the Grid packs it once.
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return [Message(content, node, message_type) for node in nodes]


@dataclass(frozen=True)
class Update:
    """What a device has returned for one message.

    Attributes:
        version: round of the message, and so of the model from which the device started.
    """

    device: "Device"
    version: int
    arrays: ArrayRecord
    metrics: Mapping[str, Any]

    def metric(self, name: str, use: str) -> float:
        """Return a metric.

        Args:
            use: for what it is needed, for the error.

        Raises:
            StrategyError: the reply does not have it.
        """
        value = metric_of(self.metrics, name)
        if value is None:
            raise StrategyError(
                f"the reply of {self.device.name} has no metric {name!r}, which is needed {use}; "
                f"it has {', '.join(map(str, self.metrics)) or 'none'}. Return it from the app's "
                "train function, or choose another strategy."
            )
        return value


class Selective(RoundPolicy, Sampled):
    """A strategy that knows devices by name and sends each its own configuration.

    It needs the lab. Models are averaged by examples, as in FedAvg, unless a subclass overrides
    `aggregate`.

    Args:
        fraction_evaluate: share of the devices that evaluate the model after each round. 0: no
            messages for that; an app may evaluate the received model before it trains.

    Attributes:
        rng: generator of all draws; `make_strategy` seeds it.
        arrays: the current global model.
        server_round: the current round, from 1.

    Raises:
        StrategyError: a parameter is out of its range.
    """

    def __init__(self, fraction_evaluate: float = 0.0) -> None:
        if not 0 <= fraction_evaluate <= 1:
            raise StrategyError(
                f"fraction_evaluate = {fraction_evaluate}: write a number from 0 to 1"
            )
        super().__init__(
            fraction_evaluate=fraction_evaluate,
            min_train_nodes=1,
            min_evaluate_nodes=1,
            min_available_nodes=1,
        )
        self.rng = np.random.default_rng(0)
        self.profiles = Profiles()
        self.arrays = ArrayRecord()
        self.server_round = 0
        self._config: dict[str, Any] = {}
        self._contents: dict[str, RecordDict] = {}
        self._devices: dict[int, Device] = {}

    @property
    def _name(self) -> str:
        return type(self).__name__

    # --- asking devices ---------------------------------------------------------------------

    @abstractmethod
    def select(self, server_round: int, devices: Sequence["Device"]) -> Sequence["Device"]:
        """Choose devices to ask.

        Args:
            server_round: from 1.
            devices: those that may be asked, at least one, by name.
        """

    def device_config(self, device: "Device") -> dict[str, Any]:
        """Return what a device's ConfigRecord has beside what all have."""
        del device
        return {}

    def message(self, device: "Device") -> Message:
        """Return the message of this round to a device."""
        self._devices[device.node_id] = device
        config = {**self._config, "server-round": self.server_round, **self.device_config(device)}
        # Messages with the same configuration share one content: the Grid packs it once.
        content = self._contents.setdefault(
            repr(config),
            RecordDict(
                {self.arrayrecord_key: self.arrays, self.configrecord_key: ConfigRecord(config)}
            ),
        )
        group = str(self.server_round)
        return Message(content, device.node_id, MessageType.TRAIN, group_id=group)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the selected devices; see `flwr.serverapp.strategy.Strategy`.

        Raises:
            StrategyError: the grid is not the lab's.
        """
        if not hasattr(grid, "devices"):
            raise StrategyError(
                f"{self._name} needs the lab: it selects and configures devices by name, and only "
                "Flowerbed's Grid lists them. Start the app in the lab, or use "
                "flwr.serverapp.strategy.FedAvg."
            )
        self.server_round, self.arrays, self._config = server_round, arrays, dict(config)
        self._contents.clear()
        grid.get_node_ids()  # waits until a device may be asked
        devices = list(grid.devices())
        chosen = self.select(server_round, devices) if devices else ()
        return [self.message(device) for device in chosen]

    def observe(self, reply: "Reply") -> None:
        """Learn how fast the device is; see `RoundPolicy`."""
        self.profiles.observe(reply)

    # --- aggregation ------------------------------------------------------------------------

    def aggregate(
        self, server_round: int, updates: Sequence[Update]
    ) -> Mapping[str, NDArray[Any]] | None:
        """Return the next global model, or None to keep the current one.

        Args:
            updates: at least one, by device and version.
        """
        del server_round
        return self.average(updates, self.arrays)

    def average(self, updates: Sequence[Update], keys: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Return the mean of the updates' arrays, by the examples that the devices have seen."""
        use = f"for the average of {self._name}"
        examples = [update.metric(self.weighted_by_key, use) for update in updates]
        models = [update.arrays for update in updates]
        return combine(zip(shares(examples), models, strict=True), keys)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate replies; see `flwr.serverapp.strategy.Strategy`.

        Returns:
            The next global model, and the mean of the metrics that all replies have. The model is
            None if nothing was aggregated, and stays as it is then.
        """
        updates = self._updates(replies)
        if not updates:
            log.warning("round %d: %s got no usable reply", server_round, self._name)
            return None, None
        arrays = self.aggregate(server_round, updates)
        if arrays is None:
            return None, None
        # The next aggregation starts from this result, even if nothing is configured in between.
        self.arrays = as_record(arrays, self.arrays)
        self._contents.clear()
        return self.arrays, self._mean_metrics(updates)

    def _updates(self, replies: Iterable[Message]) -> list[Update]:
        """Read replies; by device and version, so that no sum depends on the order of arrival."""
        updates = []
        for reply in replies:
            if reply.has_error():
                continue
            metadata, content = reply.metadata, reply.content
            device = self._devices[metadata.src_node_id]
            arrays = next(iter(content.array_records.values()), ArrayRecord())
            if differing := set(arrays) ^ set(self.arrays):
                some = ", ".join(sorted(differing)[:3])
                raise StrategyError(
                    f"{device.name} returned other arrays than it received: {len(differing)} are "
                    f"missing or new ({some}). {self._name} needs all arrays back, under the same "
                    "keys."
                )
            metrics = next(iter(content.metric_records.values()), MetricRecord())
            updates.append(Update(device, int(metadata.group_id), arrays, metrics))
        return sorted(updates, key=lambda update: (update.device.name, update.version))

    def _mean_metrics(self, updates: Sequence[Update]) -> MetricRecord:
        """Return the means of the numbers that all updates have, by examples if all have those."""
        examples = [metric_of(update.metrics, self.weighted_by_key) for update in updates]
        weights = shares(0.0 if None in examples else float(each or 0.0) for each in examples)
        means = {}
        for key in updates[0].metrics:
            found = [update.metrics.get(key) for update in updates]
            values = [value for value in found if isinstance(value, int | float)]
            if key != self.weighted_by_key and len(values) == len(updates):
                means[key] = math.fsum(map(operator.mul, weights, values))
        return MetricRecord(means)
