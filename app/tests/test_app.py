"""The app whole: what devices reply, two rounds in one process, and Flower's own checks."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from examples import APP, CLASSES, SHAPE, make_images, run_config
from flowerbed import PlacedData
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from mobilenet import calibrate, client_app, server_app
from mobilenet.learner import Parameters, get_learner
from mobilenet.settings import RunSettings

TRAIN_METRICS = {
    "num-examples",
    "eval-loss",
    "eval-accuracy",
    "eval-examples",
    "train-loss",
    "train-loss-rms",
    "train-accuracy",
    "train-steps",
    "effective-steps",
    "partial",
    "train-seconds",
    "evaluate-seconds",
    "batch-size",
}
SERVER = 0


class Lab:
    """Data as the lab places them, for the node whose turn it is."""

    def __init__(self) -> None:
        self.node = SERVER
        self.train = {SERVER: 0, 1: 40, 2: 36}
        """Training images of each node."""

    def data(self) -> PlacedData:
        train = make_images(self.train[self.node], seed=self.node)
        test = make_images(20, seed=100 + self.node)
        return PlacedData(train, test, {}, self.node, 1.0, "", [], CLASSES)


class MemoryGrid(Grid):
    """Two devices in this process."""

    def __init__(self, lab: Lab, config: dict[str, Any]) -> None:
        self.lab = lab
        self.contexts = {
            node: Context(1, node, {"partition-id": node, "batch-size": 16}, RecordDict(), config)
            for node in (1, 2)
        }
        self.replies: list[Message] = []

    def get_node_ids(self) -> list[int]:
        """Return the ids of the devices."""
        return list(self.contexts)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Let the devices work, one after another."""
        assert timeout, "nobody may wait for ever"
        replies = []
        for message in messages:
            self.lab.node = message.metadata.dst_node_id
            replies.append(client_app.app(message, self.contexts[self.lab.node]))
        self.lab.node = SERVER
        self.replies += replies
        return replies

    set_run = run = create_message = push_messages = pull_messages = None  # nobody calls them


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = Lab()
    monkeypatch.setattr("mobilenet.data.placed_data", lab.data)
    return lab


def _ask(
    lab: Lab,
    config: dict[str, Any] | None = None,
    *,
    message_type: str = MessageType.TRAIN,
    node_config: dict[str, Any] | None = None,
    **run: Any,
) -> Message:
    """Send one message to device 1 and return its reply.

    Args:
        run: changes of the run configuration.
    """
    lab.node = 1
    settings = run_config(model="linear", **run)
    model = RunSettings.parse(settings).network
    initial = get_learner(model, SHAPE, CLASSES).initial
    content = RecordDict({"arrays": initial.as_record(), "config": ConfigRecord(config or {})})
    context = Context(1, 1, node_config or {"batch-size": 16}, RecordDict(), settings)
    return client_app.app(Message(content, 1, message_type), context)


def _trained(reply: Message) -> np.ndarray[Any, Any]:
    return Parameters.from_record(reply.content["arrays"]).weights


# --- the run ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "linear", "learning_rate": 0.001},
        {"model": "mobilenet", "alpha": 0.1},
    ],
)
def test_two_rounds_in_one_process(
    lab: Lab,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
) -> None:
    monkeypatch.setenv("FLOWERBED_RUN_DIRECTORY", str(tmp_path))
    caplog.set_level("INFO", "flwr")
    config = run_config(num_server_rounds=2, **changes)
    grid = MemoryGrid(lab, config)
    server_app.app(grid, Context(1, SERVER, {}, RecordDict(), config))

    trained = [reply for reply in grid.replies if reply.metadata.message_type == "train"]
    closing = [reply for reply in grid.replies if reply.metadata.message_type == "evaluate"]
    assert (len(trained), len(closing)) == (4, 2)
    metrics = [reply.content["metrics"] for reply in trained]
    assert all(set(each) == TRAIN_METRICS for each in metrics)
    assert [each["num-examples"] for each in metrics] == [32] * 4
    assert all(each["partial"] == 0 and each["eval-examples"] == 20 for each in metrics)
    assert metrics[2]["eval-loss"] != metrics[0]["eval-loss"]  # the model has changed

    saved = keras.models.load_model(tmp_path / "model.keras")
    lab.node = 1
    test = lab.data().test
    losses = keras.losses.sparse_categorical_crossentropy(test["label"], saved(test["image"]))
    closing_metrics = closing[0].content["metrics"]
    assert closing_metrics["eval-loss"] == pytest.approx(float(np.mean(losses)), rel=1e-4)
    assert closing_metrics["num-examples"] == 20
    assert "The model on the devices' test images: {'eval-loss': " in caplog.text
    assert caplog.text.count("MetricRecord: {'accuracy': ") == 2  # of the central evaluation


def test_a_run_repeats_bit_for_bit(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one thread, as the lab's devices of up to one core have."""
    monkeypatch.setenv("FLOWERBED_RUN_DIRECTORY", str(tmp_path))
    config = run_config(num_server_rounds=2, model="mobilenet", alpha=0.1)
    runs = []
    for _ in range(2):
        get_learner.cache_clear()
        grid = MemoryGrid(lab, config)
        server_app.app(grid, Context(1, SERVER, {}, RecordDict(), config))
        runs.append([r for r in grid.replies if r.metadata.message_type == "train"])
    for first, second in zip(*runs, strict=True):
        assert _trained(first).tobytes() == _trained(second).tobytes()


def test_a_server_without_test_data_trains_all_the_same(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = lab.data
    monkeypatch.setattr("mobilenet.data.placed_data", lambda: _without_test(data(), lab.node))
    config = run_config(model="linear", num_server_rounds=1)
    grid = MemoryGrid(lab, config)
    server_app.app(grid, Context(1, SERVER, {}, RecordDict(), config))
    assert len(grid.replies) == 4
    assert (tmp_path / "model.keras").exists()


def _without_test(data: PlacedData, node: int) -> PlacedData:
    return (
        data if node != SERVER else PlacedData(data.train, data.train, {}, 0, 1.0, "", [], CLASSES)
    )


# --- one device ---------------------------------------------------------------------------------


def test_the_batches_depend_on_seed_round_and_attempt_only(lab: Lab) -> None:
    first = _trained(_ask(lab, {"server-round": 1}))
    again = _trained(_ask(lab, {"server-round": 1, "attempt": 0}))
    np.testing.assert_array_equal(first, again)
    others = [
        _ask(lab, {"server-round": 2}),
        _ask(lab, {"server-round": 1, "attempt": 1}),
        _ask(lab, {"server-round": 1}, seed=1),
    ]
    assert all(not np.array_equal(first, _trained(reply)) for reply in others)


def test_a_message_limits_the_time(lab: Lab) -> None:
    metrics = _ask(lab, {"time-limit": 0.3}, local_epochs=10_000_000).content["metrics"]
    assert metrics["partial"] == 1
    assert 0.2 < metrics["train-seconds"] < 2
    filled = _ask(lab, {"time-limit": 0.3, "fill-time": True}).content["metrics"]
    assert filled["partial"] == 0
    assert filled["num-examples"] > 40


def test_a_message_sets_the_proximal_term(lab: Lab) -> None:
    free, near = (
        _trained(_ask(lab, {"proximal-mu": mu}, local_epochs=5, learning_rate=0.001))
        for mu in (0.0, 100.0)
    )
    assert 0 < np.linalg.norm(near) < 0.9 * np.linalg.norm(free)


def test_the_device_sets_optimizer_and_rate(lab: Lab) -> None:
    node = {"batch-size": 40, "learning-rate": 1e-4, "optimizer": "adam"}
    moved = np.abs(_trained(_ask(lab, node_config=node)))
    assert moved.max() == pytest.approx(1e-4, rel=0.01)  # the first step of Adam is the rate


def test_warm_up_tells_how_fast_the_device_is(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_app, "MEASURED_SECONDS", 0.2)
    lab.node = 1
    message = Message(RecordDict(), 1, "query.warm_up")
    context = Context(1, 1, {"batch-size": 16}, RecordDict(), run_config(model="linear"))
    metrics = client_app.app(message, context).content["metrics"]
    assert metrics["num-examples"] == 40
    assert metrics["examples-per-second"] > 40


def test_the_linear_model_needs_no_tensorflow() -> None:
    """Nor do packages stay hidden that are hidden while Keras is imported."""
    code = """
import os, sys
from mobilenet import client_app, learner
from mobilenet.settings import ModelSettings
learner.get_learner(ModelSettings(model="linear", alpha=1, recipe="original"), (8, 8, 3), 10)
assert not {"tensorflow", "keras", "datasets", "pandas"} & set(sys.modules)
learner.load_tensorflow()
import tensorflow as tf
assert tf.config.threading.get_intra_op_parallelism_threads() == 3
assert not {"pandas", "matplotlib"} & set(sys.modules)
assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == "1"
"""
    environment = os.environ | {"OMP_NUM_THREADS": "3"}
    environment.pop("TF_ENABLE_ONEDNN_OPTS", None)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_machine_can_be_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_EXAMPLES", 64)
    assert calibrate.measure(0) > 0


# --- Flower's checks ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """What Flower makes of the app's directory."""
    directory = tmp_path_factory.mktemp("fab") / "mobilenet"
    shutil.copytree(APP, directory, ignore=shutil.ignore_patterns("__pycache__"))
    flwr = shutil.which(
        "flwr", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert flwr, "Flower's command line is not installed"
    done = subprocess.run(  # noqa: PLW1510 - checked below, with its output
        [flwr, "build", "--app", str(directory)],
        cwd=directory.parent,
        capture_output=True,
        text=True,
        env=os.environ | {"FLWR_HOME": str(directory.parent), "FLWR_TELEMETRY_ENABLED": "0"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing" not in done.stdout
    (file,) = directory.parent.glob("*.fab")
    with zipfile.ZipFile(file) as opened:
        yield opened


def test_flower_bundles_the_app(bundle: zipfile.ZipFile) -> None:
    names = set(bundle.namelist())
    modules = {str(path.relative_to(APP)) for path in (APP / "mobilenet").glob("*.py")}
    assert modules <= names
    others = {"pyproject.toml", "README.md", ".info/CONTENT", "tests/conftest.py"}
    assert names - modules <= others | {"tests/examples.py"}
