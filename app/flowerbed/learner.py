"""Training and evaluation of one model in compiled steps of fixed shape.

A loop of our own over a compiled step instead of `model.fit`: it can stop at any step, compiles
once for all rounds, and does not end in the idle seconds that `fit` spends in half a core.
"""

import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from flowerbed.config import ModelSettings
from flowerbed.learning import (
    EVALUATION_BATCH,
    MOMENTUM,
    Evaluation,
    Images,
    Labels,
    Training,
    Weights,
    batches,
    flip,
)
from flowerbed.model import build_model, get_weights, set_weights


class Learner:
    """A model with its optimizer and the compiled steps; used again for every round.

    Args:
        batch_size: examples a training step, fixed for the life of the learner.
    """

    def __init__(
        self,
        settings: ModelSettings,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        batch_size: int = EVALUATION_BATCH,
        optimizer: str = "sgd",
        learning_rate: float = 0.05,
        seed: int = 0,
    ) -> None:
        self.model = build_model(settings, image_shape, classes, seed)
        self._flips = settings.recipe == "small-images"
        self._batch_size = batch_size
        self._optimizer: Any = (
            keras.optimizers.Adam(learning_rate)
            if optimizer == "adam"
            else keras.optimizers.SGD(learning_rate, momentum=MOMENTUM, nesterov=True)
        )
        self._optimizer.build(self.model.trainable_variables)
        self._global: list[Any] = []
        image = tf.TensorSpec((batch_size, *image_shape), tf.uint8)
        label = tf.TensorSpec((batch_size,), tf.int64)
        mu = tf.TensorSpec((), tf.float32)
        self._plain_step = tf.function(self._step, input_signature=(image, label))
        self._proximal_step = tf.function(self._step, input_signature=(image, label, mu))
        self._evaluation_step = tf.function(
            self._evaluate_batch,
            input_signature=(
                tf.TensorSpec((EVALUATION_BATCH, *image_shape), tf.uint8),
                tf.TensorSpec((EVALUATION_BATCH,), tf.int64),
                tf.TensorSpec((EVALUATION_BATCH,), tf.float32),
            ),
        )

    def _step(self, images: Any, labels: Any, mu: Any = None) -> tuple[Any, Any]:
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            probabilities = self.model(images, training=True)
            loss = tf.reduce_mean(
                keras.losses.sparse_categorical_crossentropy(labels, probabilities)
            )
            objective = loss
            if mu is not None:  # FedProx: stay near the received model
                drift = tf.add_n(
                    [
                        tf.reduce_sum(tf.square(variable.value - start))
                        for variable, start in zip(variables, self._global, strict=True)
                    ]
                )
                objective = loss + mu / 2 * drift
        self._optimizer.apply(tape.gradient(objective, [v.value for v in variables]), variables)
        hits = tf.equal(tf.argmax(probabilities, axis=-1), labels)
        return loss, tf.reduce_mean(tf.cast(hits, tf.float32))

    def _evaluate_batch(self, images: Any, labels: Any, mask: Any) -> tuple[Any, Any]:
        probabilities = self.model(images, training=False)
        losses = keras.losses.sparse_categorical_crossentropy(labels, probabilities)
        hits = tf.cast(tf.equal(tf.argmax(probabilities, axis=-1), labels), tf.float32)
        return tf.reduce_sum(losses * mask), tf.reduce_sum(hits * mask)

    def get_weights(self) -> Weights:
        """The model's weights as one vector; see `flowerbed.model.get_weights`."""
        return get_weights(self.model)

    def evaluate(self, weights: Weights, images: Images, labels: Labels) -> Evaluation:
        """Evaluate `weights` on uint8 images (n, height, width, channels) and labels (n,)."""
        set_weights(self.model, weights)
        loss = hits = 0.0
        for start in range(0, len(images), EVALUATION_BATCH):
            chunk = images[start : start + EVALUATION_BATCH]
            mask = np.zeros(EVALUATION_BATCH, np.float32)
            mask[: len(chunk)] = 1
            # The last batch is filled up: another shape would be compiled anew.
            fill = ((0, EVALUATION_BATCH - len(chunk)), *((0, 0),) * 3)
            batch_labels = np.pad(labels[start : start + EVALUATION_BATCH], fill[:1])
            batch_loss, batch_hits = self._evaluation_step(np.pad(chunk, fill), batch_labels, mask)
            loss += float(batch_loss)
            hits += float(batch_hits)
        return Evaluation(loss / len(images), hits / len(images), len(images))

    def train(
        self,
        weights: Weights,
        images: Images,
        labels: Labels,
        *,
        epochs: int = 1,
        seed: int = 0,
        time_limit: float = 0.0,
        proximal_mu: float = 0.0,
    ) -> Training:
        """Train from `weights` with a fresh optimizer.

        Args:
            images: uint8 (n, height, width, channels), n at least the batch size.
            time_limit: seconds after which training stops where it is; 0: no limit.

        Raises:
            ValueError: fewer images than a batch.
        """
        if len(images) < self._batch_size:
            raise ValueError(
                f"the shard has {len(images)} training images, fewer than a batch of "
                f"{self._batch_size}: lower device_batch_size or raise device_data_fraction"
            )
        set_weights(self.model, weights)
        for variable in self._optimizer.variables:
            if variable is not self._optimizer.learning_rate:
                variable.assign(np.zeros(variable.shape, variable.dtype))
        if proximal_mu:
            self._keep_global()
        rng = np.random.default_rng(seed)
        deadline = time.monotonic() + time_limit if time_limit else float("inf")
        loss = accuracy = 0.0
        steps = 0
        partial = False
        for indices in batches(len(images), self._batch_size, epochs, rng):
            if steps and time.monotonic() >= deadline:
                partial = True
                break
            batch = images[indices]
            if self._flips:
                batch = flip(batch, rng)
            batch_labels = labels[indices]
            step_loss, step_accuracy = (
                self._proximal_step(batch, batch_labels, np.float32(proximal_mu))
                if proximal_mu
                else self._plain_step(batch, batch_labels)
            )
            loss += float(step_loss)
            accuracy += float(step_accuracy)
            steps += 1
        return Training(
            weights=self.get_weights(),
            loss=loss / steps,
            accuracy=accuracy / steps,
            examples=steps * self._batch_size,
            steps=steps,
            partial=partial,
        )

    def _keep_global(self) -> None:
        variables = self.model.trainable_variables
        if not self._global:
            self._global = [tf.Variable(v.value, trainable=False) for v in variables]
        for kept, variable in zip(self._global, variables, strict=True):
            kept.assign(variable.value)
