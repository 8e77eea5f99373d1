"""What a user sees of a run that is under way."""

import re
from typing import Any

import pytest
from repository import ROOT, load

MEBI = 2**20


follow_run = load(ROOT / "roles/training/action_plugins/follow_run.py")


def _device(doing: str, **more: Any) -> dict[str, Any]:
    entry = {
        "device_class": "phone",
        "info": {"memory": "1000m"},
        "online": True,
        "doing": doing,
        "last": {"examples_per_second": 133.5},
        "outcomes": {"completed": 2, "offline": 1},
    }
    return entry | more


@pytest.fixture
def status() -> dict[str, Any]:
    """Round 4 of 5, 12 s old, with a device in each state."""
    return {
        "state": "running",
        "message": "",
        "now": 112.0,
        "round_started": 100.0,
        "round": 3,
        "rounds": 5,
        "history": [],
        "devices": {
            "budget-1": _device("waiting"),
            "laptop-1": _device("working", info={"memory": None}, last=None),
            "phone-1": _device("out_of_memory"),
            "pi4-1": _device("waiting", online=False),
        },
        "memory": {"budget-1": 950 * MEBI, "laptop-1": 612 * MEBI},
    }


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What goes to the user's terminal, as it is written."""
    written: list[str] = []

    def display(text: str, *, newline: bool = True, screen_only: bool = False) -> None:
        written.append(text + "\n" if newline and not text.endswith("\n") else text)

    monkeypatch.setattr(follow_run.display, "display", display)
    return written


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_devices_are_rows(status: dict[str, Any]) -> None:
    lines = _plain(follow_run.table(status, 100)).splitlines()
    assert "round 4/5, 12 s" in lines
    rows = {line.split()[0]: line for line in lines[3:] if line.strip()}
    # Those that are not waiting come first.
    assert list(rows) == ["laptop-1", "phone-1", "pi4-1", "budget-1"]
    assert re.search(r"phone +working +2 +- +612 MiB", rows["laptop-1"])
    assert re.search(r"phone +out of memory +2 +134 +-", rows["phone-1"])
    assert re.search(r"phone +offline ", rows["pi4-1"])
    assert re.search(r"phone +waiting +2 +134 +\S+ 950 of 1000 MiB", rows["budget-1"])


def test_many_devices_do_not_leave_the_screen(status: dict[str, Any]) -> None:
    status["devices"] = {f"phone-{n:02}": _device("waiting") for n in range(40)}
    status["devices"]["phone-39"] = _device("working")
    text = _plain(follow_run.table(status, 79))
    assert "phone-39" in text
    assert "and 24 more" in text
    assert text.count("\n") < 24
    assert max(map(len, text.splitlines())) <= 79


def test_a_table_is_written_over(
    status: dict[str, Any], displayed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_run.color, "ANSIBLE_COLOR", True)
    monkeypatch.setattr(follow_run.constants, "ANSIBLE_FORCE_COLOR", False)
    screen = follow_run.Screen()
    screen.show(["one"], status)
    screen.show(["two"], status)
    screen.clear()
    table = follow_run.table(status, follow_run.display.columns)
    height = table.count("\n")
    over = f"\x1b[{height}A\x1b[J"
    assert displayed == ["one\n", table, over, "two\n", table, over]


def test_without_a_terminal_there_are_lines(
    status: dict[str, Any], displayed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_run.color, "ANSIBLE_COLOR", False)
    screen = follow_run.Screen()
    screen.show(["one"], status)
    screen.show([], status)
    screen.clear()
    told = (
        "  round 4/5, 12 s: working: laptop-1; waiting: budget-1; out of memory: phone-1; "
        "offline: pi4-1\n"
    )
    assert displayed == ["one\n", told]


def test_colours_without_a_terminal_are_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_run.color, "ANSIBLE_COLOR", True)
    monkeypatch.setattr(follow_run.constants, "ANSIBLE_FORCE_COLOR", True)
    assert not follow_run.Screen().live
