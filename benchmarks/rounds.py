"""How long a round takes and what it costs: this project and the plain ways, in turns.

    python benchmarks/rounds.py [--repeats 2] [--rounds 3]

The same shards, network, hyperparameters and limits for all; the inventory beside this file says
which. A repeat plays every way once, from cold containers. results/rounds.csv has a row for each
round, results/cost.csv one for each device.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import docker
import picture
from measure import (
    HERE,
    HOME,
    MEBIBYTE,
    Cost,
    Rows,
    deploy,
    devices,
    journal,
    lab,
    markdown,
    network,
    publish,
    read_rows,
    results,
    round_seconds,
    say,
    spread,
    start,
    surroundings,
    train,
    wait_for,
    wait_until_healthy,
    watch,
    write_rows,
)

INVENTORY = HERE / "inventory"
LIMITS = {
    "one-core": {"cpus": 1.0, "memory": "3g", "batch": "32"},
    "half-core": {"cpus": 0.5, "memory": "3g", "batch": "256"},
}
WAYS = {
    "flowerbed": "this project",
    "floor": "bare Keras loop, no federation",
    "legacy": "legacy: `start_server`, `start_client`",
    "plain": "plain modern: TensorFlow in the ClientApp",
}
SUPERLINK = [
    *("flower-superlink", "--insecure", "--host=0.0.0.0", "--port=9092"),
    "--disable-runtime-dependency-installation",
]
SUPERNODE = ["flower-supernode", "--insecure", "--superlink", "server:9092", "--node-config"]
_PATIENCE = 2400.0


def _devices(
    engine: docker.DockerClient, command: Callable[[str], list[str]], **more: Any
) -> dict[str, Any]:
    """Start both devices with their limits and shards; `command` takes the batch size."""
    return {
        name: start(
            engine,
            name,
            command(str(limits["batch"])),
            cpus=float(str(limits["cpus"])),
            memory=str(limits["memory"]),
            shard=HOME / "shards" / "devices" / name,
            **more,
        )
        for name, limits in LIMITS.items()
    }


def _costs(way: str, repeat: int, costs: dict[str, Cost], **more: Any) -> Rows:
    return [
        {
            "way": way,
            "repeat": repeat,
            "device": name,
            "peak_mib": round(cost.peak / MEBIBYTE),
            "cpu_seconds": round(cost.cpu, 1),
            "throttled_percent": round(100 * cost.throttled, 1),
            **more,
        }
        for name, cost in costs.items()
    ]


def _rounds(way: str, repeat: int, seconds: list[float]) -> Rows:
    return [
        {"way": way, "repeat": repeat, "round": number, "seconds": round(value, 2)}
        for number, value in enumerate(seconds, 1)
    ]


def floor(engine: docker.DockerClient, repeat: int, rounds: int) -> tuple[Rows, Rows]:
    """Both devices at once; a round lasts as long as the slower one's."""
    with network(engine):
        floor_of = ["python", "/ways/floor.py", str(rounds)]
        environment = {"OMP_NUM_THREADS": "1"}
        containers = _devices(engine, lambda batch: [*floor_of, batch], environment=environment)
        with watch(containers) as costs:
            for container in containers.values():
                wait_for(container, "end", _PATIENCE)
        each = [round_seconds(journal(container)) for container in containers.values()]
    seconds = [max(pair) for pair in zip(*each, strict=True)]
    return _rounds("floor", repeat, seconds), _costs("floor", repeat, costs)


def legacy(engine: docker.DockerClient, repeat: int, rounds: int) -> tuple[Rows, Rows]:
    """As Flower's Docker Compose example, on the current versions."""
    with network(engine):
        command = ["python", "/ways/legacy.py", "server", str(rounds), str(len(LIMITS))]
        server = start(engine, "server", command)
        time.sleep(20)  # a client that comes before the server gives up
        client = ["python", "/ways/legacy.py", "client", "server:8080"]
        containers = _devices(engine, lambda batch: [*client, batch])
        with watch(containers) as costs:
            wait_for(server, "end", _PATIENCE)
        wait_for(server, "accuracy", 120)
        told = journal(server)
    return _rounds("legacy", repeat, round_seconds(told)), _costs("legacy", repeat, costs)


def plain(engine: docker.DockerClient, repeat: int, rounds: int) -> tuple[Rows, Rows]:
    """SuperLink, SuperNodes and `flwr run`, each as its documentation has it."""
    with network(engine):
        server = start(engine, "server", SUPERLINK, environment={"FLWR_HOME": "/tmp/flwr"})  # noqa: S108
        containers = _devices(engine, lambda batch: [*SUPERNODE, f"batch-size={batch}"])
        wait_until_healthy(server)
        configuration = '[superlink.lab]\naddress = "127.0.0.1:9092"\ninsecure = true\n'
        script = f"mkdir -p /tmp/flwr && printf '%s' '{configuration}' > /tmp/flwr/config.toml"
        run = f"flwr run /ways/plain lab --run-config 'rounds={rounds} clients={len(LIMITS)}'"
        code, output = server.exec_run(["sh", "-c", f"{script} && {run}"])
        if code:
            raise SystemExit(f"{output.decode()}\nflwr run failed")
        with watch(containers) as costs:
            wait_for(server, "end", _PATIENCE)
        wait_for(server, "accuracy", 120)
        told = journal(server)
    return _rounds("plain", repeat, round_seconds(told)), _costs("plain", repeat, costs)


def flowerbed(engine: docker.DockerClient, repeat: int, rounds: int) -> tuple[Rows, Rows]:
    """The lab as it was deployed; its devices are started anew."""
    parts = engine.containers.list(all=True, filters={"label": "flowerbed.part"})
    for container in parts:
        container.start()
    with watch(devices(engine)) as costs:
        told_in = train(INVENTORY, training_rounds=rounds)
    for container in parts:
        container.stop(timeout=20)
    seconds = [float(row["seconds"]) for row in read_rows(told_in / "rounds.csv")]
    told = read_rows(told_in / "devices.csv")
    rows = _costs("flowerbed", repeat, costs)
    for row in rows:
        own = [line for line in told if line["device"] == row["device"]]
        row["outside_training_seconds"] = " ".join(f"{_outside(line):.1f}" for line in own)
    return _rounds("flowerbed", repeat, seconds), rows


def _outside(row: dict[str, str]) -> float:
    """Seconds that a device's round took beyond training and evaluation on the device."""
    return sum(float(row[part]) for part in ("receive_seconds", "queue_seconds", "send_seconds"))


def _first(rounds: Rows, way: str) -> list[float]:
    return [float(r["seconds"]) for r in rounds if r["way"] == way and int(r["round"]) == 1]


def _later(rounds: Rows, way: str) -> list[float]:
    return [float(r["seconds"]) for r in rounds if r["way"] == way and int(r["round"]) > 1]


def table() -> str:
    """A row a way."""
    rounds, costs = results("rounds"), results("cost")
    own = median(_later(rounds, "flowerbed"))
    rows = []
    for way, title in WAYS.items():
        mine = [row for row in costs if row["way"] == way]
        cells = [
            " / ".join(
                spread([float(r[column]) for r in mine if r["device"] == device], 0)
                for device in LIMITS
            )
            for column in ("peak_mib", "throttled_percent", "cpu_seconds")
        ]
        later = _later(rounds, way)
        ratio = f"{own / median(later):.2f}"
        rows.append([title, spread(_first(rounds, way)), spread(later), ratio, *cells])
    header = ["way", "first round, s", "later rounds, s", "this project / it"]
    return markdown([*header, "peak, MiB", "throttled, %", "CPU, s"], rows)


def main() -> None:
    """Deploy, play every way in turns, publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    engine = docker.from_env()
    rounds: Rows = []
    costs: Rows = []
    with lab():
        say("deploying the lab (the first time its images are built)")
        deploy(INVENTORY)
        for container in engine.containers.list(filters={"label": "flowerbed.part"}):
            container.stop(timeout=20)
        for repeat in range(1, arguments.repeats + 1):
            for way in (flowerbed, floor, legacy, plain):
                say(f"repeat {repeat} of {arguments.repeats}: {WAYS[way.__name__]}")
                more_rounds, more_costs = way(engine, repeat, arguments.rounds)
                say("  " + ", ".join(f"{row['seconds']} s" for row in more_rounds))
                rounds += more_rounds
                costs += more_costs
                here = surroundings(engine)
                write_rows("rounds", [row | here for row in rounds])
                write_rows("cost", [row | here for row in costs])
    publish("rounds", table())
    picture.bars(
        "rounds", {title: _later(rounds, way) for way, title in WAYS.items()}, "seconds a round"
    )


if __name__ == "__main__":
    main()
