"""Read the data that the lab has placed for a device: named arrays and their origin.

Apps call `placed_data` on every device and for each message; it imports numpy and nothing else.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

RECORD = "shard.json"
SPLITS = ("train", "test")


@dataclass(frozen=True)
class PlacedData:
    """Arrays by name, memory-mapped, the same names in both splits; the first dimension counts.

    On the server, `test` is the data set's test split (empty arrays where it has none) and the
    arrays of `train` are empty. On a device, both are the device's own.
    """

    train: dict[str, NDArray[Any]]
    test: dict[str, NDArray[Any]]
    origin: dict[str, Any]
    """Data set, splits, partitioner, seed and everything else that the data were made from."""
    partition: int
    fraction: float
    """Share of the partition that the device holds."""
    fingerprint: str
    """SHA-256 of names, types, shapes and values of the arrays."""
    labels: list[int]
    """Training examples of each label; empty where the data set has no label."""
    classes: int
    """Number of classes of the label; 0 where it is unknown."""


def placed_data(directory: Path | None = None) -> PlacedData | None:
    """Open the data that the lab has placed here.

    Args:
        directory: where they are; by default the environment variable FLOWERBED_DATA says so,
            and without it /data.

    Returns:
        The data, or None where the lab has placed none (outside of the lab, for example).
    """
    root = directory or Path(os.environ.get("FLOWERBED_DATA", "/data"))
    try:
        record = json.loads((root / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    train, test = (
        {name: np.load(array_file(root, split, name), mmap_mode="r") for name in record["arrays"]}
        for split in SPLITS
    )
    return PlacedData(
        train=train,
        test=test,
        origin=record["origin"],
        partition=record["partition"],
        fraction=record["fraction"],
        fingerprint=record["fingerprint"],
        labels=record["labels"],
        classes=record["classes"],
    )


def array_file(directory: Path, split: str, name: str) -> Path:
    """The file of a named array; a name may hold characters that a file's name cannot."""
    return directory / split / f"{quote(name, safe=' ')}.npy"
