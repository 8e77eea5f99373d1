"""The socket between ClientApp and worker, with real sockets and a worker that dies."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hosting import RUNTIME

from flowerbed.device.handoff import (
    AbandonedError,
    WorkerDiedError,
    acknowledge,
    ended_mark,
    mark_ended,
    receive_header,
    receive_payload,
    record_death,
    request,
    send_frame,
)


def _serve(path: Path, answer: Callable[[socket.socket], None]) -> threading.Thread:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, listener:
            answer(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def _reply(header: dict[str, Any]) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        receive_payload(connection, receive_header(connection))
        acknowledge(connection)
        send_frame(connection, header)

    return answer


def test_arrays_come_back_as_they_went(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = rng.random(300_000, np.float32)

    def double(connection: socket.socket) -> None:
        header = receive_header(connection)
        assert header["operation"] == "train"
        payload = receive_payload(connection, header)
        acknowledge(connection)
        time.sleep(1.2)  # longer than the ClientApp waits at once
        array = np.frombuffer(payload, np.float32) * 2
        send_frame(connection, {"n": 1}, [array[:7].tobytes(), array[7:].tobytes()])

    _serve(tmp_path / "s", double)
    blocks: list[bytes | memoryview] = [
        weights[:5].tobytes(),
        b"",
        memoryview(weights[5:].tobytes()),
    ]
    answer, data = request({"operation": "train"}, blocks, path=tmp_path / "s")
    assert answer["n"] == 1
    np.testing.assert_array_equal(np.frombuffer(data, np.float32), weights * 2)


def test_a_death_is_reported_by_its_cause(tmp_path: Path) -> None:
    record = tmp_path / "death"

    def die(connection: socket.socket) -> None:
        receive_header(connection)
        connection.close()
        time.sleep(0.3)
        record_death("out_of_memory", record)

    _serve(tmp_path / "s", die)
    with pytest.raises(WorkerDiedError, match="the worker died: out_of_memory") as error:
        request({}, path=tmp_path / "s", record=record)
    assert error.value.cause == "out_of_memory"


def test_an_older_death_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowerbed.device.handoff._DEATH_PATIENCE", 0.5)
    record_death("out_of_memory", tmp_path / "death")
    time.sleep(0.05)
    _serve(tmp_path / "s", lambda c: c.close())
    with pytest.raises(WorkerDiedError) as error:
        request({}, path=tmp_path / "s", record=tmp_path / "death")
    assert error.value.cause == "unknown"


def test_a_worker_that_is_still_starting_is_waited_for(tmp_path: Path) -> None:
    def later() -> None:
        time.sleep(0.6)
        _serve(tmp_path / "s", _reply({"ok": True}))

    threading.Thread(target=later, daemon=True).start()
    answer, _ = request({}, path=tmp_path / "s")
    assert answer["ok"]


def _after(seconds: float) -> Callable[[], None]:
    deadline = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > deadline:
            raise AbandonedError("enough")

    return check


def test_a_worker_that_stops_in_time_is_left_alone(tmp_path: Path) -> None:
    closed = threading.Event()

    def work(connection: socket.socket) -> None:
        receive_header(connection)
        acknowledge(connection)
        assert connection.recv(1) == b""  # what the worker's watch sees
        closed.set()

    thread = _serve(tmp_path / "s", work)
    started = time.monotonic()
    with pytest.raises(AbandonedError, match="enough"):
        request({}, path=tmp_path / "s", check=_after(0.1))
    assert time.monotonic() - started < 3
    thread.join(5)
    assert closed.is_set()


STUCK = """
import socket, sys, time
from flowerbed.device.handoff import acknowledge, receive_header
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
connection, _ = listener.accept()
receive_header(connection)
if sys.argv[2] == "begun":
    acknowledge(connection)
time.sleep(600)
"""


@pytest.mark.parametrize("begun", [True, False])
def test_a_worker_that_does_not_stop_is_killed_if_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """One that has not begun is loading what the next message needs."""
    monkeypatch.setattr("flowerbed.device.handoff._END_PATIENCE", 0.5)
    command = [sys.executable, "-c", STUCK, str(tmp_path / "s"), "begun" if begun else "not"]
    worker = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(RUNTIME)})
    while not (tmp_path / "s").exists():
        time.sleep(0.05)
    with pytest.raises(AbandonedError):
        request({}, path=tmp_path / "s", check=_after(0.1))
    if begun:
        assert worker.wait(5) == -9
    else:
        time.sleep(0.2)
        assert worker.poll() is None
        worker.kill()
        worker.wait()


def test_there_is_one_mark_of_a_run_that_has_ended(tmp_path: Path) -> None:
    mark_ended(7, tmp_path)
    mark_ended(8, tmp_path)
    assert not ended_mark(7, tmp_path).exists()
    assert ended_mark(8, tmp_path).exists()
