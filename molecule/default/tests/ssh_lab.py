"""What is known of the lab that Molecule has deployed."""

import csv
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml
from labs import AS_A_USER_SEES_IT
from repository import program
from testinfra.host import Host

EPHEMERAL = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
INVENTORY = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"]) / "inventory"
RESULTS = EPHEMERAL / "results"
RUN = "test-lab"
_ASK = """
import sys, urllib.request
print(urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}", timeout=10).read().decode())
"""


def listed(inventory: Path) -> dict[str, Any]:
    """An inventory as Ansible resolves it."""
    command = [program("ansible-inventory"), "-i", str(inventory), "--list"]
    environment = os.environ | AS_A_USER_SEES_IT
    done = subprocess.run(command, check=True, capture_output=True, env=environment)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def devices(inventory: Path) -> dict[str, dict[str, Any]]:
    """The variables of an inventory's devices, with their class."""
    told = listed(inventory)
    return {
        device: {"class": group, "device_machine": device} | told["_meta"]["hostvars"][device]
        for group in told["devices"]["children"]
        for device in told[group]["hosts"]
    }


def containers(machine: Host) -> dict[str, Any]:
    """The running containers of a machine's lab by name, as the engine describes them."""
    names = machine.check_output("docker ps -q --filter label=flowerbed.part").split()
    described = json.loads(machine.check_output(f"docker inspect {' '.join(names)}"))
    return {container["Name"].removeprefix("/"): container for container in described}


def asked(machine: Host, address: str) -> str:
    """What is served to the machine itself at an address, such as 9090/metrics."""
    answer: str = machine.check_output("python3 -c %s %s", _ASK, address)
    return answer


def rows(run: str, file: str) -> list[dict[str, str]]:
    """The rows of a table of a run's results."""
    with (RESULTS / run / file).open() as lines:
        return list(csv.DictReader(lines))


def trained(run: str) -> list[dict[str, str]]:
    """The rows of a run's messages that asked for training."""
    return [row for row in rows(run, "devices.csv") if row["type"] == "train"]


def run_yml(run: str) -> dict[str, Any]:
    """How a run came about."""
    told: dict[str, Any] = yaml.safe_load((RESULTS / run / "run.yml").read_text())
    return told
