"""Load a data set: from the Hugging Face hub, a directory of parquet files, or the image's digits.

Only a hub that cannot be reached leads to the fallback. Everything else that is wrong (a name, a
configuration, a full disk) is a `DataError` that names the variable.
"""

import contextlib
import csv
import errno
import gzip
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowerbed.data.plan import DataError, Plan
from flowerbed.data.progress import reporting

DIGITS = "digits"
DIGITS_FILE = Path("/opt/flowerbed/digits.csv.gz")
"""scikit-learn's digits (1,797 images of 8x8): the copy of the UCI ML hand-written digits."""
LOCAL_TEST_SHARE = 0.2
"""Share of a device's examples, and of the digits, that is kept for testing."""

_ROWS = 1024
_LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = ("Not enough disk space", "requested and")
"""Errors without a number: of datasets before a download, and of numpy in the middle of a file."""


@dataclass(frozen=True)
class Source:
    """A data set as it was really loaded; `train` and `test` are of `datasets.Dataset`."""

    dataset: str
    configuration: str
    revision: str
    """Commit on the hub; empty where the data set is not from there."""
    splits: dict[str, str]
    train: Any
    test: Any
    """None where the data set has no test split."""


def load(plan: Plan) -> Source:
    """Load the data set of a plan, or its fallback where the hub cannot be reached.

    Raises:
        DataError: it cannot be loaded.
    """
    from datasets.exceptions import DatasetsError
    from httpx import HTTPError

    if plan.dataset == DIGITS:
        return _digits(plan.seed)
    try:
        with reporting(f"loading {plan.dataset}", _cached):
            return _from_builder(plan, _builder(plan))
    except (DatasetsError, HTTPError, OSError, RuntimeError, ValueError) as error:
        causes = list(_causes(error))
        if is_local(causes) or not _is_unreachable(causes):
            raise _refusal(plan, causes) from error
        reason = (
            f"training_dataset = {plan.dataset}: the Hugging Face hub cannot be reached from this "
            f"machine ({_words(causes)})"
        )
        if not plan.fallback:
            raise DataError(
                f"{reason}. Check the machine's connection, or give a directory of parquet files "
                "that every machine has"
            ) from error
        print(f"WARNING: {reason}; using the fallback {plan.fallback} instead", flush=True)
        return _digits(plan.seed)


def content_fingerprint(dataset: Any) -> str:
    """Hash of the columns and rows of a data set, however its files are divided (SHA-256)."""
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=_ROWS):
        plain = table.replace_schema_metadata(None)
        digest.update(str(plain.schema).encode())
        # A copy has no more than its own rows, with offsets that begin at 0.
        for batch in plain.take(np.arange(len(plain))).combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


# --- the hub and directories -------------------------------------------------------------------


def _builder(plan: Plan) -> Any:
    from datasets import load_dataset_builder

    if plan.dataset.startswith("/"):
        return load_dataset_builder("parquet", data_files=_parquet_files(plan))
    builder = load_dataset_builder(
        plan.dataset, plan.configuration or None, revision=plan.revision or None
    )
    # Without the hub, datasets takes the newest version in its cache, whatever was asked for.
    if type(builder).__name__ == "Cache" and plan.revision not in ("", builder.hash):
        raise DataError(
            f"training_dataset_revision = {plan.revision}: the hub cannot be reached to look it "
            f"up, and the cache of this machine holds commit {builder.hash}. Write that commit, or "
            "check the machine's connection"
        )
    return builder


def _parquet_files(plan: Plan) -> dict[str, list[str]]:
    """Splits of a directory with their files: `train-*.parquet` or `train/*.parquet`."""
    root = Path(plan.dataset, plan.configuration)
    if plan.revision:
        raise DataError(
            f"training_dataset_revision = {plan.revision}: training_dataset is a directory, which "
            "has no revisions. Remove the variable"
        )
    if not os.access(root, os.R_OK | os.X_OK):
        variable = "training_dataset_configuration" if plan.configuration else "training_dataset"
        raise DataError(
            f"{variable}: {root} is no directory that user {os.getuid()} can read on this machine. "
            "Copy the data set there, or correct its name or mode"
        )
    files = sorted(root.glob("**/*.parquet"))
    names = {base for split in plan.splits.values() for base in _bases(split)}
    found = {
        name: [str(file) for file in files if _is_of(file.relative_to(root), name)]
        for name in sorted(names | {"train", "test", "validation"})
        if name
    }
    found = {name: paths for name, paths in found.items() if paths}
    if not found:
        shown = ", ".join(str(file.relative_to(root)) for file in files[:5]) or "no parquet file"
        raise DataError(
            f"training_dataset = {root}: there is no train*.parquet (found: {shown}). Give a "
            "directory with the parquet files of a data set, and name its splits in "
            "training_dataset_splits where they are not called train and test"
        )
    return found


def _is_of(file: Path, split: str) -> bool:
    """Whether a file or one of its directories has a split's name: not test for test_unseen."""
    pattern = re.compile(rf"{re.escape(split)}(?!_?[A-Za-z])")
    return bool(pattern.match(file.name)) or split in file.parent.parts


def _bases(split: str) -> list[str]:
    """The splits that an expression such as `train[:90%]+validation` is made of."""
    return [part.split("[")[0].strip() for part in split.split("+")]


def _from_builder(plan: Plan, builder: Any) -> Source:
    if unknown := sorted(plan.splits.keys() - {"train", "test"}):
        raise DataError(
            f"training_dataset_splits has {unknown[0]}. Write {{train: …, test: …}} with the names "
            "of two splits"
        )
    builder.download_and_prepare()
    names = list(builder.info.splits)
    train = plan.splits.get("train") or "train"
    usual = [name for name in ("test", "validation") if name in names and name not in _bases(train)]
    test = plan.splits.get("test", usual[0] if usual else "")
    for split in filter(None, (train, test)):
        if missing := [base for base in _bases(split) if base not in names]:
            raise DataError(
                f"training_dataset_splits: {plan.dataset} has no split {missing[0]}. Write train "
                f"and test as two of its splits ({', '.join(names)}), or an empty test"
            )
    try:
        dealt = builder.as_dataset(split=train)
        central = builder.as_dataset(split=test) if test else None
    except ValueError as error:
        raise DataError(
            f"training_dataset_splits: {error} ({plan.dataset} has the splits {', '.join(names)})"
        ) from error
    configuration, revision = str(builder.config.name), str(builder.hash)
    if plan.dataset.startswith("/"):
        configuration, revision = plan.configuration, ""
    splits = {"train": train, "test": test}
    return Source(plan.dataset, configuration, revision, splits, dealt, central)


def _cached() -> str:
    """How large the cache of data sets is: it grows while one is downloaded or unpacked."""
    from datasets import config

    total = 0
    for folder, _, files in Path(config.HF_CACHE_HOME).walk():
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # the file of a finished download
                total += (folder / file).lstat().st_size
    return f"{total / 1e6:.0f} MB in the cache"


# --- what may be wrong -------------------------------------------------------------------------


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it was raised from, as a traceback would show them."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _words(causes: list[BaseException]) -> str:
    """The innermost reason, in a line."""
    reason = next(
        (str(cause) for cause in reversed(causes) if str(cause)), type(causes[-1]).__name__
    )
    return " ".join(reason.split())


def is_local(causes: Iterable[BaseException]) -> bool:
    """Whether the disk of this machine is the reason: full, or not to be written."""
    return any(
        isinstance(cause, OSError)
        and (cause.errno in _LOCAL_ERRORS or any(words in str(cause) for words in _FULL))
        for cause in causes
    )


def _is_unreachable(causes: list[BaseException]) -> bool:
    from httpx import TransportError

    return any(
        isinstance(cause, ConnectionError | TimeoutError | TransportError) for cause in causes
    )


def _refusal(plan: Plan, causes: list[BaseException]) -> DataError:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HFValidationError

    error, said, reason = causes[0], " ".join(str(causes[0]).split()), _words(causes)
    name = f"training_dataset = {plan.dataset}"
    if is_local(causes):
        if plan.dataset.startswith("/") and plan.dataset in reason:
            return DataError(f"{name}: {reason}. Make it readable for user {os.getuid()}")
        return disk_error(reason)
    if isinstance(error, DatasetNotFoundError) and said.startswith("Revision"):
        return DataError(
            f"training_dataset_revision = {plan.revision}: {said} Write a branch, tag or commit"
        )
    if "LocalEntryNotFoundError" in said:
        return DataError(
            f"{name}: the hub answered with an error of its own. Try again later, or give a "
            "directory of parquet files"
        )
    # A name with two slashes is looked for in the file system, and is not found there.
    unknown = isinstance(error, DatasetNotFoundError | HFValidationError)
    if unknown or type(error) is FileNotFoundError:
        return DataError(
            f"{name}: {said} Write the name of a public data set, or an absolute directory"
        )
    if "BuilderConfig" in said or "Config name is missing" in said:
        return DataError(f"training_dataset_configuration = {plan.configuration!r}: {said}")
    if "scripts are no longer supported" in said:
        return DataError(
            f"{name}: {said}. If the hub has converted it, training_dataset_revision = "
            "refs/convert/parquet loads its parquet files"
        )
    return DataError(f"{name} cannot be loaded ({type(error).__name__}: {reason})")


def disk_error(words: str) -> DataError:
    """The refusal of a machine that has no room or no right to write."""
    return DataError(
        f"shards_directory of this machine cannot be written ({words}). Free space there, correct "
        "its owner and mode, or set shards_directory to another disk"
    )


# --- the digits --------------------------------------------------------------------------------


def _digits(seed: int) -> Source:
    """scikit-learn's digits in the form of CIFAR-10, for which they stand in without internet."""
    from datasets import Array3D, ClassLabel, Dataset, Features

    with gzip.open(DIGITS_FILE, "rt") as file:
        rows = np.array(list(csv.reader(file)), dtype=float)
    images = np.repeat(np.repeat(rows[:, :64].reshape(-1, 8, 8), 4, axis=1), 4, axis=2)
    images = np.repeat((images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=3)
    features = Features(
        {"img": Array3D(images.shape[1:], "uint8"), "label": ClassLabel(num_classes=10)}
    )
    whole = Dataset.from_dict({"img": images, "label": rows[:, 64].astype(int)}, features)
    split = whole.train_test_split(LOCAL_TEST_SHARE, seed=seed)
    splits = {"train": "train", "test": "test"}
    return Source(DIGITS, "", "", splits, split["train"], split["test"])
