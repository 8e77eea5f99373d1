"""Keras' optimizers on one flat vector of weights.

A network's step in TensorFlow ends with the gradient. A few numpy operations on one vector replace
a dozen graph operations for each of some hundred variables, which would cost a small device
memory, start-up time and a tenth of each step.
"""

import math

import numpy as np
from numpy.typing import NDArray

from mobilenet.settings import DeviceSettings

Vector = NDArray[np.float32]

MOMENTUM = 0.9
_ADAM = (0.9, 0.999, 1e-7)
"""Decay of the two moments and epsilon, as in Keras."""


class Optimizer:
    """SGD with Nesterov momentum, or Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980).

    Args:
        size: length of the weight vector. All moments start at zero.
    """

    def __init__(self, device: DeviceSettings, size: int) -> None:
        self._name, self._rate = device.optimizer, device.learning_rate
        self._moments = np.zeros((2 if self._name == "adam" else 1, size), np.float32)
        self._steps = 0

    def update(self, gradient: Vector) -> Vector:
        """Return what to add to the weights for this step's gradient; both of length `size`."""
        self._steps += 1
        if self._name == "sgd":
            (velocity,) = self._moments
            velocity *= MOMENTUM
            velocity -= self._rate * gradient
            return MOMENTUM * velocity - self._rate * gradient
        beta1, beta2, epsilon = _ADAM
        first, second = self._moments
        first += (1 - beta1) * (gradient - first)
        second += (1 - beta2) * (gradient**2 - second)
        rate = self._rate * math.sqrt(1 - beta2**self._steps) / (1 - beta1**self._steps)
        step = -rate * first / (np.sqrt(second) + epsilon)
        return step.astype(np.float32, copy=False)


def effective_steps(device: DeviceSettings, steps: int, proximal_mu: float) -> float:
    """Return how many steps of plain SGD a device's steps amount to.

    FedNova's norm of the local accumulation vector (Wang et al. 2020,
    https://arxiv.org/abs/2007.07481), for any optimizer: how far the steps carry a weight whose
    gradient stays 1, divided by the learning rate. FedProx's term pulls back what has moved.
    """
    optimizer = Optimizer(device, 1)
    moved = np.zeros(1, np.float32)
    for _ in range(steps):
        moved += optimizer.update(1 + proximal_mu * moved)
    return float(-moved[0] / device.learning_rate)
