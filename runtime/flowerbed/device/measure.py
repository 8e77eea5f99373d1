"""Measure how much memory a device needs for an app: one message of training, without limits.

    python -m flowerbed.device.measure APP --batch-sizes 8,32,128

runs the app's own ServerApp with a worker as its only device, until the device has trained and, if
the app asks for it, evaluated. Starts anew for each batch size. The last line that it prints is a
JSON object:

    peaks      batch size to the MiB that a device would take with all its processes
    problem    why there are none, the last line of a traceback first; empty if nothing failed

Meant for a container of its own with one core and no limit of its memory.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import traceback
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import tomli_w
from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid, ServerApp

from flowerbed import RESULTS_DIRECTORY
from flowerbed.device.client import HostedClientApp
from flowerbed.device.handoff import DIRECTORY, LAB_MESSAGE, record_death
from flowerbed.device.quota import out_of_memory_kills
from flowerbed.device.renewal import layer_directory
from flowerbed.device.supervisor import begin_worker, describe
from flowerbed.flower import APP_RAISED, identify_process
from flowerbed.messages import pack, seal, unpack, unseal
from flowerbed.settings import DeviceSettings

_MEBIBYTE = 2**20
REST = 155 * _MEBIBYTE
"""Bytes that all processes of a device but the worker take while it works on a message: supervisor,
SuperNode, SuperExec and ClientApp. Measured on devices without a limit, by their cgroups: 150 MiB
for an app whose arrays have a few kB, 164 for the default one, whose arrays have 0.9 MiB."""
_COPIES, _COPIES_OF_MORE, _MUCH = 12, 6, 10 * _MEBIBYTE
"""How often a message's arrays are in these processes, up to 10 MiB and beyond. An app that does
nothing but reply took 24 MiB more for arrays of 1 MiB, 39 for 2, 65 for 4, 145 for 10, 200 for 20,
310 to 450 for 50 and 600 for 100; networks that train, 60 MiB for arrays of 9 MiB and 110 for 12:
their worker takes the most when no message is on its way."""
NODES = (1, 2)
"""Flower's strategies want two nodes by default. Here, both are the same device."""
_RUN = 1
_PATIENCE = 3600.0
"""Seconds in which a message must be answered."""
_INTERVAL = 0.01
_TRACE_LINES = 20


class MeasureError(Exception):
    """Nothing could be measured; the message says why."""


# --- the ServerApp's side ------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """The measured device, as strategies see a device of the lab."""

    node_id: int
    settings: DeviceSettings
    shard: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    receive_seconds: float = 0.0
    examples: int = 0
    examples_per_second: float = 0.0

    @property
    def name(self) -> str:
        """Name in the inventory."""
        return f"{self.settings.device}-{self.node_id}"

    @property
    def device_class(self) -> str:
        """Class in the inventory."""
        return self.settings.device_class


class LoopbackGrid(Grid):
    """A Grid whose messages all go to one worker, one after another.

    Ends the process when there is nothing more to measure; see `finish`.

    Args:
        node_config: of the device.
        run_config: of the app.
        answer: the file to write the result to.
    """

    def __init__(
        self, node_config: Mapping[str, Any], run_config: Mapping[str, Any], answer: Path
    ) -> None:
        self._answer = answer
        self._contexts = {
            node: Context(_RUN, node, dict(node_config), RecordDict(), dict(run_config))
            for node in NODES
        }
        self._client = HostedClientApp()
        self._lock = threading.RLock()
        self._replies: dict[str, Message] = {}
        self._trained: set[int] = set()
        self._peak = 0
        """Bytes of the worker."""
        self._arrays = 0
        """Bytes of the arrays of the largest message or reply."""

    # --- Flower's interface ---------------------------------------------------------------

    @property
    def run(self) -> Any:
        """See `flwr.serverapp.Grid`; nothing but its number is known of the run."""
        return argparse.Namespace(run_id=_RUN)

    def set_run(self, run: Any) -> None:
        """See `flwr.serverapp.Grid`."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See `flwr.serverapp.Grid`."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> list[int]:
        """See `flwr.serverapp.Grid`."""
        return list(NODES)

    def devices(self) -> list[Device]:
        """See `flowerbed.server.grid.LabGrid`."""
        settings = DeviceSettings.parse(self._contexts[NODES[0]].node_config)
        return [Device(node, settings) for node in NODES]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """See `flwr.serverapp.Grid`."""
        ids = []
        for message in messages:
            ids.append(uuid.uuid4().hex)
            self._replies[ids[-1]] = self._ask(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """See `flwr.serverapp.Grid`."""
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """See `flwr.serverapp.Grid`."""
        del timeout
        return [self._ask(message) for message in messages]

    # --- the device -----------------------------------------------------------------------

    def introduce(self) -> None:
        """Send what the lab sends before the first round."""
        self._send(NODES[0], LAB_MESSAGE, "", seal({"introduce": True}))

    def _ask(self, message: Message) -> Message:
        """Hand a message of the app to the worker and return the reply."""
        metadata = message.metadata
        node, kind = metadata.dst_node_id, metadata.message_type.partition(".")[0]
        with self._lock:
            if kind == "train" and node in self._trained:
                self.finish()  # the second round
            records, blocks = pack(message.content)
            data = b"".join(blocks)
            sealed = seal({"records": records}, data)
            report, content = self._send(node, metadata.message_type, metadata.group_id, sealed)
            self._arrays = max(self._arrays, len(data), len(content))
            if kind == "train":
                self._trained.add(node)
            elif kind == "evaluate" and self._trained:
                self.finish()
            if "records" not in report:
                return Message(Error(APP_RAISED, report["reason"]), reply_to=message)
            return Message(unpack(report["records"], content), reply_to=message)

    def _send(
        self, node: int, kind: str, group: str, content: RecordDict
    ) -> tuple[dict[str, Any], bytes]:
        """Send an envelope; return what the lab would record of it, and the reply's arrays."""
        message_id = uuid.uuid4().hex
        metadata = Metadata(_RUN, message_id, 1, node, "", group, time.time(), _PATIENCE, kind)
        message = Message(metadata=metadata, content=content)
        reply = self._client(message, self._contexts[node])
        if reply.has_error():
            self.finish(reply.error.reason)
        report, data = unseal(reply.content)
        self._peak = max(self._peak, report["memory"] or 0)
        if report["outcome"] != "completed":
            self.finish("\n".join(filter(None, (report["reason"], report.get("traceback")))))
        return report, data

    def finish(self, problem: str = "") -> NoReturn:
        """Write the result, and end this process with all that the app has started in it."""
        if not problem and not self._trained:
            problem = "the ServerApp ended without asking a client to train"
        result = {"problem": problem, "peak": self._peak, "arrays": self._arrays}
        self._answer.write_text(json.dumps(result))
        sys.stdout.flush()
        os._exit(0)


def play(job: Mapping[str, Any]) -> NoReturn:
    """Run the ServerApp of a composed app in this process until there is enough to measure."""
    directory = job["directory"]
    layer = [layer_directory(job["layer"])] if job["layer"] else []
    sys.path[:0] = [directory, *layer]
    identify_process(_RUN)
    grid = LoopbackGrid(job["node_config"], job["run_config"], Path(job["answer"]))
    try:
        module, _, attributes = job["serverapp"].partition(":")
        app: Any = import_module(module)
        for name in attributes.split("."):
            app = getattr(app, name)
        if not isinstance(app, ServerApp):
            grid.finish(f"serverapp {job['serverapp']} is no ServerApp, but {type(app).__name__}")
        grid.introduce()
        app(grid, Context(_RUN, 1, {}, RecordDict(), dict(job["run_config"])))
    except BaseException as error:  # noqa: BLE001 - SystemExit, too, is the app's
        grid.finish(explain(error, Path(directory)))
    grid.finish()


def explain(error: BaseException, directory: Path) -> str:
    """The last line of a traceback, then the traceback from the first frame in an app's directory.

    An error without such a frame is shown from its beginning.
    """
    only = traceback.format_exception_only(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [i for i, frame in enumerate(frames) if Path(frame.filename).is_relative_to(directory)]
    lines = "".join([*traceback.format_list(frames[own[0] if own else 0 :]), *only]).splitlines()
    return "\n".join([only[-1].strip(), *lines[-_TRACE_LINES:]])


# --- the device's side ---------------------------------------------------------------------


def occupied(pid: int) -> int:
    """Bytes of a process that the kernel cannot take back, its page tables included."""
    wanted = ("RssAnon:", "RssShmem:", "VmPTE:")
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(words[1]) * 1024 for words in lines if words[0] in wanted)


class Watch(threading.Thread):
    """Follow a worker's memory, and write down what it dies of.

    Attributes:
        peak: bytes that it has taken at most.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid = pid
        self._kills = out_of_memory_kills()
        self._stop = threading.Event()

    def run(self) -> None:
        """Look until told to stop or until the worker has ended."""
        while not self._stop.wait(_INTERVAL):
            with contextlib.suppress(OSError):
                self.peak = max(self.peak, occupied(self._pid))
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            if ended:
                killed = out_of_memory_kills() > self._kills
                record_death("out_of_memory" if killed else describe(status))
                return

    def finish(self) -> None:
        """Stop looking."""
        self._stop.set()
        self.join()


@contextlib.contextmanager
def watched_worker() -> Iterator[Watch]:
    """A fresh worker of this container, and how much it takes."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    worker = begin_worker()
    watch = Watch(worker)
    watch.start()
    try:
        yield watch
    finally:
        watch.finish()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()


def compose(app: Path, target: Path, layer: str) -> tuple[str, dict[str, Any]]:
    """Copy an app with what the lab tells its worker; see `flowerbed.server.start`.

    Returns:
        Where the ServerApp is, and the app's own run configuration.
    """
    project = tomllib.loads((app / "pyproject.toml").read_text())
    own = project["tool"]["flwr"]["app"]
    table = {"clientapp": own["components"]["clientapp"], "app": "measured", "layer": layer}
    project["tool"]["flowerbed"] = project["tool"].get("flowerbed", {}) | table
    shutil.copytree(app, target, copy_function=shutil.copyfile)
    (target / "pyproject.toml").write_text(tomli_w.dumps(project))
    # Keys of nested tables come flat from the caller, as Flower gives them to an app.
    config = {key: value for key, value in own.get("config", {}).items() if type(value) is not dict}
    return own["components"]["serverapp"], config


def node_config(batch_size: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """The node configuration of a device without limits.

    Its optimizer is the one of the lab's that takes the most memory.

    Args:
        more: further keys, and other values for the lab's own.
    """
    settings = DeviceSettings(
        device="measured",
        device_class="measured",
        machine="measured",
        cpus=1,
        batch_size=batch_size,
        optimizer="adam",
    )
    # As in Flower's configuration, which has no null.
    return settings.model_dump(by_alias=True) | {"memory": ""} | dict(more)


def rest(arrays: int) -> float:
    """Bytes of a device's processes but the worker, for messages with so many bytes of arrays."""
    return REST + _COPIES * min(arrays, _MUCH) + _COPIES_OF_MORE * max(0, arrays - _MUCH)


def measure(options: argparse.Namespace, batch_size: int) -> float:
    """Return the MiB that a device takes for an app with a batch size.

    Raises:
        MeasureError: the app has failed.
    """
    with tempfile.TemporaryDirectory() as scratch, watched_worker() as watch:
        directory, answer = Path(scratch, "app"), Path(scratch, "answer.json")
        serverapp, own = compose(options.app, directory, options.layer)
        job = {
            "directory": str(directory),
            "layer": options.layer,
            "serverapp": serverapp,
            "run_config": own | json.loads(options.run_config),
            "node_config": node_config(batch_size, json.loads(options.node_config)),
            "answer": str(answer),
        }
        command = [sys.executable, "-P", "-m", "flowerbed.device.measure", "--play"]
        environment = os.environ | {RESULTS_DIRECTORY: scratch}
        environment["FLOWERBED_DATA"] = str(options.server_data)
        done = subprocess.run(
            [*command, json.dumps(job)],
            cwd=scratch,
            env=environment,
            check=False,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        print(done.stdout, end="", file=sys.stderr)
        if not answer.exists():
            said = "\n".join(done.stdout.splitlines()[-_TRACE_LINES:])
            raise MeasureError(f"the ServerApp's process ended with {done.returncode}\n{said}")
        result = json.loads(answer.read_text())
    if result["problem"]:
        raise MeasureError(result["problem"])
    worker: int = max(watch.peak, result["peak"])
    return (worker + rest(result["arrays"])) / _MEBIBYTE


def main() -> None:
    """Measure each batch size and print the peaks."""
    if sys.argv[1] == "--play":
        play(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("app", type=Path, help="directory of the app")
    parser.add_argument("--batch-sizes", default="8,32,128", help="with commas")
    parser.add_argument("--layer", default="", help="name of the app's layer below /apps")
    parser.add_argument("--run-config", default="{}", help="JSON, over the app's own")
    parser.add_argument("--node-config", default="{}", help="JSON, beside the lab's own keys")
    parser.add_argument("--server-data", default="/nowhere", help="data of the ServerApp")
    options = parser.parse_args()
    peaks: dict[str, float] = {}
    problem = ""
    try:
        for batch_size in map(int, options.batch_sizes.split(",")):
            peaks[str(batch_size)] = round(measure(options, batch_size), 1)
    except MeasureError as error:
        problem = str(error)
    print(json.dumps({"peaks": peaks, "problem": problem}))


if __name__ == "__main__":
    main()
