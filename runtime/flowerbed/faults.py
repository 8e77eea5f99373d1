"""The format of faults.csv: a row a fault that was injected into a run.

Faults are injected from outside of the containers, by the playbook that follows the run;
`flowerbed.server.faults` writes the rows, the metrics endpoint and the report read them.
"""

from dataclasses import dataclass
from pathlib import Path

from flowerbed.results import read_rows

FAULTS = "faults.csv"


@dataclass(frozen=True)
class FaultRow:
    """One fault. Its target recovers with the next row whose fault is `rejoin`."""

    time: float
    """Seconds of the wall clock (Unix) at which it was due."""
    round: int
    """The round under way at that time; 0: before the first."""
    fault: str
    target: str
    """A device, a machine or superlink."""
    machine: str
    seconds: float | None
    """Its duration; None: until another fault undoes it, or until the run ends."""
    problem: str
    """Why it could not be injected; empty where it was."""


def read_faults(directory: Path) -> list[FaultRow]:
    """Read the faults of the run whose results are in `directory`, oldest first."""
    rows: list[FaultRow] = read_rows(FaultRow, directory / FAULTS)
    return rows
