"""Flower's programs, imported once for all and forked.

A SuperNode starts the program `flower-superexec`, and that for every message `flwr-clientapp`. Each
imports Flower anew: two seconds on a core and twice as long on half a one, and 80 MiB. On a device
so slow that it takes longer than the 30 s after which Flower takes a program for lost, it would
start another one beside it, and another. So the supervisor imports them once and forks. In the PATH
of a SuperNode the programs of `bin/` come first, which ask it to. What is run are Flower's own
programs, by their entry points, with the arguments that they were given.

Nothing of an app is imported here: what an app brings is always loaded from its own directory.
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
from pathlib import Path

from flowerbed.device.handoff import FORKSERVER_SOCKET, LAB_MESSAGE, announce_end, mark_ended
from flowerbed.flower import SuperNodeLoop, load_programs, wake_superexec

log = logging.getLogger("flowerbed.forkserver")

_ALSO = ("flowerbed.device.client", "httpcore")
"""What Flower imports for a message only: the ClientApp that hands it to the worker, and what the
HTTP client needs for its first connection."""
_LONGEST_ARGUMENTS = 1 << 16
_PATIENCE = 2.0
_LOOK = 3.0
"""Seconds between two looks of SuperExec for a message, unless the SuperNode wakes it."""
_BIN = Path(__file__).parent / "bin"
_FAILED = 1

Program = Callable[[], object]


class ForkServer:
    """Imports when it is made, and forks when it is asked to, here or by the programs of `bin/`."""

    def __init__(self, path: Path = FORKSERVER_SOCKET) -> None:
        self._programs: dict[str, Program] = load_programs()
        for name in _ALSO:
            importlib.import_module(name)
        _connect_programs()
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(16)
        # The collector leaves alone what is there now, so that forks go on sharing it.
        gc.collect()
        gc.freeze()

    def serve(self, seconds: float, group: int) -> None:
        """Wait up to `seconds` for a request, and fork the requested program into process `group`.

        A connection carries one packet, the command with NUL between its words, and with it the
        descriptors for standard output and error; and one back, the exit code. A bad request and a
        fork that the kernel refuses are answered with an exit code of 1.
        """
        if not select.select([self._listener], [], [], seconds)[0]:
            return
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(_PATIENCE)
            output: list[int] = []
            try:
                packet, output, *_ = socket.recv_fds(connection, _LONGEST_ARGUMENTS, 2)
                self.fork(packet.decode().split("\0"), group, output, connection)
            except (OSError, KeyError, UnicodeDecodeError) as error:
                log.warning("a program could not be started: %r", error)
                with contextlib.suppress(OSError):
                    connection.send(str(_FAILED).encode())
            finally:
                for descriptor in output:
                    os.close(descriptor)

    def fork(
        self,
        command: Sequence[str],
        group: int = 0,
        output: Sequence[int] = (),
        requester: socket.socket | None = None,
    ) -> int:
        """Run one of Flower's programs in a process of its own; return its number.

        Args:
            group: the process group that it joins; by default, it leads one of its own.
            output: descriptors for its standard output and error; by default, they are ours.
            requester: where its exit code is sent.

        Raises:
            KeyError: there is no such program.
            OSError: the kernel has no process or no memory for it.
        """
        program = self._programs[command[0]]
        if process := os.fork():
            return process
        status = _FAILED
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
            status = _run(program)
        finally:
            if requester:
                with contextlib.suppress(OSError):  # the requester may have been killed
                    requester.send(str(status).encode())
            os._exit(status)


def _connect_programs() -> None:
    """Let the SuperNode wake SuperExec when there is a message, and the worker when a run ends."""
    message_is_there = os.eventfd(0, os.EFD_NONBLOCK)

    def wait_for_message(_: float) -> None:
        if select.select([message_is_there], [], [], _LOOK)[0]:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(message_is_there)

    def end_run(run_id: int) -> None:
        mark_ended(run_id)
        announce_end(run_id)

    loop = SuperNodeLoop(lambda: os.eventfd_write(message_is_there, 1), end_run)
    loop.install(LAB_MESSAGE)
    wake_superexec(wait_for_message)


def _run(program: Program) -> int:
    """The exit code of a program that may end by itself."""
    try:
        program()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        log.exception("%s failed", sys.argv[0])
        return _FAILED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
