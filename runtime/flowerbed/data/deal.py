"""Deal the training split to the devices, with the partitioners of flwr_datasets."""

import inspect
import warnings
from collections import Counter
from typing import Any

import numpy as np

from flowerbed.data.plan import DataError, Plan

_BY_OWN_COLUMN = ("natural_id", "grouped_natural_id", "continuous")
"""Partitioners whose column is a parameter; the others deal by the label or by no column."""
NATURAL = ("natural_id", "grouped_natural_id")
_OF_THE_PLAN = ("self", "num_partitions", "partition_by", "seed", "shuffle")


def label_column(train: Any, wanted: str = "") -> str:
    """The column of the label: `wanted`, or the only ClassLabel column; empty: there is none.

    Raises:
        DataError: there is no such column.
    """
    from datasets import ClassLabel

    if wanted:
        if wanted not in train.features:
            raise DataError(
                f"training_dataset_label = {wanted}: the data set has no such column. Write one of "
                f"{', '.join(train.features)}"
            )
        return wanted
    found = [name for name, kind in train.features.items() if isinstance(kind, ClassLabel)]
    return found[0] if len(found) == 1 else ""


def label_values(train: Any, label: str) -> list[Any]:
    """The values that a label can have, in the order in which they are counted.

    Empty where the label is a number with a fraction, which is no class, or is missing.
    """
    from datasets import ClassLabel, Value

    kind = train.features.get(label)
    if isinstance(kind, ClassLabel):
        return list(range(kind.num_classes))
    if isinstance(kind, Value) and kind.dtype.startswith(
        ("int", "uint", "bool", "string", "large")
    ):
        return sorted(value for value in train.unique(label) if value is not None)
    return []


def deal(plan: Plan, train: Any, label: str) -> list[Any]:
    """Divide the training split.

    Args:
        plan: how, and for which devices.
        train: what is dealt, a `datasets.Dataset`.
        label: name of the column that label partitioners deal by, or empty.

    Returns:
        The partition of each of the plan's devices, in their order.

    Raises:
        DataError: it cannot be dealt in this way.
    """
    try:
        partitioner = _partitioner(plan, train, label)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that examples are left over, or drawn once more
            partitioner.dataset = train
            number = partitioner.num_partitions
            partitions = [
                partitioner.load_partition(share.partition)
                for share in plan.devices
                if share.partition < number
            ]
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"training_partitioner = {plan.partitioner} with {plan.partitioner_parameters} cannot "
            f"deal {len(train)} examples to {plan.partitions} devices: {error}"
        ) from error
    if number < plan.partitions:
        raise DataError(
            f"training_partitioner = {plan.partitioner} with {plan.partitioner_parameters} makes "
            f"{number} partitions of {len(train)} examples, and there are {plan.partitions} "
            "devices. Use fewer devices, or parameters that give more partitions"
        )
    return partitions


def _class_of(name: str) -> Any:
    from flwr_datasets import partitioner

    words = "".join(word.capitalize() for word in name.split("_"))
    return getattr(partitioner, f"{words}Partitioner")


def settable_of(name: str) -> dict[str, inspect.Parameter]:
    """The parameters of a partitioner that can be given, by their names."""
    known = inspect.signature(_class_of(name).__init__).parameters
    settable = {key: value for key, value in known.items() if key not in _OF_THE_PLAN}
    if name in _BY_OWN_COLUMN:
        settable["partition_by"] = known["partition_by"]
    return settable


def _partitioner(plan: Plan, train: Any, label: str) -> Any:
    cls, settable = _class_of(plan.partitioner), settable_of(plan.partitioner)
    known = inspect.signature(cls.__init__).parameters
    own: dict[str, Any] = {"num_partitions": plan.partitions, "seed": plan.seed}
    if "partition_by" in known and "partition_by" not in settable:
        own["partition_by"] = _label_to_deal_by(plan, train, label)
    given = _checked_parameters(plan, train, settable)
    return cls(**{key: value for key, value in own.items() if key in known}, **given)


def _checked_parameters(
    plan: Plan, train: Any, settable: dict[str, inspect.Parameter]
) -> dict[str, Any]:
    given = dict(plan.partitioner_parameters)
    has = f"it has {', '.join(sorted(settable)) or 'none'}"
    if unknown := sorted(set(given) - set(settable)):
        raise DataError(
            f"training_partitioner_parameters: {plan.partitioner} has no {', '.join(unknown)}; "
            f"{has}"
        )
    needed = {key for key, value in settable.items() if value.default is value.empty}
    if missing := sorted(needed - set(given)):
        raise DataError(
            f"training_partitioner_parameters: {plan.partitioner} needs {', '.join(missing)}; {has}"
        )
    if "partition_by" in given and given["partition_by"] not in train.features:
        raise DataError(
            f"training_partitioner_parameters: partition_by = {given['partition_by']} is no column "
            f"of the data set. Write one of {', '.join(train.features)}"
        )
    if "distribution_array" in given:
        given["distribution_array"] = np.array(given["distribution_array"])
    return given


def _label_to_deal_by(plan: Plan, train: Any, label: str) -> str:
    if not label:
        raise DataError(
            f"training_partitioner = {plan.partitioner} deals by a label, and {plan.dataset} has "
            "not exactly one ClassLabel column. Name a column in training_dataset_label: "
            f"{', '.join(train.features)}"
        )
    if not label_values(train, label):
        raise DataError(
            f"training_dataset_label = {label} holds {train.features[label].dtype}, and "
            f"training_partitioner = {plan.partitioner} deals by classes. Name a column of whole "
            "numbers or text, or deal by numbers with the partitioner continuous"
        )
    return label


def count_labels(rows: Any, label: str, values: list[Any]) -> list[int]:
    """How many rows have each of a label's values."""
    counts = Counter(rows[label] if values else ())
    return [counts[value] for value in values]
