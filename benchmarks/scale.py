"""Forty devices on four machines over ssh: deploy, deploy again, train.

    python benchmarks/scale.py

The machines are those of the Molecule scenario scale, containers of this computer, and so share its
cores and memory. results/scale.csv has a row for each measurement.
"""

import os
import sys
from pathlib import Path
from statistics import median

import docker
from measure import (
    DATA,
    ROOT,
    Rows,
    Run,
    markdown,
    play,
    played,
    publish,
    results,
    run,
    say,
    surroundings,
    write_rows,
)

INVENTORY = ROOT / "molecule" / "scale" / "inventory"
EPHEMERAL = ROOT / ".cache" / "scale-machines"
RESULTS_OF_RUN = EPHEMERAL / "results" / "scale"
REPEATS = 3
# On the machines, and not where this is run.
DATA_THERE = {"training_dataset": "/srv/cifar10"}


def molecule(action: str) -> None:
    """Create, prepare or remove the machines; Molecule finds ansible-playbook on the PATH."""
    say(f"molecule {action} -s scale")
    run("molecule", action, "-s", "scale")


def main() -> None:
    """Deploy, train, deploy again, publish."""
    os.environ |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ANSIBLE_SSH_ARGS": f"-F {EPHEMERAL}/ssh_config",
        "MOLECULE_EPHEMERAL_DIRECTORY": str(EPHEMERAL),
        "MOLECULE_COMMAND_BORDERS": "false",
        "FLOWERBED_TEST_DATA": str(DATA.resolve()),
    }
    rows: Rows = []

    def measured(what: str, value: float, unit: str = "s") -> None:
        rows.append({"what": what, "value": round(value, 1), "unit": unit})
        say(f"{what}: {value:.1f} {unit}")

    molecule("destroy")
    try:
        molecule("create")
        here = surroundings(docker.from_env())
        molecule("prepare")
        first = Run(RESULTS_OF_RUN, play("playbooks/site.yml", INVENTORY, **DATA_THERE))
        measured("first site.yml", first.seconds)
        completed = [
            row["device"]
            for row in first.trained
            if (row["round"], row["outcome"]) == ("1", "completed")
        ]
        measured("devices that completed the first round", len(completed), "")
        for row in first.rounds:
            measured(f"round {row['round']}", float(row["seconds"]))
        for _ in range(REPEATS):
            again = played("playbooks/site.yml", INVENTORY, **DATA_THERE)
            measured("second site.yml", again.seconds)
            measured("tasks that it changes", again.changed, "")
    finally:
        molecule("destroy")
    write_rows("scale", [row | here for row in rows])
    publish("scale", table())


def table() -> str:
    """A row a measurement."""
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
