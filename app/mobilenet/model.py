"""The networks: Keras' MobileNets, and the recipe with which they learn 32x32 images.

Keras' MobileNets are made for 224x224 photographs. Two things keep them from learning CIFAR-10
in a federation of small devices:

- Five strides of 2 leave one pixel of a 32x32 image. The recipe `small-images` drops the first.
- The momentum of BatchNormalization's moving statistics (0.99 and 0.999) needs thousands of
  steps, but a device takes some tens a round: evaluation, which uses the statistics, stays at
  chance while the training accuracy rises. The recipe uses 0.9.

The recipe `original` is the network of Flower's Docker Compose example, unchanged.
"""

import functools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import applications, layers

from mobilenet.learner import Images, Labels, Learner, Parameters, Shape, Step
from mobilenet.settings import ModelSettings

BATCH_NORM_MOMENTUM = 0.9
_NETWORKS = {"mobilenet": applications.MobileNet, "mobilenetv2": applications.MobileNetV2}


def build_model(
    settings: ModelSettings, image_shape: Shape, classes: int, seed: int, *, fused: bool = False
) -> Any:
    """Build a network with initial weights drawn from `seed`.

    Args:
        image_shape: height, width, channels of the uint8 images (0 to 255): the scaling is the
            network's first layer, so that a saved model is complete.
        classes: length of the probability vector that the network returns.
        fused: for training; a model that is saved is made of Keras' own layers.
    """
    keras.utils.set_random_seed(seed)
    inputs = keras.Input(image_shape, dtype="uint8", name="image")
    scaling = layers.Rescaling(1 / 127.5, offset=-1.0)
    if settings.model == "linear":  # the model of mobilenet.linear
        pixels = layers.Flatten()(scaling(inputs))
        dense = layers.Dense(classes, "softmax", kernel_initializer="zeros")
        return keras.Model(inputs, dense(pixels), name=settings.model)
    if settings.recipe == "original":
        scaling = layers.Rescaling(1 / 255)
    arguments = {"dropout": 0.0} if settings.model == "mobilenet" else {}
    network = _NETWORKS[settings.model](
        input_shape=image_shape, alpha=settings.alpha, weights=None, classes=classes, **arguments
    )
    network = _adapt(network, settings, fused=fused)
    return keras.Model(inputs, network(scaling(inputs)), name=settings.model)


def _adapt(network: Any, settings: ModelSettings, *, fused: bool) -> Any:
    """Return the network with the changes of its recipe, and with fused normalization."""
    small = settings.recipe == "small-images"

    def adapt(layer: Any) -> Any:
        config, kind = layer.get_config(), type(layer)
        if isinstance(layer, layers.BatchNormalization):
            if small:
                config["momentum"] = BATCH_NORM_MOMENTUM
            if fused:
                kind = FusedBatchNormalization
        elif small and layer.name.lower() == "conv1":
            config["strides"] = (1, 1)
        return kind.from_config(config)

    return keras.models.clone_model(network, clone_function=adapt)


class FusedBatchNormalization(layers.BatchNormalization):
    """Keras' layer as a single operation of TensorFlow; Keras uses a dozen.

    Saves a third of a training step on a small device, and of its memory for activations.
    Weights, results and moving statistics are those of Keras' layer.
    """

    def call(self, inputs: Any, training: bool | None = None, **_: Any) -> Any:
        """Normalize images (batch, height, width, channels)."""
        statistics = (self.moving_mean, self.moving_variance)
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=self.gamma.value,
            offset=self.beta.value,
            mean=[] if training else statistics[0].value,
            variance=[] if training else statistics[1].value,
            epsilon=self.epsilon,
            is_training=bool(training),
        )
        if training:
            # The operation returns the unbiased variance; Keras keeps the biased one.
            count = tf.cast(tf.reduce_prod(tf.shape(inputs)[:3]), variance.dtype)
            for kept, batch in zip(statistics, (mean, variance * (count - 1) / count), strict=True):
                kept.assign(kept.value * self.momentum + batch * (1 - self.momentum))
        return outputs


class KerasLearner(Learner):
    """A network as two compiled functions of its parameters; `seed` is of the initial weights.

    A loop over a compiled step replaces `model.fit`: it can stop at any step, compiles once for all
    rounds, and avoids the idle seconds in which `fit` ends on half a core.
    """

    def __init__(
        self, settings: ModelSettings, image_shape: Shape, classes: int, seed: int = 0
    ) -> None:
        self._build = functools.partial(build_model, settings, image_shape, classes, seed)
        self._model = self._build(fused=True)
        self._trained, self._moving = _variables(self._model)
        flat = [[np.ravel(v.numpy()) for v in part] for part in (self._trained, self._moving)]
        initial = (np.concatenate(parts or [np.empty(0, np.float32)]) for parts in flat)
        super().__init__(Parameters(*initial), flips=settings.recipe == "small-images")
        signature = [tf.TensorSpec(part.shape) for part in self.initial]
        signature.append(tf.TensorSpec((None, *image_shape), tf.uint8))
        signature.append(tf.TensorSpec((None,), tf.int64))
        compiled = functools.partial(tf.function, input_signature=signature, autograph=False)
        self._compiled_step = compiled(self._gradient)
        self._compiled_score = compiled(self._sums)

    def save(self, parameters: Parameters, path: Path) -> None:
        """Save a model of Keras' own layers, which loads without this package."""
        model = self._build()
        for variables, vector in zip(_variables(model), parameters, strict=True):
            for variable, part in zip(variables, _split(vector, variables), strict=True):
                variable.assign(part)
        model.save(path)

    def _call(self, weights: Any, statistics: Any, images: Any, *, training: bool) -> Any:
        """Return probabilities, and the moving statistics after the pass."""
        parts = _split(statistics, self._moving)
        given = {id(variable): part for variable, part in zip(self._moving, parts, strict=True)}
        others = self._model.non_trainable_variables  # the moving statistics, and dropout's seeds
        probabilities, values = self._model.stateless_call(
            _split(weights, self._trained),
            [given.get(id(variable), variable.value) for variable in others],
            images,
            training=training,
        )
        moved = []
        for variable, value in zip(others, values, strict=True):
            if id(variable) in given:
                moved.append(tf.reshape(value, [-1]))
            elif training:
                variable.assign(value)
        return probabilities, tf.concat(moved, 0) if moved else statistics

    def _gradient(self, weights: Any, statistics: Any, images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(weights)
            probabilities, moved = self._call(weights, statistics, images, training=True)
            losses, hits = _judge(probabilities, labels)
            loss = tf.reduce_mean(losses)
        means = loss, tf.reduce_mean(tf.square(losses)), tf.reduce_mean(hits)
        return tape.gradient(loss, weights), moved, *means

    def _sums(self, weights: Any, statistics: Any, images: Any, labels: Any) -> Any:
        probabilities, _ = self._call(weights, statistics, images, training=False)
        return list(map(tf.reduce_sum, _judge(probabilities, labels)))

    def _step(self, parameters: Parameters, images: Images, labels: Labels) -> Step:
        gradient, statistics, *means = self._compiled_step(*parameters, images, labels)
        return gradient.numpy(), statistics.numpy(), *map(float, means)

    def _score(self, parameters: Parameters, images: Images, labels: Labels) -> tuple[float, float]:
        loss, hits = self._compiled_score(*parameters, images, labels)
        return float(loss), float(hits)


def _variables(model: Any) -> tuple[list[Any], list[Any]]:
    """Return the trained variables and the moving statistics, in the order of `Parameters`."""
    weights = set(map(id, model.weights))  # all variables but the seeds of dropout
    moving = [variable for variable in model.non_trainable_variables if id(variable) in weights]
    return list(model.trainable_variables), moving


def _split(vector: Any, variables: list[Any]) -> list[Any]:
    """Cut a flat vector into the shapes of variables."""
    shapes = [tuple(variable.shape) for variable in variables]
    parts = tf.split(vector, [int(np.prod(shape)) for shape in shapes]) if shapes else []
    return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def _judge(probabilities: Any, labels: Any) -> tuple[Any, Any]:
    """Return the cross-entropy of each example, and 1 where the answer is right."""
    losses = keras.losses.sparse_categorical_crossentropy(labels, probabilities)
    return losses, tf.cast(tf.equal(tf.argmax(probabilities, axis=-1), labels), tf.float32)
