"""The worker as a real process, asked by the ClientApp that the lab puts in an app's place."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord
from hosting import APP, RUNTIME, Hosting, arrays, config, is_alive, kill, write_app

from flowerbed.device.worker import prune_apps


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosting]:
    """A worker for tests after which it goes on as before."""
    root = tmp_path_factory.mktemp("worker")
    hosting = Hosting(root / "device", write_app(root / "app"))
    hosting.start()
    yield hosting
    hosting.stop()


@pytest.fixture
def hosting(tmp_path: Path) -> Iterator[Hosting]:
    """A worker of a test's own."""
    hosting = Hosting(tmp_path / "device", write_app(tmp_path / "app"))
    yield hosting
    hosting.stop()


# --- one run ------------------------------------------------------------------------------


def test_what_an_app_keeps_is_there_for_the_next_message(shared: Hosting) -> None:
    first, second = shared.send()["metrics"], shared.send()["metrics"]
    assert (second["pid"], second["draw"]) == (first["pid"], first["draw"])
    assert second["count"] == first["count"] + 1
    # So is the state that Flower keeps for it.
    assert second["state"] == first["state"] + 1


def test_records_arrive_as_they_were_sent(shared: Hosting) -> None:
    content = arrays(w=np.arange(6, dtype=np.float32).reshape(2, 3), b=np.int64(3))
    content["config"] = ConfigRecord(
        {"data": b"\0\xff", "text": "base64:no", "list": [1.5, 2.0], "yes": True, "many": [b"a"]}
    )
    reply = shared.send(content=content)
    assert reply["outcome"] == "completed"
    returned = reply["content"]
    np.testing.assert_array_equal(
        returned["arrays"]["w"].numpy(), content["arrays"]["w"].numpy() + 1
    )
    assert returned["arrays"]["w"].numpy().dtype == np.float32
    assert returned["arrays"]["b"].numpy() == 4
    assert dict(returned["config"]) == dict(content["config"])
    assert reply["bytes_received"] == reply["bytes_sent"] > 6 * 4


def test_the_work_is_reported(shared: Hosting) -> None:
    before = time.time()
    reply = shared.send(content=arrays(w=np.zeros(1000)))
    assert before <= reply["started"] <= time.time()
    assert 0 <= reply["queue_seconds"] < 1
    assert 0 <= reply["work_seconds"] < 1
    assert reply["bytes_received"] > 8000
    assert reply["memory"] > 10 * 2**20
    assert reply["batch_size"] is None
    assert (reply["reason"], reply["recycled"]) == ("", "")
    assert reply["throttled_share"] >= 0
    assert reply["throttled_seconds"] >= 0


@pytest.mark.parametrize(
    ("kind", "mark"),
    [("train.personalise", "personal"), ("evaluate", "evaluated"), ("query.warm_up", "arrays")],
)
def test_every_type_of_message_is_handed_over(shared: Hosting, kind: str, mark: str) -> None:
    assert mark in shared.send(kind)["metrics"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("train.divide", "ZeroDivisionError: integer division or modulo by zero"),
        ("train.leave", "SystemExit: 3"),
        ("train.nothing", "the app returned a NoneType and not a Message"),
        ("train.refuse", "not today"),
        ("train.unheard", "ValueError: No train function registered with name 'unheard'"),
    ],
)
def test_what_goes_wrong_in_the_app_is_an_outcome(shared: Hosting, kind: str, reason: str) -> None:
    before = shared.send()["metrics"]
    reply = shared.send(kind)
    assert (reply["outcome"], reply["reason"]) == ("error", reason)
    assert "records" not in reply
    after = shared.send()["metrics"]
    assert after["count"] == before["count"] + 1
    assert after["state"] == before["state"] + 1
    assert "spoiled" not in shared.context.state


def test_the_apps_own_traceback_is_reported(shared: Hosting) -> None:
    trace = shared.send("train.divide")["traceback"].splitlines()
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1] == "ZeroDivisionError: integer division or modulo by zero"
    assert any("tiny/client_app.py" in line and "in divide" in line for line in trace)
    assert not any("flowerbed/device" in line for line in trace)


def test_a_server_that_knows_nothing_of_the_lab_is_answered(shared: Hosting) -> None:
    reply = shared.send_plain(arrays(w=np.zeros(2)))
    np.testing.assert_array_equal(reply.content["arrays"]["w"].numpy(), np.ones(2))
    assert list(reply.content) == ["metrics", "arrays"]
    error = shared.send_plain(config(), "train.divide").error
    assert (error.code, error.reason) == (
        2,
        "ZeroDivisionError: integer division or modulo by zero",
    )


def test_a_device_introduces_itself(
    shared: Hosting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "shard.json").write_text('{"train_examples": 12}')
    monkeypatch.setenv("FLOWERBED_DATA", str(tmp_path))
    state = shared.context.state
    shared.context = shared.fresh_context(**{"device": "phone", "batch-size": 8})
    shared.context.state = state
    reply = shared.send_header({"introduce": True})
    assert (reply["outcome"], reply["reason"]) == ("completed", "")
    assert reply["node_config"] == {"device": "phone", "batch-size": 8}
    assert reply["shard"] == {"train_examples": 12}
    # The app's own function has been called, with an empty message.
    assert reply["warm_up"]["num-examples"] == 7
    assert (reply["warm_up"]["arrays"], reply["warm_up"]["batch"]) == (0, 8)
    environment = reply["environment"]
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["libraries"]["numpy"] == np.__version__
    assert environment["cores"] > 0
    assert environment["processor"]
    assert environment["threads"] >= 1
    assert environment["kernel"]
    assert "records" not in reply


def test_large_messages_are_handed_over(shared: Hosting) -> None:
    weights = np.random.default_rng(1).random(4_000_000, np.float32)
    reply = shared.send(content=arrays(w=weights))
    np.testing.assert_array_equal(reply["content"]["arrays"]["w"].numpy(), weights + 1)


CLIENT_FN = """
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

BEGUN = []

def mod(message, context, call_next):
    BEGUN.append(message.metadata.message_type)
    return call_next(message, context)

class Client(NumPyClient):
    def fit(self, parameters, config):
        return [p * 2 for p in parameters], 5, {"calls": len(BEGUN), "mu": config["mu"]}

def client_fn(context):
    return Client().to_client()

app = ClientApp(client_fn, mods=[mod])
"""

LIFESPAN = """
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
STEPS = []

@app.lifespan()
def lifespan(context):
    STEPS.append("enter")
    yield
    STEPS.append("leave")

@app.train()
def train(message, context):
    return Message(RecordDict({"metrics": MetricRecord({"steps": len(STEPS)})}), reply_to=message)
"""


def test_an_older_app_with_its_mods(hosting: Hosting, tmp_path: Path) -> None:
    hosting.app = write_app(tmp_path / "older", CLIENT_FN)
    hosting.start()
    # As Flower's strategies for such apps send it.
    content = arrays(w=np.ones(3))
    content["fitins.parameters"] = content.pop("arrays")
    content["fitins.config"] = ConfigRecord({"mu": 0.5})
    assert hosting.send_header({"introduce": True})["outcome"] == "completed"
    for calls in (1, 2):
        reply = hosting.send(content=content)
        (parameters,) = reply["content"]["fitres.parameters"].to_numpy_ndarrays()
        np.testing.assert_array_equal(parameters, np.full(3, 2.0))
        assert dict(reply["content"]["fitres.metrics"]) == {"calls": calls, "mu": 0.5}

    # Another app takes the worker over. Its lifespan surrounds each message.
    hosting.new_run(write_app(tmp_path / "other", LIFESPAN, app="another"))
    assert [hosting.send()["metrics"]["steps"] for _ in range(2)] == [1, 3]


# --- runs and apps ------------------------------------------------------------------------

LIBRARY = """
import os, sys
VARIABLE = os.environ.get("SLOW_VARIABLE", "")
BLOCKED = sys.modules.get("blocked_library", 0) is None
STATE = []
"""

WITH_LIBRARY = APP.replace(
    "\napp = ClientApp()\n",
    """
BEFORE = int("slow" in sys.modules) + int("slow.late" in sys.modules)
os.environ.setdefault("SLOW_VARIABLE", "of the app")
sys.modules["blocked_library"] = None
import slow
app = ClientApp()

@app.query("library")
def library(message, context):
    import slow.late
    slow.STATE.append(1)
    return reply(message, context, before=BEFORE, variable=int(slow.VARIABLE == "of the app"),
                 blocked=int(slow.BLOCKED), state_of_library=len(slow.STATE))
""",
)


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """A layer of dependencies: one library."""
    package = tmp_path / "layer" / "slow"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(LIBRARY)
    (package / "late.py").write_text("")
    return package.parent


def test_nothing_of_a_run_reaches_the_next_but_its_libraries(
    hosting: Hosting, tmp_path: Path, layer: Path
) -> None:
    hosting.app = write_app(tmp_path / "a", WITH_LIBRARY, layer=str(layer))
    hosting.start()
    first = hosting.send("query.library")["metrics"]
    assert (first["variable"], first["blocked"], first["before"]) == (1, 1, 0)
    mess = hosting.send("train.mess")["metrics"]
    assert is_alive(mess["child"])
    look = hosting.send("query.look")["metrics"]
    assert (look["environment"], look["directory"]) == (1, 1)

    hosting.end()
    hosting.new_run(write_app(tmp_path / "b", WITH_LIBRARY, layer=str(layer)))
    second = hosting.send("query.library")["metrics"]
    assert second["pid"] == first["pid"]
    assert (second["count"], second["state"], second["state_of_library"]) == (1, 1, 1)
    assert second["before"] == 2
    assert (second["variable"], second["blocked"]) == (1, 1)
    assert second["draw"] != first["draw"]
    assert not is_alive(mess["child"])
    fresh = hosting.send("query.look")["metrics"]
    assert (fresh["environment"], fresh["directory"]) == (0, 0)
    assert (fresh["random"], fresh["numpy"]) != (look["random"], look["numpy"])

    # Without a word of its end, and for another app, it starts anew as well.
    hosting.new_run()
    third = hosting.send("query.library")["metrics"]
    assert (third["count"], third["before"], third["pid"]) == (1, 0, first["pid"])
    hosting.end()
    hosting.new_run(write_app(tmp_path / "c", WITH_LIBRARY, layer=str(layer), app="another"))
    fourth = hosting.send("query.library")["metrics"]
    assert (fourth["count"], fourth["before"]) == (1, 0)


def test_an_app_whose_state_depends_on_no_run_keeps_it(hosting: Hosting, tmp_path: Path) -> None:
    hosting.app = write_app(tmp_path / "a", reuse_worker=True)
    hosting.start()
    first = hosting.send()["metrics"]
    hosting.end()
    hosting.new_run(write_app(tmp_path / "b", reuse_worker=True))
    second = hosting.send()["metrics"]
    assert (second["draw"], second["count"], second["state"]) == (first["draw"], 2, 1)
    hosting.new_run(write_app(tmp_path / "c", app="another", reuse_worker=True))
    assert hosting.send()["metrics"]["count"] == 1


def test_an_app_that_cannot_be_loaded_is_an_outcome(hosting: Hosting, tmp_path: Path) -> None:
    hosting.app = write_app(tmp_path / "a", "import numpy\nimport none_such\n")
    hosting.start()
    reply = hosting.send_header({"introduce": True}, data=bytes(3_000_000))
    assert reply["outcome"] == "error"
    assert reply["reason"] == "ModuleNotFoundError: No module named 'none_such'"
    assert 'tiny/client_app.py", line 2' in reply["traceback"]
    # Nothing is left of the attempt.
    write_app(hosting.app)
    assert hosting.send()["metrics"]["count"] == 1
    hosting.new_run(write_app(tmp_path / "b", "app = 3", app="another"))
    reply = hosting.send()
    assert reply["reason"] == "TypeError: tiny.client_app:app is a int and not a ClientApp"


def test_an_app_that_cannot_be_loaded_with_its_libraries_there_is_loaded_without(
    hosting: Hosting, tmp_path: Path, layer: Path
) -> None:
    source = WITH_LIBRARY.replace("import slow\n", "assert not BEFORE\nimport slow\n")
    hosting.app = write_app(tmp_path / "a", source, layer=str(layer))
    hosting.start()
    assert hosting.send()["outcome"] == "completed"
    hosting.end()
    hosting.new_run()
    reply = hosting.send(content=arrays(w=np.zeros(500_000)))
    assert reply["metrics"]["count"] == 1


def test_old_apps_do_not_fill_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    for age, name in enumerate(["newest", "newer", "older", "oldest"]):
        directory = tmp_path / "apps" / name
        directory.mkdir(parents=True)
        os.utime(directory, (1000 - age, 1000 - age))
    prune_apps(keep={str(tmp_path / "apps" / "oldest")})
    assert {path.name for path in (tmp_path / "apps").iterdir()} == {"newest", "newer", "oldest"}


# --- memory -------------------------------------------------------------------------------


def test_a_worker_that_grows_starts_anew_before_its_limit(tmp_path: Path) -> None:
    group = tmp_path / "cgroup"
    group.mkdir()
    (group / "memory.max").write_text(f"{200 * 2**20}\n")
    (group / "memory.current").write_text("0\n")
    hosting = Hosting(tmp_path / "device", write_app(tmp_path / "app"), FLOWERBED_CGROUP=str(group))
    hosting.start()
    try:
        for _ in range(4):  # one that keeps nothing stays
            assert hosting.send()["recycled"] == ""
        steady = hosting.send()
        assert (steady["metrics"]["count"], steady["recycled"]) == (5, "")
        reply = hosting.send("train.leak", config(bytes=20 * 2**20))
        while not reply["recycled"] and reply["metrics"]["kept"] < 9:
            reply = hosting.send("train.leak", config(bytes=20 * 2**20))
            assert reply["memory"] < 200 * 2**20
        assert reply["recycled"].startswith("the worker started anew: its memory had grown by ")
        assert reply["metrics"]["kept"] == 1
        assert reply["metrics"]["pid"] == steady["metrics"]["pid"]
        assert reply["metrics"]["state"] > 5, "context.state is not the worker's to lose"
        assert hosting.send()["recycled"] == ""
    finally:
        hosting.stop()


# --- work that nobody waits for -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["train.sleep", "train.stubborn"])
def test_an_expired_message_is_worked_on_no_longer(shared: Hosting, kind: str) -> None:
    before = shared.send()["metrics"]
    started = time.monotonic()
    reply = shared.send(kind, ttl=1.0)
    assert reply["reason"] == "the message has expired after 1 s"
    after = shared.send()["metrics"]
    assert time.monotonic() - started < 4
    assert after["draw"] == before["draw"], "the worker stays"


@pytest.mark.parametrize("kind", ["train.native", "train.thread"])
def test_work_that_cannot_be_interrupted_ends_with_its_process(shared: Hosting, kind: str) -> None:
    before = shared.send()["metrics"]
    started = time.monotonic()
    shared.send(kind, ttl=0.5)
    assert time.monotonic() - started < 6
    after = shared.send()["metrics"]
    assert after["pid"] == before["pid"]
    assert after["count"] == 1


def test_a_run_that_has_ended_is_worked_for_no_longer(shared: Hosting) -> None:
    timer = threading.Timer(0.5, (shared.directory / f"ended-{shared.run_id}").touch)
    timer.start()
    started = time.monotonic()
    reply = shared.send("train.sleep")
    assert reply["reason"] == "the run is over"
    assert time.monotonic() - started < 3
    shared.new_run()
    assert shared.send()["metrics"]["count"] == 1


def test_a_client_app_that_is_killed_waits_no_longer(shared: Hosting) -> None:
    draw = shared.send()["metrics"]["draw"]
    asleep = shared.directory / "asleep"
    asleep.unlink(missing_ok=True)
    code = (
        "import sys; from pathlib import Path; from hosting import Hosting\n"
        f"hosting = Hosting(Path({str(shared.directory)!r}), Path({str(shared.app)!r}))\n"
        f"hosting.run_id = {shared.run_id}\n"
        "hosting.context = hosting.fresh_context()\n"
        "hosting.send('train.sleep')\n"
    )
    path = os.pathsep.join([str(RUNTIME), str(Path(__file__).parent)])
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=shared.environment | {"PYTHONPATH": path},
    )
    while not asleep.exists():
        assert child.poll() is None
        time.sleep(0.05)
    kill(child.pid)
    child.wait()
    started = time.monotonic()
    assert shared.send()["metrics"]["draw"] == draw
    assert time.monotonic() - started < 2


def test_a_finished_client_is_not_taken_for_a_lost_one(shared: Hosting) -> None:
    """The worker must not see the connection close before it knows that it has finished."""
    first = shared.send()["metrics"]
    replies = [shared.send() for _ in range(200)]
    assert {reply["outcome"] for reply in replies} == {"completed"}
    assert replies[-1]["metrics"]["count"] == first["count"] + 200
