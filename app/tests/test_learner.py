"""Training and evaluation against plain Keras and against their own promises."""

import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from examples import CLASSES, SHAPE
from mobilenet.data import Data
from mobilenet.learner import Learner, Parameters, batches, flip, get_learner
from mobilenet.linear import LinearLearner
from mobilenet.model import FusedBatchNormalization, KerasLearner, build_model
from mobilenet.settings import DeviceSettings, ModelSettings

NETWORK = ModelSettings(model="mobilenet", alpha=0.1, recipe="small-images")
LINEAR = ModelSettings(model="linear", alpha=1.0, recipe="small-images")
ALL = slice(None)


def _device(**changes: Any) -> DeviceSettings:
    return DeviceSettings(**{"batch_size": 16, "learning_rate": 0.001} | changes)


@pytest.fixture(scope="module")
def network() -> KerasLearner:
    return KerasLearner(NETWORK, SHAPE, CLASSES, seed=4)


@pytest.fixture(scope="module")
def linear() -> LinearLearner:
    return LinearLearner(SHAPE, CLASSES)


def _train(
    learner: Learner,
    data: Data,
    device: DeviceSettings | None = None,
    some: slice = ALL,
    **more: Any,
) -> tuple[Parameters, dict[str, float]]:
    start = more.pop("start", learner.initial)
    train = {name: array[some] for name, array in data.train.items()}
    return learner.train(start, train, device or _device(), **more)


def _evaluate(learner: Learner, parameters: Parameters, data: Data) -> dict[str, float]:
    return learner.evaluate(parameters, data.test)


# --- the network against Keras ------------------------------------------------------------------


def _layers(model: keras.Model) -> list[keras.Layer]:
    return list(model._flatten_layers())


def test_evaluation_equals_keras(network: KerasLearner, data: Data) -> None:
    """Also if the last batch is not full: 160 images are a batch and a quarter."""
    images, labels = data.train["image"], data.train["label"]
    plain = build_model(NETWORK, SHAPE, CLASSES, 4)
    assert not any(isinstance(layer, FusedBatchNormalization) for layer in _layers(plain))
    assert any(isinstance(layer, FusedBatchNormalization) for layer in _layers(network._model))
    result = network.evaluate(network.initial, data.train)
    probabilities = plain.predict(images, verbose=0)
    loss = keras.losses.sparse_categorical_crossentropy(labels, probabilities)
    assert result["eval-examples"] == 160
    assert result["eval-loss"] == pytest.approx(float(np.mean(loss)), rel=1e-5)
    assert result["eval-accuracy"] == pytest.approx(np.mean(probabilities.argmax(1) == labels))


@pytest.mark.parametrize("name", ["mobilenet", "mobilenetv2"])
def test_a_step_equals_keras(network: KerasLearner, name: str, data: Data) -> None:
    """Gradient, moving statistics, loss and accuracy of one batch."""
    learner = network
    if name != NETWORK.model:
        learner = KerasLearner(NETWORK.model_copy(update={"model": name}), SHAPE, CLASSES)
    images, labels = data.train["image"][:16], data.train["label"][:16]
    gradient, statistics, step_loss, _, accuracy = learner._step(learner.initial, images, labels)
    model = learner._model
    with tf.GradientTape() as tape:
        probabilities = model(images, training=True)
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(labels, probabilities))
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    assert step_loss == pytest.approx(float(loss), rel=1e-5)
    assert accuracy == np.mean(np.argmax(probabilities, 1) == labels)
    moved = [v.numpy() for v in model.weights if "moving" in v.path]  # by the call of the model
    np.testing.assert_allclose(statistics, _flat(moved), rtol=1e-4, atol=1e-6)
    assert not np.allclose(statistics, learner.initial.statistics)
    np.testing.assert_allclose(gradient, _flat(gradients), rtol=1e-3, atol=1e-5)


def _flat(arrays: Iterable[Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.ravel(array) for array in arrays])


def test_a_network_with_dropout_trains(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout's seeds are variables that no message carries; each step drops other values."""

    def build(*_: Any, **__: Any) -> keras.Model:
        layers = [
            keras.Input(SHAPE, dtype="uint8"),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(CLASSES, "softmax"),
        ]
        return keras.Sequential(layers)

    monkeypatch.setattr("mobilenet.model.build_model", build)
    learner = KerasLearner(NETWORK, SHAPE, CLASSES)
    images, labels = data.train["image"][:16], data.train["label"][:16]
    (*_, one, _, _), (*_, two, _, _) = (
        learner._step(learner.initial, images, labels) for _ in range(2)
    )
    assert one != two
    assert [part.size for part in learner.initial] == [30_720 + 10 + 2 * 3072, 2 * 3072]
    _, metrics = _train(learner, data, _device(local_epochs=5))
    assert metrics["train-loss"] < one


# --- the linear model against the network --------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_the_linear_model_trains_as_keras_does(
    linear: LinearLearner, data: Data, optimizer: str, mu: float
) -> None:
    """The same batches, flips and optimizer give the same weights."""
    theirs = KerasLearner(LINEAR, SHAPE, CLASSES)
    for own, their in zip(linear.initial, theirs.initial, strict=True):
        np.testing.assert_array_equal(own, their)
    device = _device(optimizer=optimizer, local_epochs=2)
    one, metrics = _train(linear, data, device, seed=5, proximal_mu=mu)
    two, expected = _train(theirs, data, device, seed=5, proximal_mu=mu)
    np.testing.assert_allclose(one.weights, two.weights, atol=2e-5)
    assert metrics == pytest.approx(expected, rel=1e-3)
    assert (metrics["train-steps"], metrics["num-examples"]) == (20, 320)
    assert _evaluate(linear, one, data) == pytest.approx(_evaluate(theirs, one, data), rel=1e-4)


@pytest.mark.parametrize("settings", [NETWORK, LINEAR])
def test_the_saved_model_needs_only_keras(
    settings: ModelSettings, data: Data, rng: np.random.Generator, tmp_path: Path
) -> None:
    learner = KerasLearner(settings, SHAPE, CLASSES)
    weights, statistics = learner.initial
    moved = (weights + rng.normal(0, 0.1, weights.size)).astype(np.float32)
    spread = (statistics * rng.uniform(0.5, 2, statistics.size)).astype(np.float32)
    learner.save(Parameters(moved, spread), tmp_path / "model.keras")
    saved = keras.models.load_model(tmp_path / "model.keras")
    labels = data.test["label"]
    losses = keras.losses.sparse_categorical_crossentropy(labels, saved(data.test["image"]))
    result = _evaluate(learner, Parameters(moved, spread), data)
    assert result["eval-loss"] == pytest.approx(float(np.mean(losses)), rel=1e-4)
    assert np.std(losses) > 0


def test_the_seed_decides_the_initial_weights(network: KerasLearner) -> None:
    same, other = (KerasLearner(NETWORK, SHAPE, CLASSES, seed) for seed in (4, 5))
    np.testing.assert_array_equal(network.initial.weights, same.initial.weights)
    assert not np.array_equal(network.initial.weights, other.initial.weights)
    assert 0 < network.initial.statistics.size < network.initial.weights.size


# --- what holds for all models -------------------------------------------------------------


def test_training_learns(linear: LinearLearner, network: KerasLearner, data: Data) -> None:
    for learner, rate in ((linear, 0.001), (network, 0.05)):
        before = learner.evaluate(learner.initial, data.train)
        trained, metrics = _train(learner, data, _device(learning_rate=rate, local_epochs=15))
        after = learner.evaluate(trained, data.train)
        assert (metrics["train-steps"], metrics["num-examples"]) == (150, 2400)
        assert metrics["partial"] == 0
        assert after["eval-loss"] < 0.7 * before["eval-loss"]
        assert after["eval-accuracy"] > 0.5
    assert not linear.initial.weights.any()


def test_training_is_repeatable_whatever_was_trained_before(
    network: KerasLearner, data: Data
) -> None:
    """The optimizer's momentum, the statistics and the random numbers start afresh."""
    first, _ = _train(network, data, seed=1)
    other, _ = _train(network, data, seed=2)
    again, _ = _train(network, data, seed=1)
    for one, two, three in zip(first, again, other, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
        assert np.abs(one - three).max() > 1e-3


def test_the_metrics_of_a_batch(linear: LinearLearner, data: Data) -> None:
    """All losses of an untrained model are those of a guess among ten."""
    trained, metrics = _train(linear, data, some=slice(16))
    assert metrics == {
        "num-examples": 16,
        "train-loss": pytest.approx(np.log(10), rel=1e-5),
        "train-loss-rms": pytest.approx(np.log(10), rel=1e-5),
        "train-accuracy": pytest.approx(np.mean(data.train["label"][:16] == 0)),
        "train-steps": 1,
        "effective-steps": pytest.approx(1.9),
        "partial": 0,
        "batch-size": 16,
    }
    _, later = _train(linear, data, some=slice(16), start=trained)
    assert later["train-loss-rms"] > later["train-loss"]


def test_the_time_limit_returns_what_was_learned(linear: LinearLearner, data: Data) -> None:
    for stopped, steps in ((lambda: True, 1), (iter([False, False, True]).__next__, 3)):
        trained, metrics = _train(linear, data, _device(local_epochs=9), stop=stopped)
        assert (metrics["partial"], metrics["train-steps"]) == (1, steps)
        assert metrics["num-examples"] == 16 * steps
        assert trained.weights.any()


def test_the_time_is_filled(linear: LinearLearner, data: Data) -> None:
    """Training goes on after the last epoch; less than an epoch is partial there, too."""
    end = time.monotonic() + 0.5
    _, metrics = _train(linear, data, stop=lambda: time.monotonic() >= end, fill=True)
    assert time.monotonic() < end + 0.5
    assert metrics["train-steps"] > 160 // 16
    assert metrics["partial"] == 0
    _, metrics = _train(linear, data, stop=lambda: True, fill=True)
    assert (metrics["partial"], metrics["train-steps"]) == (1, 1)


def test_the_proximal_term_holds_the_weights_back(network: KerasLearner, data: Data) -> None:
    def moved(mu: float) -> float:
        device = _device(local_epochs=3, learning_rate=0.05)
        trained, _ = _train(network, data, device, seed=1, proximal_mu=mu)
        return float(np.linalg.norm(trained.weights - network.initial.weights))

    assert moved(1e-9) == pytest.approx(moved(0.0), rel=2e-2)
    assert moved(10.0) < 0.9 * moved(0.0)


@pytest.mark.parametrize("part", Parameters._fields)
def test_parameters_of_another_model_are_refused(
    network: KerasLearner, data: Data, part: str
) -> None:
    wrong = network.initial._replace(**{part: np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=f"3 {part} received.*different models"):
        _evaluate(network, wrong, data)
    with pytest.raises(ValueError, match=f"3 {part} received.*different models"):
        _train(network, data, start=wrong)


def test_fewer_images_than_a_batch_are_one_batch(linear: LinearLearner, data: Data) -> None:
    _, metrics = _train(linear, data, _device(local_epochs=2), some=slice(10))
    assert (metrics["batch-size"], metrics["num-examples"], metrics["train-steps"]) == (10, 20, 2)


def test_a_learner_is_kept_for_the_same_model_only() -> None:
    first = get_learner(LINEAR, SHAPE, CLASSES)
    assert get_learner(LINEAR.model_copy(), SHAPE, CLASSES) is first
    assert get_learner(LINEAR, SHAPE, 8) is not first
    assert get_learner(LINEAR, SHAPE, CLASSES) is not first


def test_the_old_model_is_freed_before_the_new_one_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = weakref.ref(get_learner(LINEAR, SHAPE, CLASSES))
    alive = []
    original = LinearLearner.__init__

    def build(self: LinearLearner, *arguments: Any) -> None:
        alive.append(old() is not None)
        original(self, *arguments)

    monkeypatch.setattr(LinearLearner, "__init__", build)
    get_learner(LINEAR, SHAPE, 8)
    assert alive == [False]


def test_parameters_travel_as_two_arrays(network: KerasLearner, linear: LinearLearner) -> None:
    for learner in (network, linear):
        record = learner.initial.as_record()
        assert {key: array.shape for key, array in record.items()} == {
            "weights": learner.initial.weights.shape,
            "statistics": learner.initial.statistics.shape,
        }
        for sent, received in zip(learner.initial, Parameters.from_record(record), strict=True):
            np.testing.assert_array_equal(sent, received)
            assert received.dtype == np.float32
    assert linear.initial.statistics.size == 0


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
