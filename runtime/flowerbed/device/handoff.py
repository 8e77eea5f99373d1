"""How the processes of a device talk: frames over a Unix socket, and a few small files.

A frame is the length of a JSON header (4 bytes, big-endian), the header, and as many bytes as the
header's `size` says. A connection carries one request to the worker and one reply. Between the two
the worker sends one byte (`acknowledge`) when it has read the request and begins to work on it.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowerbed.messages import Buffer

DIRECTORY = Path(os.environ.get("FLOWERBED_DEVICE_DIRECTORY", "/tmp/flowerbed"))  # noqa: S108 - a tmpfs of the container's own
WORKER_SOCKET = DIRECTORY / "worker.sock"
FORKSERVER_SOCKET = DIRECTORY / "forkserver.sock"
"""The supervisor's; the programs of `bin/` have its name, too."""
DEATH_RECORD = DIRECTORY / "worker-death.json"
LAB_MESSAGE = "query.flowerbed"
"""Type of the messages that the lab sends for itself: one before a run, one after it."""

_LENGTH = struct.Struct("!I")
_ACKNOWLEDGED = b"+"
_LOOK = 0.5
"""Seconds between two looks whether anybody still waits for the reply."""
_CONNECT_PATIENCE = 120.0
_DEATH_PATIENCE = 10.0
_END_PATIENCE = 6.0
"""Seconds in which the worker has to stop working; see `flowerbed.device.interrupt`."""


class WorkerDiedError(Exception):
    """The worker went away before it replied.

    Attributes:
        cause: `out_of_memory` or what the supervisor saw, such as `signal 9`.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(f"the worker died: {cause}")
        self.cause = cause


class AbandonedError(Exception):
    """Nobody waits for the reply any more; the message says why."""


def ended_mark(run_id: int, directory: Path = DIRECTORY) -> Path:
    """The file that exists when a run is over: nobody waits for the reply to its last message."""
    return directory / f"ended-{run_id}"


def mark_ended(run_id: int, directory: Path = DIRECTORY) -> None:
    """Make the mark of a run that is over, and remove that of the run before."""
    for mark in directory.glob("ended-*"):
        mark.unlink(missing_ok=True)
    ended_mark(run_id, directory).touch()


def write_whole(path: Path, text: str) -> None:
    """Write a file so that no reader sees half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)


def record_death(cause: str, record: Path = DEATH_RECORD) -> None:
    """Write down what the worker died of."""
    write_whole(record, json.dumps({"cause": cause, "time": time.time()}))


# --- frames -------------------------------------------------------------------------------


def _never() -> None:
    """Wait on."""


def _send(connection: socket.socket, data: "Buffer", check: Callable[[], None]) -> None:
    view = memoryview(data).cast("B")
    while view:
        try:
            view = view[connection.send(view) :]
        except TimeoutError:
            check()


def _receive(connection: socket.socket, size: int, check: Callable[[], None]) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        try:
            count = connection.recv_into(view)
        except TimeoutError:
            check()
            continue
        if not count:
            raise ConnectionResetError("the other side closed the connection")
        view = view[count:]
    return data


def send_frame(
    connection: socket.socket,
    header: dict[str, Any],
    blocks: "Iterable[Buffer]" = (),
    check: Callable[[], None] = _never,
) -> None:
    """Send one frame; `blocks` are its payload, one after another."""
    blocks = list(blocks)
    size = sum(memoryview(block).nbytes for block in blocks)
    encoded = json.dumps(header | {"size": size}).encode()
    for block in (_LENGTH.pack(len(encoded)) + encoded, *blocks):
        _send(connection, block, check)


def receive_header(connection: socket.socket, check: Callable[[], None] = _never) -> dict[str, Any]:
    """Receive the header of a frame; its payload stays in the connection.

    Raises:
        ConnectionError: the other side went away before the header was whole.
    """
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size, check))
    header: dict[str, Any] = json.loads(_receive(connection, length, check))
    return header


def receive_payload(
    connection: socket.socket, header: dict[str, Any], check: Callable[[], None] = _never
) -> bytearray:
    """Receive the payload of the frame whose header has been received.

    Raises:
        ConnectionError: the other side went away before the payload was whole.
    """
    return _receive(connection, header["size"], check)


def acknowledge(connection: socket.socket) -> None:
    """Say that the request has been read and that work on it begins."""
    connection.sendall(_ACKNOWLEDGED)


# --- the ClientApp's side -----------------------------------------------------------------


def _connect(path: Path, check: Callable[[], None]) -> socket.socket:
    """Connect, patiently: after a death the supervisor is starting another worker."""
    deadline = time.monotonic() + _CONNECT_PATIENCE
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_LOOK)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError, TimeoutError):
            connection.close()
            if time.monotonic() > deadline:
                raise WorkerDiedError("no worker is listening") from None
            check()
            time.sleep(0.1)
        else:
            return connection


def _cause_of_death(since: float, record: Path) -> str:
    """What the supervisor wrote of a death after `since` (seconds of the wall clock)."""
    deadline = time.monotonic() + _DEATH_PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            death = json.loads(record.read_text())
            if death["time"] >= since:
                return str(death["cause"])
        time.sleep(0.1)
    return "unknown"


def _end_work(connection: socket.socket) -> None:
    """Make the worker stop working on a request, and kill it where it does not.

    It interrupts itself when it sees that this side has closed, unless a library that does not
    let go of the interpreter keeps it from seeing anything.
    """
    (pid,) = struct.unpack_from(
        "i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    with contextlib.suppress(ConnectionError, OSError):
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(_END_PATIENCE)
        try:
            while connection.recv(1 << 16):
                pass
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)


def request(
    header: dict[str, Any],
    blocks: "Iterable[Buffer]" = (),
    *,
    check: Callable[[], None] = _never,
    path: Path = WORKER_SOCKET,
    record: Path = DEATH_RECORD,
) -> tuple[dict[str, Any], bytearray]:
    """Ask the worker and wait for its reply.

    Args:
        check: called twice a second while waiting; raises AbandonedError when nobody waits for the
            reply any more.

    Raises:
        AbandonedError: as `check` has raised it. The worker works on the request no longer.
        WorkerDiedError: the worker died on the way.
    """
    started = time.time()
    begun = False
    with _connect(path, check) as connection:
        try:
            send_frame(connection, header, blocks, check)
            begun = _receive(connection, 1, check) == _ACKNOWLEDGED
            reply = receive_header(connection, check)
            return reply, receive_payload(connection, reply, check)
        except ConnectionError:
            raise WorkerDiedError(_cause_of_death(started, record)) from None
        except AbandonedError:
            # A worker that has not begun is starting, and sees the closed connection in time.
            if begun:
                _end_work(connection)
            raise


def announce_end(run_id: int, path: Path = WORKER_SOCKET) -> None:
    """Tell the worker that a run is over, and do not wait for what it makes of that."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_LOOK)
        connection.connect(str(path))
        send_frame(connection, {"operation": "end", "run_id": run_id})
