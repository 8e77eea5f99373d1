"""How long a round takes and what it costs: this project and the plain ways, in turns.

    python benchmarks/rounds.py [--repeats 2] [--rounds 3] [--ways flowerbed floor legacy plain]
                                [--against DIRECTORY] [--default-runs 3]

All ways have the same shards, network, hyperparameters and limits, which benchmarks/inventory says.
A repeat is one run of each way, from cold containers. Ways that are not named keep their figures.
With --against, the lab of another checkout takes turns with the others, on the same machine. The
checkout may be older than version 0.2.0. results/rounds.csv has a row for each round,
results/cost.csv one for each device.

Then the default lab (inventory/local) trains several times with warm devices: what a run takes
beside its rounds, and what a round takes beside the slowest device's training and evaluation.
results/runs.csv has a row for each round of these runs. --default-runs 0 leaves this out.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import docker
import picture
from checkouts import Labs, labs
from containers import (
    SERVER,
    Cost,
    journal,
    network,
    round_seconds,
    run_plain_flower,
    start,
    wait_for,
    watch,
)
from measure import (
    DEFAULT_LAB,
    HERE,
    HOME,
    MEBIBYTE,
    ROOT,
    Record,
    Row,
    Rows,
    Run,
    command_line,
    commit_of,
    deploy,
    device_image,
    devices,
    first_rounds,
    later_rounds,
    markdown,
    publish,
    ratios,
    results,
    say,
    spread,
    started,
    train,
)

INVENTORY = HERE / "inventory"
DEVICES: dict[str, dict[str, Any]] = {
    "one-core": {"cpus": 1.0, "memory": "3g"},
    "half-core": {"cpus": 0.5, "memory": "3g"},
}
BATCHES = {"one-core": 32, "half-core": 256}
MOST_OUTSIDE, MOST_FIXED, MOST_MEMORY = 2.5, 20.0, 1.05
"""The aims: seconds of a round outside the slowest device's training and evaluation, seconds of a
run beside its rounds, and memory of a device relative to that of the other checkout."""
AGAINST = "against"
WAYS = {
    "flowerbed": "this project",
    AGAINST: "this project, another commit",
    "floor": "bare Keras loop, no federation",
    "legacy": "legacy: `start_server`, `start_client`",
    "plain": "plain modern: TensorFlow in the ClientApp",
}
Measured = tuple[list[float], dict[str, Cost]]
"""The seconds of each round, and the cost of each device."""


# --- the ways ----------------------------------------------------------------------------------


def flowerbed(engine: docker.DockerClient, inventory: Path, rounds: int) -> Measured:
    """The lab as it is deployed; its devices are started anew."""
    with started(engine), watch(devices(engine)) as costs:
        done = train(inventory, training_rounds=rounds)
    return [float(row["seconds"]) for row in done.rounds], costs


def _mounted() -> dict[str, Any]:
    """The options of every container: the ways beside the image's own code, and test data."""
    volumes = [f"{HERE / 'ways'}:/ways:ro", f"{HOME / 'shards' / 'test'}:/test:ro"]
    return {"volumes": volumes, "environment": {"PYTHONPATH": "/ways"}}


def _shard(name: str) -> str:
    return f"{HOME / 'shards' / 'devices' / name}:/shard:ro"


def _start_devices(engine: docker.DockerClient, *command: str) -> dict[str, Any]:
    """Start both devices with their limits and shards; their batch size ends the command."""
    options = _mounted()
    return {
        name: start(
            engine,
            name,
            device_image(engine),
            [*command, str(BATCHES[name])],
            volumes=[*options["volumes"], _shard(name)],
            environment=options["environment"],
            **limits,
        )
        for name, limits in DEVICES.items()
    }


def floor(engine: docker.DockerClient, rounds: int) -> Measured:
    """Both devices at once; a round lasts as long as the slower one's."""
    with network(engine):
        threads = ("env", "OMP_NUM_THREADS=1")  # as many as the quota has room for
        containers = _start_devices(engine, *threads, "python", "/ways/floor.py", str(rounds))
        with watch(containers) as costs:
            for container in containers.values():
                wait_for(container, "end")
        each = [round_seconds(journal(container)) for container in containers.values()]
    return [max(pair) for pair in zip(*each, strict=True)], costs


def legacy(engine: docker.DockerClient, rounds: int) -> Measured:
    """As in Flower's Docker Compose example, on the current versions."""
    with network(engine):
        command = ["python", "/ways/legacy.py", "server", str(rounds), str(len(DEVICES))]
        server = start(engine, "server", device_image(engine), command, **_mounted())
        time.sleep(20)  # a client that comes before the server gives up
        client = ["python", "/ways/legacy.py", "client", f"{SERVER}:8080"]
        with watch(_start_devices(engine, *client)) as costs:
            wait_for(server, "end")
        wait_for(server, "accuracy", 120)
        return round_seconds(journal(server)), costs


def plain(engine: docker.DockerClient, rounds: int) -> Measured:
    """SuperLink, SuperNodes and `flwr run`, each as its documentation has it."""
    nodes = {
        name: {"node_config": f"batch-size={BATCHES[name]}", "volumes": [_shard(name)], **limits}
        for name, limits in DEVICES.items()
    }
    config = f"rounds={rounds} clients={len(nodes)}"
    app = HERE / "ways" / "plain"
    with network(engine):
        server, containers = run_plain_flower(
            engine, device_image(engine), app, config, nodes, **_mounted()
        )
        with watch(containers) as costs:
            wait_for(server, "end")
        wait_for(server, "accuracy", 120)
        return round_seconds(journal(server)), costs


PLAIN_WAYS: dict[str, Callable[[docker.DockerClient, int], Measured]] = {
    "floor": floor,
    "legacy": legacy,
    "plain": plain,
}


def measure_way(
    engine: docker.DockerClient, built: Labs, way: str, root: Path, rounds: int
) -> Measured:
    """Train in one way, beside or on the lab of a checkout."""
    built.deploy(root)
    if way in PLAIN_WAYS:
        return PLAIN_WAYS[way](engine, rounds)
    return flowerbed(engine, built.inventory(root), rounds)


# --- the default lab ---------------------------------------------------------------------------


def measure_default_lab(runs: int, record: Record) -> None:
    """Train on the lab of inventory/local with warm devices."""
    deploy(DEFAULT_LAB)
    say("the default lab: a run that warms up its devices")
    train(DEFAULT_LAB)
    for number in range(1, runs + 1):
        say(f"run {number} of {runs}")
        record.add(*({"run": number} | row for row in rows_of_run(train(DEFAULT_LAB))))


def rows_of_run(done: Run) -> Rows:
    """What the rounds of a run took, and the run beside them."""
    rounds, trained = done.rounds, done.trained
    last = rounds[-1]
    inside = float(last["started"]) + float(last["seconds"]) - float(rounds[0]["started"])
    return [
        _row_of_round(row, [line for line in trained if line["round"] == row["round"]])
        | {"fixed_seconds": round(done.seconds - inside, 1)}
        for row in rounds
    ]


def _row_of_round(row: Row, messages: Rows) -> Row:
    slowest = max(messages, key=lambda line: float(line["seconds"]))
    work, transport = (
        sum(float(slowest[f"{part}_seconds"]) for part in group)
        for group in (("train", "evaluate"), ("receive", "queue", "send"))
    )
    return {
        "round": row["round"],
        "seconds": round(float(row["seconds"]), 2),
        "slowest_device": slowest["device"],
        "outside_seconds": round(float(row["seconds"]) - work, 2),
        "transport_seconds": round(transport, 2),
    }


# --- what is shown -----------------------------------------------------------------------------


def _costs(way: str, device: str, column: str) -> list[float]:
    return [
        float(row[column])
        for row in results("cost")
        if (row["way"], row["device"]) == (way, device)
    ]


def _ways() -> dict[str, str]:
    """The titles of the ways that were measured."""
    commits = {row["way"]: row["commit"] for row in results("rounds")}
    titles = {way: title for way, title in WAYS.items() if way in commits}
    if AGAINST in titles:
        titles[AGAINST] = f"this project at commit {commits[AGAINST]}"
    return titles


def table() -> str:
    """A row for each way; then the default lab, where it was measured."""
    rounds = results("rounds")
    own = later_rounds(rounds, "flowerbed")
    body = []
    for way, title in _ways().items():
        later = later_rounds(rounds, way)
        cells = [
            " / ".join(spread(_costs(way, device, column), 0) for device in DEVICES)
            for column in ("peak_mib", "throttled_percent", "cpu_seconds")
        ]
        ratio = f"{median(own) / median(later):.2f}" if own else ""
        body.append([title, spread(first_rounds(rounds, way)), spread(later), ratio, *cells])
    header = ["way", "first round, s", "later rounds, s", "this project / it"]
    first = markdown([*header, "peak, MiB", "throttled, %", "CPU, s"], body)
    return f"{first}\n\n{_default_table()}" if results("runs") else first


def _default_table() -> str:
    rows = results("runs")
    fixed = {row["run"]: float(row["fixed_seconds"]) for row in rows}
    seconds, outside, transport = (
        [float(row[f"{column}seconds"]) for row in rows]
        for column in ("", "outside_", "transport_")
    )
    work = "of it outside the slowest device's training and evaluation"
    body = [
        ["a round", spread(seconds), ""],
        [work, spread(outside), f"{MOST_OUTSIDE:g}"],
        ["of that from message to reply", spread(transport), ""],
        ["a run beside its rounds", spread(list(fixed.values())), f"{MOST_FIXED:g}"],
    ]
    return markdown(["default lab, FedAvg, warm", "s", "at most"], body)


def compare() -> None:
    """Say how this checkout compares with the other one."""
    times = ratios(results("rounds"), "flowerbed", AGAINST)
    say(f"later rounds, this project / other commit, by repeat: {spread(times, 2)} (at most 1)")
    for device in DEVICES:
        own, other = (median(_costs(way, device, "peak_mib")) for way in ("flowerbed", AGAINST))
        say(
            f"memory of {device}, this project / other commit: {own:.0f} / {other:.0f} MiB = "
            f"{own / other:.2f} (at most {MOST_MEMORY})"
        )


def main() -> None:
    """Deploy, train in every way in turns, publish."""
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    ways = [way for way in WAYS if way != AGAINST]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    parser.add_argument("--against", type=Path, metavar="DIRECTORY", help="another checkout")
    parser.add_argument("--default-runs", type=int, default=3, help="runs of the default lab")
    arguments = parser.parse_args()
    roots = dict.fromkeys(arguments.ways, ROOT)
    if arguments.against:
        other: Path = arguments.against.resolve()
        if not (other / INVENTORY.relative_to(ROOT)).is_dir():
            parser.error(f"{other} is no checkout of this project")
        roots = {"flowerbed": ROOT, AGAINST: other} | roots
    engine = docker.from_env()

    def others(row: Row) -> bool:
        return row["way"] not in (*roots, AGAINST)

    rounds, costs = Record("rounds", keep=others), Record("cost", keep=others)
    records = [rounds, costs]
    with labs(engine, INVENTORY) as built:
        for repeat in range(1, arguments.repeats + 1):
            for way, root in roots.items():
                say(f"repeat {repeat} of {arguments.repeats}: {WAYS[way]}")
                seconds, cost = measure_way(engine, built, way, root, arguments.rounds)
                head, commit = {"way": way, "repeat": repeat}, {"commit": commit_of(root)}
                rounds.add(
                    *(
                        head | {"round": number, "seconds": round(value, 2)} | commit
                        for number, value in enumerate(seconds, 1)
                    )
                )
                costs.add(*(head | _cost_row(*item) | commit for item in cost.items()))
        if arguments.default_runs:
            built.deploy(ROOT)
            records.append(Record("runs"))
            measure_default_lab(arguments.default_runs, records[-1])
    publish(table, *records)
    if arguments.against:
        compare()
    shown = {title: later_rounds(results("rounds"), way) for way, title in _ways().items()}
    picture.bars("rounds", shown, "seconds a round")


def _cost_row(device: str, cost: Cost) -> Row:
    return {
        "device": device,
        "peak_mib": round(cost.peak / MEBIBYTE),
        "cpu_seconds": round(cost.cpu, 1),
        "throttled_percent": round(100 * cost.throttled, 1),
    }


if __name__ == "__main__":
    main()
