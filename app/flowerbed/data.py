"""Shards: a device's part of the data set as compact arrays that load in no time.

    python -m flowerbed.data PLAN OUTPUT

writes the shards of one machine's devices, described by the JSON file PLAN (`Plan`), into
OUTPUT/devices/<device>/, and with `test` the test split into OUTPUT/test/shard/. Devices and server
read them with `load_shard` and never import the data-set libraries.
"""

import csv
import gzip
import hashlib
import inspect
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

IMAGE_SIDE = 32
LOCAL_TEST_SHARE = 0.2
FEWEST_IMAGES = 5
"""A share of fewer leaves nothing to train or nothing to test."""
DIGITS = Path("/opt/flowerbed/digits.csv.gz")
"""scikit-learn's digits (1,797 images of 8x8): the copy of the UCI ML hand-written digits."""

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_RECORD = "shard.json"
MANIFEST = "manifest.json"


class DeviceShare(BaseModel):
    """Which partition a device holds and how much of it."""

    model_config = ConfigDict(extra="forbid")
    device: str
    partition: Annotated[int, Field(ge=0)]
    fraction: Annotated[float, Field(gt=0, le=1)]
    images: Annotated[int, Field(ge=0)] = 0
    """The most that it holds; 0: no limit."""

    def of(self, partition: int) -> int:
        """How many of a partition's images it holds."""
        kept = round(partition * self.fraction)
        return min(kept, self.images) if self.images else kept

    def held(self, partition: int) -> float:
        """The share of a partition's images that it holds."""
        kept = self.of(partition)
        cut = kept < round(partition * self.fraction)
        return round(kept / partition, 4) if cut else self.fraction


class Plan(BaseModel):
    """What one machine prepares."""

    model_config = ConfigDict(extra="forbid")
    dataset: str
    """A name on the Hugging Face hub, or an absolute directory of parquet files."""
    fallback: Literal["", "digits"] = ""
    """Used, loudly, where the hub cannot be reached."""
    examples: Annotated[int, Field(ge=0)] = 0
    """Training images that are dealt out to all devices together; 0: all."""
    partitioner: Literal["iid", "dirichlet", "pathological", "shard", "linear", "exponential"] = (
        "iid"
    )
    """Of flwr_datasets.partitioner; linear and exponential deal by size, in the devices' order."""
    partitioner_parameters: dict[str, Any] = {}
    """Arguments of its constructor; the label, the number and the seed are the plan's."""
    partitions: Annotated[int, Field(ge=1)]
    seed: int
    devices: list[DeviceShare]
    test: bool = False
    """Also write the test split of the data set, for central evaluation."""


@dataclass(frozen=True)
class Shard:
    """Images are uint8 (n, 32, 32, 3), memory-mapped; labels int64 (n,)."""

    partition: int
    classes: int
    fingerprint: str
    labels: list[int]
    """Training images of each class."""
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels


class DatasetError(Exception):
    """The data set cannot be had or cannot be used; the message says which and why."""


def load_shard(directory: Path) -> Shard:
    """Open a shard that `prepare` has written.

    Raises:
        FileNotFoundError: there is none.
    """
    record = json.loads((directory / _RECORD).read_text())
    arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    return Shard(
        partition=record["partition"],
        classes=record["classes"],
        fingerprint=record["fingerprint"],
        labels=record["train_labels"],
        **arrays,
    )


def _write_shard(
    directory: Path,
    arrays: dict[str, NDArray[Any]],
    *,
    partition: int = 0,
    classes: int,
    fraction: float = 1.0,
) -> dict[str, Any]:
    """Write a shard aside and put it in place whole; return its record.

    One that is there already is left alone: a device that runs on it has its directory mounted.
    """
    digest = hashlib.sha256()
    for name in _ARRAYS:
        digest.update(arrays[name].tobytes())
    labels = np.bincount(arrays["train_labels"], minlength=classes)
    record = {
        "partition": partition,
        "fraction": fraction,
        "classes": classes,
        "fingerprint": digest.hexdigest(),
        "train_examples": len(arrays["train_labels"]),
        "test_examples": len(arrays["test_labels"]),
        "train_labels": labels.tolist(),
    }
    if _read_record(directory) == record:
        return record
    draft = directory.with_name(directory.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name in _ARRAYS:
        np.save(draft / f"{name}.npy", arrays[name])
    (draft / _RECORD).write_text(json.dumps(record))
    shutil.rmtree(directory, ignore_errors=True)
    draft.rename(directory)
    return record


def _read_record(directory: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((directory / _RECORD).read_text())
    except FileNotFoundError:
        return None
    return record


# --- where the images come from ----------------------------------------------------------------


def _digits(seed: int) -> tuple[Any, Any]:
    from datasets import Array3D, ClassLabel, Dataset, Features

    with gzip.open(DIGITS, "rt") as file:
        rows = np.array(list(csv.reader(file)), dtype=float)
    images = np.repeat(np.repeat(rows[:, :64].reshape(-1, 8, 8), 4, axis=1), 4, axis=2)
    images = np.repeat((images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=3)
    features = Features(
        {
            "image": Array3D((IMAGE_SIDE, IMAGE_SIDE, 3), "uint8"),
            "label": ClassLabel(num_classes=10),
        }
    )
    whole = Dataset.from_dict({"image": images, "label": rows[:, 64].astype(int)}, features)
    split = whole.train_test_split(LOCAL_TEST_SHARE, seed=seed)
    return split["train"], split["test"]


def _load_splits(plan: Plan) -> tuple[Any, Any, str]:
    """The training and test split, and the name of what was really loaded."""
    from datasets import load_dataset

    try:
        if plan.dataset.startswith("/"):
            files = {
                split: sorted(map(str, Path(plan.dataset).glob(f"**/{split}*.parquet")))
                for split in ("train", "test")
            }
            if missing := [split for split, found in files.items() if not found]:
                raise DatasetError(
                    f"{plan.dataset} holds no {' and no '.join(missing)}*.parquet: give a "
                    "directory with the parquet files of both splits"
                )
            loaded = load_dataset("parquet", data_files=files)
        elif plan.dataset == "digits":
            return *_digits(plan.seed), "digits"
        else:
            loaded = load_dataset(plan.dataset)
        return loaded["train"], loaded["test"], plan.dataset
    except (OSError, ConnectionError) as error:
        reason = f"the data set {plan.dataset!r} cannot be reached ({type(error).__name__})"
        if not plan.fallback:
            raise DatasetError(
                f"{reason}. Give a directory of parquet files that every machine has, or a "
                "name that the hub knows, as training_dataset."
            ) from error
        print(f"WARNING: {reason}; using the fallback {plan.fallback!r} instead", flush=True)
        return *_digits(plan.seed), plan.fallback


def _columns(dataset: Any) -> tuple[str, str]:
    """Names of the image and the label column, by their types."""
    from datasets import Array3D, ClassLabel, Image

    image = [name for name, kind in dataset.features.items() if isinstance(kind, Image | Array3D)]
    label = [name for name, kind in dataset.features.items() if isinstance(kind, ClassLabel)]
    if not image or not label:
        raise DatasetError(f"needs an Image and a ClassLabel column, found {dataset.features}")
    return image[0], label[0]


def _to_arrays(dataset: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from PIL import Image

    image, label = _columns(dataset)
    images = np.empty((len(dataset), IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
    for index, value in enumerate(dataset[:][image]):
        picture = value if isinstance(value, Image.Image) else Image.fromarray(np.uint8(value))
        picture = picture.convert("RGB")
        if picture.size != (IMAGE_SIDE, IMAGE_SIDE):
            picture = picture.resize((IMAGE_SIDE, IMAGE_SIDE))
        images[index] = np.asarray(picture)
    return images, np.array(dataset[:][label], np.int64)


# --- dealing them out --------------------------------------------------------------------------


_OF_THE_PLAN = ("self", "num_partitions", "partition_by", "seed", "shuffle")


def _partitioner(plan: Plan, label: str) -> Any:
    """The partitioner of a plan.

    Args:
        label: name of the column that is dealt by.
    """
    from flwr_datasets import partitioner

    cls = getattr(partitioner, f"{plan.partitioner.capitalize()}Partitioner")
    known = inspect.signature(cls.__init__).parameters
    settable = {name: known[name] for name in known if name not in _OF_THE_PLAN}
    given = plan.partitioner_parameters
    has = f"it has {', '.join(sorted(settable)) or 'none'}"
    if unknown := sorted(set(given) - set(settable)):
        raise DatasetError(
            f"training_partitioner_parameters: {plan.partitioner} has no {', '.join(unknown)}; "
            f"{has}"
        )
    needed = {name for name, value in settable.items() if value.default is value.empty}
    if missing := sorted(needed - set(given)):
        raise DatasetError(
            f"training_partitioner_parameters: {plan.partitioner} needs {', '.join(missing)}; {has}"
        )
    own = {"num_partitions": plan.partitions, "partition_by": label, "seed": plan.seed}
    return cls(**{name: value for name, value in own.items() if name in known}, **given)


def _deal(plan: Plan, train: Any) -> list[Any]:
    """The partitions of the plan's devices, in their order."""
    try:
        partitioner = _partitioner(plan, _columns(train)[1])
        partitioner.dataset = train
        return [partitioner.load_partition(share.partition) for share in plan.devices]
    except (ValueError, TypeError) as error:
        raise DatasetError(
            f"training_partitioner = {plan.partitioner} with {plan.partitioner_parameters} cannot "
            f"deal {len(train)} images to {plan.partitions} devices: {error}"
        ) from None


def _check_sizes(plan: Plan, partitions: list[Any]) -> None:
    """Refuse shares that leave nothing to train or nothing to test.

    Raises:
        DatasetError: naming every device that has one.
    """
    small = [
        f"device {share.device}: device_data_fraction = {share.fraction} leaves {kept} of "
        f"{len(partition)} images"
        for share, partition in zip(plan.devices, partitions, strict=True)
        if (kept := share.of(len(partition))) < FEWEST_IMAGES
    ]
    if small:
        raise DatasetError(
            f"{'; '.join(small)}; at least {FEWEST_IMAGES} are needed. The images are dealt out by "
            f"training_partitioner = {plan.partitioner}"
        )


def _share(partition: Any, share: DeviceShare, seed: int) -> dict[str, NDArray[Any]]:
    """A device's share of its partition, split into training and local test."""
    kept = partition.shuffle(seed=seed).select(range(share.of(len(partition))))
    split = kept.train_test_split(LOCAL_TEST_SHARE, seed=seed)
    train_images, train_labels = _to_arrays(split["train"])
    test_images, test_labels = _to_arrays(split["test"])
    return dict(zip(_ARRAYS, (train_images, train_labels, test_images, test_labels), strict=True))


def prepare(plan: Plan, output: Path) -> dict[str, Any]:
    """Write the shards that `plan` asks for and remove all others.

    The same plan gives the same shards, byte for byte, on every machine.

    Returns:
        The manifest that is also written to OUTPUT/manifest.json.

    Raises:
        DatasetError: the data set cannot be had, or leaves a device with nothing.
    """
    started = time.monotonic()
    manifest: dict[str, Any] = {"plan": plan.model_dump(), "shards": {}}
    train, test, manifest["dataset"] = _load_splits(plan)
    classes = train.features[_columns(train)[1]].num_classes
    train = train.shuffle(seed=plan.seed)
    if plan.examples:
        train = train.select(range(min(plan.examples, len(train))))
    partitions = _deal(plan, train)
    _check_sizes(plan, partitions)
    for share, partition in zip(plan.devices, partitions, strict=True):
        arrays = _share(partition, share, plan.seed)
        record = _write_shard(
            output / "devices" / share.device,
            arrays,
            partition=share.partition,
            classes=classes,
            fraction=share.held(len(partition)),
        )
        manifest["shards"][share.device] = record
        print(f"{share.device}: {record['train_examples']} images", flush=True)
    if plan.test:
        images, labels = _to_arrays(test)
        # Nothing is trained on the coordinator; the shard is the whole test split.
        arrays = dict(zip(_ARRAYS, (images[:0], labels[:0], images, labels), strict=True))
        manifest["test"] = _write_shard(output / "test" / "shard", arrays, classes=classes)
    for stale in {path.name for path in (output / "devices").glob("*")} - set(manifest["shards"]):
        shutil.rmtree(output / "devices" / stale)
    draft = output / f"{MANIFEST}.draft"
    draft.write_text(json.dumps(manifest, indent=2))
    draft.replace(output / MANIFEST)
    print(f"prepared {manifest['dataset']} in {time.monotonic() - started:.1f} s", flush=True)
    return manifest


def main() -> None:
    """Run `prepare` from the command line; a data-set error is one line and exit code 1."""
    plan_file, output = map(Path, sys.argv[1:3])
    try:
        prepare(Plan.model_validate_json(plan_file.read_text()), output)
    except DatasetError as error:
        sys.exit(f"ERROR: {error}")


if __name__ == "__main__":
    main()
