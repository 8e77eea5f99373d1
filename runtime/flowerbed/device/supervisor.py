"""PID 1 of a device's container: runs the SuperNode and the worker, and knows why they end.

    python -m flowerbed.device -- ARGUMENTS OF flower-supernode

Either child is started again when it ends, with a growing pause. A worker's death is written down
with its cause before the next one starts, so that the waiting ClientApp can report it. The
SuperNode and all that it starts are forks of this process (`forkserver`).
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from flowerbed.device.forkserver import ForkServer
from flowerbed.device.handoff import DIRECTORY, record_death
from flowerbed.device.logs import log_to_stderr
from flowerbed.device.quota import out_of_memory_kills, read_quota
from flowerbed.flower import SUPERNODE_PORT

log = logging.getLogger("flowerbed.device")

HEALTHY = DIRECTORY / "healthy"
"""Exists while both children run and the SuperNode answers: the container's health check."""
_HEALTH_INTERVAL = 10.0
_HEALTH_PATIENCE = 1.0
"""Seconds in which a SuperNode must answer; this process does nothing else meanwhile."""
_SHORTEST_PAUSE = 0.5
_LONGEST_PAUSE = 15.0
"""A SuperNode that was killed is refused until its session has expired, about a minute later."""
_WORKER_PAUSE = 4.0
"""The longest pause of a worker: where memory is short, a message waits for several."""
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
    longest_pause: float = _LONGEST_PAUSE
    pid: int = 0
    started: float = 0.0
    start_at: float = 0.0
    pause: float = _SHORTEST_PAUSE

    def start(self) -> None:
        """Start it, or plan to try again where the kernel has no process or memory for it."""
        self.started = time.monotonic()
        try:
            self.pid = self.begin()
        except OSError as error:
            log.error("%s could not be started: %s", self.name, error)  # noqa: TRY400 - says it all
            self._plan()
        else:
            log.info("%s started", self.name)

    def ended(self, status: int) -> None:
        """Take note of its end and plan the next start."""
        log.error("%s ended: %s", self.name, describe(status))
        _signal_group(self.pid, signal.SIGKILL)
        self._plan()

    def _plan(self) -> None:
        steady = time.monotonic() - self.started > _STEADY
        self.pause = _SHORTEST_PAUSE if steady else min(self.pause * 2, self.longest_pause)
        self.start_at = time.monotonic() + self.pause
        self.pid = 0


def thread_limits(threads: int) -> dict[str, str]:
    """Variables by which libraries run as many threads as the quota has room for.

    Left to themselves, they count the machine's cores, and throttle each other.
    """
    return {
        "OMP_NUM_THREADS": str(threads),  # numpy's BLAS, PyTorch, scikit-learn
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "TF_NUM_INTEROP_THREADS": "1",
        "PYTHON_CPU_COUNT": str(threads),  # os.cpu_count, and what asks it
    }


def begin_worker() -> int:
    """Start the worker as the OOM killer's first choice, and a decoy in its group as the second.

    The worker can be started again without the server losing the device. From when its last thread
    ends to when its first page is free, the kernel no longer sees it as a victim (Linux 6.18,
    `css_task_iter_advance`), and would end the next one: the greatest process of the container,
    which is the supervisor, if it is not the decoy.

    Raises:
        OSError: the kernel has no process or no memory for them.
    """
    command = [sys.executable, "-P", "-m", "flowerbed.device.worker"]
    environment = os.environ | thread_limits(read_quota().threads)
    worker = os.posix_spawn(sys.executable, command, environment, setpgroup=0)
    _prefer_as_victim(worker, _OOM_SCORE_ADJUST)
    try:
        decoy = os.posix_spawnp(_DECOY[0], _DECOY, os.environ, setpgroup=worker)
    except OSError:
        os.kill(worker, signal.SIGKILL)
        raise
    _prefer_as_victim(decoy, _OOM_SCORE_ADJUST - 10)
    return worker


def _prefer_as_victim(pid: int, adjust: int) -> None:
    with contextlib.suppress(OSError):  # it may have ended
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(adjust))


def describe(status: int) -> str:
    """A wait status in words."""
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def health_url(supernode_arguments: Sequence[str]) -> str:
    """Where a SuperNode with these arguments answers that it is healthy."""
    port: object = SUPERNODE_PORT
    for option, value in pairwise(supernode_arguments):
        if option == "--port":
            port = value
    return f"http://127.0.0.1:{port}/health"


class Supervisor:
    """Keeps the SuperNode and the worker running until the container is told to stop."""

    def __init__(self, supernode_arguments: list[str]) -> None:
        self.stopping: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: self.stopping.append(received))
        self._kills = out_of_memory_kills()
        self.worker = Child("worker", begin_worker, _WORKER_PAUSE)
        # It loads what it needs while this process does.
        self.worker.start()
        self.forkserver = ForkServer()
        command = ["flower-supernode", *supernode_arguments]
        self.supernode = Child("SuperNode", lambda: self.forkserver.fork(command))
        self.children = (self.worker, self.supernode)
        self._health_url = health_url(supernode_arguments)
        self._next_health = 0.0

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            out_of_memory = self._was_out_of_memory(status)
            for child in self.children:
                if child.pid == pid:
                    if child is self.worker:
                        cause = "out_of_memory" if out_of_memory else describe(status)
                        record_death(cause)
                        log.error("the worker died of: %s", cause)
                    child.ended(status)

    def _was_out_of_memory(self, status: int) -> bool:
        """Whether one of the kernel's kills in this container accounts for a child's end."""
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            return False
        if out_of_memory_kills() <= self._kills:
            return False
        self._kills += 1
        return True

    def _check_health(self) -> None:
        if time.monotonic() < self._next_health:
            return
        self._next_health = time.monotonic() + _HEALTH_INTERVAL
        healthy = all(child.pid for child in self.children)
        try:
            with urllib.request.urlopen(self._health_url, timeout=_HEALTH_PATIENCE):  # noqa: S310
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
    parser.add_argument("supernode", nargs="+", help="arguments of flower-supernode")
    arguments = parser.parse_args()
    log_to_stderr()
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    Supervisor(arguments.supernode).run()
