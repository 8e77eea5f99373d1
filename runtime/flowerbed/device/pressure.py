"""Fill this container's memory until the kernel kills a process, and hold it for a while.

    python -m flowerbed.device.pressure SECONDS

The kernel kills the worker: the supervisor has made it the first choice.
"""

import sys
import time

from flowerbed.device.quota import out_of_memory_kills, read_quota

_CHUNK = 16 * 2**20


def fill(seconds: float) -> None:
    """Take memory until a process has been killed or the time is up; return it when it is up."""
    deadline = time.monotonic() + seconds
    kills = out_of_memory_kills()
    held = []
    while time.monotonic() < deadline:
        if out_of_memory_kills() == kills:
            held.append(bytearray(b"\1") * _CHUNK)
        else:
            time.sleep(0.2)


if __name__ == "__main__":
    if read_quota().memory is None:
        sys.exit("this container has no limit: its machine's memory would be filled")
    fill(float(sys.argv[1]))
