"""A run as it goes on, for those who watch it.

    python -m flowerbed.follow [RUN] [--after ROUND --begun ROUND --timeout SECONDS]

prints the status of a run (by default the newest) as JSON, with the time now and the memory that
its devices hold, in bytes, as far as Prometheus knows; with --after it first waits until a round
after ROUND is finished, one has begun that --begun names, or the run is over.
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
    "begun": 0,
    "rounds": 0,
    "central_accuracy": None,
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
    """Wait until a round later than `after` is finished, or the run is, or the time is up.

    Args:
        begun: wait no longer than until this round has begun.
    """
    deadline = time.monotonic() + timeout
    while True:
        status = read_status(root, run) or dict(_NOT_YET, run=run)
        over = status["state"] in FINAL_STATES
        enough = status["round"] > after or status["begun"] >= begun
        if over or enough or time.monotonic() >= deadline:
            return status
        time.sleep(0.5)


def memory(prometheus: Prometheus) -> dict[str, float]:
    """Bytes that each device holds; none where Prometheus does not answer."""
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
    told = {"now": time.time(), "memory": memory(Prometheus(timeout=_PATIENCE))}
    print(json.dumps(status | told))


if __name__ == "__main__":
    main()
