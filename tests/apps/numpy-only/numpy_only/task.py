"""numpy-only: data, model, training and evaluation."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

FEATURES = 20
CLASSES = 10
# All partitions together hold this many examples.
EXAMPLES = 4000

Weights = NDArray[np.float32]  # of shape (FEATURES + 1, CLASSES); the last row is the bias
Data = tuple[NDArray[np.float32], NDArray[np.int64]]  # points (examples, FEATURES) and labels


def make_data(examples: int, seed: int) -> Data:
    """Draw points around one centre for each class. The centres do not depend on the seed.

    Some features are much noisier than others, so that accuracy rises over several rounds.
    """
    centres = np.random.default_rng(0).normal(size=(CLASSES, FEATURES))
    noise = np.geomspace(0.5, 5, FEATURES)
    random = np.random.default_rng([1, seed])
    labels = random.integers(CLASSES, size=examples)
    return random.normal(loc=centres[labels], scale=noise).astype(np.float32), labels


def load_data(partition_id: int, num_partitions: int) -> tuple[Data, Data]:
    """Make the training data and the test data of one partition."""
    points, labels = make_data(EXAMPLES // num_partitions, partition_id)
    split = len(labels) * 4 // 5
    return (points[:split], labels[:split]), (points[split:], labels[split:])


def predict(weights: Weights, points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the probability of each class for each point."""
    scores = points @ weights[:-1] + weights[-1]
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float32] = scores / scores.sum(axis=1, keepdims=True)
    return probabilities


def train(weights: Weights, data: Data, config: dict[str, Any], seed: list[int]) -> Weights:
    """Return the weights after the epochs of gradient descent of a run configuration."""
    weights, (points, labels) = weights.copy(), data
    random = np.random.default_rng(seed)
    for _ in range(config["local-epochs"]):
        order = random.permutation(len(labels))
        for batch in np.split(order, range(config["batch-size"], len(order), config["batch-size"])):
            error = predict(weights, points[batch])
            error[np.arange(len(batch)), labels[batch]] -= 1
            weights[:-1] -= config["learning-rate"] * points[batch].T @ error / len(batch)
            weights[-1] -= config["learning-rate"] * error.mean(axis=0)
    return weights


def test(weights: Weights, data: Data) -> tuple[float, float]:
    """Return the cross-entropy and the accuracy of the weights on some data."""
    points, labels = data
    probabilities = predict(weights, points)
    loss = -np.log(probabilities[np.arange(len(labels)), labels] + 1e-9).mean()
    return float(loss), float(np.mean(probabilities.argmax(axis=1) == labels))
