"""Faults that were struck on purpose during a run: a row each in its faults.csv.

    python -m flowerbed.faults RUN '{"fault": "kill", "target": "NAME", …}'

adds one, with the time and the round that it is told, or those of now. Faults are struck from
outside of containers, by whoever follows the run; this is where that is written down, beside what
the run itself tells.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from flowerbed.results import RESULTS, read_rows, read_status, to_csv, write

FAULTS = "faults.csv"


@dataclass(frozen=True)
class FaultRow:
    """One fault. What it brought down is back with the next `rejoin` of its target."""

    time: float
    """Seconds of the wall clock (Unix) at which it was due."""
    round: int
    """Under way then; 0 before the first."""
    fault: str
    target: str
    """A device, a machine or superlink."""
    machine: str
    seconds: float | None
    """How long it shall last; None: until it is undone by another one, or the run ends."""
    problem: str
    """Why it could not be struck; empty where it was."""


def read_faults(directory: Path) -> list[FaultRow]:
    """The faults of a run by its directory, oldest first."""
    rows: list[FaultRow] = read_rows(FaultRow, directory / FAULTS)
    return rows


def add(directory: Path, row: FaultRow) -> None:
    """Write one down."""
    rows = [*read_faults(directory), row]
    write(directory / FAULTS, to_csv(FaultRow, rows))


def main(run: str, told: str) -> None:
    """The command line."""
    status = read_status(run=run) or {"begun": 0}
    now = {"time": time.time(), "round": status["begun"]}
    add(RESULTS / run, FaultRow(**(now | json.loads(told))))


if __name__ == "__main__":
    main(*sys.argv[1:])
