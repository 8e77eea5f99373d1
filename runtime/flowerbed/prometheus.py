"""Queries to the lab's Prometheus."""

import contextlib
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
"""Query for the highest bytes of each device within a time range.

An instant query would return a replaced container for another five minutes."""


class PrometheusError(RuntimeError):
    """Prometheus has not answered a query; the message has its address and the reason."""


@dataclass(frozen=True)
class Sample:
    """One series of a result: its labels, and its points of Unix seconds and value."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


def by_device(samples: Iterable[Sample]) -> dict[str, float]:
    """The value of each device in the result of an instant query."""
    return {sample.labels["device"]: sample.points[0][1] for sample in samples}


class Prometheus:
    """A Prometheus server. Its results leave out values that are not finite.

    Args:
        address: URL of the server.
        timeout: seconds to wait for the result of a query.

    Raises:
        PrometheusError: from each query that fails.
    """

    def __init__(self, address: str = ADDRESS, timeout: float = 10.0) -> None:
        self._address = address
        self._timeout = timeout

    def _get(self, path: str, **parameters: str | float) -> list[Sample]:
        url = f"{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            # The address is the lab's own, never a file: URL.
            with urllib.request.urlopen(url, timeout=self._timeout) as response:  # noqa: S310
                result = json.load(response)["data"]["result"]
        except urllib.error.HTTPError as error:
            reason = error.reason
            with contextlib.suppress(ValueError):  # a proxy's error page is no JSON
                reason = json.load(error)["error"]
            raise PrometheusError(
                f"Prometheus at {self._address} refuses the query: {reason}"
            ) from None
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
        """Return the value of each series at a time in Unix seconds, by default now."""
        return self._get("query", query=expression, **({} if at is None else {"time": at}))

    def query_range(self, expression: str, begin: float, end: float, step: float) -> list[Sample]:
        """Return the values of each series between two times, every `step` seconds."""
        return self._get("query_range", query=expression, start=begin, end=end, step=step)
