"""A lab on this machine, deployed by the playbooks as a user would, on real images."""

import contextlib
import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import termios
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml
from labs import DATA, Played, play
from repository import ROOT, program

HOME = Path("/var/lib/flowerbed")
RESULTS = ROOT / "results"
ROUNDS = 2
EXAMPLES = 6000
BATCH = 32
"""Of all devices: a class's speed in the catalogue is that of batches of 32, and how much slower
or faster others are depends on the processor."""


@pytest.fixture(scope="session")
def variables() -> dict[str, Any]:
    """What the tests change in inventory/local: less data, fewer rounds, one size of batches."""
    assert DATA.is_dir(), f"{DATA} is missing: set FLOWERBED_TEST_DATA to CIFAR-10 as parquet"
    return {
        "training_dataset": str(DATA.resolve()),
        "training_examples": EXAMPLES,
        "training_rounds": ROUNDS,
        "training_run": "test-first",
        "device_batch_size": BATCH,
    }


@pytest.fixture(scope="session")
def before() -> Iterator[None]:
    """Set a lab that stands here aside, and bring its data back in the end."""
    aside = HOME.with_name("flowerbed.before-tests")
    shutil.rmtree(RESULTS / "test-first", ignore_errors=True)
    subprocess.run(
        [program("ansible-playbook"), "playbooks/teardown.yml"],
        cwd=ROOT,
        check=True,
    )
    if aside.exists():  # what is there now is of tests that were broken off
        shutil.rmtree(HOME, ignore_errors=True)
    elif HOME.exists():
        HOME.rename(aside)
    yield
    if aside.exists():
        shutil.rmtree(HOME, ignore_errors=True)
        aside.rename(HOME)


@pytest.fixture(scope="session")
def lab(before: None, variables: dict[str, Any]) -> Played:
    """site.yml on a machine that has no lab: deployed and trained."""
    return play("site", **variables)


@pytest.fixture(scope="session")
def engine() -> docker.DockerClient:
    """The machine's engine."""
    return docker.from_env()


@pytest.fixture(scope="session")
def inventory() -> dict[str, dict[str, Any]]:
    """The devices' variables, as Ansible resolves them."""
    command = [program("ansible-inventory"), "-i", "inventory/local", "--list"]
    listed = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    hostvars = listed["_meta"]["hostvars"]
    children = listed["devices"]["children"]
    return {host: hostvars[host] for group in children for host in listed[group]["hosts"]}


def prometheus(path: str, **parameters: Any) -> Any:
    """Ask the lab's Prometheus; a refusal is an error."""
    url = f"http://127.0.0.1:9090/api/v1/{path}?{urllib.parse.urlencode(parameters, doseq=True)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)["data"]


def on_a_terminal(name: str, *arguments: str) -> tuple[int, str]:
    """Run a program with a terminal of 30 lines and 100 columns; its exit code and output."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    written = []
    with subprocess.Popen(
        [program(name), *arguments],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm-256color"},
    ) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # the end of it, on Linux
            while part := os.read(ours, 65536):
                written.append(part)
    os.close(ours)
    return process.returncode, b"".join(written).decode().replace("\r\n", "\n")


def query(expression: str) -> list[dict[str, Any]]:
    """What an expression gives now."""
    result: list[dict[str, Any]] = prometheus("query", query=expression)["result"]
    return result


def eventually(check: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until `check` holds."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(1)


def run_yml(run: str) -> dict[str, Any]:
    """A run's run.yml on the control node."""
    told: dict[str, Any] = yaml.safe_load((RESULTS / run / "run.yml").read_text())
    return told
