"""Flower's ClientApp program, imported once and forked for each message.

    python -m flowerbed.forkserver

Flower starts the program `flwr-clientapp` for every message, which imports Flower anew: two seconds
on a core, and twice as long on half a one. On a device so slow that it takes more than the 30 s
after which Flower takes a program for lost, it would start another one beside it, and another. In
the PATH of a device's SuperNode `bin/flwr-clientapp` comes first; that asks this process to fork
instead. What is run is Flower's own program, by its entry point, with the arguments it was given.
"""

import contextlib
import gc
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from flowerbed.handoff import CLIENTAPPS_SOCKET

log = logging.getLogger("flowerbed.forkserver")

PROGRAM = "flwr-clientapp"
_ALSO = ("flwr.clientapp", "numpy", "pydantic")
"""What the app imports. Not the app: Flower loads the one that the run brings."""
_LONGEST_ARGUMENTS = 1 << 16
_PATIENCE = 5.0


def serve(program: Callable[[], object], path: Path = CLIENTAPPS_SOCKET) -> None:
    """Fork for each who connects, for good.

    A connection carries one packet, the arguments with NUL between them and with it the descriptors
    for standard output and error; and one back, the exit code.
    """
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        draft = path.with_suffix(".draft")
        draft.unlink(missing_ok=True)
        listener.bind(str(draft))
        draft.chmod(0o600)
        listener.listen(16)
        draft.rename(path)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
        # What is there is left alone by the collector, so that forks go on sharing it.
        gc.collect()
        gc.freeze()
        while True:
            connection, _ = listener.accept()
            with connection:
                _fork(program, listener, connection)


def _fork(
    program: Callable[[], object], listener: socket.socket, connection: socket.socket
) -> None:
    connection.settimeout(_PATIENCE)
    try:
        packet, output, *_ = socket.recv_fds(connection, _LONGEST_ARGUMENTS, 2)
    except OSError as error:
        log.warning("no arguments came: %s", error)
        return
    if len(output) == 2 and os.fork() == 0:  # noqa: PLR2004 - two descriptors
        listener.close()
        status = 1
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor, standard in zip(output, (1, 2), strict=True):
                os.dup2(descriptor, standard)
            sys.argv = [PROGRAM, *packet.decode().split("\0")]
            status = _run(program)
        finally:
            with contextlib.suppress(OSError):  # who asked may have been killed
                connection.send(str(status).encode())
            os._exit(status)
    for descriptor in output:
        os.close(descriptor)


def _run(program: Callable[[], object]) -> int:
    """The exit code of a program that may end by itself."""
    try:
        program()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        log.exception("%s failed", PROGRAM)
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main() -> None:
    """Import, and serve."""
    # Not of the root logger: forks would have it, too, and say everything twice.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    log.addHandler(handler)
    log.propagate = False
    (entry_point,) = entry_points(group="console_scripts", name=PROGRAM)
    program = entry_point.load()
    for name in _ALSO:
        importlib.import_module(name)
    serve(program)


if __name__ == "__main__":
    main()
