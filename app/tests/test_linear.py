"""The learner without TensorFlow, held against Keras step by step."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from flowerbed.config import ModelSettings
from flowerbed.data import Shard, load_shard
from flowerbed.linear import LinearLearner
from flowerbed.network import NetworkLearner

SHAPE = (32, 32, 3)
SETTINGS = ModelSettings(model="linear")


@pytest.fixture(scope="module")
def shard(shards: Path) -> Shard:
    return load_shard(shards / "devices" / "phone")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_it_trains_and_evaluates_as_keras_does(shard: Shard, optimizer: str, mu: float) -> None:
    """The same batches, flips and optimizer: the same weights."""
    options: dict[str, Any] = {"batch_size": 16, "optimizer": optimizer, "learning_rate": 0.001}
    ours = LinearLearner(SHAPE, 10, **options)
    theirs = NetworkLearner(SETTINGS, SHAPE, 10, **options)
    start = ours.get_weights()
    np.testing.assert_array_equal(start, theirs.get_weights())
    images, labels = shard.train_images, shard.train_labels
    one = ours.train(start, images, labels, epochs=2, seed=5, proximal_mu=mu)
    two = theirs.train(start, images, labels, epochs=2, seed=5, proximal_mu=mu)
    np.testing.assert_allclose(one.weights, two.weights, atol=2e-5)
    assert one.loss == pytest.approx(two.loss, rel=1e-3)
    assert one.rms_loss == pytest.approx(two.rms_loss, rel=1e-3)
    assert (one.steps, one.examples) == (two.steps, two.examples) == (20, 320)
    own = ours.evaluate(one.weights, shard.test_images, shard.test_labels)
    kept = theirs.evaluate(one.weights, shard.test_images, shard.test_labels)
    assert own.loss == pytest.approx(kept.loss, rel=1e-4)
    assert own.accuracy == kept.accuracy


def test_it_learns(shard: Shard) -> None:
    learner = LinearLearner(SHAPE, 10, batch_size=16, learning_rate=0.001)
    weights = learner.get_weights()
    result = learner.train(weights, shard.train_images, shard.train_labels, epochs=30)
    after = learner.evaluate(result.weights, shard.test_images, shard.test_labels)
    assert after.accuracy > 0.6
    assert not weights.any()


def test_the_time_box_returns_what_was_learned(shard: Shard) -> None:
    learner = LinearLearner(SHAPE, 10, batch_size=16)
    weights = learner.get_weights()
    images, labels = shard.train_images, shard.train_labels
    result = learner.train(weights, images, labels, epochs=9, time_limit=1e-9)
    assert (result.partial, result.steps) == (True, 1)


def test_a_time_box_is_filled(shard: Shard) -> None:
    """On after the last epoch; and what was not a whole epoch is partial there too."""
    learner = LinearLearner(SHAPE, 10, batch_size=16)
    start, images, labels = learner.get_weights(), shard.train_images, shard.train_labels
    result = learner.train(start, images, labels, time_limit=0.5, fill_time=True)
    assert result.steps > len(images) // 16
    assert not result.partial
    short = learner.train(start, images, labels, time_limit=1e-9, fill_time=True)
    assert (short.partial, short.steps) == (True, 1)


def test_the_losses_of_the_examples_are_told_as_their_root_mean_square(shard: Shard) -> None:
    """One batch of an untrained model: every loss is that of a guess among ten."""
    learner = LinearLearner(SHAPE, 10, batch_size=16)
    images, labels = shard.train_images[:16], shard.train_labels[:16]
    result = learner.train(learner.get_weights(), images, labels)
    assert result.rms_loss == pytest.approx(np.log(10), rel=1e-5)
    trained = learner.train(result.weights, images, labels)
    assert trained.rms_loss > trained.loss


def test_weights_of_another_model_are_refused() -> None:
    learner = LinearLearner(SHAPE, 10, batch_size=16)
    with pytest.raises(ValueError, match="different models"):
        learner.evaluate(np.zeros(3, np.float32), np.zeros((1, *SHAPE), np.uint8), np.zeros(1, int))


def test_the_saved_model_is_plain_keras(tmp_path: Path) -> None:
    learner = NetworkLearner(SETTINGS, SHAPE, 10)
    weights = learner.get_weights() + 0.5
    learner.save(weights, tmp_path / "model.keras")
    kernel, bias = keras.models.load_model(tmp_path / "model.keras").get_weights()
    np.testing.assert_array_equal(np.concatenate([kernel.ravel(), bias]), weights)
