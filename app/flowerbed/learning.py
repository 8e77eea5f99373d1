"""What the learners have in common; no TensorFlow here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

EVALUATION_BATCH = 128
MOMENTUM = 0.9

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Weights = NDArray[np.float32]


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and share of right answers over `examples`."""

    loss: float
    accuracy: float
    examples: int


@dataclass(frozen=True)
class Training:
    """What training left: `loss` and `accuracy` are means over the steps as they were taken."""

    weights: Weights
    loss: float
    accuracy: float
    examples: int
    steps: int
    partial: bool
    """Whether the time was up before the last epoch ended."""


def flip(images: Images, rng: np.random.Generator) -> Images:
    """Mirror half of the images: free, and shifts would cost more rounds than a lab runs."""
    mirrored = rng.random(len(images)) < 0.5  # noqa: PLR2004 - half of them
    return np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def batches(examples: int, batch: int, epochs: int, rng: np.random.Generator) -> Iterator[Any]:
    """Indices of full batches; what does not fill one is left out, differently each epoch."""
    for _ in range(epochs):
        order = rng.permutation(examples)
        for start in range(0, examples - batch + 1, batch):
            # Sorted: the images are memory-mapped, and the order within a batch means nothing.
            yield np.sort(order[start : start + batch])
