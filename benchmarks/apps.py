"""How much faster later rounds of an ordinary app are on the lab than as Flower starts it.

    python benchmarks/apps.py [--repeats 3] [--rounds 5]

tests/apps/keras-cnn on two devices with the same limits, on one lab. The ways take turns:

    cached    on the lab; the app keeps one compiled model (cache-model=true)
    built     on the lab; the app builds a model for each message
    plain     `flwr run` of the same directory: Flower starts the app anew for each message

The seconds of a round are taken from the devices' logs in the same way for all: from the first
message of training of a round to that of the next one. The round after the first message, in which
everything is loaded, does not count. results/apps.csv has a row for each round.
"""

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from datetime import datetime
from itertools import pairwise
from statistics import median
from typing import Any

import docker
from measure import (
    HERE,
    ROOT,
    Rows,
    deploy,
    devices,
    execute,
    lab,
    markdown,
    publish,
    results,
    say,
    spread,
    surroundings,
    train,
    write_rows,
)

APP = ROOT / "tests" / "apps" / "keras-cnn"
INVENTORY = HERE / "inventory"
LIMITS = {"device_cpus": 0.5, "device_memory": "1500m"}
LAB = {"training_app": str(APP), "training_dataset": "digits", **LIMITS}
"""The app makes its own data, so that it does not matter which are placed."""
WAYS = {
    "cached": "on the lab, the app keeps its model",
    "built": "on the lab, the app builds a model for each message",
    "plain": "plain Flower: a new process for each message",
}
MOST = {"cached": 0.35, "built": 0.5}
"""What is aimed at: later rounds, of those of plain Flower."""
_PATIENCE = 1800.0
_ROUND = re.compile(r"\[RUN \d+, ROUND (\d+)\]")
_TRAIN = re.compile(r"Receiving: train message")
Event = tuple[int, float]
"""The number of a round, and when a device received its message of training."""


# --- devices' logs -----------------------------------------------------------------------------


def received(lines: Iterable[str]) -> list[Event]:
    """The messages of training in the log of a device, with its times (RFC 3339) before each line.

    A SuperNode says in one line which round a message is of, and in the next what it asks for.
    """
    events = []
    number = 0
    for line in lines:
        if found := _ROUND.search(line):
            number = int(found[1])
        elif _TRAIN.search(line) and number:
            # Docker has nanoseconds.
            moment = datetime.fromisoformat(line.partition(" ")[0][:26] + "+00:00")
            events.append((number, moment.timestamp()))
            number = 0
    return events


def round_seconds(events: Iterable[Event]) -> dict[int, float]:
    """Seconds from the first message of a round to that of the next one, by the first's number."""
    begins: dict[int, float] = {}
    for number, moment in events:
        begins[number] = min(moment, begins.get(number, moment))
    return {
        number: after - before for (number, before), (_, after) in pairwise(sorted(begins.items()))
    }


def events_since(engine: docker.DockerClient, begin: float) -> list[Event]:
    """The messages of training that all devices have received since a time."""
    logs = [
        container.logs(timestamps=True, since=begin).decode(errors="replace").splitlines()
        for container in devices(engine).values()
    ]
    return [event for lines in logs for event in received(lines) if event[1] >= begin]


# --- the ways ----------------------------------------------------------------------------------


def on_the_lab(*, cached: bool, rounds: int) -> None:
    """A run of the lab."""
    config = {"cache-model": cached, "num-server-rounds": rounds}
    train(INVENTORY, training_config=config, **LAB)


def plain(engine: docker.DockerClient, rounds: int) -> None:
    """`flwr run` in the container of the lab's SuperLink, and wait for the end of the run.

    Raises:
        SystemExit: it fails or does not end.
    """
    superlink = engine.containers.get("flowerbed-superlink")
    directory = f"plain-{time.time_ns()}"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(
            APP, directory, filter=lambda each: None if "__pycache__" in each.name else each
        )
    code = (
        "import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|').extractall('/tmp')"
    )
    command = ["docker", "exec", "--interactive", str(superlink.name), "python", "-c", code]
    subprocess.run(command, input=packed.getvalue(), check=True)
    config = f"num-server-rounds={rounds}"
    told = _flwr(superlink, "run", f"/tmp/{directory}", "lab", "--run-config", config)  # noqa: S108
    deadline = time.monotonic() + _PATIENCE
    while True:
        listed = _flwr(superlink, "list", "lab")["runs"]
        status = next(each["status"] for each in listed if each["run-id"] == told["run-id"])
        if status == "finished:completed":
            return
        if status.startswith("finished") or time.monotonic() > deadline:
            sys.exit(f"plain Flower's run is {status}")
        time.sleep(10)


def _flwr(superlink: Any, *arguments: str) -> dict[str, Any]:
    """Run a command of Flower in the SuperLink's container; return what it prints as JSON."""
    answer: dict[str, Any] = json.loads(execute(superlink, "flwr", *arguments, "--format", "json"))
    return answer


def play_way(engine: docker.DockerClient, way: str, rounds: int) -> dict[int, float]:
    """Train in one way; return the seconds of its rounds but the last."""
    begin = time.time()
    if way == "plain":
        plain(engine, rounds)
    else:
        on_the_lab(cached=way == "cached", rounds=rounds)
    seconds = round_seconds(events_since(engine, begin))
    if sorted(seconds) != list(range(1, rounds)):
        sys.exit(f"{way}: the devices' logs have rounds {sorted(seconds)}, of {rounds}")
    return seconds


def main() -> None:
    """Deploy, train in each way in turns, publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    engine = docker.from_env()
    here = surroundings(engine)
    rows: Rows = []
    with lab():
        say("deploying the lab")
        deploy(INVENTORY, **LAB)
        for repeat in range(1, arguments.repeats + 1):
            # Each way comes first, second and third as often as the others.
            order = list(WAYS)[repeat % 3 :] + list(WAYS)[: repeat % 3]
            for way in order:
                seconds = play_way(engine, way, arguments.rounds)
                told = ", ".join(f"{value:.1f}" for value in seconds.values())
                say(f"repeat {repeat} of {arguments.repeats}, {way}: {told} s")
                rows += [
                    {"way": way, "repeat": repeat, "round": number, "seconds": round(value, 2)}
                    | here
                    for number, value in seconds.items()
                ]
                write_rows("apps", rows)
    publish("apps", table())


def later(rows: Rows, way: str, repeat: str = "") -> list[float]:
    """Seconds of later rounds of a way, of all repeats or of one."""
    return [
        float(row["seconds"])
        for row in rows
        if row["way"] == way and repeat in ("", str(row["repeat"])) and int(row["round"]) > 1
    ]


def table() -> str:
    """A row a way, with its ratio to plain Flower repeat by repeat."""
    rows = results("apps")
    repeats = sorted({str(row["repeat"]) for row in rows})
    body = []
    for way, title in WAYS.items():
        ratios = [
            median(later(rows, way, repeat)) / median(later(rows, "plain", repeat))
            for repeat in repeats
        ]
        aim = f"{MOST[way]:g}" if way in MOST else ""
        body.append([title, spread(later(rows, way)), spread(ratios, 2), aim])
    return markdown(["keras-cnn", "later rounds, s", "of plain Flower's", "at most"], body)


if __name__ == "__main__":
    main()
