"""How a ClientApp process and the trainer talk: frames over a Unix socket.

A frame is the length of a JSON header (4 bytes, big-endian), the header, and as many bytes as
the header's `size` says. A connection carries one request and one answer.
"""

import json
import socket
import struct
import time
from pathlib import Path
from typing import Any

RUN_DIRECTORY = Path("/tmp/flowerbed")  # noqa: S108 - a tmpfs of the container's own
TRAINER_SOCKET = RUN_DIRECTORY / "trainer.sock"
FORKSERVER_SOCKET = RUN_DIRECTORY / "forkserver.sock"
"""The supervisor's; the programs of `bin/` have its name, too."""
DEATH_RECORD = RUN_DIRECTORY / "trainer-death.json"

_LENGTH = struct.Struct("!I")
_CONNECT_PATIENCE = 120.0
_DEATH_PATIENCE = 10.0


class TrainerError(Exception):
    """The trainer answered that it could not do what was asked."""


class TrainerDiedError(Exception):
    """The trainer went away before it answered.

    Attributes:
        cause: `out_of_memory` or what the supervisor saw, such as `signal 9`.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(f"the trainer died: {cause}")
        self.cause = cause


def send_frame(
    connection: socket.socket, header: dict[str, Any], payload: bytes | bytearray = b""
) -> None:
    """Send one frame."""
    encoded = json.dumps(header | {"size": len(payload)}).encode()
    connection.sendall(_LENGTH.pack(len(encoded)) + encoded)
    if payload:
        connection.sendall(payload)


def _receive(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionResetError("the other side closed the connection")
        view = view[count:]
    return data


def receive_frame(connection: socket.socket) -> tuple[dict[str, Any], bytearray]:
    """Receive one frame: its header and payload.

    Raises:
        ConnectionError: the other side went away before the frame was whole.
    """
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    header: dict[str, Any] = json.loads(_receive(connection, length))
    return header, _receive(connection, header["size"])


def _connect(path: Path) -> socket.socket:
    """Connect, patiently: after a death the supervisor is starting another trainer."""
    deadline = time.monotonic() + _CONNECT_PATIENCE
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > deadline:
                raise TrainerDiedError("no trainer is listening") from None
            time.sleep(0.2)
        else:
            return connection


def _cause_of_death(since: float, record: Path) -> str:
    """What the supervisor wrote of a death after `since` (seconds of the wall clock)."""
    deadline = time.monotonic() + _DEATH_PATIENCE
    while time.monotonic() < deadline:
        try:
            death = json.loads(record.read_text())
            if death["time"] >= since:
                return str(death["cause"])
        except (FileNotFoundError, json.JSONDecodeError):
            pass
        time.sleep(0.1)
    return "unknown"


def request(
    header: dict[str, Any],
    payload: bytes | bytearray = b"",
    path: Path = TRAINER_SOCKET,
    record: Path = DEATH_RECORD,
) -> tuple[dict[str, Any], bytearray]:
    """Ask the trainer and wait for its answer, however long it works.

    Raises:
        TrainerError: it refused or failed; the message says why.
        TrainerDiedError: it died on the way.
    """
    started = time.time()
    with _connect(path) as connection:
        try:
            send_frame(connection, header, payload)
            answer, data = receive_frame(connection)
        except ConnectionError:
            raise TrainerDiedError(_cause_of_death(started, record)) from None
    if "error" in answer:
        raise TrainerError(answer["error"])
    return answer, data
