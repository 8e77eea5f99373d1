"""Faults as they are written down, served and told of."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flowerbed import pressure
from flowerbed.faults import FaultRow, add, read_faults
from flowerbed.metrics import StatusCollector
from flowerbed.results import Recorder

KILL = FaultRow(1000.5, 2, "kill", "phone-1", "local", 20.0, "")
REJOIN = FaultRow(1020.5, 3, "rejoin", "phone-1", "local", None, "")


def test_faults_are_added_one_by_one(tmp_path: Path) -> None:
    assert read_faults(tmp_path) == []
    add(tmp_path, KILL)
    add(tmp_path, REJOIN)
    assert read_faults(tmp_path) == [KILL, REJOIN]


def test_a_fault_is_added_by_command(tmp_path: Path) -> None:
    (tmp_path / "run-1").mkdir()
    row: dict[str, Any] = {"time": 1000.5, "round": 2, "fault": "kill", "target": "phone-1"}
    row |= {
        "machine": "local",
        "seconds": None,
        "problem": "no such container: phone-1, or it is gone",
    }
    command = [sys.executable, "-m", "flowerbed.faults", "run-1", json.dumps(row)]
    subprocess.run(command, check=True, env={"FLOWERBED_RESULTS": str(tmp_path)}, cwd="/app")
    command[-1] = json.dumps({key: row[key] for key in row if key not in ("time", "round")})
    subprocess.run(command, check=True, env={"FLOWERBED_RESULTS": str(tmp_path)}, cwd="/app")
    first, second = read_faults(tmp_path / "run-1")
    assert first == FaultRow(**row)
    assert second.time == pytest.approx(time.time(), abs=60)
    assert second.round == 0


def test_the_last_of_each_is_served(tmp_path: Path) -> None:
    recorder = Recorder("run-1", 2, 60.0, tmp_path)
    for row in (KILL, REJOIN, FaultRow(1040.5, 4, "kill", "phone-1", "local", None, "")):
        add(recorder.directory, row)
    (metric,) = (
        each
        for each in StatusCollector(tmp_path).collect()
        if each.name == "flowerbed_fault_seconds"
    )
    assert {(s.labels["fault"], s.labels["target"]): s.value for s in metric.samples} == {
        ("kill", "phone-1"): 1040.5,
        ("rejoin", "phone-1"): 1020.5,
    }


def test_a_container_without_a_limit_is_not_filled() -> None:
    command = [sys.executable, "-m", pressure.__name__, "1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no limit" in done.stderr
