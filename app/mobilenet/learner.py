"""Training and evaluation, the same for all models; no TensorFlow here.

A model's numbers are two flat vectors everywhere: in messages, in the optimizer and in the steps.
Flower ships each array of a message as an object of its own, and a MobileNet has hundreds.
"""

import functools
import gc
import itertools
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Self

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from mobilenet.data import Arrays
from mobilenet.optimizer import Optimizer, Vector, effective_steps
from mobilenet.settings import DeviceSettings, ModelSettings

EVALUATION_BATCH = 128

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Shape = tuple[int, ...]
"""Of an image: height, width, channels."""


class Parameters(NamedTuple):
    """The two arrays of a message, float32 of one dimension each."""

    weights: Vector
    """What training changes by its gradient."""
    statistics: Vector
    """Moving statistics of normalization, which a forward pass leaves behind; may be empty."""

    @classmethod
    def from_record(cls, record: ArrayRecord) -> Self:
        """Read the arrays of a message."""
        return cls(*(np.asarray(record[name].numpy(), np.float32) for name in cls._fields))

    def as_record(self) -> ArrayRecord:
        """Return the arrays as a message carries them."""
        return ArrayRecord({name: Array(part) for name, part in self._asdict().items()})


Step = tuple[Vector, Vector, float, float, float]
"""Gradient by the weights, statistics after the forward pass, mean loss, square loss, accuracy."""


class Learner(ABC):
    """One model, whose state is in the arguments; parameters of another model are a ValueError.

    Args:
        initial: parameters before any training.
        flips: whether training mirrors half of the images.
    """

    def __init__(self, initial: Parameters, *, flips: bool) -> None:
        self.initial = initial
        self._flips = flips

    @abstractmethod
    def _step(self, parameters: Parameters, images: Images, labels: Labels) -> Step:
        """Take the gradient of a batch."""

    @abstractmethod
    def _score(self, parameters: Parameters, images: Images, labels: Labels) -> tuple[float, float]:
        """Return sum of losses and number of right answers of a batch."""

    def evaluate(self, parameters: Parameters, data: Arrays) -> dict[str, float]:
        """Return metrics as a reply carries them: mean cross-entropy, share of right answers."""
        self._check(parameters)
        images, labels = data["image"], data["label"]
        sums = np.zeros(2)
        for start in range(0, len(images), EVALUATION_BATCH):
            some = slice(start, start + EVALUATION_BATCH)
            sums += self._score(parameters, images[some], labels[some])
        loss, accuracy = map(float, sums / len(images))
        return {"eval-loss": loss, "eval-accuracy": accuracy, "eval-examples": len(images)}

    def train(
        self,
        start: Parameters,
        data: Arrays,
        device: DeviceSettings,
        *,
        seed: int = 0,
        proximal_mu: float = 0.0,
        stop: Callable[[], bool] = lambda: False,
        fill: bool = False,
    ) -> tuple[Parameters, dict[str, float]]:
        """Train from `start` with a fresh optimizer; data smaller than a batch are one batch.

        Args:
            proximal_mu: weight of FedProx's proximal term, which keeps the weights near `start`
                (Li et al. 2020, https://arxiv.org/abs/1812.06127).
            stop: asked after each step whether to return what has been learned.
            fill: train on after the last epoch until `stop` says so.

        Returns:
            The trained parameters, and metrics as a reply carries them. Losses and accuracy are
            means over the steps, measured before each update; `partial` is 1 if training was
            stopped before its last epoch ended.
        """
        self._check(start)
        weights, statistics = start
        images, labels = data["image"], data["label"]
        batch_size = min(device.batch_size, len(images))
        optimizer = Optimizer(device, weights.size)
        rng = np.random.default_rng(seed)
        epochs = itertools.count() if fill else range(device.local_epochs)
        steps, sums = 0, np.zeros(3)
        for indices in batches(len(images), batch_size, epochs, rng):
            if steps and stop():
                break
            batch = flip(images[indices], rng) if self._flips else images[indices]
            parameters = Parameters(weights, statistics)
            gradient, statistics, *means = self._step(parameters, batch, labels[indices])
            if proximal_mu:
                gradient = gradient + proximal_mu * (weights - start.weights)
            weights = weights + optimizer.update(gradient)
            steps, sums = steps + 1, sums + means
        loss, squared_loss, accuracy = map(float, sums / steps)
        return Parameters(weights, statistics), {
            "num-examples": steps * batch_size,
            "train-loss": loss,
            "train-loss-rms": squared_loss**0.5,
            "train-accuracy": accuracy,
            "train-steps": steps,
            "effective-steps": effective_steps(device, steps, proximal_mu),
            "partial": int(steps < device.local_epochs * (len(images) // batch_size)),
            "batch-size": batch_size,
        }

    def _check(self, parameters: Parameters) -> None:
        for name, part, own in zip(Parameters._fields, parameters, self.initial, strict=True):
            if part.shape != own.shape:
                raise ValueError(
                    f"{part.size} {name} received, but the model here has {own.size}: server and "
                    "device build different models; compare their settings, image size and classes"
                )


def flip(images: Images, rng: np.random.Generator) -> Images:
    """Mirror half of the images: costs nothing; shifts would need more rounds than a lab runs."""
    mirrored = rng.random(len(images)) < 0.5  # noqa: PLR2004 - half of them
    return np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def batches(examples: int, batch: int, epochs: Iterable[int], rng: Any) -> Iterator[Any]:
    """Yield indices of full batches; each epoch leaves out other examples that fill none."""
    for _ in epochs:
        order = rng.permutation(examples)
        for start in range(0, examples - batch + 1, batch):
            # Sorted: the images are memory-mapped, and the order within a batch means nothing.
            yield np.sort(order[start : start + batch])


@functools.lru_cache(maxsize=1)
def get_learner(settings: ModelSettings, image_shape: Shape, classes: int) -> Learner:
    """Return a model's learner; it is kept, as compiling a network takes as long as many epochs."""
    # Free the old model before building the new one: a device's memory is planned for one.
    get_learner.cache_clear()
    gc.collect()
    if settings.model == "linear":
        from mobilenet.linear import LinearLearner

        return LinearLearner(image_shape, classes)
    load_tensorflow()
    from mobilenet.model import KerasLearner

    return KerasLearner(settings, image_shape, classes)


def load_tensorflow() -> None:
    """Import TensorFlow with as many threads as OMP_NUM_THREADS says, by default one."""
    if "tensorflow" in sys.modules:
        return
    # Hide what Keras imports if it is installed: saves 50 MiB and a second.
    hidden = {"matplotlib", "pandas"} - set(sys.modules)
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    import keras  # noqa: F401
    import tensorflow as tf

    for package in hidden:
        del sys.modules[package]
    tf.config.threading.set_intra_op_parallelism_threads(int(os.getenv("OMP_NUM_THREADS") or 1))
    tf.config.threading.set_inter_op_parallelism_threads(1)
