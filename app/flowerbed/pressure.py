"""Fill this container's memory until the kernel kills for it, and hold what was got for a while.

    python -m flowerbed.pressure SECONDS

The one to be killed is the trainer, which the supervisor has made the first choice.
"""

import sys
import time

from flowerbed.quota import out_of_memory_kills, read_quota

_CHUNK = 16 * 2**20


def fill(seconds: float) -> None:
    """Take memory until somebody has been killed or the time is up; give it back when it is."""
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
