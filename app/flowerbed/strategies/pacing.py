"""What Flower's strategies leave to whoever runs them: whom to ask, and how long to wait."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, cast

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

from flowerbed.client_app import WEIGHTS
from flowerbed.fleet import Available, Device, Reply

Vector = NDArray[np.float32]

_FIRST_REST = 2.0
"""Seconds of a round that a device does not train once it has the message, until they have been
measured."""
_NEWEST = 0.5
"""Weight of the newest measurement in a mean of all."""


class Pacing:
    """When a round is over. As it stands: when every device has answered, or the time is up."""

    asynchronous = False
    """Whether a device is asked again as soon as it has answered, and its answer counts in whatever
    round it comes. Else it is asked once a round, and late when that is over."""

    def begin(self, trainable: NDArray[np.bool_], seed: int) -> None:
        """A run begins.

        Args:
            trainable: where the vector of weights is trained; elsewhere it holds statistics.
            seed: of what is drawn.
        """

    def patience(self) -> float:
        """Seconds after which the round that has just been configured is closed, at the latest."""
        return math.inf

    def is_over(self, models: int, working: int) -> bool:
        """Whether a round has what it needs.

        Args:
            models: that have come.
            working: devices whose answer would still count.
        """
        del models
        return not working

    def observe(self, reply: Reply) -> None:
        """A device has answered, whatever and whenever."""


class Profiles:
    """How fast devices are, by what they have done."""

    def __init__(self) -> None:
        self._speed: dict[str, float] = {}
        self._overhead: dict[str, float] = {}

    def observe(self, reply: Reply) -> None:
        """Learn from an answer, if the device has trained."""
        if not (train := reply.times.train_seconds):
            return
        name = reply.device.name
        for known, seen in (
            (self._speed, reply.metrics["num-examples"] / train),
            (self._overhead, reply.seconds - train),
        ):
            known[name] = known.get(name, seen) * (1 - _NEWEST) + seen * _NEWEST

    def overhead(self, device: Device) -> float:
        """Seconds of a round that it does not train: receive, queue, evaluate, send."""
        return self._overhead.get(device.name, device.receive_seconds + _FIRST_REST)

    def seconds(self, device: Device, epochs: int) -> float:
        """Seconds of a round in which it trains for some epochs."""
        speed = self._speed.get(device.name, device.examples_per_second)
        return self.overhead(device) + epochs * device.examples / speed


class Selective(Pacing, FedAvg):
    """A strategy that knows devices by their names and asks each in its own way.

    As it stands, models are averaged by examples as in FedAvg.
    """

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        self.profiles = Profiles()
        self.rng = np.random.default_rng()
        self.trainable: NDArray[np.bool_] = np.ones(0, np.bool_)

    def begin(self, trainable: NDArray[np.bool_], seed: int) -> None:
        """See `Pacing`."""
        self.trainable = trainable
        self.rng = np.random.default_rng(seed)

    def observe(self, reply: Reply) -> None:
        """See `Pacing`."""
        self.profiles.observe(reply)

    @abstractmethod
    def select(self, devices: Sequence[Device], longest: float) -> Sequence[Device]:
        """The devices to ask among those that may be asked, of whom there is at least one.

        Args:
            longest: seconds of training that a message allows.
        """

    def task(self, device: Device) -> dict[str, Any]:
        """What its task has beside what all have, by the names of `flowerbed.config.Task`."""
        del device
        return {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages with a configuration each; see `flwr.serverapp.strategy.Strategy`."""
        del server_round
        devices = cast(Available, grid).devices
        return [
            Message(
                RecordDict(
                    {"arrays": arrays, "config": ConfigRecord({**config, **self.task(device)})}
                ),
                device.node_id,
                MessageType.TRAIN,
            )
            for device in self.select(devices, float(config["time-limit"]))
        ]


def weights_of(arrays: ArrayRecord) -> Vector:
    """The one vector of weights."""
    return np.asarray(arrays[WEIGHTS].numpy(), np.float32)


def models_of(replies: Iterable[Message]) -> NDArray[np.float32]:
    """The models of replies, a row each."""
    return np.stack([weights_of(reply.content.array_records["arrays"]) for reply in replies])


def metric_of(replies: Iterable[Message], key: str) -> NDArray[np.float64]:
    """A metric of replies."""
    return np.array([float(reply.content.metric_records["metrics"][key]) for reply in replies])


def aggregated(weights: NDArray[Any]) -> tuple[ArrayRecord, MetricRecord]:
    """A vector of weights as strategies return it; the run has measured all there is to measure."""
    return ArrayRecord({WEIGHTS: Array(weights.astype(np.float32))}), MetricRecord()
