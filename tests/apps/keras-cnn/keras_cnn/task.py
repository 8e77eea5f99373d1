"""keras-cnn: data and model."""

import functools

import keras
import numpy as np
from numpy.typing import NDArray

CLASSES = 10
IMAGES_OF_A_PARTITION = 400

Data = tuple[NDArray[np.float32], NDArray[np.int64]]


def load_model(learning_rate: float) -> keras.Model:
    """Build and compile a new model, without what is left of the one before."""
    keras.backend.clear_session()
    model = keras.Sequential(
        [
            keras.Input(shape=(28, 28, 1)),
            keras.layers.Conv2D(8, 3, strides=2, activation="relu"),
            keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(CLASSES, activation="softmax"),
        ]
    )
    model.compile(
        keras.optimizers.Adam(learning_rate),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


@functools.cache
def load_cached_model(learning_rate: float) -> keras.Model:
    """Return the one model of this process for a learning rate."""
    return load_model(learning_rate)


def load_data(partition_id: int) -> tuple[Data, Data]:
    """Make the training images and the test images of one partition.

    Each class has one pattern of 7x7 blocks, the same for all partitions. An image shows the
    pattern of its class, moved by up to three pixels and under noise.
    """
    patterns = np.random.default_rng(0).random((CLASSES, 7, 7)).repeat(4, axis=1).repeat(4, axis=2)
    random = np.random.default_rng([1, partition_id])
    labels = random.integers(CLASSES, size=IMAGES_OF_A_PARTITION)
    shifts = random.integers(-3, 4, size=(IMAGES_OF_A_PARTITION, 2))
    images = np.stack(
        [
            np.roll(patterns[label], tuple(shift), axis=(0, 1))
            for label, shift in zip(labels, shifts, strict=True)
        ]
    )
    images += random.normal(scale=0.5, size=images.shape)
    images = images[..., np.newaxis].astype(np.float32)
    split = IMAGES_OF_A_PARTITION * 4 // 5
    return (images[:split], labels[:split]), (images[split:], labels[split:])
