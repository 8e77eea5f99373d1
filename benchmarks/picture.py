"""The pictures of the benchmarks, as SVG beside their figures."""

from collections.abc import Mapping, Sequence
from statistics import median

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import RESULTS

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "flowerbed", "font.size": 10, "axes.spines.top": False})
from matplotlib import pyplot as plt  # noqa: E402 - the backend comes first

COLOR = "#3b6ea5"


def _save(figure: Figure, name: str) -> None:
    figure.savefig(RESULTS / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.spines["right"].set_visible(False)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))  # beside no line


def bars(name: str, values: Mapping[str, Sequence[float]], label: str) -> None:
    """A bar for each median, a dot for each value."""
    figure, axes = plt.subplots(figsize=(7, 0.5 + 0.5 * len(values)))
    titles = [title.replace("`", "") for title in values]
    axes.barh(titles, [median(v) for v in values.values()], color=COLOR, alpha=0.6)
    for place, points in enumerate(values.values()):
        axes.plot(points, [place] * len(points), ".", color="black", markersize=4)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.spines["right"].set_visible(False)
    _save(figure, name)


def lines(
    name: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str
) -> None:
    """A line with dots for each curve of x and y values."""
    figure, axes = plt.subplots(figsize=(7, 3.5))
    for title, (xs, ys) in curves.items():
        axes.plot(xs, ys, "o-", label=title, markersize=4)
    _label(axes, x, y)
    _save(figure, name)


def ribbons(
    name: str,
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    end: float,
    x: str,
    y: str,
) -> None:
    """The median of each group of curves in a ribbon from least to greatest, up to `end`."""
    figure, axes = plt.subplots(figsize=(7, 4))
    grid = np.linspace(0, end, 200)
    for title, group in curves.items():
        values = np.array([np.interp(grid, *np.array(points).T) for points in group])
        (line,) = axes.plot(grid, np.median(values, axis=0), label=title)
        axes.fill_between(grid, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)
    _label(axes, x, y)
    _save(figure, name)
