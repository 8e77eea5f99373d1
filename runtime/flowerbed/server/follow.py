"""The status of a run, for a program that follows it.

    python -m flowerbed.server.follow [RUN] [--after COUNT --begun ROUND --timeout SECONDS]

prints the status of a run (by default the newest) as JSON, with the time now and the bytes of
memory that each device holds, as far as Prometheus knows. With --timeout it waits first, until more
than COUNT rounds can be shown, until the round of --begun has begun, or until the run is over.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from flowerbed.prometheus import MEMORY, Prometheus, PrometheusError, by_device
from flowerbed.results import FINAL_STATES, RESULTS, read_status

_NOT_YET = {
    "state": "starting",
    "message": "",
    "round": 0,
    "settled": 0,
    "begun": 0,
    "rounds": 0,
    "accuracy": None,
    "loss": None,
    "central_accuracy": None,
    "central_loss": None,
    "data": {"dataset": "", "partitioner": ""},
    "devices": {},
    "history": [],
}
_WINDOW = "30s"
_PATIENCE = 2.0


def wait(
    run: str | None,
    after: int,
    timeout: float,
    root: Path = RESULTS,
    begun: float = float("inf"),
) -> dict[str, Any]:
    """Wait until more than `after` rounds are settled, the run is over, or the time is up.

    Args:
        run: name of the run; None: the newest.
        after: number of rounds that the caller has shown already.
        timeout: seconds.
        begun: return also when this round has begun.

    Returns:
        The status of the run.
    """
    deadline = time.monotonic() + timeout
    while True:
        status = read_status(root, run) or dict(_NOT_YET, run=run)
        over = status["state"] in FINAL_STATES
        enough = status["settled"] > after or status["begun"] >= begun
        if over or enough or time.monotonic() >= deadline:
            return status
        time.sleep(0.5)


def memory(prometheus: Prometheus) -> dict[str, float]:
    """Bytes that each device holds; empty where Prometheus does not answer."""
    try:
        return by_device(prometheus.query(MEMORY % _WINDOW))
    except PrometheusError:
        return {}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Wait for a round and print the run's status.")
    parser.add_argument("run", nargs="?")
    parser.add_argument("--after", type=int, default=-1)
    parser.add_argument("--begun", type=int, default=float("inf"))
    parser.add_argument("--timeout", type=float, default=0)
    arguments = parser.parse_args()
    status = wait(arguments.run, arguments.after, arguments.timeout, begun=arguments.begun)
    now = {"now": time.time(), "memory": memory(Prometheus(timeout=_PATIENCE))}
    print(json.dumps(status | now))


if __name__ == "__main__":
    main()
