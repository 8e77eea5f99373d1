"""The record of faults: appended by a command, served as metrics."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flowerbed.device import pressure
from flowerbed.faults import FaultRow, read_faults
from flowerbed.server.faults import add
from flowerbed.server.metrics import StatusCollector
from flowerbed.server.recorder import Recorder

KILL = FaultRow(1000.5, 2, "kill", "phone-1", "local", 20.0, "")
REJOIN = FaultRow(1020.5, 3, "rejoin", "phone-1", "local", None, "")


def test_faults_are_appended(tmp_path: Path) -> None:
    assert read_faults(tmp_path) == []
    add(tmp_path, KILL)
    add(tmp_path, REJOIN)
    assert read_faults(tmp_path) == [KILL, REJOIN]


def test_a_command_appends_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run-1").mkdir()
    monkeypatch.setenv("FLOWERBED_RESULTS", str(tmp_path))
    row: dict[str, Any] = {"time": 1000.5, "round": 2, "fault": "kill", "target": "phone-1"}
    row |= {"machine": "local", "seconds": None, "problem": "no such container: phone-1, removed"}
    command = [sys.executable, "-m", "flowerbed.server.faults", "run-1", json.dumps(row)]
    subprocess.run(command, check=True)
    command[-1] = json.dumps({key: row[key] for key in row if key not in ("time", "round")})
    subprocess.run(command, check=True)
    first, second = read_faults(tmp_path / "run-1")
    assert first == FaultRow(**row)
    assert second.time == pytest.approx(time.time(), abs=60)
    assert second.round == 0


def test_the_last_time_of_each_fault_is_a_metric(tmp_path: Path) -> None:
    recorder = Recorder("run-1", 60.0, tmp_path)
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


def test_the_memory_of_a_container_without_a_limit_is_not_filled() -> None:
    command = [sys.executable, "-m", pressure.__name__, "1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no limit" in done.stderr
