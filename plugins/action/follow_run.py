"""Follow a run on the coordinator and show a line for each round that is finished.

The playbook that follows a run also injects its faults: the plugin returns when a fault is due, and
the next call goes on with what this one has returned.

This is an action plugin because a task shows nothing until it ends, and a run takes long. One
command at a time waits on the coordinator for the next round. On a terminal, a table below the
rounds shows what each device is doing; elsewhere a line shows it when a round takes long.
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
"""Seconds that one command waits for the next round."""
REFRESH = 5
"""Seconds that it waits where a table shows the devices."""
START_PATIENCE = 180
"""Seconds after which a run that has no status is given up."""
FINAL_STATES = ("completed", "failed")
HEADING = f"{'round':>7}  {'accuracy':>8}  {'loss':>7}  {'seconds':>7}  slowest device"
MOST_DEVICES = 16
"""Rows of the table: it must fit on the screen, where the next one overwrites it."""
MEBI = 2**20
_LOG = "Its log is that of the container flowerbed-serverapp, in results/{}/logs/."


def _model(row: dict[str, Any], of: str) -> str:
    """Accuracy or loss: of the central evaluation, else the mean over the devices, else "-"."""
    for value in (row[f"central_{of}"], row[of]):
        if value is not None:
            return f"{value:.4f}"
    return "-"


def line_of(row: dict[str, Any], rounds: int) -> str:
    """The line of a finished round.

    Args:
        row: of rounds.csv.
        rounds: that the run will have; 0: unknown.
    """
    slowest = f"{row['slowest_device']} ({row['slowest_seconds']:.1f} s)"
    return (
        f"{row['round']:>3}/{rounds or '-':<3}  {_model(row, 'accuracy'):>8}  "
        f"{_model(row, 'loss'):>7}  {row['seconds']:>7.1f}  "
        + (slowest if row["slowest_device"] else "-")
        + (f", {row['failed']} failed" if row["failed"] else "")
    )


def _doing(entry: dict[str, Any]) -> str:
    """What a device does now, in a word."""
    return str(entry["doing"]).replace("_", " ") if entry["online"] else "offline"


def _progress(status: dict[str, Any]) -> str:
    """The round that is under way, and for how long."""
    if status["state"] != "running" or not status.get("round_started"):
        return str(status["state"])
    seconds = status["now"] - status["round_started"]
    number = f"{status['begun']}/{status['rounds'] or '-'}"
    if status["round"] >= status["begun"]:
        return f"round {number} is finished"
    return f"round {number}, {seconds:.0f} s"


def devices_line(status: dict[str, Any]) -> str:
    """What the devices do, in one line."""
    by_word: dict[str, list[str]] = {}
    for name, entry in sorted(status["devices"].items()):
        by_word.setdefault(_doing(entry), []).append(name)
    return f"  {_progress(status)}: " + "; ".join(
        f"{word}: {', '.join(names)}" for word, names in sorted(by_word.items(), reverse=True)
    )


def _memory(used: float | None, limit: str | None) -> Any:
    """A bar of the memory in use relative to the limit; "-" where Prometheus does not know it."""
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
    """A table of the devices, those that do not wait first; each line ends with a newline."""
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
            Group(f"\n[bold]{_progress(status)}[/]", rows, f"and {more} more" if more > 0 else "")
        )
    return captured.get()


def due_in(
    fault: Mapping[str, Any], injected: Mapping[str, float], status: Mapping[str, Any]
) -> float:
    """Seconds until a fault is due: 0 or less if it is due, infinite if that cannot be known yet.

    Args:
        fault: with `at_round`, with `at_second` after the start of the first round, or with the
            `seconds` that it comes `after` another fault, which is given by its id. Without any of
            them it is due at once, also after the end of the run.
        injected: when other faults were injected, by their ids.
        status: of the run.
    """
    if not {"at_round", "at_second", "after"} & set(fault):
        return 0
    if status["state"] in FINAL_STATES:
        return math.inf
    if "at_round" in fault:
        return 0 if status["begun"] >= fault["at_round"] else math.inf
    if "after" in fault:
        start, delay = injected.get(str(fault["after"]), math.inf), fault["seconds"]
    elif not status["begun"]:
        return math.inf
    else:
        rounds = status["history"]
        start = rounds[0]["started"] if rounds else status["round_started"]
        delay = fault["at_second"]
    return float(start + delay - status["now"])


class Screen:
    """What the user sees: lines that stay, and on a terminal a table that is overwritten."""

    def __init__(self) -> None:
        # Ansible's worker process has no terminal: what it displays gets there through the main
        # process, which has looked for a terminal to decide on colours.
        self.live = color.ANSIBLE_COLOR and not constants.ANSIBLE_FORCE_COLOR
        self._height = 0

    def clear(self) -> None:
        """Remove the table."""
        if self._height:
            display.display(f"\x1b[{self._height}A\x1b[J", newline=False, screen_only=True)
            self._height = 0

    def show(self, lines: Iterable[str], status: dict[str, Any]) -> None:
        """Add lines, and show the state of the devices below them."""
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
            display.display(devices_line(status))


class ActionModule(ActionBase):
    """`follow_run: run=NAME` returns the run's last status, and fails if the run fails.

    With `injections`, the faults that are planned, it also returns when one of them is due, as
    `due`. `injected` has those that have been injected: id to time. `shown`, the number of rounds
    that have been shown, is passed to the next call; `over` says that the run has ended.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("run", "injections", "injected", "shown"))

    def _exec(self, container: str, *argv: str) -> dict[str, Any]:
        """Return the JSON that a command in a container prints.

        A module would take longer than the command.
        """
        command = ["docker", "exec", container, *argv]
        result = self._low_level_execute_command(shlex.join(command))
        if result["rc"] != 0:
            reason = result["stderr"].strip() or result["stdout"].strip()
            raise AnsibleActionFail(f"{shlex.join(command)} failed: {reason}")
        printed: dict[str, Any] = json.loads(result["stdout"])
        return printed

    def _status(self, run: str, after: int, patience: float, begun: int = 0) -> dict[str, Any]:
        options = ["--after", str(after), "--timeout", f"{patience:.1f}"]
        options += ["--begun", str(begun)] if begun else []
        return self._exec(
            "flowerbed-metrics", "python", "-m", "flowerbed.server.follow", run, *options
        )

    def _dead(self) -> bool:
        """Whether no run is under way in Flower."""
        try:
            known = self._exec("flowerbed-superlink", "flwr", "list", "lab", "--format", "json")
        except AnsibleActionFail:  # the SuperLink may be restarting
            return False
        return all(run["status"].startswith("finished") for run in known.get("runs", []))

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        """Follow the run until it is over or a fault is due."""
        super().run(tmp, task_vars)
        screen = Screen()
        try:
            return self._follow(self._task.args["run"], screen)
        finally:
            screen.clear()

    def _wait(
        self, name: str, shown: int, most: float, soon: float, pending: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """The status when a round is finished, after `most` seconds, or when a fault is due.

        Args:
            soon: seconds until the next fault whose time is known.
            pending: faults that have not been injected.
        """
        rounds = [fault["at_round"] for fault in pending if "at_round" in fault]
        # Seconds count from the start of the first round.
        if math.isinf(soon):
            rounds += [1 for fault in pending if "at_second" in fault]
        return self._status(name, shown, min(most, max(soon, 0.0)), min(rounds, default=0))

    def _check(self, name: str, status: dict[str, Any], seconds: float) -> None:
        """Fail if the run has failed, or has no status after so many seconds."""
        if status["state"] == "failed":
            message = status["message"]
            known = not status["begun"] or message.startswith("round ")
            where = "" if known else f" in round {status['begun']}"
            raise AnsibleActionFail(f"run {name} failed{where}: {message}")
        if status["state"] == "starting" and seconds > START_PATIENCE:
            raise AnsibleActionFail(
                f"run {name} has not started within {START_PATIENCE} s: the ServerApp has written "
                f"no status. {_LOG.format(name)}"
            )

    def _check_alive(self, name: str, shown: int) -> None:
        """Fail if the run is over in Flower and its ServerApp has not said so."""
        if not self._dead():
            return
        status = self._status(name, shown, 0)  # it may have ended between the two commands
        if status["state"] in FINAL_STATES:
            return
        where = f"in round {status['begun']}" if status["begun"] else "before its first round"
        raise AnsibleActionFail(
            f"run {name} failed {where}: the ServerApp ended without a result. {_LOG.format(name)}"
        )

    def _follow(self, name: str, screen: Screen) -> dict[str, Any]:
        started = last_checked = last_shown = time.monotonic()
        arguments = self._task.args
        injected = arguments.get("injected") or {}
        faults = arguments.get("injections") or ()
        pending = [fault for fault in faults if str(fault["id"]) not in injected]
        shown, message = int(arguments.get("shown") or 0), ""
        # The first command returns at once: only its status tells when faults are due.
        soon = 0.0 if pending else math.inf
        most = REFRESH if screen.live else PATIENCE
        while True:
            status = self._wait(name, shown, most, soon, pending)
            rows = status["history"][: status["settled"]]
            lines = [HEADING] if rows and not shown else []
            lines += [line_of(row, status["rounds"]) for row in rows[shown:]]
            # The message of a failed run is that of the task's failure.
            if status["state"] != "failed" and status["message"] not in ("", message):
                message = status["message"]
                lines.append(f"{status['state']}: {message}")
            shown = max(shown, len(rows))
            now = time.monotonic()
            if lines or screen.live or now > last_shown + most - 1:
                last_shown = now
                screen.show(lines, status)
            seen = {"changed": False, "status": status, "shown": shown}
            wait = {fault["id"]: due_in(fault, injected, status) for fault in pending}
            soon = min(wait.values(), default=math.inf)
            if soon <= 0:
                due = min(pending, key=lambda fault: wait[fault["id"]])
                return seen | {"over": False, "due": due}
            if status["state"] == "completed":
                return seen | {"over": True, "due": {}}
            self._check(name, status, now - started)
            if lines:
                last_checked = now
            elif now > last_checked + PATIENCE:
                last_checked = now
                self._check_alive(name, shown)
