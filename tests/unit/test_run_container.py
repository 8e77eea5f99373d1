"""A container that runs as defined is left alone; no engine is asked for that."""

import json
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT, load, run_task

action = load(ROOT / "plugins/action/run_container.py")

LABELS = {"flowerbed.part": "part"}
CONTAINER = {"name": "flowerbed-part", "image": "some", "labels": LABELS}
NO_ENGINE = "unix:///nonexistent/docker.sock"


def run_container(directory: Path, *found: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What is printed and returned where the role docker has found such containers."""
    engine = {"docker_engine": {"containers": found}}
    task = {"run_container": CONTAINER | {"docker_host": NO_ENGINE}, "vars": engine}
    return run_task(directory, task)


@pytest.fixture
def running() -> dict[str, Any]:
    """As it runs where it was run as defined."""
    definition = action.definition_of(CONTAINER | {"docker_host": NO_ENGINE})
    labels = LABELS | {action.DEFINITION: definition}
    return {"Names": ["/flowerbed-part"], "State": "running", "Labels": labels}


def test_what_runs_as_defined_is_left_alone(tmp_path: Path, running: dict[str, Any]) -> None:
    printed, told = run_container(tmp_path, {"Names": ["/other"]} | running, running)
    assert told["changed"] is False, printed


@pytest.mark.parametrize(
    "differs",
    [
        {"State": "exited"},
        {"Names": ["/flowerbed-part-2"]},
        {"Labels": LABELS},
        {"Labels": {action.DEFINITION: action.definition_of(CONTAINER)}},
    ],
    ids=json.dumps,
)
def test_anything_else_is_for_the_engine(
    tmp_path: Path, running: dict[str, Any], differs: dict[str, Any]
) -> None:
    printed, told = run_container(tmp_path, running | differs)
    assert told == {}
    assert "Error connecting" in printed


def test_where_nobody_has_looked_the_engine_is_asked(tmp_path: Path) -> None:
    printed, _ = run_container(tmp_path)
    assert "Error connecting" in printed
