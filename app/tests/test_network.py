"""Training and evaluation against plain Keras and against their own promises."""

import time
from pathlib import Path
from typing import Literal

import keras
import numpy as np
import pytest
import tensorflow as tf

from flowerbed.config import ModelSettings
from flowerbed.data import Shard, load_shard
from flowerbed.learning import batches, flip
from flowerbed.model import FusedBatchNormalization, get_weights, set_weights
from flowerbed.network import NetworkLearner

SHAPE = (32, 32, 3)


@pytest.fixture(scope="module")
def shard(shards: Path) -> Shard:
    return load_shard(shards / "devices" / "phone")


@pytest.fixture(scope="module")
def learner() -> NetworkLearner:
    return NetworkLearner(ModelSettings(), SHAPE, 10, batch_size=16, seed=4)


def _plain(learner: NetworkLearner) -> keras.Model:
    """The same network of Keras' own layers."""
    model = learner._plain()
    set_weights(model, learner.get_weights())
    assert not any(isinstance(layer, FusedBatchNormalization) for layer in _layers(model))
    assert any(isinstance(layer, FusedBatchNormalization) for layer in _layers(learner._model))
    return model


def _layers(model: keras.Model) -> list[keras.Layer]:
    return list(model._flatten_layers())


def test_evaluation_equals_keras(learner: NetworkLearner, shard: Shard) -> None:
    """Also where the last batch is not full: 160 images are a batch and a quarter."""
    images, labels = np.array(shard.train_images), np.array(shard.train_labels)
    assert len(images) == 160
    result = learner.evaluate(learner.get_weights(), images, labels)
    probabilities = _plain(learner).predict(images, verbose=0)
    loss = keras.losses.sparse_categorical_crossentropy(labels, probabilities)
    assert result.examples == 160
    assert result.loss == pytest.approx(float(np.mean(loss)), rel=1e-5)
    assert result.accuracy == pytest.approx(np.mean(probabilities.argmax(1) == labels))


@pytest.mark.parametrize("name", ["mobilenet", "mobilenetv2"])
def test_a_step_equals_keras(name: Literal["mobilenet", "mobilenetv2"], shard: Shard) -> None:
    """Gradient, moving statistics, loss and accuracy of one batch."""
    learner = NetworkLearner(ModelSettings(model=name), SHAPE, 10, batch_size=16, seed=4)
    images, labels = np.array(shard.train_images[:16]), np.array(shard.train_labels[:16])
    step = learner._step(learner.get_weights(), images, labels)
    model = learner._model
    with tf.GradientTape() as tape:
        probabilities = model(images, training=True)
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(labels, probabilities))
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    assert step.loss == pytest.approx(float(loss), rel=1e-5)
    assert step.accuracy == np.mean(np.argmax(probabilities, 1) == labels)
    np.testing.assert_allclose(step.weights, get_weights(model), rtol=1e-4, atol=1e-6)
    ours = step.gradient[learner.trainable() > 0]
    theirs = np.concatenate([np.ravel(gradient) for gradient in gradients])
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    assert not step.gradient[learner.trainable() == 0].any()


def test_training_learns(learner: NetworkLearner, shard: Shard) -> None:
    start = learner.get_weights()
    before = learner.evaluate(start, shard.train_images, shard.train_labels)
    result = learner.train(start, shard.train_images, shard.train_labels, epochs=25, seed=1)
    after = learner.evaluate(result.weights, shard.train_images, shard.train_labels)
    assert (result.steps, result.examples, result.partial) == (250, 4000, False)
    assert after.loss < 0.7 * before.loss
    assert after.accuracy > 0.5


def test_training_is_repeatable_whatever_was_trained_before(
    learner: NetworkLearner, shard: Shard
) -> None:
    """The optimizer's momentum and the random numbers start afresh."""
    start = learner.get_weights()
    images, labels = shard.train_images, shard.train_labels
    first = learner.train(start, images, labels, seed=1)
    learner.train(start, images, labels, seed=2)
    again = learner.train(start, images, labels, seed=1)
    np.testing.assert_allclose(first.weights, again.weights, atol=1e-6)
    assert np.abs(first.weights - start).max() > 1e-3


def test_the_time_box_returns_what_was_learned(learner: NetworkLearner, shard: Shard) -> None:
    start = learner.get_weights()
    begin = time.monotonic()
    result = learner.train(
        start, shard.train_images, shard.train_labels, epochs=10_000, time_limit=1.0
    )
    assert time.monotonic() - begin < 3
    assert result.partial
    assert 0 < result.examples == result.steps * 16 < 10_000 * 160
    assert not np.array_equal(result.weights, start)


def test_the_proximal_term_holds_back(learner: NetworkLearner, shard: Shard) -> None:
    start = learner.get_weights()
    assert 0 < learner.trainable().sum() < start.size
    moved = [
        np.linalg.norm(
            learner.train(
                start, shard.train_images, shard.train_labels, epochs=3, seed=1, proximal_mu=mu
            ).weights
            - start
        )
        for mu in (1e-9, 10.0)
    ]
    free = learner.train(start, shard.train_images, shard.train_labels, epochs=3, seed=1)
    assert moved[1] < 0.9 * moved[0]
    assert moved[0] == pytest.approx(np.linalg.norm(free.weights - start), rel=2e-2)


def test_too_few_images_name_the_remedy(learner: NetworkLearner, shard: Shard) -> None:
    with pytest.raises(ValueError, match="lower device_batch_size"):
        learner.train(learner.get_weights(), shard.train_images[:15], shard.train_labels[:15])


def test_an_epoch_sees_each_image_at_most_once(rng: np.random.Generator) -> None:
    epochs = list(batches(50, 16, range(2), rng))
    assert [len(batch) for batch in epochs] == [16] * 6
    for epoch in (epochs[:3], epochs[3:]):
        assert len(set(np.concatenate(epoch))) == 48


def test_half_of_the_images_are_mirrored(rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (200, *SHAPE), np.uint8)
    result = flip(images, rng)
    same = np.all(result == images, axis=(1, 2, 3))
    mirrored = np.all(result == images[:, :, ::-1], axis=(1, 2, 3))
    assert np.all(same ^ mirrored)
    assert 70 < mirrored.sum() < 130
