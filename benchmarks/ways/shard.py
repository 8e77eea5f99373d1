"""The device's images and the network of Flower's example, as every other way uses them."""

from pathlib import Path
from typing import Any

import numpy as np

SHARD = Path("/shard")
TEST = Path("/test/shard")


def load(split: str, shard: Path = SHARD) -> tuple[Any, Any]:
    """Images (n, 32, 32, 3) as float32 from 0 to 1, and labels (n,)."""
    images, labels = (np.load(shard / split / f"{name}.npy") for name in ("image", "label"))
    return images.astype(np.float32) / np.float32(255), labels


def build_model(**options: Any) -> Any:
    """MobileNetV2 of width 0.1, compiled with Adam."""
    import keras

    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.1, weights=None, classes=10)
    model.compile(
        optimizer="adam",
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        **options,
    )
    return model
