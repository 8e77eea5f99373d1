"""Flower Apps that know nothing of this project, on the lab that stands; nothing is redeployed."""

import csv
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from conftest import RESULTS, eventually, query, run_yml
from labs import Played, play
from repository import ROOT

APPS = ROOT / "tests/apps"
FIRST = "budget-1"
"""The device of partition 0, which the apps' switches for faults are about."""


def _rows(run: str, file: str = "devices.csv") -> list[dict[str, str]]:
    with (RESULTS / run / file).open() as lines:
        return list(csv.DictReader(lines))


def _outcomes(run: str, device: str, kind: str = "train") -> dict[str, str]:
    """Outcomes of a device's messages of a type by round."""
    rows = [row for row in _rows(run) if (row["device"], row["type"]) == (device, kind)]
    return {row["round"]: row["outcome"] for row in rows}


def _started(engine: docker.DockerClient) -> dict[str, Any]:
    """When each container of the lab was started."""
    containers = engine.containers.list(filters={"label": "flowerbed.part"})
    return {str(each.name): each.attrs["State"]["StartedAt"] for each in containers}


def _train(
    run: str, app: str | Path, variables: dict[str, Any], *, ok: bool = True, **more: Any
) -> Played:
    given = {key: value for key, value in variables.items() if not key.startswith("training_r")}
    return play("train", ok=ok, training_run=run, training_app=str(app), **(given | more))


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_redeployed(lab: Played, engine: docker.DockerClient) -> Iterator[None]:
    before = _started(engine)
    yield
    after = _started(engine)
    after.pop("flowerbed-device-laptop-1")  # a fault restarts it
    assert after.items() <= before.items()


def _check_outputs(run: str, output: str, rounds: int) -> None:
    """What every run leaves, whatever its app."""
    table = _rows(run, "rounds.csv")
    assert [row["round"] for row in table][:rounds] == [str(n) for n in range(1, rounds + 1)]
    for row in table[:rounds]:
        assert int(row["devices"]) >= 3
        assert float(row["accuracy"]) > 0
        assert re.search(rf"^ +{row['round']}/\d* +0\.\d{{4}} ", output, re.MULTILINE), row["round"]
    told = run_yml(run)
    assert re.fullmatch("[0-9a-f]{64}", told["app"]["sha256"])
    assert len(told["devices"]) == 4
    assert (RESULTS / run / "report.html").exists()
    status = json.loads((RESULTS / run / "status.json").read_text())
    assert status["state"] == "completed"

    def agrees() -> bool:
        (series,) = query("model_accuracy") or [{"value": (0, "nan")}]
        return bool(float(series["value"][1]) == status["accuracy"])

    eventually(agrees, 30, "Prometheus has the accuracy of the run")


def test_an_app_that_raises_in_one_round(lab: Played, variables: dict[str, Any]) -> None:
    run = "test-numpy"
    config = {"raise-in-round": 2, "num-server-rounds": 3}
    played = _train(run, APPS / "numpy-only", variables, training_config=config)
    _check_outputs(run, played.output, 3)
    assert _outcomes(run, FIRST) == {"1": "completed", "2": "error", "3": "completed"}
    (reason,) = (row["reason"] for row in _rows(run) if row["outcome"] == "error")
    assert reason.startswith("ZeroDivisionError")
    rounds = _rows(run, "rounds.csv")
    assert [row["failed"] for row in rounds] == ["0", "1", "0"]
    # It evaluates on the devices and on the server, after each round.
    assert float(rounds[2]["central_accuracy"]) > float(rounds[0]["central_accuracy"]) > 0.3
    assert set(_outcomes(run, "laptop-1", "evaluate").values()) == {"completed"}
    assert run_yml(run)["run"]["raise_in_round"] == 2
    assert "ZeroDivisionError" in (RESULTS / run / "report.html").read_text()


def test_an_app_whose_client_is_killed_for_memory(lab: Played, variables: dict[str, Any]) -> None:
    """A Keras model in Flower's older style, on both sides."""
    run = "test-keras"
    config = {"allocate-in-round": 2, "num-server-rounds": 3, "cache-model": True}
    played = _train(run, APPS / "keras-cnn", variables, training_config=config)
    _check_outputs(run, played.output, 3)
    assert _outcomes(run, FIRST) == {"1": "completed", "2": "out_of_memory", "3": "completed"}
    killed = next(row for row in _rows(run) if row["outcome"] == "out_of_memory")
    assert float(killed["seconds"]) < 60


def test_an_app_with_dependencies_of_its_own_and_a_fault(
    lab: Played, variables: dict[str, Any], engine: docker.DockerClient
) -> None:
    run, device = "test-sklearn", "laptop-1"
    container = engine.containers.get(f"flowerbed-device-{device}")
    code, _ = container.exec_run(["python", "-c", "import sklearn"])
    assert code != 0
    faults = [{"at_round": 2, "do": "kill", "device": device, "seconds": 2}]
    played = _train(
        run,
        APPS / "sklearn-extra",
        variables,
        training_config={"num-server-rounds": 4, "fraction-evaluate": 1.0},
        training_faults=faults,
        training_round_timeout=120,
    )
    _check_outputs(run, played.output, 4)
    outcomes = _outcomes(run, device)
    assert outcomes["1"] == "completed"
    assert "offline" in outcomes.values()
    injected = [(row["fault"], row["target"], row["problem"]) for row in _rows(run, "faults.csv")]
    assert injected == [("kill", device, ""), ("rejoin", device, "")]
    # The packages came as a layer of their own, and the image is what it was.
    code, _ = container.exec_run(["python", "-c", "import sklearn"])
    assert code != 0


def test_an_app_with_a_strategy_and_message_types_of_its_own(
    lab: Played, variables: dict[str, Any]
) -> None:
    run = "test-text"
    played = _train(run, APPS / "text-tokens", variables)
    _check_outputs(run, played.output, 3)
    rows = _rows(run)
    for kind in ("train", "evaluate", "train.personalise", "query"):
        devices = {row["device"] for row in rows if row["type"] == kind}
        assert len(devices) == 4, kind
    metrics = {row["device"]: json.loads(row["metrics"]) for row in rows if row["type"] == "query"}
    # Flower keeps context.state from message to message: 3 rounds of two messages each, and two.
    assert {each["calls"] for each in metrics.values()} == {8}
    personal = [json.loads(r["metrics"]) for r in rows if r["type"] == "train.personalise"]
    assert all(0 < each["personal_accuracy"] <= 1 for each in personal)


def test_runs_of_unlike_apps_are_compared(lab: Played) -> None:
    play("report", runs="test-numpy,test-text")
    page = (RESULTS / "test-numpy-test-text.html").read_text()
    assert "numpy-only" in page
    assert "text-tokens" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("remove", "there is no such directory (training_app)"),
        ("component", "numpy_only.nowhere"),
        ("raise", "ModuleNotFoundError: No module named 'not_there'"),
        ("key", "learning-rate"),
    ],
)
def test_an_app_that_cannot_run_is_refused(
    lab: Played, variables: dict[str, Any], tmp_path: Path, change: str, message: str
) -> None:
    app = tmp_path / "an app"
    config: dict[str, Any] = {}
    if change != "remove":
        for source in (APPS / "numpy-only").rglob("*"):
            if source.is_file() and "__pycache__" not in source.parts:
                target = app / source.relative_to(APPS / "numpy-only")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(source.read_text())
    if change == "component":
        project = app / "pyproject.toml"
        text = project.read_text().replace("numpy_only.client_app:app", "numpy_only.nowhere:app")
        project.write_text(text)
    elif change == "raise":
        client = app / "numpy_only/client_app.py"
        client.write_text("import not_there\n" + client.read_text())
    elif change == "key":
        config = {"learning-rat": 0.1}
    started = time.monotonic()
    more = {"training_config": config} if config else {}
    played = _train(f"test-refused-{change}", app, variables, ok=False, **more)
    assert played.code != 0
    assert message in re.sub(r"\s+", " ", played.output)
    assert time.monotonic() - started < 120
    assert not (RESULTS / f"test-refused-{change}/rounds.csv").exists()
