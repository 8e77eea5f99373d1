"""What an app may import, in the lab and without it."""

import math
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from flowerbed import TimeLimit, evaluate_beside, placed_data, results_directory


def _message(ttl: float, **config: object) -> Message:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    named = {key.replace("_", "-"): value for key, value in config.items()}
    return Message(RecordDict({"config": ConfigRecord(named)}), 1, "train", ttl=ttl)


def test_a_time_limit_is_the_strategys() -> None:
    limit = TimeLimit(_message(1000.0, time_limit=0.2, fill_time=True))
    assert (limit.seconds, limit.fill, limit.reached) == (0.2, True, False)
    time.sleep(0.25)
    assert limit.reached


def test_without_a_limit_there_is_time_until_the_message_expires() -> None:
    limit = TimeLimit(_message(610.0))
    assert limit.seconds == pytest.approx(600 - 30, abs=1)
    assert not limit.fill
    assert TimeLimit(_message(1.0)).reached
    without = Message(RecordDict(), 1, "train", ttl=1000.0)
    assert math.isfinite(TimeLimit(without).seconds)


def test_without_a_lab_nothing_is_placed_and_files_go_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLOWERBED_DATA", str(tmp_path))
    monkeypatch.delenv("FLOWERBED_RUN_DIRECTORY", raising=False)
    assert placed_data() is None
    assert results_directory() == Path()
    monkeypatch.setenv("FLOWERBED_RUN_DIRECTORY", str(tmp_path))
    assert results_directory() == tmp_path


def test_an_evaluation_that_may_run_beside_runs_in_place_without_a_lab() -> None:
    called = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        called.append(number)
        return MetricRecord({"loss": 1.0})

    assert evaluate_beside(evaluate)(3, ArrayRecord([np.zeros(1)])) == MetricRecord({"loss": 1.0})
    assert called == [3]
