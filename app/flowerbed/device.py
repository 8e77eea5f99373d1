"""PID 1 of a device's container: runs the SuperNode and the trainer, and knows who died of what.

    python -m flowerbed.device --shard DIRECTORY -- ARGUMENTS OF flower-supernode

Either child is started again when it ends, with a growing pause. A trainer's death is written
down with its cause before the next one starts, so that the waiting ClientApp can report it. The
SuperNode and all that it starts are forks of this process (`flowerbed.forkserver`).
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flowerbed.forkserver import ForkServer
from flowerbed.handoff import DEATH_RECORD, RUN_DIRECTORY
from flowerbed.quota import out_of_memory_kills, read_quota

log = logging.getLogger("flowerbed.device")

HEALTHY = RUN_DIRECTORY / "healthy"
"""Exists while both children run and the SuperNode answers: the container's health check."""
_HEALTH_URL = "http://127.0.0.1:9094/health"
_HEALTH_INTERVAL = 10.0
_LONGEST_PAUSE = 15.0
"""A SuperNode that was killed is refused until its session has expired, about a minute later."""
_STEADY = 120.0
_STOP_PATIENCE = 8.0
_OOM_SCORE_ADJUST = 900
_DECOY = ["sleep", "infinity"]
_INTERVAL = 0.25


@dataclass
class Child:
    """A process that is kept running.

    Attributes:
        begin: starts it as the leader of a process group, so that what it starts ends with it, and
            returns its number.
        pid: its number; 0 while it does not run.
    """

    name: str
    begin: Callable[[], int]
    pid: int = 0
    started: float = 0.0
    start_at: float = 0.0
    pause: float = 1.0

    def start(self) -> None:
        """Start it."""
        self.pid = self.begin()
        self.started = time.monotonic()
        log.info("%s started", self.name)

    def ended(self, status: int) -> None:
        """Take note of its end and plan the next start."""
        log.error("%s ended: %s", self.name, describe(status))
        _signal_group(self.pid, signal.SIGKILL)
        steady = time.monotonic() - self.started > _STEADY
        self.pause = 1.0 if steady else min(self.pause * 2, _LONGEST_PAUSE)
        self.start_at = time.monotonic() + self.pause
        self.pid = 0


def begin_trainer(shard: Path) -> int:
    """Start a trainer, the one to die when memory runs out, and a decoy in its process group.

    The trainer can be started again without the server losing the device. From when its last thread
    ends to when its first page is free, the kernel no longer sees it as a victim (Linux 6.18,
    `css_task_iter_advance`), and who wants memory then brings down the next one: the greatest
    process of the container, which is the supervisor, if it is not the decoy.
    """
    command = [sys.executable, "-m", "flowerbed.trainer", str(shard)]
    # numpy's and TensorFlow's libraries read it when they are loaded.
    threads = {"OMP_NUM_THREADS": str(read_quota().threads)}
    trainer = os.posix_spawn(sys.executable, command, os.environ | threads, setpgroup=0)
    decoy = os.posix_spawnp(_DECOY[0], _DECOY, os.environ, setpgroup=trainer)
    for pid, adjust in ((trainer, _OOM_SCORE_ADJUST), (decoy, _OOM_SCORE_ADJUST - 10)):
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(adjust))
    return trainer


def describe(status: int) -> str:
    """A wait status in words."""
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def record_death(cause: str, record: Path = DEATH_RECORD) -> None:
    """Write down what the trainer died of; replaced whole, so that no reader sees half."""
    draft = record.with_suffix(".draft")
    draft.write_text(json.dumps({"cause": cause, "time": time.time()}))
    draft.replace(record)


class Supervisor:
    """Keeps the SuperNode and the trainer running until the container is told to stop."""

    def __init__(self, shard: Path, supernode_arguments: list[str]) -> None:
        self.stopping: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: self.stopping.append(received))
        self.trainer = Child("trainer", lambda: self._begin_trainer(shard))
        # It loads what it needs while this process does.
        self.trainer.start()
        self.forkserver = ForkServer()
        command = ["flower-supernode", *supernode_arguments]
        self.supernode = Child("SuperNode", lambda: self.forkserver.fork(command))
        self.children = (self.trainer, self.supernode)
        self._next_health = 0.0

    def _begin_trainer(self, shard: Path) -> int:
        self._kills = out_of_memory_kills()
        return begin_trainer(shard)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for child in self.children:
                if child.pid == pid:
                    if child is self.trainer:
                        killed = out_of_memory_kills() > self._kills
                        cause = "out_of_memory" if killed else describe(status)
                        record_death(cause)
                        log.error("the trainer died of: %s", cause)
                    child.ended(status)

    def _check_health(self) -> None:
        if time.monotonic() < self._next_health:
            return
        self._next_health = time.monotonic() + _HEALTH_INTERVAL
        healthy = all(child.pid for child in self.children)
        try:
            with urllib.request.urlopen(_HEALTH_URL, timeout=5):
                pass
        except (urllib.error.URLError, OSError):
            healthy = False
        if healthy:
            HEALTHY.touch()
        else:
            HEALTHY.unlink(missing_ok=True)
            self._next_health = time.monotonic() + 1.0

    def run(self) -> None:
        """Supervise until SIGTERM or SIGINT."""
        while not self.stopping:
            for child in self.children:
                if not child.pid and time.monotonic() >= child.start_at:
                    child.start()
            self._reap()
            self._check_health()
            self.forkserver.serve(_INTERVAL, self.supernode.pid)
        self._stop()

    def _stop(self) -> None:
        log.info("stopping")
        for child in self.children:
            if child.pid:
                _signal_group(child.pid, signal.SIGTERM)
        left = {child.pid for child in self.children} - {0}
        deadline = time.monotonic() + _STOP_PATIENCE
        while left and time.monotonic() < deadline:
            left.discard(os.waitpid(-1, os.WNOHANG)[0])
            time.sleep(0.1)


def main() -> None:
    """Parse the command line and supervise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard", type=Path, required=True)
    parser.add_argument("supernode", nargs="+", help="arguments of flower-supernode")
    arguments = parser.parse_args()
    # Not of the root logger: what is forked would say everything twice.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    own = logging.getLogger("flowerbed")
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    own.propagate = False
    RUN_DIRECTORY.mkdir(parents=True, exist_ok=True)
    Supervisor(arguments.shard, arguments.supernode).run()


if __name__ == "__main__":
    main()
