"""Several runs on one page: what they learned, how long they took, and how they differ.

Runs of the same configuration that differ in their seeds only are one group: its median is shown,
with the range in parentheses.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

from markupsafe import Markup

from flowerbed.report import pictures
from flowerbed.report.elements import (
    NOTHING,
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
from flowerbed.report.findings import percent, waiting
from flowerbed.report.page import setting
from flowerbed.report.record import Record
from flowerbed.results import MODEL_OUTCOMES

_STEP = 0.05
_LEAST = 0.15
"""The accuracies whose times are compared: multiples of the step, from here on."""
_OF_EACH_RUN = frozenset({"run_name"})
_BY_SEED = _OF_EACH_RUN | {"seed", "shard", "labels", "examples", "environment", "fingerprint"}
"""Keys of run.yml that may differ between the runs of a group."""


def _flat(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of a document, each with its path."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flat(value, (*path, str(key)))
    elif isinstance(node, list | tuple):
        yield path, ", ".join(map(str, node))
    else:
        yield path, node


def _leaves(record: Record, without: frozenset[str]) -> dict[str, Any]:
    return {
        ".".join(path): value
        for path, value in _flat(record.description)
        if without.isdisjoint(path)
    }


@dataclass(frozen=True)
class Group:
    """Runs of one configuration."""

    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        """The names of its runs."""
        first, *others = [record.name for record in self.records]
        return f"{first} and {len(others)} more" if others[1:] else " and ".join((first, *others))

    def curve(self, of: str, by: str) -> list[tuple[float, float, float, float]]:
        """Points of a line: position, median, least and greatest value at each round.

        Args:
            of: accuracy or loss.
            by: rounds or seconds; of several runs, the median of the seconds.
        """
        at: dict[int, list[tuple[float, float]]] = {}
        for record in self.records:
            for row, value in record.curve(of)[1]:
                at.setdefault(row.round, []).append((record.ended(row), value))
        points = []
        for number_, found in sorted(at.items()):
            seconds, values = zip(*found, strict=True)
            place = float(number_) if by == "rounds" else median(seconds)
            points.append((place, median(values), min(values), max(values)))
        return points


def grouped(records: Sequence[Record]) -> list[Group]:
    """Group the runs that differ in their seeds only, in the order of their first runs."""
    groups: dict[tuple[tuple[str, str], ...], list[Record]] = {}
    for record in records:
        leaves = _leaves(record, _BY_SEED)
        # A run that was never described is like no other.
        key = tuple(sorted((path, str(v)) for path, v in leaves.items())) or (("", record.name),)
        groups.setdefault(key, []).append(record)
    return [Group(tuple(members)) for members in groups.values()]


def differences(groups: Sequence[Group]) -> list[tuple[str, tuple[Any, ...]]]:
    """The settings in which groups of runs differ, each with its value in every group."""
    without = _OF_EACH_RUN if all(len(g.records) == 1 for g in groups) else _BY_SEED
    known = [_leaves(group.records[0], without) for group in groups]
    keys = list(dict.fromkeys(key for settings in known for key in settings))
    rows = [(key, tuple(settings.get(key) for settings in known)) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def time_to(record: Record, accuracy: float) -> float | None:
    """Seconds until the global model had an accuracy after a round; None: it never had."""
    for row, value in record.curve("accuracy")[1]:
        if value >= accuracy:
            return record.ended(row)
    return None


def compared_accuracies(records: Sequence[Record]) -> list[float]:
    """The accuracies whose times are compared: those that at least one run has reached."""
    best = max((v for record in records for _, v in record.curve("accuracy")[1]), default=0.0)
    # Rounded before the division is cut off: 0.3 / 0.05 is less than 6.
    steps = range(round(_LEAST / _STEP), int(round(best / _STEP, 6)) + 1)
    return [round(step * _STEP, 2) for step in steps]


def spread(values: Sequence[float | None], digits: int = 0, unit: str = "") -> str:
    """Median and range of values; None counts as a time that never came."""
    known = sorted(math.inf if value is None else value for value in values)
    if not known:
        return NOTHING
    middle, least, most = (
        number(value, digits, unit) if math.isfinite(value) else "never"
        for value in (median(known), known[0], known[-1])
    )
    return middle if least == most else f"{middle} ({least} to {most})"


def _last(record: Record, of: str) -> list[float]:
    return [value for _, value in record.curve(of)[1]][-1:]


def _best(record: Record) -> list[float]:
    values = [value for _, value in record.curve("accuracy")[1]]
    return [max(values)] if values else []


def _failures(record: Record) -> int:
    return sum(row.outcome not in (*MODEL_OUTCOMES, "unavailable") for row in record.training)


def _waiting(group: Group) -> str:
    shares = [found for record in group.records if (found := waiting(record)) is not None]
    if len(shares) == 1:
        return share(shares[0])
    return f"{percent(median(shares))} (median)" if shares else NOTHING


def _numbers(groups: Sequence[Group], dotted: Sequence[Markup]) -> Markup:
    head = (
        "run",
        "",
        "rounds",
        "accuracy",
        "best",
        "loss",
        "time",
        "per round",
        "waiting",
        "failures",
    )
    rows = []
    for name, group in zip(dotted, groups, strict=True):
        records = group.records
        rows.append(
            (
                name,
                ", ".join(dict.fromkeys(record.state for record in records)),
                spread([len(record.rounds) for record in records]),
                spread([v for record in records for v in _last(record, "accuracy")], 3),
                spread([v for record in records for v in _best(record)], 3),
                spread([v for record in records for v in _last(record, "loss")], 3),
                spread([record.seconds for record in records], 0, " s"),
                spread([r.seconds / len(r.rounds) for r in records if r.rounds], 1, " s"),
                _waiting(group),
                spread([_failures(record) for record in records]),
            )
        )
    return table(head, rows, words=(1,))


def _times(groups: Sequence[Group]) -> Markup:
    accuracies = compared_accuracies([record for group in groups for record in group.records])
    if not accuracies:
        return text("No run has reached an accuracy that is worth comparing.")
    return table(
        ("accuracy", *(group.name for group in groups)),
        (
            (
                f"{accuracy:.2f}",
                *(spread([time_to(r, accuracy) for r in g.records], 0, " s") for g in groups),
            )
            for accuracy in accuracies
        ),
    )


def comparison_page(records: Sequence[Record]) -> str:
    """The page that compares runs."""
    groups = grouped(records)
    # Colours first; when they repeat, the shape of the marker tells lines apart.
    looks = [(colour, marker) for marker, colour in product(pictures.MARKERS, pictures.PALETTE)]
    looks = [looks[n % len(looks)] for n in range(len(groups))]
    dotted = [named(group.name, *look) for group, look in zip(groups, looks, strict=True)]
    of = "accuracy" if any(record.curve("accuracy")[1] for record in records) else "loss"
    sources = sorted({record.curve(of)[0] for record in records if record.curve(of)[1]})

    def chart(by: str) -> Markup | None:
        lines = [
            pictures.Line(*look, group.curve(of, by))
            for group, look in zip(groups, looks, strict=True)
        ]
        return pictures.compared(lines, by, of)

    several = len(groups) < len(records)
    differing = differences(groups)
    names = [group.name for group in groups]
    title = ", ".join(record.name for record in records)
    body = [
        Markup("<header><h1>{}</h1><p>{} runs compared</p></header>").format(
            " · ".join(names), len(records)
        ),
        section(
            "In numbers",
            text("Runs that differ in their seeds only are one line: median (range).")
            if several
            else None,
            _numbers(groups, dotted),
        ),
        section(
            "What the models learned",
            legend(dotted),
            pair(
                figure(
                    chart("seconds"),
                    f"{of.capitalize()} of the global model over time ({' or '.join(sources)}).",
                ),
                figure(chart("rounds"), "The same over rounds."),
            )
            or text("No run has reported an accuracy or a loss."),
        ),
        section("Time to an accuracy", _times(groups)),
        section(
            "Differences of the configurations",
            table(("setting", *names), ((key, *map(setting, values)) for key, values in differing))
            if differing
            else text("None: the runs have the same configuration."),
        ),
    ]
    return page(f"{title} - Flowerbed", body)
