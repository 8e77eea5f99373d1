"""The charts of a report, as SVG that takes its colours and fonts from the page.

Matplotlib draws them; its colours are then replaced by variables of the page, so that a chart is as
readable on a dark page as on a light one. Text stays text. What a chart draws is limited: devices,
rounds and points beyond the limits are merged or left out, so that the page of a large run opens.
"""

import io
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flowerbed.report.record import CENTRAL, DEVICES, Record, busy_seconds, is_training
from flowerbed.report.usage import Points, Usage, size
from flowerbed.results import DeviceRow

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
"""Colours of the devices in their order, distinguishable with most kinds of colour blindness."""
MARKERS = ("o", "s", "D", "^")
"""Shapes that distinguish lines of the same colour; `page.css` has the same for the legends."""
THEME = {INK: "ink", FAINT: "faint", LINE: "line", BAD: "bad"} | {
    colour: f"c{number}" for number, colour in enumerate(PALETTE)
}
"""Variable of the page for each colour that is drawn."""

MOST_DEVICES = 40
"""Devices that a chart draws one by one."""
_MOST_BLOCKS, _MOST_CELLS = 60, 1600
"""Blocks of rounds in the timeline, and blocks times devices."""

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
"""Width and height in inches of a chart that takes half of a wide page, or a whole phone."""
_WIDEST = 42.0
"""Inches."""
_LARGEST = 1.2
_WRITTEN_CELLS = 200
"""Cells of the chart of labels up to which each shows its number."""
_ROUNDS_MARKED = 100
"""Rounds up to which charts over time mark each start of a round."""

_LOOKS: dict[str, tuple[float, dict[str, Any]]] = {
    "transit": (0.6, {"alpha": 0.55}),
    "queue": (0.6, {}),
    "evaluate": (0.6, {"alpha": 0.5}),
    "train": (0.6, {}),
    "wait": (0.06, {}),
    "none": (0.6, {"facecolor": "none", "edgecolor": BAD, "linewidth": 0.8}),
}
"""Bars of the timeline: height in a lane, and look."""

Colours = Mapping[str, str]


def keys_of(record: Record) -> dict[str, str]:
    """What the colour of each device stands for: its name, or its class if there are many."""
    few = len(record.names) <= len(PALETTE)
    return {name: name if few else record.classes[name] for name in record.names}


def colours_of(record: Record) -> dict[str, str]:
    """A colour for each device, the same in every chart."""
    keys = keys_of(record)
    order = {key: number for number, key in enumerate(sorted(set(keys.values())))}
    return {name: PALETTE[order[key] % len(PALETTE)] for name, key in keys.items()}


def drawn_devices(record: Record) -> list[str]:
    """The devices that charts draw one by one: all, or those that say most of a large run.

    These are the devices with most failures, then those that were busy longest.
    """
    if len(record.names) <= MOST_DEVICES:
        return record.names

    def weight(name: str) -> tuple[int, float]:
        rows = [row for row in record.rows_of(name) if is_training(row)]
        failures = sum(row.outcome not in ("completed", "partial", "unavailable") for row in rows)
        return -failures, -sum(row.seconds for row in rows)

    return sorted(sorted(record.names, key=weight)[:MOST_DEVICES])


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as an element of a page; screen readers read `title`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    # Ids that nothing refers to would occur once in each chart of a page.
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"#[0-9a-f]{6}", lambda found: _variable(found[0]), text)
    # Little more than its natural width, so that letters have a similar size in all charts.
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
    axes.set_xlabel("finished rounds")


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside upper left", ncols=2, handlelength=1.2)


# --- learning ----------------------------------------------------------------------------------


def course(record: Record, colours: Colours, of: str) -> Markup | None:
    """Accuracy or loss of the global model after each round; None where nothing is known.

    Args:
        of: accuracy or loss.
    """
    figure, axes = _axes(*_HALF)
    by_device = {name: record.measured(name, of) for name in record.names}
    if len(record.names) <= MOST_DEVICES:
        for name, points in by_device.items():
            if points:
                axes.plot(*zip(*points, strict=True), color=colours[name], linewidth=1.1)
    else:
        _draw_band(axes, by_device.values())
    looks: dict[str, dict[str, Any]] = {
        f"central_{of}": {"linewidth": 2.4, "marker": "o", "markersize": 4, "label": CENTRAL},
        of: {"linestyle": (0, (4, 2)), "label": DEVICES},
    }
    if len(record.rounds) > _ROUNDS_MARKED:
        looks[f"central_{of}"].pop("marker")
    for column, look in looks.items():
        values = [(row.round, getattr(row, column)) for row in record.rounds]
        known = [(n, value) for n, value in values if value is not None and math.isfinite(value)]
        if known:
            single = {"marker": "o", "markersize": 4} if len(known) == 1 else {}
            axes.plot(*zip(*known, strict=True), color=INK, **(look | single))
    if not axes.has_data():
        return None
    _whole_rounds(axes, record.rounds[-1].round)
    if of == "accuracy":
        axes.set_ylim(bottom=0)
    axes.set_ylabel(of)
    _legend(axes)
    return _svg(figure, f"{of.capitalize()} after each round")


def _draw_band(axes: Axes, devices: Iterable[Sequence[tuple[int, float]]]) -> None:
    """Draw where the middle 80% of many devices are."""
    at: defaultdict[int, list[float]] = defaultdict(list)
    for points in devices:
        for number, value in points:
            at[number].append(value)
    if at:
        numbers = sorted(at)
        low, high = np.array([np.percentile(at[n], (10, 90)) for n in numbers]).T
        axes.fill_between(
            numbers, low, high, color=PALETTE[0], alpha=0.3, linewidth=0, label="80% of devices"
        )


# --- timeline ----------------------------------------------------------------------------------


@dataclass
class _Lane:
    """What the timeline shows of a device or the server: bars by look, and texts."""

    bars: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {look: [] for look in _LOOKS}
    )
    """Start and length in seconds."""
    texts: list[tuple[float, str]] = field(default_factory=list)


def block_size(rounds: int, devices: int) -> int:
    """Rounds that the timeline merges into one block, so that it stays readable."""
    blocks = min(_MOST_BLOCKS, _MOST_CELLS // max(devices, 1))
    return max(1, math.ceil(rounds / max(blocks, 1)))


def _parts_of(row: DeviceRow) -> list[tuple[str, float]]:
    """The parts of a message's time in their order."""
    if not busy_seconds(row):
        return [("none", row.seconds), ("wait", row.wait_seconds)]
    return [
        ("transit", row.receive_seconds),
        ("queue", row.queue_seconds),
        ("evaluate", row.evaluate_seconds),
        ("train", row.train_seconds),
        ("transit", row.send_seconds),
        ("wait", row.wait_seconds),
    ]


def _device_lane(record: Record, name: str, size: int) -> _Lane:
    """The messages of a device; in a block of rounds, equal parts are drawn as one bar."""
    lane = _Lane()
    lasted = {row.round: row.devices_seconds for row in record.rounds}
    blocks: defaultdict[int, list[DeviceRow]] = defaultdict(list)
    for number, row in enumerate(record.rows_of(name)):
        blocks[number if size == 1 else (row.round - 1) // size].append(row)
    for rows in blocks.values():
        at = min(row.started for row in rows) - record.begin
        spent: defaultdict[str, float] = defaultdict(float)
        for row in rows:
            for look, seconds in _parts_of(row):
                if size > 1:
                    spent[look] += seconds
                    continue
                # A device that could not be asked is missing for the whole round.
                length = seconds or (lasted.get(row.round, 0.0) if look == "none" else 0.0)
                if length:
                    lane.bars[look].append((at, length))
                at += length
        for look in _LOOKS:
            if spent[look]:
                lane.bars[look].append((at, spent[look]))
                at += spent[look]
        if size == 1 and rows[0].outcome not in ("completed", "partial"):
            (row,) = rows
            length = row.seconds or lasted.get(row.round, 0.0)
            middle = row.started - record.begin + length / 2
            lane.texts.append((middle, row.outcome.replace("_", " ")))
    return lane


def _server_lane(record: Record) -> _Lane:
    lane = _Lane()
    for row in record.rounds:
        at, end = row.started - record.begin, record.ended(row)
        replied = at + row.configure_seconds + row.devices_seconds
        parts = [
            (at, row.configure_seconds),
            (replied, row.aggregate_seconds),
            (end - row.evaluate_seconds, row.evaluate_seconds),
        ]
        lane.bars["train"] += [part for part in parts if part[1]]
    return lane


def timeline(record: Record, colours: Colours) -> Markup:
    """What each device did when: a lane for each device, and one for the server."""
    names = drawn_devices(record)
    size = block_size(len(record.rounds), len(names))
    lanes = {name: _device_lane(record, name, size) for name in names}
    lanes["server"] = _server_lane(record)
    names = list(lanes)
    starts = record.rounds[::size]
    width = min(_WIDEST, max(9.4, 0.7 * len(starts)))
    figure, axes = _axes(width, 0.75 + 0.34 * len(names))
    for row in starts:
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
    for number, (name, lane) in enumerate(lanes.items()):
        for look, bars in lane.bars.items():
            height, style = _LOOKS[look]
            colour = colours.get(name, INK) if look in ("evaluate", "train") else FAINT
            looks: dict[str, Any] = {"facecolor": colour, "linewidth": 0} | style
            if bars:
                axes.broken_barh(bars, (number - height / 2, height), **looks)
        for middle, outcome in lane.texts:
            axes.text(
                middle,
                number,
                textwrap.fill(outcome, 8),
                color=BAD,
                ha="center",
                va="center",
                fontsize=8,
            )
    for fault in record.faults:
        lane_name = "server" if fault.target == "superlink" else fault.target
        if lane_name in lanes:
            mark = "^" if fault.fault == "rejoin" else "v"
            at = (fault.time - record.begin, names.index(lane_name) - 0.4)
            axes.plot(*at, marker=mark, color=BAD, markersize=4, clip_on=False)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.5, -1.2)
    axes.set_xlim(0, record.seconds)
    axes.grid(visible=False)
    axes.set_xlabel("seconds since the run's first message; above the lanes: rounds")
    return _svg(figure, "Timeline of the rounds by device")


# --- data and limits ---------------------------------------------------------------------------


def labels(record: Record) -> Markup:
    """Training examples by device and label: a row for each device, a column for each label."""
    names = [name for name in drawn_devices(record) if name in record.labels]
    columns = max(len(record.labels[name]) for name in names)
    held = [record.labels[name] for name in names]
    counts = np.array([row + [0] * (columns - len(row)) for row in held], float)
    width = min(_WIDEST, max(_HALF[0], 1.2 + 0.36 * columns))
    figure, axes = _axes(width, 0.8 + 0.3 * len(names))
    # The page's colour, more or less opaque: as readable on a dark page as on a light one.
    strength = counts / max(counts.max(), 1)
    cells = [(row, column) for (row, column), share in np.ndenumerate(strength) if share]
    corners = [
        [(c - 0.5, r - 0.5), (c + 0.5, r - 0.5), (c + 0.5, r + 0.5), (c - 0.5, r + 0.5)]
        for r, c in cells
    ]
    fills = [to_rgba(PALETTE[0], 0.08 + 0.62 * strength[cell]) for cell in cells]
    axes.add_collection(PolyCollection(corners, facecolors=fills, linewidths=0))
    if counts.size <= _WRITTEN_CELLS:
        for (row, column), count in np.ndenumerate(counts):
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=INK, fontsize=8)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)
    if columns <= _WRITTEN_CELLS // 10:
        axes.set_xticks(range(columns))
    axes.set_xlabel("label")
    axes.grid(visible=False)
    return _svg(figure, "Training examples by device and label")


def _over_time(lines: Iterable[tuple[str, Points]], record: Record, what: str) -> Markup:
    figure, axes = _axes(*_HALF)
    for colour, points in lines:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.3)
    for row in record.rounds if len(record.rounds) <= _ROUNDS_MARKED else ():
        axes.axvline(row.started - record.begin, color=LINE, linewidth=1)
    axes.axhline(100, color=BAD, linewidth=1, linestyle=(0, (2, 2)))
    axes.set_ylim(0, 115)
    axes.set_xlim(0, record.seconds)
    axes.set_xlabel("seconds since the run's first message")
    axes.set_ylabel(f"{what}, % of the limit")
    axes.grid(visible=False, axis="x")
    return _svg(figure, f"{what} over time")


def cores(record: Record, usage: Mapping[str, Usage], colours: Colours) -> Markup | None:
    """Cores in use relative to the quota; None where no device has a quota."""
    lines = []
    for name in filter(usage.__contains__, drawn_devices(record)):
        quota, points = record.settings.get(name, {}).get("cpus"), usage[name].cores_over_time
        if quota and points:
            lines.append((colours[name], [(at, 100 * used / quota) for at, used in points]))
    return _over_time(lines, record, "cores") if lines else None


def memory(record: Record, usage: Mapping[str, Usage], colours: Colours) -> Markup | None:
    """Working set relative to the limit; None where no device has a limit."""
    lines = []
    for name in filter(usage.__contains__, drawn_devices(record)):
        limit = size(record.settings.get(name, {}).get("memory"))
        points = usage[name].memory_over_time
        if limit and points:
            lines.append((colours[name], [(at, 100 * used / limit) for at, used in points]))
    return _over_time(lines, record, "memory") if lines else None


# --- comparison --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of a comparison: the median over runs at each round, and their range."""

    colour: str
    marker: str
    points: Sequence[tuple[float, float, float, float]]
    """Horizontal position, median, least and greatest value."""


def compared(lines: Sequence[Line], by: str, of: str) -> Markup | None:
    """Accuracy or loss of several runs.

    Args:
        by: the horizontal axis, rounds or seconds.
        of: accuracy or loss.
    """
    figure, axes = _axes(*_HALF)
    for line in lines:
        if not line.points:
            continue
        at, middle, low, high = zip(*line.points, strict=True)
        look: dict[str, Any] = {"marker": line.marker, "markersize": 3.5}
        if len(at) > _ROUNDS_MARKED:
            look["markevery"] = len(at) // 10
        axes.plot(at, middle, color=line.colour, **look)
        if low != high:
            axes.fill_between(at, low, high, color=line.colour, alpha=0.2, linewidth=0)
    if not axes.has_data():
        return None
    if of == "accuracy":
        axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{of} of the global model")
    if by == "rounds":
        _whole_rounds(axes, max(int(at) for line in lines for at, *_ in line.points))
    else:
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds since the run's first message")
    return _svg(figure, f"{of.capitalize()} by {by}")


mpl.rcParams.update(_STYLE)
