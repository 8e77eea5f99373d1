"""The networks: Keras' MobileNets, and the recipe that makes them learn 32x32 images.

Keras' MobileNets are made for 224x224 photographs. Two things keep them from learning CIFAR-10
in a federation of small devices:

- five strides of 2 leave one pixel of a 32x32 image. The recipe `small-images` drops the first.
- the momentum of BatchNormalization's moving statistics (0.99 and 0.999) needs thousands of
  steps, while a device takes some tens a round: evaluation, which uses the statistics, stays at
  chance while training goes well. The recipe uses 0.9.

The recipe `original` is the network of Flower's Docker Compose example as it was.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from flowerbed.config import ModelSettings

BATCH_NORM_MOMENTUM = 0.9
_STEM = {"mobilenet": "conv1", "mobilenetv2": "Conv1"}
_NETWORK = {
    "mobilenet": keras.applications.MobileNet,
    "mobilenetv2": keras.applications.MobileNetV2,
}


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Keras' layer by TensorFlow's one operation for it, where Keras takes a dozen.

    A third of a training step on a small device, and of its memory for activations. Weights,
    results and moving statistics are those of Keras' layer.
    """

    def call(
        self,
        inputs: Any,
        training: bool | None = None,
        mask: Any = None,  # noqa: ARG002 - a clone of a network passes on what its layer took
    ) -> Any:
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
            # The operation tells the unbiased variance; Keras keeps the biased one.
            count = tf.cast(tf.reduce_prod(tf.shape(inputs)[:3]), variance.dtype)
            for kept, batch in zip(statistics, (mean, variance * (count - 1) / count), strict=True):
                kept.assign(kept.value * self.momentum + batch * (1 - self.momentum))
        return outputs


def _adapt(network: Any, settings: ModelSettings, *, fused: bool) -> Any:
    """The network with the changes of its recipe, and fused normalization if asked for."""
    small = settings.recipe == "small-images"

    def adapt(layer: Any) -> Any:
        config, kind = layer.get_config(), type(layer)
        if isinstance(layer, keras.layers.BatchNormalization):
            if small:
                config["momentum"] = BATCH_NORM_MOMENTUM
            if fused:
                kind = FusedBatchNormalization
        elif small and layer.name == _STEM[settings.model]:
            config["strides"] = (1, 1)
        return kind.from_config(config)

    return keras.models.clone_model(network, clone_function=adapt)


def build_model(
    settings: ModelSettings,
    image_shape: tuple[int, int, int],
    classes: int,
    seed: int,
    *,
    fused: bool = False,
) -> Any:
    """Build a network with initial weights drawn from `seed`.

    Args:
        image_shape: height, width, channels of the uint8 images that it takes (0 to 255: the
            scaling is its first layer, so that a saved model needs nothing beside it).
        classes: length of the probability vector that it returns.
        fused: for training; a model that is saved is made of Keras' own layers.
    """
    keras.utils.set_random_seed(seed)
    inputs = keras.Input(image_shape, dtype="uint8", name="image")
    if settings.model == "linear":  # what flowerbed.linear trains
        pixels = keras.layers.Flatten()(keras.layers.Rescaling(1 / 127.5, offset=-1.0)(inputs))
        dense = keras.layers.Dense(classes, "softmax", kernel_initializer="zeros")
        return keras.Model(inputs, dense(pixels), name=settings.model)
    arguments = {"dropout": 0.0} if settings.model == "mobilenet" else {}
    network = _NETWORK[settings.model](
        input_shape=image_shape, alpha=settings.alpha, weights=None, classes=classes, **arguments
    )
    scaling = keras.layers.Rescaling(1 / 255)
    if settings.recipe == "small-images":
        scaling = keras.layers.Rescaling(1 / 127.5, offset=-1.0)
    network = _adapt(network, settings, fused=fused)
    return keras.Model(inputs, network(scaling(inputs)), name=settings.model)


def get_weights(model: Any) -> NDArray[np.float32]:
    """All weights of the model, moving statistics included, as one flat vector.

    One array a message instead of hundreds: Flower ships each array as an object of its own.
    """
    return np.concatenate([np.ravel(weight.numpy()) for weight in model.weights])


def sizes_of(model: Any) -> list[int]:
    """Length of each of the model's weights in the flat vector."""
    return [int(np.prod(weight.shape)) for weight in model.weights]


def check_weights(model: Any, vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vector, fit for the model: moving variances are kept above zero.

    A server-side optimizer treats them as any other parameter and may overshoot.

    Raises:
        ValueError: the vector is of another model, by its length.
    """
    sizes = sizes_of(model)
    if vector.size != sum(sizes):
        raise ValueError(
            f"{vector.size} weights received, but the model {model.name!r} has {sum(sizes)}: "
            "server and device build different models"
        )
    variance = np.repeat([w.path.endswith("moving_variance") for w in model.weights], sizes)
    return np.where(variance, np.maximum(vector, 0), vector)


def set_weights(model: Any, vector: NDArray[np.float32]) -> None:
    """Write a vector of `get_weights` into the model.

    Raises:
        ValueError: the vector is of another model, by its length.
    """
    parts = np.split(check_weights(model, vector), np.cumsum(sizes_of(model))[:-1])
    for weight, part in zip(model.weights, parts, strict=True):
        weight.assign(part.reshape(weight.shape))
