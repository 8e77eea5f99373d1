"""Several runs side by side: how well they learned, how long it took, and what sets them apart."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from flowerbed.report import pictures
from flowerbed.report.elements import (
    figure,
    legend,
    named,
    number,
    page,
    pair,
    section,
    share,
    table,
    text,
)
from flowerbed.report.findings import waiting
from flowerbed.report.page import setting
from flowerbed.report.record import Record
from flowerbed.results import MODEL_OUTCOMES

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


def comparison_page(records: Sequence[Record]) -> str:
    """Several runs side by side."""
    names = [record.name for record in records]
    colours = [pictures.PALETTE[n % len(pictures.PALETTE)] for n in range(len(records))]
    dotted = [named(*pair) for pair in zip(names, colours, strict=True)]
    summary = (
        (
            name,
            record.state,
            record.description.get("run", {}).get("strategy", "-"),
            len(record.rounds),
            number(record.rounds[-1].central_accuracy if record.rounds else None, 3),
            number(max((r.central_accuracy for r in record.rounds), default=None), 3),
            number(record.seconds, 0, " s"),
            number(record.seconds / len(record.rounds) if record.rounds else None, 1, " s"),
            share(waiting(record)),
            sum(row.outcome not in (*MODEL_OUTCOMES, "unavailable") for row in record.devices),
        )
        for name, record in zip(dotted, records, strict=True)
    )
    head = (
        "run",
        "",
        "strategy",
        "rounds",
        "accuracy",
        "best",
        "time",
        "a round",
        "waiting",
        "failed",
    )
    times = times_to_accuracy(records)
    differing = differences(records)
    body = [
        Markup("<header><h1>{}</h1><p>{} runs compared</p></header>").format(
            " · ".join(names), len(records)
        ),
        section("In numbers", table(head, summary, words=(1, 2))),
        section(
            "How well they learned",
            legend(dotted),
            pair(
                figure(
                    pictures.compared(records, "seconds"),
                    "Accuracy of the global model on the test split, over time: what a user gets.",
                ),
                figure(
                    pictures.compared(records, "rounds"),
                    "The same, over rounds: what a round is worth.",
                ),
            ),
        ),
        section(
            "Time to an accuracy",
            table(
                ("accuracy", *names),
                (
                    (f"{accuracy:.2f}", *(number(seconds, 0, " s") for seconds in reached))
                    for accuracy, reached in times
                ),
            )
            if times
            else text("None of the runs has come to an accuracy worth comparing."),
        ),
        section(
            "What differs in their configuration",
            table(("setting", *names), ((key, *map(setting, v)) for key, v in differing))
            if differing
            else text("Nothing: the runs were configured alike."),
        ),
    ]
    return page(f"{', '.join(names)} - Flowerbed", body)
