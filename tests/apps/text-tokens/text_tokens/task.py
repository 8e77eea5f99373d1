"""text-tokens: sentences, tokens, model, training and evaluation."""

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

TOPICS = 5
LENGTH = 12  # words in a sentence
DIMENSION = 16  # of an embedding
# Invented words: 60 for each topic, and 100 that all topics share.
WORDS = [f"topic{topic}word{word}" for topic in range(TOPICS) for word in range(60)]
WORDS += [f"word{word}" for word in range(100)]
TOKENS = {word: token for token, word in enumerate(WORDS)}

# The embeddings (words, DIMENSION), the weights of the softmax (DIMENSION, TOPICS), and its bias.
Model = dict[str, NDArray[np.float32]]
Data = tuple[NDArray[np.int64], NDArray[np.int64]]  # tokens (sentences, LENGTH) and topics


def make_sentence(topic: int, random: np.random.Generator) -> str:
    """Write a sentence in which about one word of seven belongs to the topic."""
    of_topic = topic * 60 + random.integers(60, size=LENGTH)
    shared = TOPICS * 60 + random.integers(100, size=LENGTH)
    chosen = np.where(random.random(LENGTH) < 0.15, of_topic, shared)
    return " ".join(WORDS[index] for index in chosen)


def load_data(partition_id: int, sentences: int = 400) -> tuple[Data, Data]:
    """Make the training and the test data of one partition; most sentences are of one topic."""
    random = np.random.default_rng([1, partition_id])
    topics = random.integers(TOPICS, size=sentences)
    topics[random.random(sentences) < 0.7] = partition_id % TOPICS
    texts = [make_sentence(topic, random) for topic in topics]
    tokens = np.array([[TOKENS[word] for word in text.split()] for text in texts])
    split = sentences * 4 // 5
    return (tokens[:split], topics[:split]), (tokens[split:], topics[split:])


def initial_model() -> Model:
    """Return the model that every run starts from."""
    random = np.random.default_rng(0)
    embeddings = random.normal(scale=0.5, size=(len(WORDS), DIMENSION))
    weights = random.normal(scale=0.5, size=(DIMENSION, TOPICS))
    model = {"embeddings": embeddings, "weights": weights, "bias": np.zeros(TOPICS)}
    return {name: array.astype(np.float32) for name, array in model.items()}


def to_record(arrays: dict[str, NDArray[Any]]) -> ArrayRecord:
    """Return named arrays as they travel in a message."""
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def from_record(record: ArrayRecord) -> Model:
    """Return the named arrays of a message, as copies."""
    return {name: array.numpy().copy() for name, array in record.items()}


def predict(model: Model, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float32], ...]:
    """Return the mean embedding of each sentence, and the probability of each topic."""
    bags = model["embeddings"][tokens].mean(axis=1)
    scores = bags @ model["weights"] + model["bias"]
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return bags, scores / scores.sum(axis=1, keepdims=True)


def train(model: Model, data: Data, epochs: int, learning_rate: float, seed: list[int]) -> None:
    """Train the model in place, by gradient descent in batches of ten sentences."""
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        for batch in random.permutation(len(data[1])).reshape(-1, 10):
            tokens, topics = data[0][batch], data[1][batch]
            bags, error = predict(model, tokens)
            error[np.arange(10), topics] -= 1
            step = learning_rate * (error @ model["weights"].T)
            model["weights"] -= learning_rate * bags.T @ error / 10
            model["bias"] -= learning_rate * error.mean(axis=0)
            # Not divided by ten and LENGTH: a word is rarely in a second sentence of its batch.
            np.subtract.at(model["embeddings"], tokens, step[:, np.newaxis])


def test(model: Model, data: Data) -> tuple[float, float]:
    """Return the cross-entropy and the accuracy of the model."""
    tokens, topics = data
    _, probabilities = predict(model, tokens)
    loss = -np.log(probabilities[np.arange(len(topics)), topics] + 1e-9).mean()
    return float(loss), float(np.mean(probabilities.argmax(axis=1) == topics))
