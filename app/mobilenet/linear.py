"""Softmax regression on pixels in numpy, with the weights in the order of the Keras model.

Devices need no TensorFlow and little memory for it: forty fit where four others would.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilenet.learner import Images, Labels, Learner, Parameters, Shape, Step
from mobilenet.optimizer import Vector


class LinearLearner(Learner):
    """Pixels times kernel plus bias, and softmax. Initial weights are zeros, kernel first."""

    def __init__(self, image_shape: Shape, classes: int) -> None:
        self._shape = (int(np.prod(image_shape)), classes)
        weights = np.zeros((self._shape[0] + 1) * classes, np.float32)
        super().__init__(Parameters(weights, weights[:0]), flips=True)

    def _probabilities(self, weights: Vector, pixels: NDArray[np.float32]) -> Any:
        size = self._shape[0] * self._shape[1]
        logits = pixels @ weights[:size].reshape(self._shape) + weights[size:]
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True)

    def _step(self, parameters: Parameters, images: Images, labels: Labels) -> Step:
        pixels = scale(images)
        errors = self._probabilities(parameters.weights, pixels)
        losses, hits = _judge(errors, labels)
        errors[np.arange(len(labels)), labels] -= 1
        errors /= len(labels)
        gradient = np.concatenate([(pixels.T @ errors).ravel(), errors.sum(axis=0)])
        loss, square = float(losses.mean()), float(np.square(losses).mean())
        return gradient, parameters.statistics, loss, square, hits / len(labels)

    def _score(self, parameters: Parameters, images: Images, labels: Labels) -> tuple[float, float]:
        losses, hits = _judge(self._probabilities(parameters.weights, scale(images)), labels)
        return float(losses.sum()), hits


def scale(images: Images) -> NDArray[np.float32]:
    """Return pixels as rows of numbers from -1 to 1, shape (n, height * width * channels)."""
    return images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1


def _judge(probabilities: Any, labels: Labels) -> tuple[NDArray[np.float32], float]:
    """Return the cross-entropy of each example, and the number of right answers."""
    right = np.clip(probabilities[np.arange(len(labels)), labels], 1e-7, 1)
    return -np.log(right), float((probabilities.argmax(axis=1) == labels).sum())
