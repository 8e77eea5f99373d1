"""sklearn-extra: data, model, training and evaluation."""

from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from more_itertools import chunked_even  # type: ignore[import-not-found]
from numpy.typing import NDArray
from sklearn.datasets import load_digits  # type: ignore[import-not-found]
from sklearn.linear_model import SGDClassifier  # type: ignore[import-not-found]
from sklearn.metrics import log_loss  # type: ignore[import-not-found]

PIXELS = 64
DIGITS = np.arange(10)

Data = tuple[NDArray[np.float64], NDArray[np.int64]]  # images (examples, PIXELS) and labels


def load_data(partition_id: int, num_partitions: int) -> tuple[Data, Data]:
    """Return the training data and the test data of one partition."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    own = order[partition_id::num_partitions]
    train_part, test_part = np.split(own, [len(own) * 4 // 5])
    images = images / 16.0
    return (images[train_part], labels[train_part]), (images[test_part], labels[test_part])


def create_model(alpha: float, arrays: ArrayRecord | None = None) -> SGDClassifier:
    """Create a logistic regression with the given weights, or with zeros."""
    model = SGDClassifier(
        loss="log_loss", alpha=alpha, learning_rate="constant", eta0=0.01, random_state=0
    )
    # One fit creates the attributes that scikit-learn expects of a model with known classes.
    model.partial_fit(np.zeros((1, PIXELS)), DIGITS[:1], classes=DIGITS)
    model.coef_[:], model.intercept_[:] = arrays.to_numpy_ndarrays() if arrays else (0, 0)
    return model


def get_weights(model: SGDClassifier) -> ArrayRecord:
    """Return the weights of a model."""
    return ArrayRecord([model.coef_, model.intercept_])


def train(model: SGDClassifier, data: Data, config: dict[str, Any], seed: list[int]) -> None:
    """Train a model in batches of nearly equal size."""
    images, labels = data
    random = np.random.default_rng(seed)
    for _ in range(config["local-epochs"]):
        for batch in chunked_even(random.permutation(len(labels)), config["batch-size"]):
            model.partial_fit(images[batch], labels[batch])


def test(model: SGDClassifier, data: Data) -> tuple[float, float]:
    """Return the cross-entropy and the accuracy of a model."""
    images, labels = data
    loss = log_loss(labels, model.predict_proba(images), labels=DIGITS)
    return float(loss), float(model.score(images, labels))
