"""Forty devices on four machines over ssh: deploy, deploy again, train.

    python benchmarks/scale.py

The machines are those of the Molecule scenario scale. They are containers of this computer, and
share its cores and memory. results/scale.csv has a row for each measurement.
"""

import os
import shutil
import sys
from pathlib import Path
from statistics import median

from measure import (
    DATA,
    ROOT,
    Record,
    Run,
    command_line,
    markdown,
    play,
    publish,
    results,
    run,
    say,
)

INVENTORY = ROOT / "molecule" / "scale" / "inventory"
EPHEMERAL = ROOT / ".cache" / "scale-machines"
RESULTS_OF_RUN = EPHEMERAL / "results" / "scale"
REPEATS = 3
# A directory on the machines, not on this computer.
DATA_THERE = {"training_dataset": "/srv/cifar10"}


def molecule(action: str) -> None:
    """Create, prepare or remove the machines."""
    say(f"molecule {action} -s scale")
    run("molecule", action, "-s", "scale")


def main() -> None:
    """Deploy, train, deploy again, publish."""
    command_line(__doc__).parse_args()
    os.environ |= {
        # Molecule finds ansible-playbook on the PATH.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ANSIBLE_SSH_ARGS": f"-F {EPHEMERAL}/ssh_config",
        "MOLECULE_EPHEMERAL_DIRECTORY": str(EPHEMERAL),
        "MOLECULE_COMMAND_BORDERS": "false",
        "FLOWERBED_TEST_DATA": str(DATA.resolve()),
    }

    def measured(what: str, value: float, unit: str = "s") -> None:
        record.add({"what": what, "value": round(value, 1), "unit": unit})

    molecule("destroy")
    try:
        molecule("create")  # installs Docker on this computer, if it is missing
        record = Record("scale")
        molecule("prepare")
        played = play("playbooks/site.yml", INVENTORY, **DATA_THERE)
        first = Run(RESULTS_OF_RUN, played.seconds)
        measured("first site.yml", first.seconds)
        completed = {
            row["device"]
            for row in first.trained
            if (row["round"], row["outcome"]) == ("1", "completed")
        }
        measured("devices that completed the first round", len(completed), "")
        for row in first.rounds:
            measured(f"round {row['round']}", float(row["seconds"]))
        for _ in range(REPEATS):
            again = play("playbooks/site.yml", INVENTORY, **DATA_THERE)
            measured("second site.yml", again.seconds)
            measured("tasks that it changes", again.changed, "")
    finally:
        molecule("destroy")
        shutil.rmtree(EPHEMERAL, ignore_errors=True)
        shutil.rmtree(INVENTORY / ".secrets", ignore_errors=True)
    publish(table, record)


def table() -> str:
    """A row for each measurement."""
    rows = results("scale")
    body = []
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        value = median(float(row["value"]) for row in mine)
        unit = mine[0]["unit"]
        body.append([what, f"{value:.1f} {unit}" if unit else f"{value:.0f}"])
    return markdown(["", "40 devices on 4 machines"], body)


if __name__ == "__main__":
    main()
