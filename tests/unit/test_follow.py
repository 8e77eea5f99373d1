"""What a user sees of a run that is under way, and when following it ends."""

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from repository import ROOT, load

MEBI = 2**20


follow_run = load(ROOT / "plugins/action/follow_run.py")


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
        "settled": 0,
        "begun": 4,
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


def _row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "round": number,
        "started": 100.0,
        "accuracy": 0.25,
        "loss": 2.0,
        "central_accuracy": 0.3,
        "central_loss": 1.5,
        "seconds": 12.34,
        "failed": 0,
        "slowest_device": "pi4-1",
        "slowest_seconds": 9.96,
    }
    return row | changes


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


# --- lines and tables --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "changes", "line"),
    [
        (5, {}, "  4/5      0.3000   1.5000     12.3  pi4-1 (10.0 s)"),
        (5, {"failed": 2}, "  4/5      0.3000   1.5000     12.3  pi4-1 (10.0 s), 2 failed"),
        # No central evaluation: means over the devices.
        (
            5,
            {"central_accuracy": None, "central_loss": None},
            "  4/5      0.2500   2.0000     12.3  pi4-1 (10.0 s)",
        ),
        (
            0,
            dict.fromkeys(("accuracy", "loss", "central_accuracy", "central_loss"))
            | {"slowest_device": "", "slowest_seconds": 0.0},
            "  4/-           -        -     12.3  -",
        ),
    ],
)
def test_a_finished_round_is_a_line(rounds: int, changes: dict[str, Any], line: str) -> None:
    assert follow_run.line_of(_row(4, **changes), rounds) == line


def test_devices_are_rows(status: dict[str, Any]) -> None:
    lines = _plain(follow_run.table(status, 100)).splitlines()
    assert "round 4/5, 12 s" in lines
    rows = {line.split()[0]: line for line in lines[3:] if line.strip()}
    # Devices that do not wait come first.
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


def test_a_table_is_overwritten(
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
    line = (
        "  round 4/5, 12 s: working: laptop-1; waiting: budget-1; out of memory: phone-1; "
        "offline: pi4-1\n"
    )
    assert displayed == ["one\n", line]


@pytest.mark.parametrize(
    ("changes", "progress"),
    [
        ({"rounds": 0}, "  round 4/-, 12 s: "),
        ({"round": 4}, "  round 4/5 is finished: "),
        ({"state": "waiting", "round_started": None}, "  waiting: "),
    ],
)
def test_the_progress_of_a_run(
    status: dict[str, Any], changes: dict[str, Any], progress: str
) -> None:
    assert follow_run.devices_line(status | changes).startswith(progress)


def test_colours_without_a_terminal_are_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_run.color, "ANSIBLE_COLOR", True)
    monkeypatch.setattr(follow_run.constants, "ANSIBLE_FORCE_COLOR", True)
    assert not follow_run.Screen().live


# --- following ---------------------------------------------------------------------------------


class _Task:
    def __init__(self, **arguments: Any) -> None:
        self.args = arguments


Follow = Callable[..., dict[str, Any]]


@pytest.fixture
def follow(displayed: list[str], monkeypatch: pytest.MonkeyPatch) -> Follow:
    """Follow a run whose status changes from one command to the next; the last one stays.

    A command that waits for a round takes as long as it may, by a clock that only they move.
    """
    monkeypatch.setattr(follow_run.color, "ANSIBLE_COLOR", False)
    clock = itertools.count()
    now = 0.0

    def call(statuses: list[dict[str, Any]], runs: str = "running", **arguments: Any) -> Any:
        left = list(statuses)
        asked: list[list[str]] = []

        def execute(command: str) -> dict[str, Any]:
            nonlocal now
            next(clock)
            if "flwr list" in command:
                return {"rc": 0, "stdout": json.dumps({"runs": [{"status": runs}]}), "stderr": ""}
            words = command.split()
            assert words[3:6] == ["python", "-m", "flowerbed.server.follow"]
            asked.append(words[7:])
            now += float(words[words.index("--timeout") + 1])
            status = left.pop(0) if len(left) > 1 else left[0]
            return {"rc": 0, "stdout": json.dumps(status), "stderr": ""}

        monkeypatch.setattr(follow_run.time, "monotonic", lambda: now)
        plugin = follow_run.ActionModule.__new__(follow_run.ActionModule)
        plugin._task = _Task(run="run-1", **arguments)
        plugin._low_level_execute_command = execute
        result = plugin._follow("run-1", follow_run.Screen())
        return result | {"asked": asked}

    return call


def test_a_round_is_shown_when_it_is_settled(
    status: dict[str, Any], displayed: list[str], follow: Follow
) -> None:
    """The central evaluation of the newest round runs beside the next one."""
    rows = [_row(n, central_accuracy=n / 10) for n in (1, 2)]
    unsettled = [rows[0], _row(2, central_accuracy=None)]
    seen = follow(
        [
            status | {"history": unsettled, "settled": 1},
            status | {"history": rows, "settled": 2},
            status | {"history": rows, "settled": 2, "state": "completed"},
        ]
    )
    lines = [line for line in displayed if re.match(r" +\d/5 +0\.", line)]
    assert [line.split()[:2] for line in lines] == [["1/5", "0.1000"], ["2/5", "0.2000"]]
    assert displayed[0] == follow_run.HEADING + "\n"
    assert (seen["over"], seen["shown"]) == (True, 2)
    after = [words[words.index("--after") + 1] for words in seen["asked"]]
    assert after == ["0", "1", "2"]


def test_the_message_of_a_run_that_waits_is_shown_once(
    status: dict[str, Any], displayed: list[str], follow: Follow
) -> None:
    waiting = status | {"state": "waiting", "message": "2 of 4 devices are ready"}
    follow([waiting, waiting, status | {"state": "completed"}])
    assert displayed.count("waiting: 2 of 4 devices are ready\n") == 1


@pytest.mark.parametrize(
    ("message", "begun", "failure"),
    [
        (
            "ValueError: no such layer\nTraceback (most recent call last):\n  File ...",
            2,
            "run run-1 failed in round 2: ValueError: no such layer\nTraceback (most recent call "
            "last):\n  File ...",
        ),
        ("not ready after 300 s: pi4-1", 0, "run run-1 failed: not ready after 300 s: pi4-1"),
        ("round 3: no device returned a model", 3, "run run-1 failed: round 3: no device returned"),
    ],
)
def test_the_message_of_a_failed_run_is_shown_whole(
    *,
    status: dict[str, Any],
    displayed: list[str],
    follow: Follow,
    message: str,
    begun: int,
    failure: str,
) -> None:
    failed = status | {"state": "failed", "message": message, "begun": begun}
    with pytest.raises(AnsibleActionFail, match=re.escape(failure)):
        follow([failed])
    assert not any("failed:" in line for line in displayed)  # the failed task shows it


@pytest.mark.parametrize(
    ("changes", "where"),
    [({"begun": 1}, "in round 1"), ({"begun": 0, "state": "waiting"}, "before its first round")],
)
def test_a_run_whose_server_app_is_gone_fails(
    status: dict[str, Any], follow: Follow, changes: dict[str, Any], where: str
) -> None:
    failure = (
        f"run run-1 failed {where}: the ServerApp ended without a result. Its log is that of the "
        "container flowerbed-serverapp, in results/run-1/logs/."
    )
    with pytest.raises(AnsibleActionFail, match=re.escape(failure)):
        follow([status | changes], runs="finished:failed")


def test_a_run_that_never_starts_fails(status: dict[str, Any], follow: Follow) -> None:
    starting = status | {"state": "starting", "begun": 0, "devices": {}}
    with pytest.raises(AnsibleActionFail, match=r"has not started within 180 s: .* no status\."):
        follow([starting])


def test_following_ends_when_a_fault_is_due(status: dict[str, Any], follow: Follow) -> None:
    faults = [{"id": 1, "at_round": 5}, {"id": 2, "at_second": 20}]
    early = status | {"round_started": 100.0, "now": 105.0}
    late = early | {"now": 120.5}
    seen = follow([early, late], injections=faults, injected={})
    assert (seen["due"], seen["over"]) == (faults[1], False)
    # The second command waits until the fault is due, or until its round begins.
    (_, *first), (_, *second) = ([words[n] for n in (0, 3, 5)] for words in seen["asked"])
    assert first == ["0.0", "5"]
    assert second == ["15.0", "5"]
