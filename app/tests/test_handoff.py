"""The socket between ClientApp and trainer, with real sockets and a trainer that dies."""

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowerbed.device import record_death
from flowerbed.handoff import TrainerDiedError, TrainerError, receive_frame, request, send_frame


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
        receive_frame(connection)
        send_frame(connection, header)

    return answer


def test_arrays_come_back_as_they_went(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = rng.random(300_000, np.float32)

    def double(connection: socket.socket) -> None:
        header, payload = receive_frame(connection)
        assert header["operation"] == "train"
        send_frame(connection, {"n": 1}, (np.frombuffer(payload, np.float32) * 2).tobytes())

    _serve(tmp_path / "s", double)
    answer, data = request({"operation": "train"}, weights.tobytes(), tmp_path / "s")
    assert answer["n"] == 1
    np.testing.assert_array_equal(np.frombuffer(data, np.float32), weights * 2)


def test_a_refusal_is_an_error_with_its_reason(tmp_path: Path) -> None:
    _serve(tmp_path / "s", _reply({"error": "batch too large"}))
    with pytest.raises(TrainerError, match="batch too large"):
        request({}, path=tmp_path / "s")


def test_a_death_is_reported_by_its_cause(tmp_path: Path) -> None:
    record = tmp_path / "death"

    def die(connection: socket.socket) -> None:
        receive_frame(connection)
        connection.close()
        time.sleep(0.3)
        record_death("out_of_memory", record)

    _serve(tmp_path / "s", die)
    with pytest.raises(TrainerDiedError) as error:
        request({}, path=tmp_path / "s", record=record)
    assert error.value.cause == "out_of_memory"


def test_an_older_death_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowerbed.handoff._DEATH_PATIENCE", 0.5)
    record_death("out_of_memory", tmp_path / "death")
    time.sleep(0.05)
    _serve(tmp_path / "s", lambda c: c.close())
    with pytest.raises(TrainerDiedError) as error:
        request({}, path=tmp_path / "s", record=tmp_path / "death")
    assert error.value.cause == "unknown"


def test_a_trainer_that_is_still_starting_is_waited_for(tmp_path: Path) -> None:
    def later() -> None:
        time.sleep(0.6)
        _serve(tmp_path / "s", _reply({"ok": True}))

    threading.Thread(target=later, daemon=True).start()
    answer, _ = request({}, path=tmp_path / "s")
    assert answer["ok"]
