"""What a ClientApp does when the trainer is out of memory."""

from pathlib import Path
from typing import Any, Literal

import pytest

from flowerbed import client_app
from flowerbed.config import DeviceSettings, Task
from flowerbed.handoff import TrainerDiedError


class _Trainer:
    """A trainer whose memory is large enough for batches of `fits`."""

    def __init__(self, fits: int, cause: str = "out_of_memory") -> None:
        self.fits, self.cause = fits, cause
        self.asked: list[int] = []

    def __call__(self, header: dict[str, Any], weights: bytes) -> tuple[dict[str, Any], bytearray]:
        size = DeviceSettings.parse(header["device"]).batch_size
        self.asked.append(size)
        if size > self.fits:
            raise TrainerDiedError(self.cause)
        return {"outcome": "completed"}, bytearray(weights)


@pytest.fixture(autouse=True)
def _record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_app, "BATCH_RECORD", tmp_path / "batch-size")


def _ask(
    monkeypatch: pytest.MonkeyPatch,
    trainer: _Trainer,
    policy: Literal["fail", "halve_batch"],
    batch: int = 32,
) -> str:
    monkeypatch.setattr(client_app, "request", trainer)
    device = DeviceSettings(
        device="phone",
        device_class="c",
        machine="m",
        batch_size=batch,
        out_of_memory_policy=policy,
    )
    *_, said = client_app._ask_trainer("train", Task(), device, b"")
    return said


def test_half_the_batch_is_tried_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _Trainer(fits=10)
    said = _ask(monkeypatch, trainer, "halve_batch")
    assert trainer.asked == [32, 16, 8]
    assert said == "out of memory with batches of 16, went on with 8"
    # It is remembered, and no smaller setting is raised to it.
    assert _ask(monkeypatch, trainer, "halve_batch") == ""
    assert _ask(monkeypatch, trainer, "halve_batch", batch=4) == ""
    assert trainer.asked[3:] == [8, 4]


def test_without_the_policy_it_is_the_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _Trainer(fits=10)
    with pytest.raises(TrainerDiedError):
        _ask(monkeypatch, trainer, "fail")
    assert trainer.asked == [32]


def test_no_batch_is_smaller_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _Trainer(fits=0)
    with pytest.raises(TrainerDiedError):
        _ask(monkeypatch, trainer, "halve_batch", batch=4)
    assert trainer.asked == [4, 2, 1]


def test_another_death_is_not_the_batchs_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _Trainer(fits=10, cause="signal 9")
    with pytest.raises(TrainerDiedError):
        _ask(monkeypatch, trainer, "halve_batch")
    assert trainer.asked == [32]
