"""Softmax regression on pixels, in numpy: the model of a lab whose subject is not the learning.

A device with it needs no TensorFlow and little memory, so that forty fit where four others would.
The weights are in the order of the Keras model of the same name, which the server evaluates and
saves.
"""

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowerbed.learning import (
    EVALUATION_BATCH,
    MOMENTUM,
    Evaluation,
    Images,
    Labels,
    Training,
    Weights,
    batches,
    flip,
)

_ADAM = (0.9, 0.999, 1e-7)
"""Decay of the two moments and epsilon, as in Keras."""


def scale(images: Images) -> NDArray[np.float32]:
    """Pixels as rows of numbers from -1 to 1, shape (n, height * width * channels)."""
    return images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1


class LinearLearner:
    """The interface of `flowerbed.learner.Learner`, without TensorFlow.

    Args:
        batch_size: examples a training step.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        batch_size: int,
        optimizer: str = "sgd",
        learning_rate: float = 0.05,
    ) -> None:
        self._shape = (int(np.prod(image_shape)), classes)
        self._batch_size = batch_size
        self._optimizer = optimizer
        self._rate = learning_rate

    def get_weights(self) -> Weights:
        """Initial weights: zeros, kernel first, then bias."""
        return np.zeros((self._shape[0] + 1) * self._shape[1], np.float32)

    def _split(self, weights: Weights) -> tuple[Any, Any]:
        size = self._shape[0] * self._shape[1]
        if weights.size != size + self._shape[1]:
            raise ValueError(
                f"{weights.size} weights received, but the model 'linear' has "
                f"{size + self._shape[1]}: server and device build different models"
            )
        return weights[:size].reshape(self._shape), weights[size:]

    def _probabilities(self, weights: Weights, pixels: NDArray[np.float32]) -> Any:
        kernel, bias = self._split(weights)
        logits = pixels @ kernel + bias
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True)

    @staticmethod
    def _score(probabilities: Any, labels: Labels) -> tuple[float, int]:
        """Sum of cross-entropies, and number of right answers."""
        right = np.clip(probabilities[np.arange(len(labels)), labels], 1e-7, 1)
        return float(-np.log(right).sum()), int((probabilities.argmax(axis=1) == labels).sum())

    def evaluate(self, weights: Weights, images: Images, labels: Labels) -> Evaluation:
        """Evaluate `weights` on uint8 images (n, height, width, channels) and labels (n,)."""
        loss, hits = 0.0, 0
        for start in range(0, len(images), EVALUATION_BATCH):
            some = slice(start, start + EVALUATION_BATCH)
            probabilities = self._probabilities(weights, scale(images[some]))
            batch_loss, batch_hits = self._score(probabilities, labels[some])
            loss, hits = loss + batch_loss, hits + batch_hits
        return Evaluation(loss / len(images), hits / len(images), len(images))

    @staticmethod
    def _gradient(pixels: Any, probabilities: Any, labels: Labels) -> Any:
        errors = probabilities.copy()
        errors[np.arange(len(labels)), labels] -= 1
        errors /= len(labels)
        return np.concatenate([(pixels.T @ errors).ravel(), errors.sum(axis=0)])

    def train(
        self,
        weights: Weights,
        images: Images,
        labels: Labels,
        *,
        epochs: int = 1,
        seed: int = 0,
        time_limit: float = 0.0,
        proximal_mu: float = 0.0,
    ) -> Training:
        """Train from `weights` with a fresh optimizer; see `Learner.train`."""
        start = weights
        weights = weights.copy()
        moments = np.zeros((2, weights.size), np.float32)
        rng = np.random.default_rng(seed)
        deadline = time.monotonic() + time_limit if time_limit else float("inf")
        loss = accuracy = 0.0
        steps = 0
        partial = False
        for indices in batches(len(images), self._batch_size, epochs, rng):
            if steps and time.monotonic() >= deadline:
                partial = True
                break
            pixels, batch_labels = scale(flip(images[indices], rng)), labels[indices]
            probabilities = self._probabilities(weights, pixels)
            gradient = self._gradient(pixels, probabilities, batch_labels)
            if proximal_mu:
                gradient += proximal_mu * (weights - start)
            steps += 1
            weights -= self._rate * self._direction(gradient, moments, steps)
            batch_loss, hits = self._score(probabilities, batch_labels)
            loss += batch_loss / len(batch_labels)
            accuracy += hits / len(batch_labels)
        return Training(
            weights=weights,
            loss=loss / steps,
            accuracy=accuracy / steps,
            examples=steps * self._batch_size,
            steps=steps,
            partial=partial,
        )

    def _direction(self, gradient: Any, moments: Any, step: int) -> Any:
        """What the optimizer makes of a gradient: Keras' SGD with Nesterov momentum, or Adam."""
        if self._optimizer == "sgd":
            moments[0] = MOMENTUM * moments[0] + gradient
            return gradient + MOMENTUM * moments[0]
        first, second, epsilon = _ADAM
        moments[0] = first * moments[0] + (1 - first) * gradient
        moments[1] = second * moments[1] + (1 - second) * gradient**2
        corrected = np.sqrt(moments[1] / (1 - second**step)) + epsilon
        return moments[0] / (1 - first**step) / corrected
