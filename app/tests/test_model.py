"""The networks: the original as Keras has it, the recipe as documented, weights as a vector."""

from typing import Any, Literal

import keras
import numpy as np
import pytest
import tensorflow as tf
from examples import CLASSES, SHAPE
from mobilenet.model import (
    BATCH_NORM_MOMENTUM,
    FusedBatchNormalization,
    build_model,
)
from mobilenet.settings import ModelSettings

Network = Literal["mobilenet", "mobilenetv2"]


def _settings(**changes: Any) -> ModelSettings:
    defaults: dict[str, Any] = {"model": "mobilenet", "alpha": 0.1, "recipe": "small-images"}
    return ModelSettings.parse(defaults | changes)


def _layers(model: keras.Model, kind: type) -> list[keras.Layer]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, kind)]


def _stem(model: keras.Model) -> keras.layers.Layer:
    (stem,) = (layer for layer in model._flatten_layers() if layer.name.lower() == "conv1")
    return stem


@pytest.mark.parametrize(("name", "momentum"), [("mobilenet", 0.99), ("mobilenetv2", 0.999)])
def test_the_original_is_keras_own(name: Network, momentum: float) -> None:
    alpha = 0.25 if name == "mobilenet" else 0.1
    settings = _settings(model=name, alpha=alpha, recipe="original")
    model = build_model(settings, SHAPE, CLASSES, seed=1)
    norms = _layers(model, keras.layers.BatchNormalization)
    assert {norm.momentum for norm in norms} == {momentum}
    assert _stem(model).strides == (2, 2)


@pytest.mark.parametrize("name", ["mobilenet", "mobilenetv2"])
def test_the_recipe_keeps_resolution_and_quickens_the_statistics(name: Network) -> None:
    original = build_model(_settings(model=name, recipe="original"), SHAPE, CLASSES, seed=1)
    model = build_model(_settings(model=name), SHAPE, CLASSES, seed=1)
    norms = _layers(model, keras.layers.BatchNormalization)
    assert {norm.momentum for norm in norms} == {BATCH_NORM_MOMENTUM}
    assert _stem(model).strides == (1, 1)
    assert model.count_params() == original.count_params()


def test_fused_normalization_is_keras_normalization(rng: np.random.Generator) -> None:
    """Outputs, gradients and moving statistics, in training and after it."""
    images = tf.constant(rng.normal(1, 2, (16, 8, 8, 6)), tf.float32)
    weights = [rng.uniform(0.5, 2, 6).astype(np.float32) for _ in range(4)]
    factors = tf.constant(rng.normal(size=images.shape), tf.float32)
    results = []
    for kind in (FusedBatchNormalization, keras.layers.BatchNormalization):
        layer = kind(momentum=0.9, epsilon=0.001)
        layer.build(images.shape)
        layer.set_weights(weights)
        with tf.GradientTape() as tape:
            tape.watch(images)
            outputs = layer(images, training=True)
            total = tf.reduce_sum(outputs * factors)
        gradients = tape.gradient(total, [images, layer.gamma.value, layer.beta.value])
        results.append([outputs, *gradients, *layer.get_weights(), layer(images, training=False)])
    for fused, plain in zip(*results, strict=True):
        np.testing.assert_allclose(fused, plain, rtol=1e-4, atol=1e-4)
