"""What the tests have in common: settings, and small images that a network can learn."""

import tomllib
from pathlib import Path
from typing import Any

import mobilenet
import numpy as np
from mobilenet.data import IMAGE_SIDE, Arrays

APP = Path(mobilenet.__file__).parent.parent
SHAPE = (IMAGE_SIDE, IMAGE_SIDE, 3)
CLASSES = 10


def make_images(examples: int, seed: int) -> Arrays:
    """Draw images of noise with a bright square whose place is that of the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, examples)
    images = rng.integers(0, 160, (examples, *SHAPE), np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = 6 * (label // 2), 10 + 6 * (label % 2)  # a mirrored image shows another label
        image[row : row + 6, column : column + 6] += 90
    return {"image": images, "label": labels}


def run_config(**changes: Any) -> dict[str, Any]:
    """Return the run configuration of pyproject.toml, with changes; keys in snake case."""
    project = tomllib.loads((APP / "pyproject.toml").read_text())
    changed = {key.replace("_", "-"): value for key, value in changes.items()}
    return {**project["tool"]["flwr"]["app"]["config"], **changed}
