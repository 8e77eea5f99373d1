"""Containers of the lab: services that run as specified are left alone, programs are followed."""

import json
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from repository import ROOT, load, run_task

action = load(ROOT / "plugins/action/run_container.py")

NO_ENGINE = "unix:///nonexistent/docker.sock"
CONTAINER = {"name": "flowerbed-part", "image": "some", "docker_host": NO_ENGINE}


def run_container(
    directory: Path, *found: dict[str, Any], check: bool = False, **variables: Any
) -> tuple[str, dict[str, Any]]:
    """Output and result, if the role docker has found such containers."""
    variables |= {"docker_engine": {"containers": found}}
    task = {"run_container": CONTAINER, "vars": variables}
    return run_task(directory, task, *(["--check"] if check else []))


@pytest.fixture
def running() -> dict[str, Any]:
    """The container as it runs if it was started with these arguments."""
    spec = action.spec_hash(action.container_arguments(CONTAINER))
    return {"Names": ["/flowerbed-part"], "State": "running", "Labels": {action.SPEC: spec}}


def test_a_service_is_hardened_unless_a_task_says_otherwise() -> None:
    arguments = action.container_arguments(
        {"name": "flowerbed-x", "image": "i", "pids_limit": 512, "labels": {"a": "b"}}
    )
    assert arguments == {
        "name": "flowerbed-x",
        "image": "i",
        "read_only": True,
        "tmpfs": ["/tmp"],
        "cap_drop": ["ALL"],
        "security_opts": ["no-new-privileges"],
        "pids_limit": 512,
        "labels": {"flowerbed.part": "x", "a": "b"},
        "restart_policy": "unless-stopped",
        "log_driver": "json-file",
        "log_options": {"max-size": "10m", "max-file": "3"},
    }


def test_a_program_has_no_network_and_is_not_restarted() -> None:
    arguments = action.container_arguments({"name": "flowerbed-x", "image": "i", "wait": True})
    assert arguments["network_mode"] == "none"
    assert arguments["cap_drop"] == ["ALL"]
    assert not {"wait", "restart_policy"} & set(arguments)


def test_a_service_that_runs_as_specified_is_left_alone(
    tmp_path: Path, running: dict[str, Any]
) -> None:
    printed, result = run_container(tmp_path, {"Names": ["/other"]} | running, running)
    assert result["changed"] is False, printed


@pytest.mark.parametrize(
    "differs",
    [
        {"State": "exited"},
        {"Names": ["/flowerbed-part-2"]},
        {"Labels": {}},
        {"Labels": {action.SPEC: action.spec_hash(CONTAINER)}},
    ],
    ids=json.dumps,
)
def test_the_engine_is_asked_about_any_other_container(
    tmp_path: Path, running: dict[str, Any], differs: dict[str, Any]
) -> None:
    printed, result = run_container(tmp_path, running | differs)
    assert result == {}
    assert "Error connecting" in printed


def test_check_mode_needs_no_engine(tmp_path: Path) -> None:
    printed, result = run_container(tmp_path, check=True, docker_running=False)
    assert result["changed"] is True, printed


class Followed(action.ActionModule):  # type: ignore[name-defined]
    """The action on a machine whose replies to commands are given."""

    def __init__(self, *replies: dict[str, Any]) -> None:
        self.replies = list(replies)

    def _low_level_execute_command(self, cmd: str) -> dict[str, Any]:
        assert cmd.startswith('echo "$(timeout 5 docker wait flowerbed-shards)"; docker logs ')
        return {"rc": 0, "stderr": ""} | self.replies.pop(0)


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that go to the user's terminal."""
    written: list[str] = []
    monkeypatch.setattr(action.display, "display", written.append)
    return written


def test_lines_of_a_program_are_shown_once_as_they_come(displayed: list[str]) -> None:
    followed = Followed(
        {"stdout": "\n"},
        {"stdout": "\nloading cifar10\n"},
        {"stdout": "\nloading cifar10\nloading cifar10: 10 s, 7 MB in the cache\n"},
        {"stdout": '0\nloading cifar10\nloading cifar10: 10 s, 7 MB in the cache\n{"a": 1}\n'},
    )
    code, lines = followed._follow("flowerbed-shards", "pi")
    assert (code, lines[-1]) == (0, '{"a": 1}')
    assert displayed == ["  pi: loading cifar10", "  pi: loading cifar10: 10 s, 7 MB in the cache"]


@pytest.mark.usefixtures("displayed")
def test_a_program_whose_container_is_gone_fails() -> None:
    followed = Followed({"stdout": "\n", "stderr": "No such container", "rc": 1})
    with pytest.raises(AnsibleActionFail, match="flowerbed-shards is lost: No such container"):
        followed._follow("flowerbed-shards", "pi")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ["loading", "ERROR: training_dataset = x: correct it"],
            "training_dataset = x: correct it",
        ),
        ([], "the container ended with exit code 137:"),
        (list("abcdefg"), "the container ended with exit code 137:\nc\nd\ne\nf\ng"),
    ],
)
def test_the_message_of_a_failure_is_what_the_program_said_last(
    lines: list[str], said: str
) -> None:
    assert action.failure(137, lines) == said
