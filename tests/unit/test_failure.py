"""What is shown of a run that has failed: the culprit, and its last words."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT, program

DEVICES = {"phone-1": "one", "phone-10": "two", "phone-1.lan": "two", "pi4-1": "one"}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Logs of a run, each of 40 lines."""
    names = {(machine, f"device-{device}") for device, machine in DEVICES.items()}
    for machine, name in {*names, ("one", "serverapp"), ("two", "cadvisor")}:
        log = tmp_path / f"results/run-1/logs/{machine}/flowerbed-{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(f"{name} says {number}\n" for number in range(1, 41)))
    return tmp_path / "results"


def shown(tmp_path: Path, results: Path, failure: str) -> list[str]:
    """The lines that train.yml ends with."""
    (tmp_path / "inventory.json").write_text(
        json.dumps(
            {
                "coordinator": {"hosts": {"one": None}},
                "machines": {"hosts": {"one": None, "two": None}},
                "devices": {
                    "hosts": {name: {"device_machine": on} for name, on in DEVICES.items()}
                },
            }
        )
    )
    template = ROOT / "playbooks/templates/failure.txt.j2"
    variables = {
        "ansible_connection": "local",
        "training_results": str(results),
        "training_name": "run-1",
        "__train_failure": failure,
    }
    task: dict[str, Any] = {
        "ansible.builtin.copy": {
            "content": f"{{{{ lookup('ansible.builtin.template', '{template}') }}}}",
            "dest": str(tmp_path / "shown"),
            "mode": "0644",
        },
        "delegate_to": "localhost",
    }
    play = {"hosts": "coordinator", "gather_facts": False, "vars": variables, "tasks": [task]}
    # Beside a playbook are its filters.
    (tmp_path / "filter_plugins").symlink_to(ROOT / "plugins/filter")
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    command = [program("ansible-playbook"), "-i", "inventory.json", "play.yml"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return (tmp_path / "shown").read_text().splitlines()


def test_the_device_that_is_named_is_the_culprit(tmp_path: Path, results: Path) -> None:
    lines = shown(tmp_path, results, "not ready after 300 s: phone-1.")
    log = results / "run-1/logs/one/flowerbed-device-phone-1.log"
    assert lines[:3] == ["not ready after 300 s: phone-1.", "", f"The end of {log}:"]
    assert lines[3:] == [f"  device-phone-1 says {number}" for number in range(16, 41)]


def test_no_more_than_three_are_shown(tmp_path: Path, results: Path) -> None:
    names = "pi4-1: error; phone-10: offline; phone-1.lan: offline; phone-1: timeout"
    lines = shown(tmp_path, results, f"round 1: no device returned a model ({names})")
    told = [line for line in lines if line.startswith("The end of")]
    assert [line.rpartition("flowerbed-")[2] for line in told] == [
        "device-phone-1.log:",
        "device-phone-1.lan.log:",
        "device-phone-10.log:",
    ]


def test_where_no_device_is_named_it_was_the_serverapp(tmp_path: Path, results: Path) -> None:
    lines = shown(tmp_path, results, "run run-1 ended without a word in round 2")
    assert [line for line in lines if line.startswith("The end of")] == [
        f"The end of {results}/run-1/logs/one/flowerbed-serverapp.log:"
    ]


def test_a_log_that_is_missing_is_no_second_failure(tmp_path: Path, results: Path) -> None:
    (results / "run-1/logs/one/flowerbed-device-pi4-1.log").unlink()
    assert shown(tmp_path, results, "not ready: pi4-1") == ["not ready: pi4-1"]
