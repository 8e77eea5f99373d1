"""The ClientApp that hands messages over: which app it finds, and what it does about memory."""

import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from flwr.app import Context, Message, Metadata, RecordDict
from hosting import write_app

from flowerbed.device import client
from flowerbed.device.client import Done, HostedApp
from flowerbed.device.handoff import WorkerDiedError
from flowerbed.messages import seal


class _Worker:
    """A worker whose memory is large enough for batches of `fits`."""

    def __init__(self, fits: int, cause: str = "out_of_memory") -> None:
        self.fits, self.cause = fits, cause
        self.asked: list[int] = []

    def __call__(
        self, header: dict[str, Any], *_: object, **__: object
    ) -> tuple[dict[str, Any], bytearray]:
        size = header["context"]["node_config"]["batch-size"]
        self.asked.append(size)
        if size > self.fits:
            raise WorkerDiedError(self.cause)
        return {"outcome": "completed", "reason": ""}, bytearray()


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "DIRECTORY", tmp_path)


def _ask(
    monkeypatch: pytest.MonkeyPatch,
    worker: _Worker,
    policy: Literal["fail", "halve_batch"],
    batch: int = 32,
    app: str = "hash",
) -> Done:
    monkeypatch.setattr(client, "request", worker)
    config = {"batch-size": batch, "out-of-memory-policy": policy}
    hosted = HostedApp("/app", "tiny.client_app:app", app, "", reuse_worker=False)
    header = {"context": {"node_config": config}}
    return client.ask_worker(hosted, header, [], lambda: None)


def test_half_the_batch_is_tried_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _Worker(fits=10)
    done = _ask(monkeypatch, worker, "halve_batch")
    assert worker.asked == [32, 16, 8]
    assert done.said == "out of memory with batches of 16, went on with 8"
    assert done.node_config["batch-size"] == 8
    # It is remembered, and no smaller setting is raised to it.
    assert _ask(monkeypatch, worker, "halve_batch").said == ""
    assert _ask(monkeypatch, worker, "halve_batch", batch=4).said == ""
    assert worker.asked[3:] == [8, 4]
    # Another app may need less.
    assert (
        _ask(monkeypatch, _Worker(fits=32), "halve_batch", app="b").node_config["batch-size"] == 32
    )


def test_without_the_policy_it_is_the_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _Worker(fits=10)
    done = _ask(monkeypatch, worker, "fail")
    assert done.reply["outcome"] == "out_of_memory"
    assert done.reply["reason"] == "the worker died: out_of_memory"
    assert worker.asked == [32]


def test_no_batch_is_smaller_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _Worker(fits=0)
    assert _ask(monkeypatch, worker, "halve_batch", batch=4).reply["outcome"] == "out_of_memory"
    assert worker.asked == [4, 2, 1]


def test_another_death_is_not_the_batchs_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _Worker(fits=10, cause="signal 9")
    done = _ask(monkeypatch, worker, "halve_batch")
    assert done.reply == {"outcome": "error", "reason": "the worker died: signal 9"}
    assert worker.asked == [32]


def test_a_device_without_a_batch_size_has_none_to_halve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.fitting({"device": "phone"}, "hash") == {"device": "phone"}
    assert client.halved({"out-of-memory-policy": "halve_batch"}, "hash") is None


def test_the_app_is_found_where_flower_has_unpacked_it(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    app = write_app(tmp_path / "app", layer="abc", reuse_worker=True)
    path = [str(tmp_path / "none"), str(plain), str(app)]
    assert HostedApp.find(path) == HostedApp(
        str(app), "tiny.client_app:app", "hash of the app", "abc", reuse_worker=True
    )
    with pytest.raises(RuntimeError, match=r"tool\.flowerbed"):
        HostedApp.find(path[:2])


@pytest.mark.parametrize(("reply", "ttl"), [(0.0, 60.0), (20.0, 40.0), (50.0, 30.0)])
def test_the_app_sees_a_message_that_leaves_time_for_its_reply(
    reply: float, ttl: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as replies of the device take; half of the time is always left for the work."""
    seen: list[dict[str, Any]] = []

    def request(header: dict[str, Any], *_: object, **__: object) -> tuple[dict[str, Any], Any]:
        seen.append(header)
        return {"outcome": "completed", "reason": ""}, bytearray()

    monkeypatch.setattr(client, "request", request)
    monkeypatch.setattr("sys.path", [str(write_app(tmp_path / "app")), *sys.path])
    metadata = Metadata(1, "id", 1, 5, "", "1", time.time(), 60.0, "train")
    content = seal({"records": [], "reply_seconds": reply})
    context = Context(1, 5, {}, RecordDict(), {})
    answer = client.HostedClientApp()(Message(metadata=metadata, content=content), context)
    assert seen[0]["metadata"]["ttl"] == ttl
    assert answer.metadata.ttl > 50  # Flower still takes the reply until the real end
