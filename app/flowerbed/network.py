"""The learner of Keras networks: gradient and evaluation in compiled steps of fixed shape.

A loop of our own over a compiled step instead of `model.fit`: it can stop at any step, compiles
once for all rounds, and does not end in the idle seconds that `fit` spends in half a core.
"""

import functools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from flowerbed.config import ModelSettings
from flowerbed.learning import EVALUATION_BATCH, Images, Labels, Learner, Step, Weights
from flowerbed.model import build_model, check_weights, get_weights, set_weights, sizes_of


def _judge(probabilities: Any, labels: Any) -> tuple[Any, Any]:
    """Cross-entropy of each example, and 1 where the answer is right."""
    losses = keras.losses.sparse_categorical_crossentropy(labels, probabilities)
    return losses, tf.cast(tf.equal(tf.argmax(probabilities, axis=-1), labels), tf.float32)


class NetworkLearner(Learner):
    """A Keras network as two functions of its weights; `options` as of `Learner`."""

    def __init__(
        self,
        settings: ModelSettings,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(flips=settings.recipe == "small-images", **options)
        self._plain = functools.partial(build_model, settings, image_shape, classes, seed)
        self._model = self._plain(fused=True)
        self._initial = get_weights(self._model)
        self._shapes = [tuple(weight.shape) for weight in self._model.weights]
        self._sizes = sizes_of(self._model)
        place = {id(weight): index for index, weight in enumerate(self._model.weights)}
        self._trained = [place[id(weight)] for weight in self._model.trainable_variables]
        self._moving = [place[id(weight)] for weight in self._model.non_trainable_variables]

        def signature(batch: int) -> tuple[Any, ...]:
            images = tf.TensorSpec((batch, *image_shape), tf.uint8)
            return tf.TensorSpec(self._initial.shape), images, tf.TensorSpec(batch, tf.int64)

        self._gradient_function = tf.function(
            self._gradient, input_signature=signature(self.batch_size), autograph=False
        )
        self._evaluation_function = tf.function(
            self._score,
            input_signature=(*signature(EVALUATION_BATCH), tf.TensorSpec(EVALUATION_BATCH)),
            autograph=False,
        )

    def _pieces(self, vector: Any) -> list[Any]:
        """The vector as the network's weights, in their order and shapes."""
        parts = tf.split(vector, self._sizes)
        return [tf.reshape(part, shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _call(self, pieces: list[Any], images: Any, *, training: bool) -> tuple[Any, list[Any]]:
        """Probabilities, and the moving statistics after the pass."""
        trained = [pieces[index] for index in self._trained]
        moving = [pieces[index] for index in self._moving]
        probabilities, moved = self._model.stateless_call(
            trained, moving, images, training=training
        )
        return probabilities, moved

    def _gradient(self, vector: Any, images: Any, labels: Any) -> tuple[Any, ...]:
        with tf.GradientTape() as tape:
            tape.watch(vector)
            pieces = self._pieces(vector)
            probabilities, moved = self._call(pieces, images, training=True)
            losses, hits = _judge(probabilities, labels)
            loss = tf.reduce_mean(losses)
        gradient = tape.gradient(loss, vector)  # 0 at the moving statistics
        for index, statistic in zip(self._moving, moved, strict=True):
            pieces[index] = statistic
        flat = tf.concat([tf.reshape(piece, [-1]) for piece in pieces], axis=0)
        return flat, gradient, loss, tf.reduce_mean(tf.square(losses)), tf.reduce_mean(hits)

    def _score(self, vector: Any, images: Any, labels: Any, mask: Any) -> tuple[Any, Any]:
        probabilities, _ = self._call(self._pieces(vector), images, training=False)
        losses, hits = _judge(probabilities, labels)
        return tf.reduce_sum(losses * mask), tf.reduce_sum(hits * mask)

    def get_weights(self) -> Weights:
        """Initial weights as one vector; see `flowerbed.model.get_weights`."""
        return self._initial

    def save(self, weights: Weights, path: Path) -> None:
        """Save `weights` as a model of Keras' own layers, which loads without this package."""
        model = self._plain()
        set_weights(model, weights)
        model.save(path)

    def _check(self, weights: Weights) -> Weights:
        return check_weights(self._model, weights)

    def trainable(self) -> Weights:
        """See `Learner`: 0 at the moving statistics of normalization."""
        trained = np.zeros(len(self._sizes), np.float32)
        trained[self._trained] = 1
        return np.repeat(trained, self._sizes)

    def _step(self, weights: Weights, images: Images, labels: Labels) -> Step:
        moved, gradient, *means = self._gradient_function(weights, images, labels)
        return Step(moved.numpy(), gradient.numpy(), *map(float, means))

    def _evaluate(self, weights: Weights, images: Images, labels: Labels) -> tuple[float, float]:
        # A batch that is not full is filled up: another shape would be compiled anew.
        fill = ((0, EVALUATION_BATCH - len(images)), *((0, 0),) * 3)
        mask = np.pad(np.ones(len(images), np.float32), fill[:1])
        loss, hits = self._evaluation_function(
            weights, np.pad(images, fill), np.pad(labels, fill[:1]), mask
        )
        return float(loss), float(hits)
