"""What devices used of their machines during a run, as the lab's Prometheus has recorded it."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from flowerbed.prometheus import Prometheus, PrometheusError, Sample
from flowerbed.report.record import Record

Points = list[tuple[float, float]]
"""Seconds since the first round began, and a value."""

_POINTS = 200
_SCRAPE = 5.0
"""Seconds between two points at least: there are no more in Prometheus."""
_RATE = "30s"

_CORES = 'sum by (device) (increase(container_cpu_usage_seconds_total{device!=""}[%(range)s]))'
_THROTTLED = (
    'sum by (device) (increase(container_cpu_cfs_throttled_periods_total{device!=""}[%(range)s]))'
    ' / sum by (device) (increase(container_cpu_cfs_periods_total{device!=""}[%(range)s]))'
)
_PEAK = 'max by (device) (max_over_time(container_memory_working_set_bytes{device!=""}[%(range)s]))'
_CORES_NOW = f'sum by (device) (rate(container_cpu_usage_seconds_total{{device!=""}}[{_RATE}]))'
_MEMORY_NOW = 'sum by (device) (container_memory_working_set_bytes{device!=""})'


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


def _first_values(samples: Iterable[Sample]) -> dict[str, float]:
    return {sample.labels["device"]: sample.points[0][1] for sample in samples}


def read_usage(prometheus: Prometheus, record: Record) -> tuple[dict[str, Usage], str]:
    """The usage of the run's devices, and why there is none where there is none."""
    if not record.rounds:
        return {}, "The run has no rounds."
    begin, seconds = record.begin, max(record.seconds, 2 * _SCRAPE)
    found: defaultdict[str, Usage] = defaultdict(Usage)
    span = {"range": f"{seconds:.0f}s"}
    try:
        for device, used in _first_values(prometheus.query(_CORES % span, begin + seconds)).items():
            found[device].cores = used / seconds
        for device, share in _first_values(
            prometheus.query(_THROTTLED % span, begin + seconds)
        ).items():
            found[device].throttled = share
        for device, peak in _first_values(prometheus.query(_PEAK % span, begin + seconds)).items():
            found[device].memory_peak = peak
        step = max(_SCRAPE, seconds / _POINTS)
        for name, expression in (("cores", _CORES_NOW), ("memory", _MEMORY_NOW)):
            for sample in prometheus.query_range(expression, begin, begin + seconds, step):
                points = [(at - begin, value) for at, value in sample.points]
                setattr(found[sample.labels["device"]], f"{name}_over_time", points)
    except PrometheusError as error:
        return {}, str(error)
    known = {name: found[name] for name in record.names if name in found}
    return known, "" if known else "Prometheus has nothing from the time of this run."
