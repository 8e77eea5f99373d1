"""What sets runs apart: their configuration, and how long they take to an accuracy."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flowerbed.report.record import Record

_STEP = 0.05
_LEAST = 0.15
"""The accuracies that are told of: multiples of the step from here on."""
_OF_EACH_RUN = ("run.run_name",)


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a document, each with its path."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        yield path, ", ".join(map(str, node))
    else:
        yield path, node


def differences(records: Sequence[Record]) -> list[tuple[str, tuple[Any, ...]]]:
    """The settings in which runs differ, each with its value in every run."""
    told = [dict(_flat(record.description)) for record in records]
    keys = list(dict.fromkeys(key for settings in told for key in settings))
    rows = [(key, tuple(settings.get(key, "not there") for settings in told)) for key in keys]
    return [
        (key, values)
        for key, values in rows
        if key not in _OF_EACH_RUN and any(value != values[0] for value in values)
    ]


def time_to(record: Record, accuracy: float) -> float | None:
    """Seconds from the first round's begin until the global model had an accuracy, if ever."""
    for row in record.rounds:
        if row.central_accuracy >= accuracy:
            return row.started + row.seconds - record.begin
    return None


def times_to_accuracy(
    records: Sequence[Record],
) -> list[tuple[float, tuple[float | None, ...]]]:
    """For accuracies that at least one run reached, the time that each run took, in seconds."""
    best = max((row.central_accuracy for record in records for row in record.rounds), default=0)
    steps = range(round(_LEAST / _STEP), int(best / _STEP) + 1)
    return [
        (step * _STEP, tuple(time_to(record, step * _STEP) for record in records)) for step in steps
    ]
