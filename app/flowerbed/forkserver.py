"""Flower's programs, imported once for all and forked.

A SuperNode starts the program `flower-superexec`, and that for every message `flwr-clientapp`. Each
imports Flower anew: two seconds on a core and twice as long on half a one, and 80 MiB. On a device
so slow that it takes longer than the 30 s after which Flower takes a program for lost, it would
start another one beside it, and another. So the supervisor (`flowerbed.device`) imports them once
and forks. In the PATH of a SuperNode the programs of `bin/` come first, which ask it to. What is
run are Flower's own programs, by their entry points, with the arguments that they were given.
"""

import contextlib
import gc
import importlib
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from flowerbed.handoff import FORKSERVER_SOCKET

log = logging.getLogger("flowerbed.forkserver")

PROGRAMS = ("flower-supernode", "flower-superexec", "flwr-clientapp")
_ALSO = ("flwr.clientapp", "numpy", "pydantic")
"""What the app imports. Not the app: Flower loads the one that the run brings."""
_LONGEST_ARGUMENTS = 1 << 16
_PATIENCE = 5.0
_BIN = Path(__file__).parent / "bin"

Program = Callable[[], object]


class ForkServer:
    """Imports when it is made, and forks when it is asked to, here or by the programs of `bin/`."""

    def __init__(self, path: Path = FORKSERVER_SOCKET) -> None:
        points = entry_points(group="console_scripts")
        self._programs: dict[str, Program] = {name: points[name].load() for name in PROGRAMS}
        for name in _ALSO:
            importlib.import_module(name)
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(16)
        # What is there is left alone by the collector, so that forks go on sharing it.
        gc.collect()
        gc.freeze()

    def serve(self, seconds: float, group: int) -> None:
        """Wait so long for one who asks; what it is given belongs to that process group.

        A connection carries one packet, the command with NUL between its words, and with it the
        descriptors for standard output and error; and one back, the exit code.
        """
        if not select.select([self._listener], [], [], seconds)[0]:
            return
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(_PATIENCE)
            try:
                packet, output, *_ = socket.recv_fds(connection, _LONGEST_ARGUMENTS, 2)
            except OSError as error:
                log.warning("no command came: %s", error)
                return
            command = packet.decode().split("\0")
            if len(output) == 2 and command[0] in self._programs:  # noqa: PLR2004 - two descriptors
                self.fork(command, group, output, connection)
            for descriptor in output:
                os.close(descriptor)

    def fork(
        self,
        command: Sequence[str],
        group: int = 0,
        output: Sequence[int] = (),
        asked: socket.socket | None = None,
    ) -> int:
        """Run one of `PROGRAMS` in a process of its own; the process' number.

        Args:
            group: the process group that it joins; by default, it leads one of its own.
            output: descriptors for its standard output and error; by default, they are ours.
            asked: where its exit code is sent.
        """
        if process := os.fork():
            return process
        status = 1
        try:
            os.setpgid(0, group)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            self._listener.close()
            for descriptor, standard in zip(output, (1, 2), strict=False):
                os.dup2(descriptor, standard)
            os.environ["PATH"] = f"{_BIN}:{os.environ['PATH']}"
            Path("/proc/self/comm").write_text(command[0])
            sys.argv = list(command)
            status = _run(self._programs[command[0]])
        finally:
            if asked:
                with contextlib.suppress(OSError):  # who asked may have been killed
                    asked.send(str(status).encode())
            os._exit(status)


def _run(program: Program) -> int:
    """The exit code of a program that may end by itself."""
    try:
        program()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        log.exception("%s failed", sys.argv[0])
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
