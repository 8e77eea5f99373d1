"""What devices used of their processors and memory during a run, by the lab's Prometheus."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from flowerbed.prometheus import MEMORY, Prometheus, PrometheusError, by_device
from flowerbed.report.record import Record

Points = list[tuple[float, float]]
"""Seconds since the run's first message, and a value."""

_POINTS = 200
_SCRAPE = 5.0
"""Least seconds between two points: Prometheus scrapes no more often."""
_NOW = "30s"
"""Time range that a point is computed over."""

_CORES = 'sum by (device) (increase(container_cpu_usage_seconds_total{device!=""}[%s]))'
_THROTTLED = (
    'sum by (device) (increase(container_cpu_cfs_throttled_periods_total{device!=""}[%s]))'
    ' / sum by (device) (increase(container_cpu_cfs_periods_total{device!=""}[%s]))'
)
_CORES_NOW = f'sum by (device) (rate(container_cpu_usage_seconds_total{{device!=""}}[{_NOW}]))'
_MEMORY_NOW = MEMORY % _NOW


@dataclass
class Usage:
    """One device during a run; None: Prometheus has no value."""

    cores: float | None = None
    """Mean."""
    throttled: float | None = None
    """Share of the scheduler's periods in which it had used up its quota."""
    memory_peak: float | None = None
    """Highest working set, bytes."""
    cores_over_time: Points = field(default_factory=list)
    memory_over_time: Points = field(default_factory=list)


def size(text: str | None) -> float | None:
    """Bytes of a size in Docker's notation, such as 512m; None: no limit."""
    if not text:
        return None
    exponent = "bkmgt".find(text[-1].lower())
    return float(text) if exponent < 0 else float(text[:-1]) * 1024**exponent


def read_usage(prometheus: Prometheus, record: Record) -> tuple[dict[str, Usage], str]:
    """Read the usage of the run's devices.

    Returns:
        The usage by device, and the reason where it is empty.
    """
    begin, seconds = record.begin, max(record.seconds, 2 * _SCRAPE)
    end, step = begin + seconds, max(_SCRAPE, seconds / _POINTS)
    found: defaultdict[str, Usage] = defaultdict(Usage)

    def over_all(expression: str) -> dict[str, float]:
        return by_device(prometheus.query(expression.replace("%s", f"{seconds:.0f}s"), end))

    def over_time(expression: str) -> Iterator[tuple[str, Points]]:
        for sample in prometheus.query_range(expression, begin, end, step):
            yield sample.labels["device"], [(at - begin, value) for at, value in sample.points]

    try:
        for device, used in over_all(_CORES).items():
            found[device].cores = used / seconds
        for device, share in over_all(_THROTTLED).items():
            found[device].throttled = share
        for device, peak in over_all(MEMORY).items():
            found[device].memory_peak = peak
        for device, points in over_time(_CORES_NOW):
            found[device].cores_over_time = points
        for device, points in over_time(_MEMORY_NOW):
            found[device].memory_over_time = points
    except PrometheusError as error:
        return {}, str(error)
    known = {name: found[name] for name in record.names if name in found}
    return known, "" if known else "Prometheus has no data from the time of this run."
