"""The optimizers against Keras' own, step by step."""

from typing import Literal

import keras
import numpy as np
import pytest
from mobilenet.optimizer import MOMENTUM, Optimizer, effective_steps
from mobilenet.settings import DeviceSettings


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_they_step_as_keras_does(name: Literal["sgd", "adam"], rng: np.random.Generator) -> None:
    start = rng.normal(size=50).astype(np.float32)
    variable = keras.Variable(start)
    theirs = (
        keras.optimizers.Adam(0.01)
        if name == "adam"
        else keras.optimizers.SGD(0.01, momentum=MOMENTUM, nesterov=True)
    )
    ours, weights = Optimizer(DeviceSettings(optimizer=name, learning_rate=0.01), start.size), start
    for step in range(20):
        gradient = rng.normal(size=50).astype(np.float32) * 10.0 ** (step % 5 - 3)
        gradient[:5] = 0
        theirs.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        weights = weights + ours.update(gradient)
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights, variable.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(weights[:5], start[:5])  # what has no gradient stays


def test_effective_steps_are_those_of_the_closed_forms() -> None:
    """The sum of what Nesterov's momentum makes of each gradient; Adam's steps have one size."""
    steps = 7
    nesterov = (steps - MOMENTUM**2 * (1 - MOMENTUM**steps) / (1 - MOMENTUM)) / (1 - MOMENTUM)
    sgd, adam = DeviceSettings(optimizer="sgd"), DeviceSettings(optimizer="adam")
    assert effective_steps(sgd, steps, 0.0) == pytest.approx(nesterov, rel=1e-5)
    assert effective_steps(adam, steps, 0.0) == pytest.approx(steps, rel=1e-4)
    assert effective_steps(sgd, 1, 0.0) == pytest.approx(1 + MOMENTUM)
    assert effective_steps(sgd, steps, 1.0) < effective_steps(sgd, steps, 0.0)
