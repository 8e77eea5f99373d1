"""What devices used of their machines during a run, as the lab's Prometheus has recorded it."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from flowerbed.prometheus import MEMORY, Prometheus, PrometheusError, by_device
from flowerbed.report.record import Record

Points = list[tuple[float, float]]
"""Seconds since the first round began, and a value."""

_POINTS = 200
_SCRAPE = 5.0
"""Seconds between two points at least: there are no more in Prometheus."""
_NOW = "30s"
"""What a point looks back on."""

_CORES = 'sum by (device) (increase(container_cpu_usage_seconds_total{device!=""}[%s]))'
_THROTTLED = (
    'sum by (device) (increase(container_cpu_cfs_throttled_periods_total{device!=""}[%s]))'
    ' / sum by (device) (increase(container_cpu_cfs_periods_total{device!=""}[%s]))'
)
_CORES_NOW = f'sum by (device) (rate(container_cpu_usage_seconds_total{{device!=""}}[{_NOW}]))'
_MEMORY_NOW = MEMORY % _NOW


@dataclass
class Usage:
    """One device during the rounds of a run; None is what Prometheus does not know."""

    cores: float | None = None
    """Mean."""
    throttled: float | None = None
    """Share of the scheduler's periods in which it wanted more than its quota."""
    memory_peak: float | None = None
    """Highest working set, bytes."""
    cores_over_time: Points = field(default_factory=list)
    memory_over_time: Points = field(default_factory=list)


def size(text: str | None) -> float | None:
    """Bytes of a size as Docker writes it, such as 512m; None: no limit."""
    if not text:
        return None
    exponent = "bkmgt".find(text[-1].lower())
    return float(text) if exponent < 0 else float(text[:-1]) * 1024**exponent


def read_usage(prometheus: Prometheus, record: Record) -> tuple[dict[str, Usage], str]:
    """The usage of the run's devices, and why there is none where there is none."""
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
    return known, "" if known else "Prometheus has nothing from the time of this run."
