"""A control node on a test machine: another Debian, Python and ansible-core than those here."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from labs import TASK_BY_TASK, Played, show
from packaging.requirements import Requirement
from repository import ROOT, files
from ssh_lab import EPHEMERAL, RESULTS
from testinfra.host import Host

HOME = "/srv/control"
PROJECT = f"{HOME}/flowerbed"


class ControlNode:
    """Commands typed on a test machine, as root, in a copy of the project.

    Python packages are brought along as wheels: how this computer reaches a package index is
    nothing that a machine need know.

    Args:
        machine: the machine.
        container: what it is called by the engine that bears it.
        folder: where there is room.
    """

    def __init__(self, machine: Host, container: str, folder: Path) -> None:
        self.container = container
        machine.check_output("apt-get -qq update")
        machine.check_output("apt-get -qq --yes install --no-install-recommends make python3-venv")
        self.python = machine.check_output("python3 --version").removeprefix("Python ")
        machine.check_output("mkdir --mode=0700 %s", HOME)
        self._bring_project(folder / "project.tar")
        self._bring_wheels(folder / "wheels")
        self._bring_keys(folder / "keys")

    def make(self, target: str, inventory: str, **variables: Any) -> Played:
        """`make TARGET` with an inventory that has been brought."""
        environment = {
            "HOME": HOME,  # so that all that is left is below it
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": f"{HOME}/wheels",
            "ANSIBLE_SSH_ARGS": f"-F {HOME}/keys/ssh_config",
            "ANSIBLE_FORCE_COLOR": "false",
            "MOLECULE_EPHEMERAL_DIRECTORY": HOME,  # where the scenario's inventory wants results
            **TASK_BY_TASK,
        }
        command = ["docker", "exec", f"--workdir={PROJECT}"]
        for name, value in environment.items():
            command += ["--env", f"{name}={value}"]
        extra = shlex.quote(json.dumps(variables))
        command += [self.container, "make", target, f"INVENTORY={HOME}/{inventory}"]
        return show([*command, f"ARGS=-e {extra}"])

    def bring(self, source: Path, name: str) -> None:
        """Copy a directory to this name in its home."""
        subprocess.run(
            ["docker", "cp", f"{source}/.", f"{self.container}:{HOME}/{name}"], check=True
        )

    def fetch_results(self) -> None:
        """Copy what its runs have left to where those of this computer are."""
        subprocess.run(
            ["docker", "cp", f"{self.container}:{HOME}/results/.", str(RESULTS)], check=True
        )

    def _bring_project(self, archive: Path) -> None:
        names = "\0".join(str(path.relative_to(ROOT)) for path in files())
        command = ["tar", "--create", f"--file={archive}", "--null", "--files-from=-"]
        command += ["--transform=s,^,flowerbed/,S"]
        subprocess.run(command, cwd=ROOT, input=names, text=True, check=True)
        with archive.open("rb") as stream:
            subprocess.run(
                ["docker", "cp", "-", f"{self.container}:{HOME}"], stdin=stream, check=True
            )

    def _bring_wheels(self, folder: Path) -> None:
        there = {"python_version": self.python.rpartition(".")[0]}
        lines = (ROOT / "requirements.txt").read_text().splitlines()
        wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
        # pip would go by the Python that it runs on.
        names = [
            f"{each.name}{each.specifier}"
            for each in wanted
            if each.marker is None or each.marker.evaluate(there)
        ]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
        command += [f"--python-version={self.python}", f"--dest={folder}", *names]
        subprocess.run(command, check=True)
        self.bring(folder, "wheels")

    def _bring_keys(self, folder: Path) -> None:
        folder.mkdir()
        for name in ("id_ed25519", "known_hosts"):
            shutil.copy(EPHEMERAL / name, folder)
        config = (EPHEMERAL / "ssh_config").read_text()
        (folder / "ssh_config").write_text(config.replace(str(EPHEMERAL), f"{HOME}/keys"))
        self.bring(folder, "keys")
