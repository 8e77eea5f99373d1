"""Flower's SuperLink, patient with runs.

    python -m flowerbed.server.superlink ...

takes the arguments of `flower-superlink`.
"""

import sys
from importlib.metadata import entry_points

from flowerbed.flower import extend_patience

INTERVALS = 5
"""Intervals of 30 s after which a run without a heartbeat is over: 90 s of standstill are survived,
whenever the last heartbeat was."""
PROGRAM = "flower-superlink"


def main() -> None:
    """Run the SuperLink."""
    extend_patience(INTERVALS)
    program = entry_points(group="console_scripts")[PROGRAM].load()
    sys.argv[0] = PROGRAM
    program()


if __name__ == "__main__":
    main()
