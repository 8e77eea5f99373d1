"""Softmax regression on pixels, in numpy: the model of a lab whose subject is not the learning.

A device with it needs no TensorFlow and little memory, so that forty fit where four others would.
The weights are in the order of the Keras model of the same name, which the server evaluates and
saves.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowerbed.learning import Images, Labels, Learner, Step, Weights


def scale(images: Images) -> NDArray[np.float32]:
    """Pixels as rows of numbers from -1 to 1, shape (n, height * width * channels)."""
    return images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1


class LinearLearner(Learner):
    """Pixels times kernel plus bias, and softmax; `options` as of `Learner`."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int, **options: Any) -> None:
        super().__init__(**options)
        self._shape = (int(np.prod(image_shape)), classes)

    def get_weights(self) -> Weights:
        """Initial weights: zeros, kernel first, then bias."""
        return np.zeros((self._shape[0] + 1) * self._shape[1], np.float32)

    def _check(self, weights: Weights) -> Weights:
        if weights.size != (wanted := self.get_weights().size):
            raise ValueError(
                f"{weights.size} weights received, but the model 'linear' has {wanted}: server "
                "and device build different models"
            )
        return weights

    def _probabilities(self, weights: Weights, pixels: NDArray[np.float32]) -> Any:
        size = self._shape[0] * self._shape[1]
        logits = pixels @ weights[:size].reshape(self._shape) + weights[size:]
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True)

    @staticmethod
    def _score(probabilities: Any, labels: Labels) -> tuple[NDArray[np.float32], float]:
        """Cross-entropy of each example, and number of right answers."""
        right = np.clip(probabilities[np.arange(len(labels)), labels], 1e-7, 1)
        return -np.log(right), float((probabilities.argmax(axis=1) == labels).sum())

    def _step(self, weights: Weights, images: Images, labels: Labels) -> Step:
        pixels = scale(images)
        probabilities = self._probabilities(weights, pixels)
        losses, hits = self._score(probabilities, labels)
        errors = probabilities
        errors[np.arange(len(labels)), labels] -= 1
        errors /= len(labels)
        gradient = np.concatenate([(pixels.T @ errors).ravel(), errors.sum(axis=0)])
        return Step(
            weights,
            gradient,
            loss=float(losses.mean()),
            squared_loss=float(np.square(losses).mean()),
            accuracy=hits / len(labels),
        )

    def _evaluate(self, weights: Weights, images: Images, labels: Labels) -> tuple[float, float]:
        losses, hits = self._score(self._probabilities(weights, scale(images)), labels)
        return float(losses.sum()), hits
