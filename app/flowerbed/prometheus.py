"""Questions to the lab's Prometheus."""

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass

ADDRESS = "http://flowerbed-prometheus:9090"
"""Its address in the lab's network."""

MEMORY = 'max by (device) (max_over_time(container_memory_working_set_bytes{device!=""}[%s]))'
"""Bytes of each device, the most in a time. A range and no instant: a container that has been
replaced stays in an instant's answer for five minutes."""


class PrometheusError(RuntimeError):
    """There was no answer; the message says from where and why."""


@dataclass(frozen=True)
class Sample:
    """One series of an answer: its labels, and points of Unix seconds and value."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


def by_device(samples: Iterable[Sample]) -> dict[str, float]:
    """The one value of each device."""
    return {sample.labels["device"]: sample.points[0][1] for sample in samples}


class Prometheus:
    """A Prometheus by its address; values that are no numbers are left out of its answers.

    Raises:
        PrometheusError: from each question that is not answered.
    """

    def __init__(self, address: str = ADDRESS, timeout: float = 10.0) -> None:
        self._address = address
        self._timeout = timeout

    def _ask(self, path: str, **parameters: str | float) -> list[Sample]:
        url = f"{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            # Never a file: the address is the lab's own.
            with urllib.request.urlopen(url, timeout=self._timeout) as answer:  # noqa: S310
                result = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            reason = json.load(error).get("error", error.reason)
            raise PrometheusError(f"Prometheus at {self._address} refuses: {reason}") from None
        except (OSError, ValueError) as error:
            raise PrometheusError(
                f"Prometheus at {self._address} does not answer: {error}"
            ) from None
        samples = []
        for series in result:
            values = series["values"] if "values" in series else [series["value"]]
            points = [(float(at), float(value)) for at, value in values]
            points = [point for point in points if math.isfinite(point[1])]
            if points:
                samples.append(Sample(series["metric"], points))
        return samples

    def query(self, expression: str, at: float | None = None) -> list[Sample]:
        """The value of each series at a time in Unix seconds, by default now."""
        return self._ask("query", query=expression, **({} if at is None else {"time": at}))

    def query_range(self, expression: str, begin: float, end: float, step: float) -> list[Sample]:
        """The values of each series between two times, every `step` seconds."""
        return self._ask("query_range", query=expression, start=begin, end=end, step=step)
