"""What a device's ClientApp does in a run, without waiting for a server's messages.

python message.py JOB

JOB is JSON: `task`, `device` (see flowerbed.config), `seconds` of training a round. Started in a
device's container; it tells in a line of JSON the peak of the container's memory without file
pages, in bytes, or that the trainer died. Flower's process for a message shares most of what it has
loaded with the supervisor that it is a fork of; this one loads little, and takes about as much for
itself.
"""

import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from flowerbed.config import Task  # type: ignore[import-not-found]
from flowerbed.handoff import (  # type: ignore[import-not-found]
    TrainerDiedError,
    TrainerError,
    request,
)

CGROUP = Path("/sys/fs/cgroup")
INTERVAL = 0.02
ROUNDS = 2


def occupied() -> int:
    """Bytes of this container that the kernel cannot take back: usage without file pages."""
    if (CGROUP / "memory.current").exists():
        usage, details, prefix = CGROUP / "memory.current", CGROUP / "memory.stat", ""
    else:
        root = CGROUP / "memory"
        usage, details, prefix = root / "memory.usage_in_bytes", root / "memory.stat", "total_"
    stat = dict(line.split() for line in details.read_text().splitlines())
    files = sum(int(stat[f"{prefix}{state}_file"]) for state in ("active", "inactive"))
    return int(usage.read_text()) - files


class Peak(threading.Thread):
    """The greatest `occupied` while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        """Look until the process ends."""
        while True:
            self.peak = max(self.peak, occupied())
            time.sleep(INTERVAL)


def weights_of(header: dict[str, Any]) -> bytes:
    """Weights of the task's network: the trainer, given too few, says how many it wants."""
    try:
        request(header | {"operation": "evaluate"}, bytes(4))
    except TrainerError as error:
        found = re.search(r" has (\d+)", str(error))
        if found:
            numbers = np.random.default_rng(0).normal(0, 0.01, int(found[1]))
            return numbers.astype(np.float32).tobytes()
        raise
    raise AssertionError("a trainer has taken one weight for a network")


def work(job: dict[str, Any]) -> None:
    """A run: prepare, and some rounds as a server would ask for them."""
    task = Task(**job["task"], time_limit=job["seconds"], fill_time=True).as_config()
    header = {"task": task, "device": job["device"]}
    request(header | {"operation": "prepare"})
    weights = weights_of(header)
    for _ in range(ROUNDS):
        _, trained = request(header | {"operation": "train"}, weights)
        # The array of the reply, the object that is sent, and what the next message brings.
        array = np.frombuffer(trained, np.float32).tobytes()
        sent = bytes(bytearray(array))
        weights = bytes(bytearray(sent))


def main() -> None:
    """Work, and tell."""
    peak = Peak()
    peak.start()
    died = ""
    try:
        work(json.loads(sys.argv[1]))
    except TrainerDiedError as error:
        died = error.cause
    print(json.dumps({"peak": peak.peak, "died": died}))


if __name__ == "__main__":
    main()
