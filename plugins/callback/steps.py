"""What a playbook prints: a line for each play, with its seconds and its changes.

A step is a play. Its line is printed when it ends; a step of which no task did anything has none.
What has to be read while a step runs stands before that line, indented, below the step's name:
messages of `debug`, failures, diffs, and after ten seconds without any of them the task that is
under way. Only whole lines are printed, so that a terminal and a log file show the same.

None of the callbacks in the package `ansible` has seconds for steps and hides tasks that change
nothing. With `-v`, the output is Ansible's ordinary one.
"""

import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ansible import constants, context
from ansible.playbook.task_include import TaskInclude
from ansible.plugins.callback import CallbackBase
from ansible.plugins.callback.default import CallbackModule as Ordinary
from ansible.utils.display import Display

DOCUMENTATION = """
name: steps
type: stdout
short_description: Print a line for each play, with its seconds and its changes
description:
  - Prints messages, failures, warnings and diffs as they come, and names tasks that take long.
  - Prints what the callback P(ansible.builtin.default#callback) prints if the verbosity is not 0.
extends_documentation_fragment:
  - default_callback
  - result_format_callback
"""

PATIENCE = 10.0
"""Seconds without a line after which the task that is under way is named, for the first time."""
SHOWS_ITSELF = "follow_"
"""Prefix of actions that print lines while they run. `run_container` prints lines with `wait`."""
WIDTH = 60
"""Columns for the name of a step."""
MOST_HOSTS = 5
"""Hosts that are named in a line."""
SILENT_ACTIONS = ("ansible.builtin.set_fact", "set_fact")
"""Actions that do not make a step worth a line."""
HIDDEN_KEYS = (
    *("msg", "censored", "changed", "failed", "unreachable", "skipped", "results"),
    *("item", "ansible_loop_var", "stdout_lines", "stderr_lines", "start", "end", "delta"),
)
"""Of a failed task's result: what is printed otherwise, or says nothing of the failure."""


@dataclass
class Step:
    """The play that is under way.

    Attributes:
        name: of the play.
        began: seconds of a monotonic clock.
        hosts: on which a task of it was started.
        done: whether a task has done anything.
        headed: whether its name has been printed.
        changed: changes, counted as in the recap.
        failed: failures that nothing handles.
    """

    name: str
    began: float = field(default_factory=time.monotonic)
    hosts: set[str] = field(default_factory=set)
    done: bool = False
    headed: bool = False
    changed: int = 0
    failed: int = 0


@dataclass
class Work:
    """The task that is under way.

    Attributes:
        name: of the task.
        shows_itself: whether it prints lines of its own.
        began: seconds of a monotonic clock.
        busy: hosts on which it runs.
        patience: seconds without a line after which it is named.
    """

    name: str
    shows_itself: bool = False
    began: float = field(default_factory=time.monotonic)
    busy: set[str] = field(default_factory=set)
    patience: float = PATIENCE


def names_of(hosts: Iterable[str]) -> str:
    """Hosts in a line: the first ones by name, and how many there are beside them."""
    names = sorted(hosts)
    more = len(names) - MOST_HOSTS
    return ", ".join(names[:MOST_HOSTS]) + (f" and {more} more" if more > 0 else "")


def line_of(name: str, seconds: float, changed: int, failed: int, checking: bool) -> str:
    """The line of a step that has ended."""
    counts = [f"{changed} {'would change' if checking else 'changed'}"] if changed else []
    counts += [f"{failed} failed"] if failed else []
    return f"{name:<{WIDTH}} {seconds:>7.1f} s  {', '.join(counts)}".rstrip()


def _line(entry: Any) -> str | None:
    """A value, or a mapping of values, in a line; None if it is nested deeper."""
    if isinstance(entry, Mapping):
        if any(isinstance(value, Mapping | list) for value in entry.values()):
            return None
        return ", ".join(f"{key}: {value}" for key, value in entry.items())
    return None if isinstance(entry, list) else str(entry)


def is_rescued(task: Any) -> bool:
    """Whether a block around a task, or around an include that it comes from, has a rescue."""
    inner, outer = task, task._parent  # noqa: SLF001  # Ansible has no public name for it
    while outer:
        if getattr(outer, "rescue", None) and any(
            each._uuid == inner._uuid  # noqa: SLF001  # a block and its tasks are copied
            for each in outer.block
        ):
            return True
        inner, outer = outer, outer._parent  # noqa: SLF001
    return False


class CallbackModule(CallbackBase):
    """The output without `-v`. Ansible finds the class, and its options, by this name."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "steps"

    def __init__(self) -> None:
        super().__init__()
        self._total = Step("Total")
        self._step = self._total
        self._work = Work("")
        # What is printed when the task is over on all hosts: text to hosts.
        self._notes: dict[str, list[str]] = {}
        # Tasks and hosts whose differences have been printed.
        self._diffs: set[tuple[str, str]] = set()
        # Why items of a task have failed, by its host.
        self._items: dict[str, list[str]] = {}
        # The host on which a task has failed first for a reason.
        self._failures: dict[tuple[str, str], str] = {}
        self._last_line = time.monotonic()
        self._lock = threading.RLock()
        self._over = threading.Event()

    # --- lines -----------------------------------------------------------------------------

    def _say(self, text: str, color: str | None = None) -> None:
        """Print lines of the step, below its name."""
        with self._lock:
            self._head()
            self._display.display(textwrap.indent(text, "  "), color=color)
            self._last_line = time.monotonic()

    def _head(self) -> None:
        """Print the name of the step, once."""
        if self._step.headed or self._step is self._total:
            return
        self._step.headed = True
        self._display.display(self._step.name)

    def _note(self, result: Any, text: str) -> None:
        self._notes.setdefault(text, []).append(result.host.get_name())

    def _print_notes(self) -> None:
        """Print what the task has said, with its hosts unless the step has one only."""
        notes, self._notes = self._notes, {}
        for text, hosts in notes.items():
            if len(self._step.hosts) > 1 and not text.startswith(hosts[0]):
                space = "\n" if "\n" in text else " "
                text = f"{names_of(hosts)}:{space}{text}"  # noqa: PLW2901
            self._say(text)

    def _end_step(self, following: Step) -> None:
        self._print_notes()
        step = self._step
        if step is not self._total and (step.done or step.headed):
            self._print_line(step)
        self._total.changed += step.changed
        self._total.failed += step.failed
        with self._lock:
            self._step = following
            self._last_line = time.monotonic()

    def _print_line(self, step: Step) -> None:
        color = constants.COLOR_OK
        if step.changed:
            color = constants.COLOR_CHANGED
        if step.failed:
            color = constants.COLOR_ERROR
        seconds = time.monotonic() - step.began
        checking = context.CLIARGS["check"]
        line = line_of(step.name, seconds, step.changed, step.failed, checking)
        self._display.display(line, color=color)

    def _watch(self) -> None:
        """Show what has been printed, and name the task if nothing has been for a while."""
        while not self._over.wait(1):
            with self._lock:
                # Ansible does not flush, and Python keeps kilobytes back for a file or a pipe.
                try:
                    sys.stdout.flush()
                except OSError:  # Nobody reads the pipe any more.
                    return
                work, now = self._work, time.monotonic()
                quiet_since = max(self._last_line, work.began)
                if work.shows_itself or now - quiet_since < work.patience:
                    continue
                work.patience *= 2
                where = f", on {names_of(work.busy)}" if len(self._step.hosts) > 1 else ""
                self._say(f"{work.name}: {now - work.began:.0f} s{where}")

    # --- plays and tasks -------------------------------------------------------------------

    def v2_playbook_on_start(self, playbook: Any) -> None:  # noqa: ARG002
        """Begin to watch for silence."""
        threading.Thread(target=self._watch, daemon=True).start()

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """End the last step, and begin another one."""
        self._end_step(Step(play.get_name().strip()))

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:  # noqa: ARG002
        """Remember what is under way."""
        self._print_notes()
        self._items.clear()
        action = task.action.rpartition(".")[2]
        programs = action == "run_container" and "wait" in task.args
        shows_itself = action.startswith(SHOWS_ITSELF) or programs
        with self._lock:
            self._work = Work(task.name or task.action, shows_itself)
            if shows_itself:
                self._head()

    def v2_playbook_on_handler_task_start(self, task: Any) -> None:
        """Remember what is under way."""
        self.v2_playbook_on_task_start(task, False)

    def v2_runner_on_start(self, host: Any, task: Any) -> None:  # noqa: ARG002
        """Remember where it is under way."""
        with self._lock:
            self._step.hosts.add(host.get_name())
            self._work.busy.add(host.get_name())

    # --- results ---------------------------------------------------------------------------

    def _take(self, result: Any) -> None:
        """What all results of a task on a host have in common."""
        with self._lock:
            self._work.busy.discard(result.host.get_name())
        self._warn(result)

    def _warn(self, result: Any) -> None:
        if result.result.get("warnings") or result.result.get("deprecations"):
            with self._lock:
                self._head()
                self._handle_warnings(result.result)

    def v2_runner_on_ok(self, result: Any) -> None:
        """Count the change, and note a message or what would change."""
        self._take(result)
        if isinstance(result.task, TaskInclude):
            return
        self._step.changed += result.is_changed()
        self._step.done |= result.is_changed() or result.task.action not in SILENT_ACTIONS
        if not result.task.loop:
            self._note_message(result)
        told = (result.task._uuid, result.host.get_name()) in self._diffs  # noqa: SLF001
        if context.CLIARGS["check"] and result.is_changed() and not told:
            self._note(result, f"would change: {result.task_name}")

    def v2_runner_item_on_ok(self, result: Any) -> None:
        """Note the message of an item."""
        self._warn(result)
        self._note_message(result)

    def _note_message(self, result: Any) -> None:
        """Note what `debug` has to say."""
        if not self._run_is_verbose(result):
            return
        self._clean_results(result.result, result.task.action)
        self._note(result, self._message(result.result.get("msg", result.result)))

    def _message(self, message: Any) -> str:
        """A message as a person writes it: text, a line for each entry of a list, or else YAML."""
        if isinstance(message, str):
            return message.strip("\n")
        if isinstance(message, list):
            lines = [_line(entry) for entry in message]
            if all(line is not None for line in lines):
                return "\n".join(map(str, lines))
        if not isinstance(message, Mapping):
            message = {"msg": message}
        return textwrap.dedent(self._dump_results(message)).strip("\n")

    def v2_runner_on_skipped(self, result: Any) -> None:
        """Pass its warnings on."""
        self._take(result)

    def v2_runner_item_on_skipped(self, result: Any) -> None:
        """Pass its warnings on."""
        self._warn(result)

    def v2_runner_item_on_failed(self, result: Any) -> None:
        """Keep why it failed for the failure of the task."""
        self._warn(result)
        reason = f"{self._get_item_label(result.result)}: {self._reason(result)}"
        self._items.setdefault(result.host.get_name(), []).append(reason)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """Print the failure: all of it, unless it is ignored or rescued."""
        self._take(result)
        handled = "ignored" if ignore_errors else "handled" if is_rescued(result.task) else ""
        if ignore_errors:
            self._step.changed += result.is_changed()  # as in the recap
        self._print_failure(result, "FAILED", handled)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """Print why a host cannot be reached."""
        self._take(result)
        handled = "ignored" if result.task.ignore_unreachable else ""
        self._print_failure(result, "UNREACHABLE", handled)

    def _print_failure(self, result: Any, word: str, handled: str) -> None:
        self._print_notes()
        self._step.done = True
        host = result.host.get_name()
        items = self._items.pop(host, [])
        reason = "\n".join(items) or self._reason(result)
        where = f"[{self.host_label(result)}]: {result.task_name}"
        if handled:
            first, _, _ = reason.partition("\n")
            self._say(f"{word.lower()}, {handled} {where}: {first}", constants.COLOR_WARN)
            return
        self._step.failed += 1
        first = self._failures.setdefault((result.task._uuid, reason), host)  # noqa: SLF001
        reason = textwrap.indent(reason if first == host else f"as on {first}", "  ")
        lines = [f"{word} {where}", result.task.get_path(), reason]
        self._say("\n".join(lines), constants.COLOR_ERROR)

    def _reason(self, result: Any) -> str:
        """Why a task or an item has failed: its message, and what else the module has returned."""
        self._clean_results(result.result, result.task.action)
        told = self._dump_results(result.result, serialize=False)
        parts = [self._message(told[key]) for key in ("msg", "censored") if told.get(key)]
        for key, value in told.items():
            if key in HIDDEN_KEYS or value == "":
                continue
            if isinstance(value, str):  # YAML would fold long lines.
                parts.append(f"{key}:" + (f"\n{value}" if "\n" in value else f" {value}"))
            else:
                parts.append(self._message({key: value}))
        return "\n".join(parts)

    def v2_on_file_diff(self, result: Any) -> None:
        """Print what a task or an item changes, or would change."""
        if not (result.result.get("changed") and result.result.get("diff")):
            return
        diff = self._get_diff(result.result["diff"]).rstrip("\n")
        if diff:
            verb = "would change" if context.CLIARGS["check"] else "changed"
            self._diffs.add((result.task._uuid, result.host.get_name()))  # noqa: SLF001
            self._say(f"{verb} [{self.host_label(result)}]: {result.task_name}\n{diff}")

    # --- the end ---------------------------------------------------------------------------

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Print the total, and Ansible's recap, which scripts and tests read."""
        self._end_step(self._total)
        self._over.set()
        self._print_line(self._total)
        Ordinary.v2_playbook_on_stats(self, stats)


# The command line has been read when Ansible loads this file.
if Display().verbosity:
    CallbackModule = Ordinary  # type: ignore[misc]  # Ansible looks for a class of this name
