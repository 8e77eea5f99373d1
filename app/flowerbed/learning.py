"""Training and evaluation as all models have it in common; no TensorFlow here.

Weights are one flat vector everywhere: in messages, in the optimizer and in the steps.
"""

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowerbed.optimizer import Optimizer, OptimizerName, effective_steps

EVALUATION_BATCH = 128

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Weights = NDArray[np.float32]


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and share of right answers over `examples`."""

    loss: float
    accuracy: float
    examples: int


@dataclass(frozen=True)
class Training:
    """What training left: `loss` and `accuracy` are means over the steps as they were taken."""

    weights: Weights
    loss: float
    rms_loss: float
    """Root of the mean square of the examples' losses."""
    accuracy: float
    examples: int
    steps: int
    effective_steps: float
    """See `flowerbed.optimizer.effective_steps`."""
    partial: bool
    """Whether the time was up before the last epoch ended."""


@dataclass(frozen=True)
class Step:
    """What one batch tells; `loss` and `accuracy` are means over its examples."""

    weights: Weights
    """With what a forward pass changes in them (moving statistics)."""
    gradient: Weights
    """Of `loss`."""
    loss: float
    squared_loss: float
    """Mean of the squares of its examples' losses."""
    accuracy: float


class Learner(ABC):
    """One model with the hyperparameters of one device; used again for every round.

    Args:
        batch_size: examples a training step.
        flips: whether training mirrors half of the images.
    """

    def __init__(
        self,
        *,
        batch_size: int = EVALUATION_BATCH,
        optimizer: OptimizerName = "sgd",
        learning_rate: float = 0.05,
        flips: bool = True,
    ) -> None:
        self.batch_size = batch_size
        self._optimizer: OptimizerName = optimizer
        self._learning_rate = learning_rate
        self._flips = flips

    @abstractmethod
    def get_weights(self) -> Weights:
        """Initial weights."""

    @abstractmethod
    def _check(self, weights: Weights) -> Weights:
        """The weights as the steps take them.

        Raises:
            ValueError: they are of another model, by their number.
        """

    @abstractmethod
    def _step(self, weights: Weights, images: Images, labels: Labels) -> Step:
        """One training step's gradient; `images` are a full batch."""

    @abstractmethod
    def _evaluate(self, weights: Weights, images: Images, labels: Labels) -> tuple[float, float]:
        """Sum of cross-entropies, and number of right answers; at most EVALUATION_BATCH images."""

    def trainable(self) -> Weights:
        """1 where a weight is trained, and 0 where it is a statistic that passes leave behind."""
        return np.ones_like(self.get_weights())

    def evaluate(self, weights: Weights, images: Images, labels: Labels) -> Evaluation:
        """Evaluate `weights` on uint8 images (n, height, width, channels) and labels (n,)."""
        weights = self._check(weights)
        loss = hits = 0.0
        for start in range(0, len(images), EVALUATION_BATCH):
            some = slice(start, start + EVALUATION_BATCH)
            batch_loss, batch_hits = self._evaluate(weights, images[some], labels[some])
            loss, hits = loss + batch_loss, hits + batch_hits
        return Evaluation(loss / len(images), hits / len(images), len(images))

    def train(
        self,
        weights: Weights,
        images: Images,
        labels: Labels,
        *,
        epochs: int = 1,
        seed: int = 0,
        time_limit: float = 0.0,
        fill_time: bool = False,
        proximal_mu: float = 0.0,
    ) -> Training:
        """Train from `weights` with a fresh optimizer.

        Args:
            images: uint8 (n, height, width, channels), n at least the batch size.
            time_limit: seconds after which training stops where it is; 0: no limit.
            fill_time: go on after the last epoch until then.
            proximal_mu: weight of FedProx's proximal term, which keeps the model near `weights`.

        Raises:
            ValueError: fewer images than a batch, or weights of another model.
        """
        if len(images) < self.batch_size:
            raise ValueError(
                f"the shard has {len(images)} training images, fewer than a batch of "
                f"{self.batch_size}: lower device_batch_size or raise device_data_fraction"
            )
        weights = start = self._check(weights)
        pull = proximal_mu * self.trainable() if proximal_mu else 0.0
        optimizer = Optimizer(self._optimizer, self._learning_rate, weights.size)
        rng = np.random.default_rng(seed)
        deadline = time.monotonic() + time_limit if time_limit else float("inf")
        loss = squared_loss = accuracy = 0.0
        steps = 0
        for indices in batches(
            len(images), self.batch_size, itertools.count() if fill_time else range(epochs), rng
        ):
            if steps and time.monotonic() >= deadline:
                break
            batch = flip(images[indices], rng) if self._flips else images[indices]
            step = self._step(weights, batch, labels[indices])
            gradient = step.gradient
            if proximal_mu:
                gradient = gradient + pull * (weights - start)
            weights = step.weights + optimizer.update(gradient)
            loss += step.loss
            squared_loss += step.squared_loss
            accuracy += step.accuracy
            steps += 1
        return Training(
            weights=weights,
            loss=loss / steps,
            rms_loss=(squared_loss / steps) ** 0.5,
            accuracy=accuracy / steps,
            examples=steps * self.batch_size,
            steps=steps,
            effective_steps=effective_steps(
                self._optimizer, self._learning_rate, steps, proximal_mu
            ),
            partial=steps < epochs * (len(images) // self.batch_size),
        )


def flip(images: Images, rng: np.random.Generator) -> Images:
    """Mirror half of the images: free, and shifts would cost more rounds than a lab runs."""
    mirrored = rng.random(len(images)) < 0.5  # noqa: PLR2004 - half of them
    return np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def batches(
    examples: int, batch: int, epochs: Iterable[int], rng: np.random.Generator
) -> Iterator[Any]:
    """Indices of full batches; what does not fill one is left out, differently each epoch."""
    for _ in epochs:
        order = rng.permutation(examples)
        for start in range(0, examples - batch + 1, batch):
            # Sorted: the images are memory-mapped, and the order within a batch means nothing.
            yield np.sort(order[start : start + batch])
