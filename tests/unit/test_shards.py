"""What a user sees of data that are being placed, and why they could not be."""

from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from repository import ROOT, load

follow_container = load(ROOT / "roles/shards/action_plugins/follow_container.py")


class Followed(follow_container.ActionModule):  # type: ignore[name-defined]
    """The action on a machine whose commands have answers that are known."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers)

    def _low_level_execute_command(self, cmd: str) -> dict[str, Any]:
        assert cmd.startswith('echo "$(timeout 5 docker wait flowerbed-shards)"; docker logs ')
        return {"rc": 0, "stderr": ""} | self.answers.pop(0)


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that go to the user's terminal."""
    written: list[str] = []
    monkeypatch.setattr(follow_container.display, "display", written.append)
    return written


def test_lines_are_shown_once_as_they_come(displayed: list[str]) -> None:
    action = Followed(
        {"stdout": "\n"},
        {"stdout": "\nloading cifar10\n"},
        {"stdout": "\nloading cifar10\nloading cifar10: 10 s, 7 MB in the cache\n"},
        {"stdout": "0\nloading cifar10\nloading cifar10: 10 s, 7 MB in the cache\nplaced\n"},
    )
    code, lines = action._follow("flowerbed-shards", "pi")
    assert (code, lines[-1]) == (0, "placed")
    assert displayed == [
        "  pi: loading cifar10",
        "  pi: loading cifar10: 10 s, 7 MB in the cache",
        "  pi: placed",
    ]


@pytest.mark.usefixtures("displayed")
def test_a_container_that_is_gone_ends_it() -> None:
    action = Followed({"stdout": "\n", "stderr": "No such container", "rc": 1})
    with pytest.raises(AnsibleActionFail, match="flowerbed-shards is lost: No such container"):
        action._follow("flowerbed-shards", "pi")


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
def test_a_failure_is_what_the_container_said_last(lines: list[str], said: str) -> None:
    assert follow_container.failure(137, lines) == said
