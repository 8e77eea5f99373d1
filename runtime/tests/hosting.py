"""A device's worker as a real process, apps for it, and messages as Flower hands them over."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)

import flowerbed
from flowerbed.device import client
from flowerbed.device.handoff import announce_end, ended_mark, request
from flowerbed.messages import is_sealed, pack, seal, unpack, unseal

RUNTIME = Path(flowerbed.__file__).parents[1]

APP = '''
"""Does what its messages ask."""
import ctypes, hashlib, os, random, subprocess, sys, threading, time
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
COUNT = 0
DRAW = random.random()
KEPT = []

def reply(message, context, **metrics):
    global COUNT
    COUNT += 1
    state = context.state.setdefault("state", ConfigRecord({"count": 0}))
    state["count"] += 1
    metrics |= {"pid": os.getpid(), "count": COUNT, "state": state["count"], "draw": DRAW,
                "batch": context.node_config.get("batch-size", 0)}
    content = RecordDict({"metrics": MetricRecord(metrics)})
    for name, arrays in message.content.array_records.items():
        more = {key: Array(np.asarray(array.numpy() + 1)) for key, array in arrays.items()}
        content[name] = ArrayRecord(more)
    for name, config in message.content.config_records.items():
        content[name] = config
    return Message(content, reply_to=message)

@app.train()
def train(message, context):
    return reply(message, context)

@app.train("personalise")
def personalise(message, context):
    return reply(message, context, personal=1)

@app.evaluate()
def evaluate(message, context):
    return reply(message, context, evaluated=1)

@app.query("warm_up")
def warm_up(message, context):
    return reply(message, context, **{"num-examples": 7, "arrays": len(message.content)})

@app.train("divide")
def divide(message, context):
    context.state["spoiled"] = ConfigRecord({"x": 1})
    return reply(message, context, x=1 // 0)

@app.train("leave")
def leave(message, context):
    sys.exit(3)

@app.train("abort")
def abort(message, context):
    os.abort()

@app.train("greedy")
def greedy(message, context):
    """Is killed by the kernel for its memory, as far as its cgroup tells."""
    if context.node_config["batch-size"] > 10:
        events = os.path.join(os.environ["FLOWERBED_CGROUP"], "memory.events")
        kills = int(open(events).read().split()[1])
        open(events, "w").write(f"oom_kill {kills + 1}")
        os.kill(os.getpid(), 9)
    return reply(message, context)

@app.train("nothing")
def nothing(message, context):
    return None

@app.train("refuse")
def refuse(message, context):
    return Message(Error(77, "not today"), reply_to=message)

@app.train("sleep")
def sleep(message, context):
    open(os.environ["FLOWERBED_DEVICE_DIRECTORY"] + "/asleep", "w").close()
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass

@app.train("stubborn")
def stubborn(message, context):
    for _ in range(2):
        try:
            time.sleep(60)
        except BaseException:
            KEPT.append("caught")
    return reply(message, context)

@app.train("native")
def native(message, context):
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)  # without the interpreter's lock

@app.train("locked")
def locked(message, context):
    ctypes.PyDLL(None).sleep(600)  # with it

@app.train("thread")
def thread(message, context):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    time.sleep(600)

@app.train("leak")
def leak(message, context):
    KEPT.append(np.ones(int(message.content["config"]["bytes"]), np.uint8))
    return reply(message, context, kept=len(KEPT))

@app.train("mess")
def mess(message, context):
    os.environ["OF_THIS_RUN"] = "1"
    os.chdir("/")
    child = subprocess.Popen(["sleep", "600"])
    random.seed(5); np.random.seed(5)
    return reply(message, context, child=child.pid)

@app.query("look")
def look(message, context):
    return reply(message, context, environment=int("OF_THIS_RUN" in os.environ),
                 directory=int(os.getcwd() == "/"), random=random.random(),
                 numpy=float(np.random.random()))
'''


def write_app(directory: Path, source: str = APP, **table: Any) -> Path:
    """Write an app as Flower unpacks it, composed for the lab."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {"clientapp": "tiny.client_app:app", "app": "hash of the app"} | table
    lines = [f"{key.replace('_', '-')} = {toml(value)}" for key, value in values.items()]
    (directory / "pyproject.toml").write_text("\n".join(["[tool.flowerbed]", *lines]) + "\n")
    (directory / "tiny").mkdir(exist_ok=True)
    (directory / "tiny" / "__init__.py").write_text("")
    (directory / "tiny" / "client_app.py").write_text(source)
    return directory


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    return str(value).lower() if isinstance(value, bool) else f'"{value}"'


class Hosting:
    """A worker and the ClientApp that hands messages to it.

    Args:
        directory: of the device's sockets.
        app: the app that messages are for.
    """

    def __init__(self, directory: Path, app: Path, **environment: str) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.socket = directory / "worker.sock"
        self.app = app
        self.run_id = 1
        self.context = self.fresh_context()
        self.environment = os.environ | {
            "FLOWERBED_DEVICE_DIRECTORY": str(directory),
            "PYTHONPATH": str(RUNTIME),
        }
        self.environment |= environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the worker."""
        command = [sys.executable, "-P", "-m", "flowerbed.device.worker"]
        self.process = subprocess.Popen(command, env=self.environment)

    def stop(self) -> None:
        """End the worker."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def fresh_context(self, **node_config: Any) -> Context:
        """The context of a run that begins."""
        return Context(self.run_id, 5, node_config, RecordDict(), {"lr": 0.1, "local": 2})

    def new_run(self, app: Path | None = None) -> None:
        """Send the messages that follow as those of another run."""
        self.run_id += 1
        self.app = app or self.app
        self.context = self.fresh_context()

    def end(self) -> None:
        """Say that the run is over, as the SuperNode does."""
        announce_end(self.run_id, self.socket)

    @contextlib.contextmanager
    def _client(self) -> Iterator[client.HostedClientApp]:
        record = self.directory / "worker-death.json"
        with mock.patch.multiple(
            client,
            request=functools.partial(request, path=self.socket, record=record),
            ended_mark=functools.partial(ended_mark, directory=self.directory),
            DIRECTORY=self.directory,
        ):
            sys.path.insert(0, str(self.app))
            try:
                yield client.HostedClientApp()
            finally:
                sys.path.remove(str(self.app))

    def message(
        self, content: RecordDict, kind: str, ttl: float = 60.0, server_round: int | str = 1
    ) -> Message:
        """A message as Flower gives it to a ClientApp."""
        now = time.time()
        metadata = Metadata(self.run_id, "id", 1, 5, "", str(server_round), now, ttl, kind)
        return Message(metadata=metadata, content=content)

    def send_plain(self, content: RecordDict, kind: str = "train", ttl: float = 60.0) -> Message:
        """Send a message of a server that knows nothing of the lab."""
        with self._client() as app:
            return app(self.message(content, kind, ttl), self.context)

    def send_header(
        self,
        header: Mapping[str, Any],
        kind: str = "query.flowerbed",
        data: bytes = b"",
        **options: Any,
    ) -> dict[str, Any]:
        """Send an envelope; return the header of the reply, with its `content`."""
        with self._client() as app:
            reply = app(self.message(seal(dict(header), data), kind, **options), self.context)
        if reply.has_error():
            return {"outcome": "flower error", "reason": reply.error.reason}
        assert is_sealed(reply.content)
        answer, data = unseal(reply.content)
        if "records" in answer:
            answer["content"] = unpack(answer["records"], data)
            answer["metrics"] = dict(answer["content"].metric_records.get("metrics", {}))
        return answer

    def send(
        self, kind: str = "train", content: RecordDict | None = None, **options: Any
    ) -> dict[str, Any]:
        """Send a message of the lab; return the header of the reply, with its `content`."""
        header, blocks = pack(content or RecordDict())
        return self.send_header({"records": header}, kind, b"".join(blocks), **options)


def arrays(**values: Any) -> RecordDict:
    """Content with a record of arrays."""
    return RecordDict({"arrays": ArrayRecord({k: Array(np.asarray(v)) for k, v in values.items()})})


def config(**values: Any) -> RecordDict:
    """Content with a record of configuration."""
    return RecordDict({"config": ConfigRecord(values)})


def metrics(**values: Any) -> RecordDict:
    """Content with a record of metrics."""
    return RecordDict({"metrics": MetricRecord(values)})


def kill(pid: int) -> None:
    """Kill a process as the kernel does."""
    os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether a process runs, and is not waited for only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
