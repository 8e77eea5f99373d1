"""Run FedAvg over the lab's Grid with simulated devices, and measure the server's part by part.

Flower's own Grid, below the lab's, is simulated: each device replies at a random time with a model
of its own. Started by `benchmarks/bookkeeping.py`.

python many_devices.py DEVICES ROUNDS WEIGHTS
"""

import json
import logging
import random
import resource
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flowerbed.server.grid as lab_grid  # type: ignore[import-not-found]
import numpy as np
from flowerbed.messages import pack, seal, unseal  # type: ignore[import-not-found]
from flowerbed.server.fleet import Fleet  # type: ignore[import-not-found]
from flowerbed.server.metric_names import MetricReader  # type: ignore[import-not-found]
from flowerbed.server.observe import observed  # type: ignore[import-not-found]
from flowerbed.server.recorder import Recorder  # type: ignore[import-not-found]
from flowerbed.server.rounds import Rounds  # type: ignore[import-not-found]
from flowerbed.settings import LabSettings  # type: ignore[import-not-found]
from flwr.app import ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

SIMULATED, WAITING = "(simulated)", "(waiting)"
OTHER = "everything else"
_SPREAD = 2.0
"""Seconds over which the devices' replies are spread."""
_BASES = 8
"""Different models among the replies: each reply is a copy of one of them."""


class Stopwatch:
    """Measures the time of the main thread by part; each second counts for the innermost part."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._parts: list[str] = []
        self._since = 0.0

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside the block for a part."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._charge()
        self._parts.append(name)
        try:
            yield
        finally:
            self._charge()
            self._parts.pop()

    def measure(self, owner: Any, names: Iterable[str], part: str) -> None:
        """Count the time inside functions or methods of `owner` for a part."""
        for name in names:
            setattr(owner, name, self._measured(getattr(owner, name), part))

    def _measured(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        return measured


class SimulatedGrid(Grid):
    """Flower's Grid, with devices that introduce themselves at once and train for a moment.

    Args:
        devices: how many there are.
        weights: of the model that each returns.
    """

    def __init__(self, devices: int, weights: int) -> None:
        generator = np.random.default_rng(1)
        self._nodes = range(1, devices + 1)
        self._models = [ArrayRecord([generator.random(weights, np.float32)]) for _ in range(_BASES)]
        self._ready: dict[str, tuple[float, Message]] = {}
        self._lock = threading.Lock()

    @property
    def run(self) -> Any:
        """Not used here."""
        return None

    def set_run(self, run: Any) -> None:
        """Not used here."""

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not used here."""
        raise NotImplementedError

    def send_and_receive(self, *args: Any, **kwargs: Any) -> list[Message]:
        """Not used here."""
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        """All nodes."""
        return list(self._nodes)

    def get_nodes(self) -> list[SimpleNamespace]:
        """All nodes."""
        return [SimpleNamespace(node_id=node, last_activated_at="today") for node in self._nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages; their replies are ready at random times."""
        ids = []
        for message in messages:
            ids.append(uuid.uuid4().hex)
            after = 0.0 if _introduces(message) else random.uniform(0.1, _SPREAD)  # noqa: S311
            self._ready[ids[-1]] = time.monotonic() + after, message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Make the replies that are ready."""
        now = time.monotonic()
        with self._lock:
            found = {
                key: self._ready.pop(key)[1]
                for key in message_ids
                if key in self._ready and self._ready[key][0] <= now
            }
        return [self._reply(key, message) for key, message in found.items()]

    def _reply(self, message_id: str, message: Message) -> Message:
        asked, node = message.metadata, message.metadata.dst_node_id
        metadata = Metadata(
            asked.run_id,
            uuid.uuid4().hex,
            node,
            asked.src_node_id,
            message_id,
            asked.group_id,
            time.time(),
            asked.ttl,
            asked.message_type,
        )
        header: dict[str, Any] = {"outcome": "completed", "reason": "", "queue_seconds": 0.01}
        header |= {"started": time.time() - 0.1, "work_seconds": 0.08}
        if _introduces(message):
            header["node_config"] = _node_config(node)
            return Message(metadata=metadata, content=seal(header))
        metrics = {"num-examples": 100 + node, "train_loss": 1.5, "train-seconds": 0.05}
        metrics |= {"eval-accuracy": 0.3, "eval-loss": 1.7, "eval-examples": 20}
        model = self._models[node % _BASES]
        content = RecordDict({"arrays": model, "metrics": MetricRecord(metrics)})
        header["records"], blocks = pack(content)
        data = b"".join(blocks)
        header["bytes_sent"] = len(data)
        return Message(metadata=metadata, content=seal(header, data))


def _introduces(message: Message) -> bool:
    return "introduce" in unseal(message.content)[0]


def _node_config(node: int) -> dict[str, Any]:
    return {
        "device": f"phone-{node:03}",
        "device-class": f"class-{node % 5}",
        "machine": "simulated",
        "memory": "1000m",
        "cpus": 0.5,
    }


def run(devices: int, rounds: int, weights: int, directory: Path) -> dict[str, float]:
    """Run FedAvg and return the seconds of a round by part."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    watch = Stopwatch()
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # messages carry it
    inner = SimulatedGrid(devices, weights)
    settings = LabSettings(run_name="bookkeeping")
    recorder = Recorder(settings.run_name, settings.round_timeout, directory)
    names = MetricReader()
    fleet = Fleet(inner, names, settings.device_wait, recorder.online)
    booked = Rounds(recorder, names)
    grid = lab_grid.LabGrid(inner, settings, fleet, booked)
    fleet.wait_for([f"phone-{node + 1:03}" for node in range(devices)], 60, print)
    grid.devices()
    strategy = FedAvg(fraction_evaluate=0.0)
    recording = ("begin", "absent", "sent", "received", "closed", "aggregated", "finish")
    watch.measure(time, ["sleep"], WAITING)
    watch.measure(inner, ["push_messages", "get_nodes"], SIMULATED)
    watch.measure(fleet, ["_pull"], SIMULATED)  # waits for threads that make the replies
    watch.measure(fleet, ["send"], "send: pack the model, address the messages")
    watch.measure(fleet, ["_read"], "read: unpack and check the replies")
    watch.measure(grid, ["devices", "_not_asked"], "select: devices that are free and available")
    watch.measure(booked, recording, "record: rounds and messages")
    watch.measure(recorder, ["_save"], "record: status file")
    watch.measure(lab_grid, ["reject_misfits"], "compare the replies")
    watch.measure(strategy, ["configure_train"], "FedAvg: configure")
    watch.measure(strategy, ["aggregate_train"], "FedAvg: aggregate")
    initial = ArrayRecord([np.zeros(weights, np.float32)])
    with observed(grid), watch.part(OTHER):
        strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds)
    trained = [row.devices for row in recorder.rounds]
    if trained != [devices] * rounds:
        sys.exit(f"wrong: {trained} models were aggregated in the rounds, not {devices} in each")
    return {part: seconds / rounds for part, seconds in watch.seconds.items()}


def main(devices: int, rounds: int, weights: int) -> None:
    """Print the seconds of a round by part, and the peak of memory, as JSON."""
    with tempfile.TemporaryDirectory() as directory:
        spent = run(devices, rounds, weights, Path(directory))
    seconds = {part: value for part, value in spent.items() if part not in (SIMULATED, WAITING)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"seconds": seconds, "peak_mib": peak}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
