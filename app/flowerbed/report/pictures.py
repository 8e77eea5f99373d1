"""The pictures of a report, as SVG that takes its colours and letters from the page.

Matplotlib draws; its colours are then replaced by the page's variables, so that a picture is as
readable on a dark page as on a light one. Text stays text.
"""

import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flowerbed.report.findings import busy_seconds
from flowerbed.report.record import Record
from flowerbed.report.usage import Points, Usage, size

INK, FAINT, LINE, BAD = "#1c2024", "#60646c", "#d9d9e0", "#c62a2f"
PALETTE = (
    "#0070b8",
    "#d9730d",
    "#12805c",
    "#a144af",
    "#a88305",
    "#c9356e",
    "#008fa8",
    "#6e56cf",
)
"""Colours that stay apart for most colour-blind people, too, in the order of the devices."""
THEME = {INK: "ink", FAINT: "faint", LINE: "line", BAD: "bad"} | {
    colour: f"c{number}" for number, colour in enumerate(PALETTE)
}
"""Colour as it is drawn: the page's variable."""

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flowerbed",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "xtick.labelcolor": FAINT,
    "ytick.color": LINE,
    "ytick.labelcolor": FAINT,
    "ytick.left": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
}
_HALF = (4.6, 2.7)
"""Width and height in inches of a picture that takes half of a wide page, or a whole phone."""
_LARGEST = 1.2
_CELLS = 200
"""Cells of the picture of the data up to which each has its number written in it."""

_LOOKS: dict[str, tuple[float, dict[str, Any]]] = {
    "transport": (0.6, {"alpha": 0.55}),
    "queue": (0.6, {}),
    "evaluate": (0.6, {"alpha": 0.5}),
    "train": (0.6, {}),
    "wait": (0.06, {}),
    "none": (0.6, {"facecolor": "none", "edgecolor": BAD, "linewidth": 0.8}),
}
"""What the timeline shows: height in its lane, and look."""

Colours = Mapping[str, str]


def keys_of(record: Record) -> dict[str, str]:
    """What a device has its colour by: its name, or its class where there are many devices."""
    few = len(record.names) <= len(PALETTE)
    return {name: name if few else record.classes[name] for name in record.names}


def colours_of(record: Record) -> dict[str, str]:
    """A colour for each device, the same in every picture."""
    keys = keys_of(record)
    order = {key: number for number, key in enumerate(sorted(set(keys.values())))}
    return {name: PALETTE[order[key] % len(PALETTE)] for name, key in keys.items()}


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as an element of a page; `title` is what a screen reader says of it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r' id="(?:figure|axes|patch|text|line2d|xtick|ytick|matplotlib)[^"]*"', "", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"#[0-9a-f]{6}", lambda found: _variable(found[0]), text)
    # Little more than its natural width, so that letters are of a size in all pictures.
    widest = figure.get_figwidth() * 96 * _LARGEST
    label = Markup('<svg role="img" aria-label="{}" style="max-width: {:.0f}px"').format(
        title, widest
    )
    return label + Markup(text.removeprefix("<svg"))  # noqa: S704 - matplotlib has escaped it


def _variable(colour: str) -> str:
    return f"var(--{THEME[colour]})" if colour in THEME else colour


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _whole_rounds(axes: Axes, last: int) -> None:
    axes.set_xlim(0, last + 0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("rounds finished")


def _legend(axes: Axes, columns: int = 3) -> None:
    axes.figure.legend(loc="outside upper left", ncols=columns, handlelength=1.2)


def course(record: Record, colours: Colours, of: str) -> Markup:
    """Accuracy or loss after each round: the global model's, and as devices measured it.

    Args:
        of: accuracy or loss.
    """
    figure, axes = _axes(*_HALF)
    for name in record.names:
        # A device measures the model that it receives: that of the round before.
        points = [
            (row.round - 1, value)
            for row in record.rows_of(name)
            if (value := getattr(row, of)) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), color=colours[name], linewidth=1.1)
    rounds = [row.round for row in record.rounds]
    values = [getattr(row, f"central_{of}") for row in record.rounds]
    axes.plot(
        rounds, values, color=INK, linewidth=2.4, marker="o", markersize=4, label="test split"
    )
    own = [(row.round, value) for row in record.rounds if (value := getattr(row, of)) is not None]
    if own:
        axes.plot(
            *zip(*own, strict=True), color=INK, linestyle=(0, (4, 2)), label="mean over the devices"
        )
    _whole_rounds(axes, rounds[-1])
    if of == "accuracy":
        axes.set_ylim(bottom=0)
    axes.set_ylabel(of)
    _legend(axes)
    return _svg(figure, f"{of.capitalize()} after each round")


def _spans(record: Record) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Begin and length of everything that each lane of the timeline shows, by what it was."""
    lanes: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: {look: [] for look in _LOOKS} for name in [*record.names, "server"]
    }
    lasted = {}
    for row in record.rounds:
        at = row.started - record.begin
        lasted[row.round] = row.devices_seconds
        replied = at + row.configure_seconds + row.devices_seconds
        server = [(at, row.configure_seconds), (replied, at + row.seconds - replied)]
        lanes["server"]["train"] += server
    for entry in record.devices:
        lane, at = lanes[entry.device], entry.started - record.begin
        if not busy_seconds(entry):
            lane["none"].append((at, lasted[entry.round]))
            continue
        for look, seconds in (
            ("transport", entry.receive_seconds),
            ("queue", entry.queue_seconds),
            ("evaluate", entry.evaluate_seconds),
            ("train", entry.train_seconds),
            ("transport", entry.send_seconds),
            ("wait", entry.wait_seconds),
        ):
            lane[look].append((at, seconds))
            at += seconds
    return lanes


def timeline(record: Record, colours: Colours) -> Markup:
    """Who did what when: a lane a device, and one for the server."""
    lanes = _spans(record)
    names = list(lanes)
    width = max(9.4, 0.7 * len(record.rounds))
    figure, axes = _axes(width, 0.75 + 0.34 * len(names))
    for row in record.rounds:
        start = row.started - record.begin
        axes.axvline(start, color=LINE, linewidth=1)
        axes.annotate(
            str(row.round),
            (start, -0.85),
            xytext=(3, 0),
            textcoords="offset points",
            color=FAINT,
            va="center",
        )
    for number, (name, spans) in enumerate(lanes.items()):
        for look, parts in spans.items():
            height, style = _LOOKS[look]
            colour = colours.get(name, INK) if look in ("evaluate", "train") else FAINT
            where = (number - height / 2, height)
            looks: dict[str, Any] = {"facecolor": colour, "linewidth": 0} | style
            axes.broken_barh(parts, where, **looks)
    for entry in record.devices:
        busy = busy_seconds(entry)
        if not busy:
            begin, seconds = lanes[entry.device]["none"].pop(0)
        elif entry.outcome == "late":
            begin, seconds = entry.started - record.begin, busy
        else:
            continue
        outcome = textwrap.fill(entry.outcome.replace("_", " "), 8)
        middle = (begin + seconds / 2, names.index(entry.device))
        axes.text(*middle, outcome, color=BAD, ha="center", va="center", fontsize=8)
    for fault in record.faults:
        lane = "server" if fault.target == "superlink" else fault.target
        if lane in names:
            mark = "^" if fault.fault == "rejoin" else "v"
            at = (fault.time - record.begin, names.index(lane) - 0.4)
            axes.plot(*at, marker=mark, color=BAD, markersize=4, clip_on=False)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.5, -1.2)
    axes.set_xlim(0, record.seconds)
    axes.grid(visible=False)
    axes.set_xlabel("seconds since the first round began; above: rounds")
    return _svg(figure, "Timeline of the rounds by device")


def labels(record: Record) -> Markup:
    """Who holds how much of what: a row a device, a column a label."""
    names = sorted(record.labels)
    counts = np.array([record.labels[name] for name in names], float)
    figure, axes = _axes(max(_HALF[0], 1.2 + 0.36 * counts.shape[1]), 0.8 + 0.3 * len(names))
    # The page's colour at an opacity: as good on dark as on light.
    strength = counts / max(counts.max(), 1)
    for (row, column), share in np.ndenumerate(strength):
        if share:
            axes.barh(
                row, 1, left=column - 0.5, height=1, color=PALETTE[0], alpha=0.08 + 0.62 * share
            )
    if counts.size <= _CELLS:
        for (row, column), count in np.ndenumerate(counts):
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=INK, fontsize=8)
    axes.set_xlim(-0.5, counts.shape[1] - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)
    if counts.shape[1] <= _CELLS // 10:
        axes.set_xticks(range(counts.shape[1]))
    axes.set_xlabel("label")
    axes.grid(visible=False)
    return _svg(figure, "Training images by device and label")


def _over_time(lines: Iterable[tuple[str, Points]], record: Record, what: str) -> Markup:
    figure, axes = _axes(*_HALF)
    for colour, points in lines:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.3)
    for row in record.rounds:
        axes.axvline(row.started - record.begin, color=LINE, linewidth=1)
    axes.axhline(100, color=BAD, linewidth=1, linestyle=(0, (2, 2)))
    axes.set_ylim(0, 115)
    axes.set_xlim(0, record.seconds)
    axes.set_xlabel("seconds since the first round began")
    axes.set_ylabel(f"{what}, % of the limit")
    axes.grid(visible=False, axis="x")
    return _svg(figure, f"{what} over time")


def cores(record: Record, usage: Mapping[str, Usage], colours: Colours) -> Markup | None:
    """Cores in use against the quota; None where no device has one."""
    lines = []
    for name, used in usage.items():
        quota = record.settings.get(name, {}).get("cpus")
        if quota and used.cores_over_time:
            lines.append((colours[name], [(at, 100 * v / quota) for at, v in used.cores_over_time]))
    return _over_time(lines, record, "cores") if lines else None


def memory(record: Record, usage: Mapping[str, Usage], colours: Colours) -> Markup | None:
    """Working set against the limit; None where no device has one."""
    lines = []
    for name, used in usage.items():
        limit = size(record.settings.get(name, {}).get("memory"))
        if limit and used.memory_over_time:
            points = [(at, 100 * value / limit) for at, value in used.memory_over_time]
            lines.append((colours[name], points))
    return _over_time(lines, record, "memory") if lines else None


def compared(records: Sequence[Record], by: str) -> Markup:
    """Central accuracy of several runs.

    Args:
        by: what is on the horizontal axis, rounds or seconds.
    """
    figure, axes = _axes(*_HALF)
    for number, record in enumerate(records):
        points = [
            (
                row.round if by == "rounds" else row.started + row.seconds - record.begin,
                row.central_accuracy,
            )
            for row in record.rounds
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=PALETTE[number % len(PALETTE)],
                marker="o",
                markersize=3.5,
                label=record.name,
            )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("accuracy on the test split")
    if by == "rounds":
        _whole_rounds(axes, max((len(record.rounds) for record in records), default=1))
    else:
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds since the first round began")
    return _svg(figure, f"Accuracy by {by}")


mpl.rcParams.update(_STYLE)
