"""How long a round takes and what it costs: this project and the plain ways, in turns.

    python benchmarks/rounds.py [--repeats 2] [--rounds 3] [--ways flowerbed floor legacy plain]
                                [--base DIRECTORY] [--default-runs 3]

The same shards, network, hyperparameters and limits for all; the inventory beside this file says
which. A repeat plays every way once, from cold containers. With --base, the directory of another
checkout, its lab takes turns with the others, on the same machine and in the same run.
results/rounds.csv has a row for each round, results/cost.csv one for each device.

Then the default lab (inventory/local) trains several times with warm devices: what a run takes
beside its rounds, and what a round takes beside the slowest device's training and evaluation.
results/runs.csv has a row for each round of these runs.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import docker
import picture
from measure import (
    HERE,
    HOME,
    MEBIBYTE,
    NETWORK,
    RESULTS,
    ROOT,
    Cost,
    Rows,
    Run,
    commit_of,
    deploy,
    devices,
    journal,
    lab,
    markdown,
    network,
    play,
    publish,
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
DEFAULT_LAB = ROOT / "inventory" / "local"
MOST_OUTSIDE, MOST_FIXED, MOST_MEMORY = 2.5, 20.0, 1.05
"""What is aimed at: seconds a round outside the slowest device's training and evaluation, seconds
of a run beside its rounds, and memory of a device against that of the other checkout."""
WAYS = {
    "flowerbed": "this project",
    "base": "this project, another commit",
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


def flowerbed(
    engine: docker.DockerClient, repeat: int, rounds: int, root: Path = ROOT, way: str = "flowerbed"
) -> tuple[Rows, Rows]:
    """The lab of a checkout as it was deployed; its devices are started anew."""
    parts = engine.containers.list(all=True, filters={"label": "flowerbed.part"})
    for container in parts:
        container.start()
    with watch(devices(engine)) as costs:
        done = train(_inventory(root), training_rounds=rounds)
    for container in parts:
        container.stop(timeout=20)
    rows = _costs(way, repeat, costs)
    for row in rows:
        own = [line for line in done.trained if line["device"] == row["device"]]
        row["outside_training_seconds"] = " ".join(f"{_outside(line):.1f}" for line in own)
    return _rounds(way, repeat, [float(row["seconds"]) for row in done.rounds]), rows


def _inventory(root: Path) -> Path:
    return root / INVENTORY.relative_to(ROOT)


def _outside(row: dict[str, str]) -> float:
    """Seconds that a device's round took beyond training and evaluation on the device."""
    return sum(float(row[part]) for part in ("receive_seconds", "queue_seconds", "send_seconds"))


# --- labs of two checkouts ---------------------------------------------------------------------


class Labs:
    """The labs of checkouts, one of which stands at a time; the data of the others are set aside.

    Each deployment removes images that it does not know. Those of the other checkouts keep a second
    name meanwhile, and get their first one back before their next deployment.
    """

    def __init__(self, engine: docker.DockerClient) -> None:
        self._engine = engine
        self._standing: Path | None = None
        self._tags: dict[Path, dict[str, str]] = {}

    def stand(self, root: Path) -> None:
        """Deploy the lab of a checkout and stop its containers, unless it stands already."""
        if self._standing == root:
            return
        if self._standing:
            play("playbooks/teardown.yml", _inventory(self._standing))
            HOME.rename(self._aside(self._standing))
        if self._aside(root).exists():
            self._aside(root).rename(HOME)
        for name, image in self._tags.get(root, {}).items():
            self._engine.images.get(image).tag(*name.split(":"))
        say(f"deploying the lab of {root} (the first time its images are built)")
        deploy(_inventory(root))
        self._standing = root
        self._tags[root] = {
            tag: str(image.id)
            for image in self._engine.images.list()
            for tag in image.tags
            if tag.startswith("flowerbed/")
        }
        kept = f"{NETWORK}/kept-{list(self._tags).index(root)}"
        for number, image in enumerate(sorted(set(self._tags[root].values()))):
            self._engine.images.get(image).tag(kept, str(number))
        for container in self._engine.containers.list(filters={"label": "flowerbed.part"}):
            container.stop(timeout=20)

    @staticmethod
    def _aside(root: Path) -> Path:
        return HOME.with_name(f"flowerbed.benchmark{str(root).replace('/', '-')}")

    def remove(self) -> None:
        """Remove what was set aside, and the images' second names."""
        for root in self._tags:
            shutil.rmtree(self._aside(root), ignore_errors=True)
        for image in self._engine.images.list():
            for tag in image.tags:
                if tag.startswith(f"{NETWORK}/kept-"):
                    self._engine.images.remove(tag)


@contextmanager
def labs(engine: docker.DockerClient) -> Iterator[Labs]:
    """Labs, and nothing of them afterwards."""
    with lab():
        made = Labs(engine)
        try:
            yield made
        finally:
            made.remove()


# --- the default lab ---------------------------------------------------------------------------


def default_lab(runs: int) -> Rows:
    """Train on the lab of inventory/local with warm devices; a row a round."""
    deploy(DEFAULT_LAB)
    say("the default lab: a run that warms its devices up")
    train(DEFAULT_LAB)
    rows: Rows = []
    for number in range(1, runs + 1):
        told = _of_run(number, train(DEFAULT_LAB))
        say(
            f"run {number} of {runs}: {told[0]['fixed_seconds']} s beside its rounds; outside the "
            f"slowest device's work {', '.join(str(row['outside_seconds']) for row in told)} s"
        )
        rows += told
    return rows


def _of_run(number: int, run: Run) -> Rows:
    """What the rounds of a run took, and the run beside them."""
    rounds = run.rounds
    last = rounds[-1]
    inside = float(last["started"]) + float(last["seconds"]) - float(rounds[0]["started"])
    rows = []
    for row in rounds:
        slowest = max(
            (line for line in run.trained if line["round"] == row["round"]),
            key=lambda line: float(line["seconds"]),
        )
        work = float(slowest["train_seconds"]) + float(slowest["evaluate_seconds"])
        rows.append(
            {
                "run": number,
                "round": row["round"],
                "seconds": round(float(row["seconds"]), 2),
                "slowest_device": slowest["device"],
                "outside_seconds": round(float(row["seconds"]) - work, 2),
                "transport_seconds": round(_outside(slowest), 2),
                "fixed_seconds": round(run.seconds - inside, 1),
            }
        )
    return rows


# --- what is shown -----------------------------------------------------------------------------


def _first(rounds: Rows, way: str) -> list[float]:
    return [float(r["seconds"]) for r in rounds if r["way"] == way and int(r["round"]) == 1]


def _later(rounds: Rows, way: str) -> list[float]:
    return [float(r["seconds"]) for r in rounds if r["way"] == way and int(r["round"]) > 1]


def table() -> str:
    """A row a way; then the default lab, where it was measured."""
    rounds, costs = results("rounds"), results("cost")
    ways = [way for way in WAYS if _later(rounds, way)]
    own = median(_later(rounds, "flowerbed"))
    rows = []
    for way in ways:
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
        rows.append([WAYS[way], spread(_first(rounds, way)), spread(later), ratio, *cells])
    header = ["way", "first round, s", "later rounds, s", "this project / it"]
    first = markdown([*header, "peak, MiB", "throttled, %", "CPU, s"], rows)
    return f"{first}\n\n{_default_table()}" if (RESULTS / "runs.csv").exists() else first


def _default_table() -> str:
    rows = results("runs")
    fixed = {row["run"]: float(row["fixed_seconds"]) for row in rows}
    aims: list[tuple[str, list[float], str]] = [
        ("a round", [float(row["seconds"]) for row in rows], ""),
        (
            "of it outside the slowest device's training and evaluation",
            [float(row["outside_seconds"]) for row in rows],
            f"{MOST_OUTSIDE:g}",
        ),
        (
            "of that from message to reply",
            [float(row["transport_seconds"]) for row in rows],
            "",
        ),
        ("a run beside its rounds", list(fixed.values()), f"{MOST_FIXED:g}"),
    ]
    body = [[what, spread(values), aim] for what, values, aim in aims]
    return markdown(["default lab, FedAvg, warm", "s", "at most"], body)


def compare(rounds: Rows, costs: Rows) -> None:
    """Say how this checkout compares with the other one, repeat by repeat."""

    def later(way: str, repeat: str) -> float:
        return median(_later([row for row in rounds if str(row["repeat"]) == repeat], way))

    repeats = sorted({str(row["repeat"]) for row in rounds if row["way"] == "base"})
    ratios = [later("flowerbed", repeat) / later("base", repeat) for repeat in repeats]
    say(f"later rounds, this project / another commit: {spread(ratios, 2)} (at most 1)")
    for device in LIMITS:
        peaks = [
            median(
                [float(r["peak_mib"]) for r in costs if (r["way"], r["device"]) == (way, device)]
            )
            for way in ("flowerbed", "base")
        ]
        ratio = peaks[0] / peaks[1]
        say(
            f"memory of {device}: {peaks[0]:.0f} / {peaks[1]:.0f} MiB = {ratio:.2f} "
            f"(at most {MOST_MEMORY})"
        )


def main() -> None:
    """Deploy, play every way in turns, publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    plain_ways = [way for way in WAYS if way != "base"]
    parser.add_argument("--ways", nargs="*", choices=plain_ways, default=plain_ways)
    parser.add_argument("--base", type=Path, help="directory of another checkout")
    parser.add_argument("--default-runs", type=int, default=3, help="runs of the default lab")
    arguments = parser.parse_args()
    engine = docker.from_env()
    here = surroundings(engine)
    ways = {"flowerbed": flowerbed, "floor": floor, "legacy": legacy, "plain": plain}
    rounds: Rows = []
    costs: Rows = []

    def keep(found: tuple[Rows, Rows], commit: str) -> None:
        say("  " + ", ".join(f"{row['seconds']} s" for row in found[0]))
        rounds.extend(row | here | {"commit": commit} for row in found[0])
        costs.extend(row | here | {"commit": commit} for row in found[1])
        write_rows("rounds", rounds)
        write_rows("cost", costs)

    with labs(engine) as built:
        for repeat in range(1, arguments.repeats + 1):
            for way in arguments.ways:
                built.stand(ROOT)
                say(f"repeat {repeat} of {arguments.repeats}: {WAYS[way]}")
                keep(ways[way](engine, repeat, arguments.rounds), here["commit"])
            if arguments.base:
                base = arguments.base.resolve()
                built.stand(base)
                say(f"repeat {repeat} of {arguments.repeats}: {WAYS['base']}")
                found = flowerbed(engine, repeat, arguments.rounds, base, "base")
                keep(found, commit_of(base))
        if arguments.default_runs:
            built.stand(ROOT)
            told = default_lab(arguments.default_runs)
            write_rows("runs", [row | here for row in told])
    if arguments.base:
        compare(rounds, costs)
    publish("rounds", table())
    shown = {WAYS[way]: _later(rounds, way) for way in WAYS if _later(rounds, way)}
    picture.bars("rounds", shown, "seconds a round")


if __name__ == "__main__":
    main()
