"""What the lab takes from Flower beyond its public interface: fails when an upgrade moves it."""

import importlib
import inspect
import random
import sys
import threading
import time
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp

from flowerbed import flower
from flowerbed.server import superlink


def _metadata(**changes: Any) -> Metadata:
    values = {
        "run_id": 7,
        "message_id": "abc",
        "src_node_id": 1,
        "dst_node_id": 5,
        "reply_to_message_id": "",
        "group_id": "3",
        "created_at": time.time(),
        "ttl": 60.0,
        "message_type": "train",
    }
    return Metadata(**values | changes)


def test_error_codes() -> None:
    codes = importlib.import_module("flwr.common.constant").ErrorCode
    assert codes.NODE_UNAVAILABLE == flower.NODE_UNAVAILABLE
    assert codes.CLIENT_APP_RAISED_EXCEPTION == flower.APP_RAISED


def test_strategies_sample_with_a_generator_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("flwr.serverapp.strategy.strategy_utils", "flwr.server.client_manager")
    modules = [importlib.import_module(name) for name in names]
    for module in modules:
        monkeypatch.setattr(module, "random", module.random)  # put back in the end
    grid = SimpleNamespace(get_node_ids=lambda: list(range(100)))
    drawn = []
    for _ in range(2):
        generator = flower.seed_sampling(3)
        assert all(module.random is generator for module in modules)
        random.random()  # noqa: S311 - somebody else draws from Python's generator
        drawn.append(modules[0].sample_nodes(grid, 1, 10)[0])
    assert drawn[0] == drawn[1]


def test_a_superlink_forgives_a_standstill(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is over when it has missed its heartbeats; not when the SuperLink stood still."""
    memory = importlib.import_module("flwr.supercore.corestate.in_memory_corestate")
    sql = importlib.import_module("flwr.supercore.corestate.sql_corestate")
    link = importlib.import_module("flwr.server.superlink.linkstate.in_memory_linkstate")
    devices = link.HEARTBEAT_PATIENCE
    for module in (memory, sql):
        monkeypatch.setattr(module, "HEARTBEAT_PATIENCE", module.HEARTBEAT_PATIENCE)
        assert "HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL" in inspect.getsource(module)
        assert module.HEARTBEAT_DEFAULT_INTERVAL == 30
    flower.extend_patience(superlink.INTERVALS)
    assert memory.HEARTBEAT_PATIENCE == sql.HEARTBEAT_PATIENCE == superlink.INTERVALS
    assert devices == link.HEARTBEAT_PATIENCE  # when devices are offline stays
    constant = importlib.import_module("flwr.common.constant")
    pause = (constant.HEARTBEAT_DEFAULT_INTERVAL - constant.HEARTBEAT_CALL_TIMEOUT) * (
        constant.HEARTBEAT_BASE_MULTIPLIER + constant.HEARTBEAT_RANDOM_RANGE[1]
    )
    assert pause + 90 < 30 * superlink.INTERVALS
    programs = {each.name for each in entry_points(group="console_scripts")}
    assert superlink.PROGRAM in programs


def test_a_message_can_be_rebuilt_from_its_metadata() -> None:
    message = Message(metadata=_metadata(message_type="train.own"), content=RecordDict())
    reply = Message(RecordDict(), reply_to=message)
    assert reply.metadata.reply_to_message_id == "abc"
    assert (reply.metadata.run_id, reply.metadata.dst_node_id) == (7, 1)
    assert (reply.metadata.group_id, reply.metadata.message_type) == ("3", "train.own")
    assert 0 < reply.metadata.ttl <= 60


def test_flower_calls_a_client_app_as_a_whole() -> None:
    source = inspect.getsource(importlib.import_module("flwr.supernode.runtime.run_clientapp"))
    assert "client_app(message=message, context=context)" in source

    class Replaced(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            assert context.run_id == message.metadata.run_id
            return message

    assert list(inspect.signature(ClientApp.__call__).parameters) == ["self", "message", "context"]
    message = Message(metadata=_metadata(), content=RecordDict())
    assert Replaced()(message=message, context=Context(7, 5, {}, RecordDict(), {})) is message


def test_the_functions_of_an_app_are_known() -> None:
    app = ClientApp()

    @app.query("warm_up")
    def warm_up(message: Message, context: Context) -> Message:
        return message

    assert flower.has_function(app, "query.warm_up")
    assert not flower.has_function(app, "query.other")
    older = ClientApp(lambda _: None)
    assert not flower.has_function(older, "query.warm_up")


def test_an_app_is_loaded_from_the_first_directory_of_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_the_app.py").write_text("app = 3")
    monkeypatch.setattr(sys, "path", sys.path[:])
    load_app = importlib.import_module("flwr.supercore.object_ref").load_app
    assert load_app("of_the_app:app", ValueError, tmp_path) == 3
    assert sys.path[0] == str(tmp_path)


def test_apps_are_unpacked_below_flowers_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", "/flwr")
    project = importlib.import_module("flwr.common.config").get_project_dir
    assert str(project("me/app", "1.0", "0123456789abcdef")) == "/flwr/apps/me.app.1.0.01234567"


def test_flowers_programs_can_be_imported() -> None:
    programs = flower.load_programs()
    assert set(programs) == {"flower-supernode", "flower-superexec", "flwr-clientapp"}
    assert all(callable(program) for program in programs.values())
    supernode = inspect.getsource(importlib.import_module("flwr.supernode.start_client_internal"))
    assert 'command = ["flower-superexec"]' in supernode
    executor = importlib.import_module("flwr.supercore.superexec.executor.subprocess_executor")
    commands = importlib.import_module("flwr.supercore.constant").TASK_TYPE_TO_COMMAND
    assert "flwr-clientapp" in commands.values()
    assert "subprocess.Popen(args)" in inspect.getsource(executor)


def test_the_supernodes_port() -> None:
    constant = importlib.import_module("flwr.supercore.constant")
    assert constant.SUPERNODE_UVICORN_DEFAULT_PORT == flower.SUPERNODE_PORT


def test_the_loops_of_flower_wait_and_ask_as_they_did() -> None:
    supernode = importlib.import_module("flwr.supernode.start_client_internal")
    loop = inspect.getsource(supernode.start_client_internal)
    assert "run_id = _pull_and_store_message(" in loop
    assert "time.sleep(3)" in loop
    assert "time.sleep(0.5)" in inspect.getsource(supernode._push_messages)
    assert issubclass(supernode.RunNotRunningException, BaseException)
    assert {"state", "receive", "pull_object"} <= set(
        inspect.signature(supernode._pull_and_store_message).parameters
    )
    assert "time.sleep(task_poll_interval)" in inspect.getsource(
        importlib.import_module("flwr.supercore.superexec.run_superexec").run_superexec
    )


class _Time:
    """Stands in for the module `time`: nobody waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class _Loop:
    """Flower's loop with ours in it: what it pulls, what it is told, and its clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module: Any = importlib.import_module("flwr.supernode.start_client_internal")
        self.time = _Time()
        self.messages = 0
        self.ended: list[int] = []
        self.asked = 0
        self.running = True
        self.tasks = 0
        self.readable = True
        self.lock_msg_store = threading.Lock()
        self.msg_store: dict[str, Any] = {}
        monkeypatch.setattr(flower, "time", self.time)
        monkeypatch.setattr(self.module, "time", self.time)
        monkeypatch.setattr(self.module, "_pull_and_store_message", self._original)
        self.loop = flower.SuperNodeLoop(self._message, self.ended.append)
        self.loop.install("query.lab")

    def _message(self) -> None:
        self.messages += 1

    def _original(self, *, receive: Any, **_: object) -> int | None:
        received = receive()
        return received[0].metadata.run_id if received and self.readable else None

    def _pull_object(self, run: int, _: str) -> None:
        assert run == 7
        self.asked += 1
        raise ValueError if self.running else self.module.RunNotRunningException

    def get_tasks(self, *, statuses: list[str]) -> list[int]:
        """Tasks of ClientApps that have not ended."""
        assert statuses == ["running"]
        self.tasks -= 1
        return [1] if self.tasks >= 0 else []

    def pull(self, kind: str = "") -> None:
        """Ask for a message; one of `kind` is there."""
        metadata = _metadata(message_type=kind) if kind else None
        received = metadata and (Message(metadata=metadata, content=RecordDict()), None)
        self.module._pull_and_store_message(
            state=self, receive=lambda: received, pull_object=self._pull_object
        )

    def wait(self, seconds: float, times: int = 1) -> list[float]:
        """Wait as Flower does; return for how long it has slept each time."""
        self.time.slept.clear()
        for _ in range(times):
            self.module.time.sleep(seconds)
            while self.loop._asking.is_alive():
                self.loop._asking.join()
        return self.time.slept[:]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> _Loop:
    return _Loop(monkeypatch)


def test_a_supernode_without_messages_costs_no_more_than_before(loop: _Loop) -> None:
    loop.pull()
    assert loop.wait(3, 100) == [3.0] * 100
    assert (loop.asked, loop.messages) == (0, 0)


def test_a_reply_is_sent_soon_and_the_next_message_fetched_soon(loop: _Loop) -> None:
    loop.pull("train")
    assert loop.messages == 1
    assert loop.wait(0.5, 120) == [0.1] * 120
    assert loop.asked == 2, "every four seconds"
    pauses = loop.wait(3, 60)
    assert pauses[:3] == [0.3] * 3
    assert pauses == sorted(pauses)
    assert pauses[-1] == 3.0
    assert sum(pauses[:10]) < 4
    assert sum(pauses[:35]) > 30, "after half a minute it is as lazy as before"


def test_the_next_message_waits_for_the_context_of_the_one_before(loop: _Loop) -> None:
    loop.pull("train")
    loop.wait(0.5)
    loop.tasks = 3
    loop.time.slept.clear()
    loop.pull("train")
    assert loop.time.slept == [0.02] * 3
    loop.wait(0.5)
    loop.tasks = 10**6  # a ClientApp that was killed is not waited for
    loop.pull("train")
    assert sum(loop.time.slept) < 2.5


def test_a_supernode_sees_that_a_run_is_over(loop: _Loop) -> None:
    loop.pull("train")
    loop.wait(0.5, 30)
    assert loop.ended == []
    loop.running = False
    loop.wait(0.5, 60)
    assert loop.ended == [7], "while a message is worked on, and once"
    loop.pull("train")
    loop.wait(3, 40)
    assert loop.ended == [7, 7], "while none is"
    loop.readable = False
    loop.pull("train")
    assert loop.ended == [7, 7]
    loop.pull("query.lab")
    assert loop.ended == [7, 7, 7], "when its last message cannot be read any more"


def test_superexec_waits_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module("flwr.supercore.superexec.run_superexec")
    monkeypatch.setattr(module, "time", module.time)
    waited: list[float] = []
    flower.wake_superexec(waited.append)
    module.time.sleep(0.5)
    assert waited == [0.5]
    assert module.time.monotonic() > 0, "all else of the module `time` is there"


def test_a_reply_that_waits_is_sent_without_another_message() -> None:
    """A reply of a run that was over came first, and the one of the new run was left behind."""
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.nodestate import NodeStateFactory

    state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    assert not flower.has_waiting_reply(state)
    metadata = Metadata(1, "reply", 1, 2, "asked", "", 0.0, 1000.0, "query")
    state.store_message(Message(content=RecordDict(), metadata=metadata))
    module: Any = importlib.import_module("flwr.supernode.start_client_internal")
    original, clock = module._pull_and_store_message, module.time
    try:
        module._pull_and_store_message = lambda **_: None
        flower.SuperNodeLoop(lambda: None, lambda _: None).install("query.flowerbed")
        pull = module._pull_and_store_message
        assert pull(state=state, receive=lambda: None) is not None
        assert state.get_messages_legacy(is_reply=True)
        assert pull(state=state, receive=lambda: None) is None
    finally:
        module._pull_and_store_message, module.time = original, clock
