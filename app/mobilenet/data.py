"""The data: how a data set becomes arrays, and where a device finds its own.

In the lab, the arrays have been placed on each device before any run. Elsewhere, for example in
Flower's simulation, each client takes its partition of a `FederatedDataset`.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flowerbed import placed_data
from flwr.app import Context
from numpy.typing import NDArray

from mobilenet.settings import RunSettings

IMAGE_SIDE = 32
"""Width and height in pixels to which images are resized."""
LOCAL_TEST_SHARE = 0.2
"""Part of a partition that a client keeps for evaluation, outside of the lab."""

Arrays = dict[str, NDArray[Any]]
"""image: uint8 (n, height, width, channels). label: int64 (n,)."""


@dataclass(frozen=True)
class Data:
    """What a device trains and evaluates on; the server has no examples in `train`."""

    train: Arrays
    test: Arrays
    classes: int
    partition: int = 0

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("the number of classes is unknown: make the labels a ClassLabel")


def to_arrays(dataset: Any) -> Arrays:
    """Turn a `datasets.Dataset` with one column of images and one of labels into arrays."""
    from PIL import Image

    image, label = _columns(dataset.features)
    images = np.empty((len(dataset), IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
    labels: list[int] = []
    for batch in dataset.iter(1000):  # all images at once would need much memory
        for row, value in enumerate(batch[image], start=len(labels)):
            is_array = not hasattr(value, "convert")
            picture = Image.fromarray(np.array(value, np.uint8).squeeze()) if is_array else value
            images[row] = np.asarray(picture.convert("RGB").resize((IMAGE_SIDE, IMAGE_SIDE)))
        labels += batch[label]
    return {"image": images, "label": np.array(labels, np.int64)}


def _columns(features: Any) -> tuple[str, str]:
    """Return the names of the image and the label column, which are found by their types."""
    from datasets import Array2D, Array3D, ClassLabel, Image, Value

    def names(*kinds: Any) -> list[str]:
        return [name for name, kind in features.items() if isinstance(kind, kinds)]

    images = names(Image) or [n for n in names(Array2D, Array3D) if features[n].dtype == "uint8"]
    labels = names(ClassLabel) or [n for n in names(Value) if "int" in features[n].dtype]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            "the data set must have one column of images (Image, or arrays of uint8) and one of "
            f"labels (ClassLabel, or integers), but it has: {features}. Name the columns in "
            "mobilenet/data.py, function _columns"
        )
    return images[0], labels[0]


def load_data(context: Context, run: RunSettings) -> Data:
    """Load what this device trains and evaluates on.

    In the lab, this opens memory-mapped files at each call, so that data which have been placed
    anew are never mistaken for the old ones.
    """
    if placed := placed_data():
        classes = placed.classes or len(placed.labels)
        return Data(placed.train, placed.test, classes, placed.partition)
    partition, partitions = (context.node_config[key] for key in ("partition-id", "num-partitions"))
    limit = -(-run.examples // partitions)
    return _load_partition(run.dataset, run.seed, partition, partitions, limit)


def load_test_data(run: RunSettings) -> Data:
    """Load what the server evaluates on: the data set's test split, which may be empty."""
    if placed := placed_data():
        return Data(placed.train, placed.test, placed.classes or len(placed.labels))
    dataset = _federated(run.dataset, run.seed, 1).load_split("test")
    test = to_arrays(dataset)
    return Data({name: array[:0] for name, array in test.items()}, test, _classes(dataset))


@functools.lru_cache(maxsize=64)  # a process of a simulation serves several clients in turn
def _load_partition(name: str, seed: int, partition: int, partitions: int, limit: int) -> Data:
    dataset = _federated(name, seed, partitions).load_partition(partition, "train")
    count = min(limit or len(dataset), len(dataset))
    if count < 2:  # noqa: PLR2004 - one to train on, one to evaluate on
        raise ValueError(f"partition {partition} has {count} images: use more, or fewer clients")
    arrays = to_arrays(dataset.select(range(count)))
    tests = max(1, round(count * LOCAL_TEST_SHARE))
    test = {name: array[:tests] for name, array in arrays.items()}
    train = {name: array[tests:] for name, array in arrays.items()}
    return Data(train, test, _classes(dataset), partition)


@functools.lru_cache(maxsize=1)
def _federated(name: str, seed: int, partitions: int) -> Any:
    """Return a data set of the hub, or of the parquet files in a directory; it is shuffled."""
    from flwr_datasets import FederatedDataset
    from flwr_datasets.partitioner import IidPartitioner

    source: dict[str, Any] = {"dataset": name}
    if Path(name).is_dir():
        files = {split: f"{name}/**/{split}*.parquet" for split in ("train", "test")}
        source = {"dataset": "parquet", "data_files": files}
    partitioners = {"train": IidPartitioner(partitions)}
    return FederatedDataset(**source, partitioners=partitioners, seed=seed)


def _classes(dataset: Any) -> int:
    return getattr(dataset.features[_columns(dataset.features)[1]], "num_classes", 0)
