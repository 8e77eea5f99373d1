"""Keras' optimizers on one flat vector of weights.

A network's step in TensorFlow ends with the gradient. A few numpy operations on one vector take
the place of a dozen graph operations for each of some hundred variables, which would cost a small
device memory, start-up time and a tenth of each step.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
OptimizerName = Literal["sgd", "adam"]

MOMENTUM = 0.9
_ADAM = (0.9, 0.999, 1e-7)
"""Decay of the two moments and epsilon, as in Keras."""


def effective_steps(
    name: OptimizerName, rate: float, steps: int, proximal_mu: float = 0.0
) -> float:
    """How many steps of plain SGD a device's steps amount to.

    FedNova's norm of the local accumulation vector (Wang et al. 2020,
    https://arxiv.org/abs/2007.07481), for any optimizer: how far the steps carry a weight whose
    gradient stays 1, over the learning rate.

    Args:
        proximal_mu: of FedProx's term, which pulls back what has gone far.
    """
    optimizer = Optimizer(name, rate, 1)
    moved = np.zeros(1, np.float32)
    for _ in range(steps):
        moved += optimizer.update(1 + proximal_mu * moved)
    return float(-moved[0] / rate)


class Optimizer:
    """SGD with Nesterov momentum, or Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980).

    Args:
        size: length of the weight vector. All moments start at zero.
    """

    def __init__(self, name: OptimizerName, rate: float, size: int) -> None:
        self._name = name
        self._rate = rate
        self._moments = np.zeros((2 if name == "adam" else 1, size), np.float32)
        self._steps = 0

    def update(self, gradient: Vector) -> Vector:
        """What to add to the weights for this step's gradient; both of length `size`."""
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
