"""How long rounds of an ordinary app are on the lab, and as plain Flower starts it.

    python benchmarks/apps.py [--repeats 3] [--rounds 5]

The app is tests/apps/keras-cnn, on two devices with the same limits in each way. The ways take
turns, and each run begins with cold containers:

    cached    on the lab; the app keeps one compiled model (cache-model=true)
    built     on the lab; the app builds a model for each message
    plain     SuperLink and SuperNodes without the lab: each message starts a process that imports
              the app

The seconds of a round are taken from the devices' logs in the same way for all: from the first
message of training of a round to that of the next one. The first round, in which everything is
loaded, does not count. results/apps.csv has a row for each round.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import docker
from containers import network, round_seconds, run_plain_flower, wait_for_plain_run
from measure import (
    HERE,
    ROOT,
    Record,
    command_line,
    deploy,
    device_image,
    devices,
    lab,
    later_rounds,
    markdown,
    publish,
    ratios,
    results,
    say,
    spread,
    started,
    stop,
    train,
)

APP = ROOT / "tests" / "apps" / "keras-cnn"
INVENTORY = HERE / "inventory"
CPUS, MEMORY = 0.5, "1500m"
LAB = {
    "training_app": str(APP),
    "training_dataset": "digits",  # not used: the app makes its own data
    "device_cpus": CPUS,
    "device_memory": MEMORY,
}
WAYS = {
    "cached": "on the lab, the app keeps its model",
    "built": "on the lab, the app builds a model for each message",
    "plain": "plain Flower: a new process for each message",
}
MOST = {"cached": 0.35, "built": 0.5}
"""The aims: later rounds, as a share of plain Flower's."""
_ROUND = re.compile(r"\[RUN \d+, ROUND (\d+)\]")
_TRAIN = re.compile(r"Receiving: train message")


def _seconds(moment: str) -> float:
    """Unix time of a time as Docker writes it (RFC 3339)."""
    return datetime.fromisoformat(moment).timestamp()


def received(lines: Iterable[str]) -> list[tuple[int, float]]:
    """Find the messages of training in the log of a device: round and Unix time of each.

    A SuperNode writes in one line which round a message is of, and in the next what it asks for.

    Args:
        lines: of the log, each after its time (RFC 3339).
    """
    found = []
    number = 0
    for line in lines:
        if match := _ROUND.search(line):
            number = int(match[1])
        elif _TRAIN.search(line) and number:
            found.append((number, _seconds(line.partition(" ")[0])))
            number = 0
    return found


def seconds_of_rounds(logs: Iterable[Iterable[str]], rounds: int) -> list[float]:
    """Return the seconds of all rounds but the last, from the devices' logs.

    Raises:
        SystemExit: the logs do not have all rounds.
    """
    begins: dict[int, float] = {}
    for lines in logs:
        for number, moment in received(lines):
            begins[number] = min(moment, begins.get(number, moment))
    if sorted(begins) != list(range(1, rounds + 1)):
        sys.exit(f"the devices' logs have the rounds {sorted(begins)}, of {rounds}")
    return round_seconds({"event": "round", "time": begins[number]} for number in sorted(begins))


def _logs(containers: Mapping[str, Any]) -> list[list[str]]:
    """Read the logs of containers since they were started."""
    logs = []
    for container in containers.values():
        container.reload()
        begin = _seconds(container.attrs["State"]["StartedAt"])
        text = container.logs(timestamps=True, since=begin)
        logs.append(text.decode(errors="replace").splitlines())
    return logs


def on_the_lab(engine: docker.DockerClient, rounds: int, *, cached: bool) -> list[list[str]]:
    """Train on the lab; return the devices' logs."""
    config = {"cache-model": cached, "num-server-rounds": rounds}
    with started(engine):
        train(INVENTORY, training_config=config, **LAB)
        return _logs(devices(engine))


def plain(engine: docker.DockerClient, rounds: int) -> list[list[str]]:
    """Train without the lab; return the devices' logs."""
    names = sorted(devices(engine))
    nodes = {
        name: {
            "node_config": f"partition-id={number} num-partitions={len(names)}",
            "cpus": CPUS,
            "memory": MEMORY,
        }
        for number, name in enumerate(names)
    }
    config = f"num-server-rounds={rounds}"
    with network(engine):
        server, containers = run_plain_flower(engine, device_image(engine), APP, config, nodes)
        wait_for_plain_run(server)
        return _logs(containers)


def main() -> None:
    """Deploy, train in each way in turns, publish."""
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    # Neither the first nor the last round counts.
    parser.add_argument("--rounds", type=int, default=5, choices=range(3, 101), metavar="3...100")
    arguments = parser.parse_args()
    engine = docker.from_env()
    record = Record("apps")
    with lab(INVENTORY):
        deploy(INVENTORY, **LAB)
        stop(engine)
        for repeat in range(1, arguments.repeats + 1):
            # Each way comes first, second and third as often as the others.
            turn = repeat % len(WAYS)
            for way in [*WAYS][turn:] + [*WAYS][:turn]:
                say(f"repeat {repeat} of {arguments.repeats}: {WAYS[way]}")
                if way == "plain":
                    logs = plain(engine, arguments.rounds)
                else:
                    logs = on_the_lab(engine, arguments.rounds, cached=way == "cached")
                seconds = seconds_of_rounds(logs, arguments.rounds)
                record.add(
                    *(
                        {"way": way, "repeat": repeat, "round": number, "seconds": round(value, 2)}
                        for number, value in enumerate(seconds, 1)
                    )
                )
    publish(table, record)


def table() -> str:
    """A row for each way, with its ratio to plain Flower repeat by repeat."""
    rows = results("apps")
    body = [
        [
            title,
            spread(later_rounds(rows, way)),
            spread(ratios(rows, way, "plain"), 2),
            f"{MOST[way]:g}" if way in MOST else "",
        ]
        for way, title in WAYS.items()
    ]
    return markdown(["keras-cnn", "later rounds, s", "of plain Flower's", "at most"], body)


if __name__ == "__main__":
    main()
