"""PID 1 of a device's container: runs SuperNode, fork server and trainer; knows who died of what.

    python -m flowerbed.device --shard DIRECTORY -- ARGUMENTS OF flower-supernode

Each child is started again when it ends, with a growing pause. A trainer's death is written
down with its cause before the next one starts, so that the waiting ClientApp can report it.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from flowerbed.handoff import CLIENTAPPS_SOCKET, DEATH_RECORD, RUN_DIRECTORY
from flowerbed.quota import out_of_memory_kills, read_quota

log = logging.getLogger("flowerbed.device")

HEALTHY = RUN_DIRECTORY / "healthy"
"""Exists while all children run and the SuperNode answers: the container's health check."""
_HEALTH_URL = "http://127.0.0.1:9094/health"
_HEALTH_INTERVAL = 10.0
_LONGEST_PAUSE = 15.0
"""A SuperNode that was killed is refused until its session has expired, about a minute later."""
_STEADY = 120.0
_STOP_PATIENCE = 8.0
_OOM_SCORE_ADJUST = 900
_PROGRAMS = Path(__file__).parent / "bin"


@dataclass
class Child:
    """A process that is kept running; it is started when the file `after` is there."""

    name: str
    command: list[str]
    after: Path | None = None
    oom_score_adjust: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    start_at: float = 0.0
    pause: float = field(default=1.0)

    def may_start(self) -> bool:
        """Whether it does not run, and nothing keeps it from being started."""
        pausing = time.monotonic() < self.start_at
        return not self.process and not pausing and (self.after is None or self.after.exists())

    def start(self) -> None:
        """Start the process in a session of its own, so that its children end with it."""
        self.process = subprocess.Popen(
            self.command, start_new_session=True, env=os.environ | self.environment
        )
        self.started = time.monotonic()
        if self.oom_score_adjust:
            path = Path(f"/proc/{self.process.pid}/oom_score_adj")
            path.write_text(str(self.oom_score_adjust))
        log.info("%s started", self.name)

    def ended(self, status: int) -> None:
        """Take note of its end and plan the next start."""
        log.error("%s ended: %s", self.name, describe(status))
        if self.process:
            _signal_group(self.process.pid, signal.SIGKILL)
        steady = time.monotonic() - self.started > _STEADY
        self.pause = 1.0 if steady else min(self.pause * 2, _LONGEST_PAUSE)
        self.start_at = time.monotonic() + self.pause
        self.process = None


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
        # The trainer is the one to die when memory runs out: it can be started again without
        # the server losing the device.
        self.trainer = Child(
            "trainer",
            [sys.executable, "-m", "flowerbed.trainer", str(shard)],
            oom_score_adjust=_OOM_SCORE_ADJUST,
            # numpy's and TensorFlow's libraries read it when they are loaded.
            environment={"OMP_NUM_THREADS": str(read_quota().threads)},
        )
        self.forkserver = Child("fork server", [sys.executable, "-m", "flowerbed.forkserver"])
        self.supernode = Child(
            "SuperNode",
            ["flower-supernode", *supernode_arguments],
            # Who is known to the server can answer.
            after=CLIENTAPPS_SOCKET,
            environment={"PATH": f"{_PROGRAMS}:{os.environ['PATH']}"},
        )
        self.children = (self.trainer, self.forkserver, self.supernode)
        self._kills = out_of_memory_kills()
        self._next_health = 0.0

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for child in self.children:
                if child.process and child.process.pid == pid:
                    child.process.returncode = os.waitstatus_to_exitcode(status)
                    if child is self.trainer:
                        kills = out_of_memory_kills()
                        cause = "out_of_memory" if kills > self._kills else describe(status)
                        self._kills = kills
                        record_death(cause)
                        log.error("the trainer died of: %s", cause)
                    child.ended(status)

    def _check_health(self) -> None:
        if time.monotonic() < self._next_health:
            return
        self._next_health = time.monotonic() + _HEALTH_INTERVAL
        healthy = all(child.process for child in self.children)
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
        stopping: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: stopping.append(received))
        while not stopping:
            for child in self.children:
                if child.may_start():
                    child.start()
            self._reap()
            self._check_health()
            time.sleep(0.25)
        self._stop()

    def _stop(self) -> None:
        log.info("stopping")
        for child in self.children:
            if child.process:
                _signal_group(child.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_PATIENCE
        while any(c.process and c.process.poll() is None for c in self.children):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)


def main() -> None:
    """Parse the command line and supervise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard", type=Path, required=True)
    parser.add_argument("supernode", nargs="+", help="arguments of flower-supernode")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    RUN_DIRECTORY.mkdir(parents=True, exist_ok=True)
    Supervisor(arguments.shard, arguments.supernode).run()


if __name__ == "__main__":
    main()
