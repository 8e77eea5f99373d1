"""Follow a run on the coordinator and show a line a round as it is finished.

Whoever follows a run also strikes it with faults: so this ends as well when one is due, and goes on
after it with what it has returned.

An action plugin and not a loop of tasks: a task shows nothing until it ends, and a run takes long.
The waiting is done on the coordinator, one command a look. On a terminal, a table below the rounds
says what each device is doing; elsewhere a line does so when a round takes long.
"""

import io
import json
import math
import shlex
import time
from collections.abc import Iterable, Mapping
from typing import Any

from ansible import constants
from ansible.errors import AnsibleActionFail
from ansible.module_utils.common.text.formatters import human_to_bytes
from ansible.plugins.action import ActionBase
from ansible.utils import color
from ansible.utils.display import Display
from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.table import Table

display = Display()

PATIENCE = 30
"""Seconds that one look waits for the next round."""
REFRESH = 5
"""The same where a table shows the devices."""
START_PATIENCE = 180
"""Seconds after which a run that has written nothing is taken for dead."""
FINAL_STATES = ("completed", "failed")
HEADING = f"{'round':>7}  {'accuracy':>8}  {'loss':>7}  {'seconds':>7}  slowest device"
MOST_DEVICES = 16
"""Rows of the table: all of it must be on the screen to be written over."""
MEBI = 2**20


def _line(row: dict[str, Any], rounds: int) -> str:
    return (
        f"{row['round']:>3}/{rounds:<3}  {row['central_accuracy']:>8.4f}  "
        f"{row['central_loss']:>7.4f}  {row['seconds']:>7.1f}  "
        f"{row['slowest_device']} ({row['slowest_seconds']:.1f} s)"
        + (f", {row['failed']} failed" if row["failed"] else "")
    )


def _doing(entry: dict[str, Any]) -> str:
    """What a device does now, in a word."""
    return str(entry["doing"]).replace("_", " ") if entry["online"] else "offline"


def _since(status: dict[str, Any]) -> str:
    """How long the round has been under way."""
    if status["state"] != "running" or not status.get("round_started"):
        return str(status["state"])
    seconds = status["now"] - status["round_started"]
    return f"round {min(status['round'] + 1, status['rounds'])}/{status['rounds']}, {seconds:.0f} s"


def sign_of_life(status: dict[str, Any]) -> str:
    """One line: who is still working, and who is not."""
    by_word: dict[str, list[str]] = {}
    for name, entry in sorted(status["devices"].items()):
        by_word.setdefault(_doing(entry), []).append(name)
    return f"  {_since(status)}: " + "; ".join(
        f"{word}: {', '.join(names)}" for word, names in sorted(by_word.items(), reverse=True)
    )


def _memory(used: float | None, limit: str | None) -> Any:
    """A bar of the memory in use against the limit."""
    if used is None:
        return "-"
    text = f"{used / MEBI:.0f}"
    if not limit:
        return f"{text} MiB"
    most = human_to_bytes(limit)
    grid = Table.grid(padding=(0, 1))
    style = "red" if used > 0.9 * most else "green"
    bar = ProgressBar(total=most, completed=used, width=16, complete_style=style)
    grid.add_row(bar, f"{text} of {most / MEBI:.0f} MiB")
    return grid


def table(status: dict[str, Any], columns: int) -> str:
    """The devices as rows, those that are worked for first; each line ends with a newline."""
    devices = sorted(
        status["devices"].items(), key=lambda item: (_doing(item[1]) == "waiting", item[0])
    )
    rows = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("device", "class", "state"):
        rows.add_column(heading, no_wrap=True)
    for heading in ("done", "examples/s"):
        rows.add_column(heading, justify="right", no_wrap=True)
    rows.add_column("memory", no_wrap=True)
    for name, entry in devices[:MOST_DEVICES]:
        word, last = _doing(entry), entry["last"] or {}
        style = {"working": "cyan", "waiting": "dim"}.get(word, "red")
        rows.add_row(
            name,
            entry["device_class"],
            f"[{style}]{word}[/]",
            str(sum(entry["outcomes"].get(outcome, 0) for outcome in ("completed", "partial"))),
            f"{last['examples_per_second']:.0f}" if last.get("examples_per_second") else "-",
            _memory(status["memory"].get(name), entry["info"].get("memory")),
        )
    more = len(devices) - MOST_DEVICES
    console = Console(file=io.StringIO(), force_terminal=True, width=columns, height=MOST_DEVICES)
    with console.capture() as captured:
        console.print(
            Group(f"\n[bold]{_since(status)}[/]", rows, f"and {more} more" if more > 0 else "")
        )
    return captured.get()


def due_in(
    strike: Mapping[str, Any], struck: Mapping[str, float], status: Mapping[str, Any]
) -> float:
    """Seconds until a fault is due: 0 or less when it is, infinite where nobody can tell yet.

    Args:
        strike: with `at_round`, with `at_second` since the first round began, or with the
            `seconds` that it comes `after` another one, by that one's id. With none of them it is
            due at once, and even when the run is over.
        struck: when others were, by their ids.
        status: of the run.
    """
    if not {"at_round", "at_second", "after"} & set(strike):
        return 0
    if status["state"] in FINAL_STATES:
        return math.inf
    if "at_round" in strike:
        return 0 if status["begun"] >= strike["at_round"] else math.inf
    if "after" in strike:
        first, later = struck.get(str(strike["after"]), math.inf), strike["seconds"]
    elif not status["begun"]:
        return math.inf
    else:
        rounds = status["history"]
        first = rounds[0]["started"] if rounds else status["round_started"]
        later = strike["at_second"]
    return float(first + later - status["now"])


class Screen:
    """What the user sees: lines that stay, and on a terminal a table that is written over."""

    def __init__(self) -> None:
        # The worker that runs this has no terminal of its own; whether there is one, Ansible has
        # found out for its colours, and what is displayed gets there through the main process.
        self.live = color.ANSIBLE_COLOR and not constants.ANSIBLE_FORCE_COLOR
        self._height = 0

    def clear(self) -> None:
        """Take the table away."""
        if self._height:
            display.display(f"\x1b[{self._height}A\x1b[J", newline=False, screen_only=True)
            self._height = 0

    def show(self, lines: Iterable[str], status: dict[str, Any]) -> None:
        """Add lines, and show the state below them."""
        lines = list(lines)
        self.clear()
        for line in lines:
            display.display(line)
        if status["state"] in FINAL_STATES or not status["devices"]:
            return
        if self.live:
            text = table(status, display.columns)
            self._height = text.count("\n")
            display.display(text, screen_only=True)
        elif not lines:
            display.display(sign_of_life(status))


class ActionModule(ActionBase):
    """`follow_run: run=NAME`: returns the run's last status; fails when the run has failed.

    With `strikes`, of which some have been `struck` (id to time), it also returns when one is due:
    `due` is that one, else there is none. `shown` are the rounds that have been shown, to be given
    to the next call, and `over` says whether one makes sense.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("run", "strikes", "struck", "shown"))

    def _exec(self, container: str, *argv: str) -> dict[str, Any]:
        """The JSON that a command in a container prints; no module, which costs more than it."""
        command = ["docker", "exec", container, *argv]
        result = self._low_level_execute_command(shlex.join(command))
        if result["rc"] != 0:
            reason = result["stderr"].strip() or result["stdout"].strip()
            raise AnsibleActionFail(f"{shlex.join(command)} failed: {reason}")
        answer: dict[str, Any] = json.loads(result["stdout"])
        return answer

    def _status(self, run: str, after: int, patience: float, begun: int = 0) -> dict[str, Any]:
        options = ["--after", str(after), "--timeout", f"{patience:.1f}"]
        options += ["--begun", str(begun)] if begun else []
        return self._exec("flowerbed-metrics", "python", "-m", "flowerbed.follow", run, *options)

    def _dead(self) -> bool:
        """Whether Flower knows of no run that is under way."""
        try:
            answer = self._exec("flowerbed-superlink", "flwr", "list", "lab", "--format", "json")
        except AnsibleActionFail:  # the SuperLink itself may be on its way back
            return False
        return all(run["status"].startswith("finished") for run in answer.get("runs", []))

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        """Poll until the run is over."""
        super().run(tmp, task_vars)
        screen = Screen()
        try:
            return self._follow(self._task.args["run"], screen)
        finally:
            screen.clear()

    def _look(
        self, name: str, shown: int, most: float, soon: float, pending: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """The status when there is something new, after `most` seconds, or when a fault is due.

        Args:
            soon: seconds until the next one of which that is known.
        """
        rounds = [strike["at_round"] for strike in pending if "at_round" in strike]
        # Seconds are counted from the first round's begin.
        if math.isinf(soon):
            rounds += [1 for strike in pending if "at_second" in strike]
        return self._status(name, shown, min(most, max(soon, 0.0)), min(rounds, default=0))

    def _give_up(self, name: str, status: dict[str, Any], seconds: float) -> None:
        """Fail where the run has failed, or has not begun after so many seconds."""
        if status["state"] == "failed":
            raise AnsibleActionFail(f"run {name} failed: {status['message']}")
        if status["state"] == "starting" and seconds > START_PATIENCE:
            raise AnsibleActionFail(f"run {name} has not begun after {START_PATIENCE} s")

    def _follow(self, name: str, screen: Screen) -> dict[str, Any]:
        started = last_sign = last_shown = time.monotonic()
        told = self._task.args
        struck = told.get("struck") or {}
        pending = [one for one in told.get("strikes") or () if str(one["id"]) not in struck]
        shown, message = int(told.get("shown") or 0), ""
        # When a fault is due is known from the first look on.
        soon = 0.0 if pending else math.inf
        most = REFRESH if screen.live else PATIENCE
        while True:
            status = self._look(name, shown, most, soon, pending)
            rows = status["history"]
            lines = [HEADING] if rows and not shown else []
            lines += [_line(row, status["rounds"]) for row in rows[shown:]]
            if status["message"] not in ("", message):
                message = status["message"]
                lines.append(f"{status['state']}: {message}")
            shown = len(rows)
            now = time.monotonic()
            if lines or screen.live or now > last_shown + most - 1:
                last_shown = now
                screen.show(lines, status)
            seen = {"changed": False, "status": status, "shown": shown}
            wait = {one["id"]: due_in(one, struck, status) for one in pending}
            soon = min(wait.values(), default=math.inf)
            if soon <= 0:
                (due, *_) = sorted(pending, key=lambda one: wait[one["id"]])
                return seen | {"over": False, "due": due}
            if status["state"] == "completed":
                return seen | {"over": True, "due": {}}
            self._give_up(name, status, now - started)
            if lines:
                last_sign = now
            elif now > last_sign + PATIENCE:
                last_sign = now
                # It may have ended between the two looks.
                if self._dead() and self._status(name, shown, 0)["state"] not in FINAL_STATES:
                    raise AnsibleActionFail(f"run {name} ended without a word in round {shown + 1}")
