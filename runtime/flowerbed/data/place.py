"""Write shards: a device's part of the data set as named arrays that are opened in no time.

    python -m flowerbed.data PLAN OUTPUT

writes the shards of one machine's devices, described by the JSON file PLAN (`plan.py`), into
OUTPUT/devices/<device>/, and with `test` the test split into OUTPUT/test/shard/. A shard is a
record, shard.json, and an .npy file for each array in train/ and test/; devices and server read it
with `placed_data` and never import the data-set libraries.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from flowerbed.data.arrays import Arrays, Convert, convert_by_app, convert_columns
from flowerbed.data.deal import NATURAL, count_labels, deal, label_column, label_values
from flowerbed.data.placed import RECORD, SPLITS, array_file
from flowerbed.data.plan import DataError, DeviceShare, Plan
from flowerbed.data.progress import reporting
from flowerbed.data.source import (
    LOCAL_TEST_SHARE,
    Source,
    content_fingerprint,
    disk_error,
    is_local,
    load,
)
from flowerbed.provenance import VARIABLES

MANIFEST = "manifest.json"
FEWEST_EXAMPLES = 5
"""A share of fewer leaves nothing to train or nothing to test."""
_SAMPLE = 64
"""Rows that are converted to learn how many bytes one takes."""


def prepare(plan: Plan, output: Path) -> dict[str, Any]:
    """Write the shards that `plan` asks for and remove all others.

    The same plan and data give the same shards, byte for byte, on every machine.

    Returns:
        The manifest that is also written to OUTPUT/manifest.json: `plan`, `dataset` (the one that
        was used), `origin`, `shards` (device to its record) and `test`, the record of the test
        split. A record is that of shard.json without the origin, which is the same for all.

    Raises:
        DataError: the data cannot be loaded, dealt or converted, or leave a device with nothing.
    """
    try:
        return _prepare(plan, output)
    except OSError as error:
        if not is_local([error]):
            raise
        raise disk_error(str(error)) from error


def _prepare(plan: Plan, output: Path) -> dict[str, Any]:
    started = time.monotonic()
    source = load(plan)
    convert, code = _conversion(plan, source)
    label = _Label.of(plan, source)
    train = source.train.shuffle(seed=plan.seed)
    if plan.examples:
        train = train.select(range(min(plan.examples, len(train))))
    origin = _origin(plan, source, label.column, code, len(train))
    parts = _parts(plan, train, label.column, convert)
    # Whoever fails from here on leaves shards of two plans: without a manifest all are dealt anew.
    (output / MANIFEST).unlink(missing_ok=True)
    shards: dict[str, Any] = {}
    count = f"{len(parts)} device{'' if len(parts) == 1 else 's'}"
    with reporting(f"placing the data of {count}", lambda: f"{len(shards)} placed"):
        for share, part in zip(plan.devices, parts, strict=True):
            split = part.rows.train_test_split(LOCAL_TEST_SHARE, seed=plan.seed)
            arrays = {name: convert(split[name]) for name in SPLITS}
            _check_arrays(share.device, arrays)
            about = {"partition": share.partition, "fraction": part.fraction}
            about |= label.counted(split["train"], arrays["train"])
            shards[share.device] = _write_shard(
                output / "devices" / share.device, arrays, about, origin
            )
    manifest = {
        "plan": plan.model_dump(),
        "dataset": source.dataset,
        "origin": origin,
        "shards": shards,
    }
    if plan.test:
        about = {"partition": 0, "fraction": 1.0} | label.counted(train.select([]), {})
        manifest["test"] = _write_shard(
            output / "test" / "shard", _arrays_of_server(source, convert), about, origin
        )
    for stale in {path.name for path in (output / "devices").glob("*")} - set(shards):
        shutil.rmtree(output / "devices" / stale)
    _replace(output / MANIFEST, json.dumps(manifest, indent=2))
    print(f"placed {source.dataset} in {time.monotonic() - started:.1f} s", flush=True)
    return manifest


def _conversion(plan: Plan, source: Source) -> tuple[Convert, str]:
    """How rows become arrays, and the hash of the app's code that says so."""
    if plan.app.arrays:
        return convert_by_app(plan.app)
    natural = plan.partitioner in NATURAL
    column = plan.partitioner_parameters.get("partition_by", "") if natural else ""
    return convert_columns(source.train, column), ""


def _origin(plan: Plan, source: Source, label: str, code: str, examples: int) -> dict[str, Any]:
    """All that the shards are made from; the same on every machine of a lab."""
    asked = plan.model_dump()
    return {
        "dataset": source.dataset,
        "asked": {key: asked[key] for key in VARIABLES},
        "configuration": source.configuration,
        "revision": source.revision,
        "splits": source.splits,
        "label": label,
        "fingerprint": content_fingerprint(source.train),
        "examples": examples,
        "partitioner": plan.partitioner,
        "parameters": plan.partitioner_parameters,
        "partitions": plan.partitions,
        "seed": plan.seed,
        "arrays": plan.app.arrays,
        "arrays_hash": code,
    }


@dataclass(frozen=True)
class _Label:
    """The column of the label, the values that it can have, and the number of classes or 0."""

    column: str
    values: list[Any]
    classes: int

    @classmethod
    def of(cls, plan: Plan, source: Source) -> "_Label":
        # The fallback does not have the columns of the data set that was asked for.
        wanted = plan.label if source.dataset == plan.dataset else ""
        column = label_column(source.train, wanted)
        values = label_values(source.train, column)
        classes = getattr(source.train.features.get(column), "num_classes", 0)
        return cls(column, values, classes)

    def counted(self, rows: Any, arrays: Arrays) -> dict[str, Any]:
        """Examples of each label; none where the app's function made other examples of the rows."""
        same = all(len(array) == len(rows) for array in arrays.values())
        labels = count_labels(rows, self.column, self.values) if same else []
        return {"labels": labels, "classes": self.classes}


@dataclass(frozen=True)
class _Part:
    """The rows that a device holds, and the share of its partition that they are."""

    rows: Any
    fraction: float


def _parts(plan: Plan, train: Any, label: str, convert: Convert) -> list[_Part]:
    """What each device holds of its partition.

    Raises:
        DataError: naming every device that is left with too little.
    """
    parts, small = [], []
    for share, partition in zip(plan.devices, deal(plan, train, label), strict=True):
        rows = partition.shuffle(seed=plan.seed).select(
            range(round(len(partition) * share.fraction))
        )
        fitting = _fitting(rows, share, convert)
        if fitting < FEWEST_EXAMPLES:
            reason = "auto leaves room for" if fitting < len(rows) else f"{share.fraction} leaves"
            small.append(
                f"device {share.device}: device_data_fraction = {reason} {fitting} of "
                f"{len(partition)} examples"
            )
        elif fitting < len(rows):
            fraction = round(fitting / len(partition), 4)
            parts.append(_Part(rows.select(range(fitting)), fraction))
        else:
            parts.append(_Part(rows, share.fraction))
    if small:
        raise DataError(
            f"{'; '.join(small)}; at least {FEWEST_EXAMPLES} are needed. The examples are dealt by "
            f"training_partitioner = {plan.partitioner}"
        )
    return parts


def _fitting(rows: Any, share: DeviceShare, convert: Convert) -> int:
    """How many of the rows fit into the bytes that a device has for them."""
    if not share.bytes or not len(rows):
        return len(rows)
    sample = rows.select(range(min(_SAMPLE, len(rows))))
    size = sum(array.nbytes for array in convert(sample).values()) / len(sample)
    return min(len(rows), int(share.bytes / size)) if size else len(rows)


def _check_arrays(device: str, arrays: dict[str, Arrays]) -> None:
    """Refuse what only the app's function can have done."""
    if set(arrays["train"]) != set(arrays["test"]):
        raise DataError(
            f"device {device}: the arrays function named {sorted(arrays['train'])} for training "
            f"and {sorted(arrays['test'])} for testing. Return the same names for every data set"
        )
    for split in SPLITS:
        if not _examples(arrays[split]):
            raise DataError(f"device {device}: the arrays function left no examples to {split}")


def _arrays_of_server(source: Source, convert: Convert) -> dict[str, Arrays]:
    """The test split, whole. Nothing is trained on the server: the rest has shapes and no rows."""
    if source.test is not None:
        test = convert(source.test)
        return {"train": _emptied(test), "test": test}
    empty = _emptied(convert(source.train.select(range(1))))
    return {"train": empty, "test": empty}


def _emptied(arrays: Arrays) -> Arrays:
    return {name: array[:0] for name, array in arrays.items()}


def _examples(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


# --- files -------------------------------------------------------------------------------------


def _write_shard(
    directory: Path, arrays: dict[str, Arrays], about: dict[str, Any], origin: dict[str, Any]
) -> dict[str, Any]:
    """Write a shard aside and put it in place whole; return its record without the origin.

    Arrays that are there already stay: a device that runs on them has their directory mounted.
    """
    record = about | {
        "arrays": list(arrays["train"]),
        "fingerprint": _fingerprint(arrays),
        "train_examples": _examples(arrays["train"]),
        "test_examples": _examples(arrays["test"]),
    }
    whole = record | {"origin": origin}
    there = _read_record(directory)
    if there == whole:
        return record
    if there.get("fingerprint") == record["fingerprint"]:
        _replace(directory / RECORD, json.dumps(whole))
        return record
    draft = directory.with_name(directory.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    for split in SPLITS:
        (draft / split).mkdir(parents=True)
        for name, array in arrays[split].items():
            np.save(array_file(draft, split, name), array)
    (draft / RECORD).write_text(json.dumps(whole))
    shutil.rmtree(directory, ignore_errors=True)
    draft.rename(directory)
    return record


def _read_record(directory: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((directory / RECORD).read_text())
    except FileNotFoundError:
        return {}
    return record


def _fingerprint(arrays: dict[str, Arrays]) -> str:
    """SHA-256 of names, types, shapes and bytes of all arrays."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for name, array in arrays[split].items():
            digest.update(json.dumps([split, name, array.dtype.str, array.shape]).encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _replace(file: Path, text: str) -> None:
    draft = file.with_name(f"{file.name}.draft")
    draft.write_text(text)
    draft.replace(file)


def main() -> None:
    """Run `prepare` from the command line; a data error is one line and exit code 1."""
    plan_file, output = map(Path, sys.argv[1:3])
    # Whoever reads the output reads lines, and progress is printed here.
    for bars in (
        "TQDM_DISABLE",
        "HF_DATASETS_DISABLE_PROGRESS_BARS",
        "HF_HUB_DISABLE_PROGRESS_BARS",
    ):
        os.environ.setdefault(bars, "1")
    try:
        prepare(Plan.model_validate_json(plan_file.read_text()), output)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        sys.exit(f"ERROR: {plan_file} is no plan: {'; '.join(wrong)}")
    except DataError as error:
        sys.exit(f"ERROR: {error}")
