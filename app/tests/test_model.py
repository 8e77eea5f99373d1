"""The networks: the original as Keras has it, the recipe as documented, weights as a vector."""

from typing import Literal

import keras
import numpy as np
import pytest
import tensorflow as tf

from flowerbed.config import ModelSettings
from flowerbed.model import (
    BATCH_NORM_MOMENTUM,
    FusedBatchNormalization,
    build_model,
    get_weights,
    set_weights,
)

SHAPE = (32, 32, 3)
Network = Literal["mobilenet", "mobilenetv2"]


def _layers(model: keras.Model, kind: type) -> list[keras.Layer]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, kind)]


def _stem(model: keras.Model) -> keras.layers.Layer:
    (stem,) = (layer for layer in model._flatten_layers() if layer.name.lower() == "conv1")
    return stem


@pytest.mark.parametrize(("name", "momentum"), [("mobilenet", 0.99), ("mobilenetv2", 0.999)])
def test_the_original_is_keras_own(name: Network, momentum: float) -> None:
    alpha = 0.25 if name == "mobilenet" else 0.1
    settings = ModelSettings(model=name, alpha=alpha, recipe="original")
    model = build_model(settings, SHAPE, 10, seed=1)
    norms = _layers(model, keras.layers.BatchNormalization)
    assert {norm.momentum for norm in norms} == {momentum}
    assert _stem(model).strides == (2, 2)


@pytest.mark.parametrize("name", ["mobilenet", "mobilenetv2"])
def test_the_recipe_keeps_resolution_and_quickens_the_statistics(name: Network) -> None:
    original = build_model(ModelSettings(model=name, recipe="original"), SHAPE, 10, seed=1)
    model = build_model(ModelSettings(model=name), SHAPE, 10, seed=1)
    norms = _layers(model, keras.layers.BatchNormalization)
    assert {norm.momentum for norm in norms} == {BATCH_NORM_MOMENTUM}
    assert _stem(model).strides == (1, 1)
    assert get_weights(model).size == get_weights(original).size


def test_weights_make_the_journey(rng: np.random.Generator) -> None:
    first = build_model(ModelSettings(), SHAPE, 10, seed=1)
    second = build_model(ModelSettings(), SHAPE, 10, seed=2)
    images = rng.integers(0, 256, (4, *SHAPE), np.uint8)
    trained = get_weights(first) + rng.normal(0, 0.1, get_weights(first).size).astype(np.float32)
    for model in (first, second):
        set_weights(model, trained)
        np.testing.assert_array_equal(get_weights(model)[:100], trained[:100])
    np.testing.assert_array_equal(first(images), second(images))
    assert np.ptp(first(images)) > 0


def test_the_seed_decides_the_initial_weights() -> None:
    vectors = [get_weights(build_model(ModelSettings(), SHAPE, 10, seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert not np.array_equal(vectors[0], vectors[2])


def test_weights_of_another_model_are_refused() -> None:
    model = build_model(ModelSettings(), SHAPE, 10, seed=1)
    with pytest.raises(ValueError, match="different models"):
        set_weights(model, np.zeros(3, np.float32))


def test_a_negative_variance_does_not_reach_the_model() -> None:
    model = build_model(ModelSettings(), SHAPE, 10, seed=1)
    set_weights(model, get_weights(model) - 2)
    variances = [w for w in model.weights if w.path.endswith("moving_variance")]
    assert variances
    assert all(np.min(variance) >= 0 for variance in variances)


def test_fused_normalization_is_keras_normalization(rng: np.random.Generator) -> None:
    """Outputs, gradients and moving statistics, in training and after it."""
    images = tf.constant(rng.normal(1, 2, (16, 8, 8, 6)), tf.float32)
    weights = [rng.uniform(0.5, 2, 6).astype(np.float32) for _ in range(4)]
    pulls = tf.constant(rng.normal(size=images.shape), tf.float32)
    told = []
    for kind in (FusedBatchNormalization, keras.layers.BatchNormalization):
        layer = kind(momentum=0.9, epsilon=0.001)
        layer.build(images.shape)
        layer.set_weights(weights)
        with tf.GradientTape() as tape:
            tape.watch(images)
            outputs = layer(images, training=True)
            pull = tf.reduce_sum(outputs * pulls)
        gradients = tape.gradient(pull, [images, layer.gamma.value, layer.beta.value])
        told.append([outputs, *gradients, *layer.get_weights(), layer(images, training=False)])
    for fused, plain in zip(*told, strict=True):
        np.testing.assert_allclose(fused, plain, rtol=1e-4, atol=1e-4)
