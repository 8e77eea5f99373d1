"""Records a fault that was injected into a run.

    python -m flowerbed.server.faults RUN '{"fault": "kill", "target": "NAME", …}'

appends a row to the run's faults.csv. Its time and round are those of the JSON object, by default
those of now.
"""

import json
import sys
import time
from pathlib import Path

from flowerbed.faults import FAULTS, FaultRow, read_faults
from flowerbed.results import RESULTS, read_status, to_csv, write


def add(directory: Path, row: FaultRow) -> None:
    """Append a row to the faults of the run whose results are in `directory`."""
    rows = [*read_faults(directory), row]
    write(directory / FAULTS, to_csv(FaultRow, rows))


def main(run: str, values: str) -> None:
    """The command line."""
    status = read_status(run=run) or {"begun": 0}
    now = {"time": time.time(), "round": status["begun"]}
    add(RESULTS / run, FaultRow(**(now | json.loads(values))))


if __name__ == "__main__":
    main(*sys.argv[1:])
