"""What the benchmarks have in common: containers with limits, their cost, tables and pictures."""

import csv
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import docker

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
DATA = Path(os.environ.get("FLOWERBED_TEST_DATA", ROOT.parent / "shared" / "data" / "cifar10"))
HOME = Path("/var/lib/flowerbed")
NETWORK = "flowerbed-benchmark"
PAGES = (ROOT / "docs" / "measurements.md",)
MEBIBYTE = 2**20
Rows = list[dict[str, Any]]
_SAMPLE_INTERVAL = 1.0


def say(text: str) -> None:
    """A line of progress with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


# --- the lab -----------------------------------------------------------------------------------


@dataclass
class Played:
    """How long a playbook took, and what it printed."""

    seconds: float
    output: str

    @property
    def changed(self) -> int:
        """Changed tasks over all hosts, from the recap."""
        recap = re.findall(r"^\S+\s+: ok=\d+\s+changed=(\d+)", self.output, re.MULTILINE)
        return sum(map(int, recap))


def run(name: str, *arguments: str, root: Path = ROOT) -> str:
    """Run a program of the virtual environment in a checkout and return its output.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    done = subprocess.run(
        [str(Path(sys.executable).with_name(name)), *arguments],
        cwd=root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{name} {arguments[0]} failed: see above")
    return done.stdout


def checkout_of(inventory: Path) -> Path:
    """The checkout that an inventory belongs to; this one if it is in none."""
    found = (p for p in inventory.resolve().parents if (p / "playbooks" / "site.yml").exists())
    return next(found, ROOT)


def played(playbook: str, inventory: Path, **variables: Any) -> Played:
    """Run a playbook, such as playbooks/site.yml, of the checkout that the inventory belongs to.

    Its output is shown when it fails.

    Raises:
        SystemExit: it failed.
    """
    variables = {"training_dataset": str(DATA.resolve()), **variables}
    started = time.monotonic()
    arguments = [playbook, "-i", str(inventory), "-e", json.dumps(variables)]
    output = run("ansible-playbook", *arguments, root=checkout_of(inventory))
    return Played(time.monotonic() - started, output)


def play(playbook: str, inventory: Path, **variables: Any) -> float:
    """The seconds of a playbook; see `played`."""
    return played(playbook, inventory, **variables).seconds


@contextmanager
def lab() -> Iterator[None]:
    """A lab of the benchmark's own: one that stands here is taken down, its data are set aside.

    Images stay, so that the next benchmark need not build them again.
    """
    aside = HOME.with_name("flowerbed.before-benchmark")
    play("playbooks/teardown.yml", ROOT / "inventory" / "local")
    if aside.exists():  # what is there now is of a benchmark that was broken off
        shutil.rmtree(HOME, ignore_errors=True)
    elif HOME.exists():
        HOME.rename(aside)
    try:
        yield
    finally:
        play("playbooks/teardown.yml", ROOT / "inventory" / "local")
        shutil.rmtree(HOME, ignore_errors=True)
        if aside.exists():
            aside.rename(HOME)


def deploy(inventory: Path, **variables: Any) -> None:
    """Deploy a lab without training."""
    for part in ("preflight", "machines", "coordinator", "devices"):
        play(f"playbooks/{part}.yml", inventory, **variables)


@dataclass
class Run:
    """A run of the lab.

    Attributes:
        directory: of its results.
        seconds: of the playbook.
    """

    directory: Path
    seconds: float

    @property
    def rounds(self) -> Rows:
        """A row a round."""
        return read_rows(self.directory / "rounds.csv")

    @property
    def messages(self) -> Rows:
        """A row a message to a device."""
        return read_rows(self.directory / "devices.csv")

    @property
    def trained(self) -> Rows:
        """The messages that asked for training, one for each round and device."""
        # Before version 0.2.0 there were no others, and no column.
        return [row for row in self.messages if row.get("type", "train").startswith("train")]


def train(inventory: Path, **variables: Any) -> Run:
    """Train on a lab that is deployed."""
    name = f"benchmark-{time.strftime('%Y%m%d-%H%M%S')}"
    seconds = play("playbooks/train.yml", inventory, training_run=name, **variables)
    return Run(checkout_of(inventory) / "results" / name, seconds)


def curve(run: Run) -> Rows:
    """Round, seconds since the run began and central accuracy of each round of a run."""
    told = run.rounds
    begin = float(told[0]["started"])
    return [
        {
            "round": row["round"],
            "seconds": round(float(row["started"]) - begin + float(row["seconds"]), 1),
            "accuracy": round(float(row["central_accuracy"]), 4),
        }
        for row in told
    ]


def devices(engine: docker.DockerClient) -> dict[str, Any]:
    """The lab's device containers, running or not, by the device's name."""
    found = engine.containers.list(all=True, filters={"label": "flowerbed.part=device"})
    return {container.labels["flowerbed.device"]: container for container in found}


def read_rows(path: Path) -> Rows:
    """The rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))


def results(name: str) -> Rows:
    """The rows of results/NAME.csv."""
    return read_rows(RESULTS / f"{name}.csv")


# --- containers --------------------------------------------------------------------------------


def application_image() -> str:
    """The image that the lab's devices run."""
    return str(next(iter(devices(docker.from_env()).values())).attrs["Config"]["Image"])


@contextmanager
def network(engine: docker.DockerClient) -> Iterator[None]:
    """A network of the benchmark's own; what an earlier one left is removed first."""
    for container in engine.containers.list(all=True, filters={"label": NETWORK}):
        container.remove(force=True)
    for left in engine.networks.list(names=[NETWORK]):
        left.remove()
    made = engine.networks.create(NETWORK)
    try:
        yield
    finally:
        for container in engine.containers.list(all=True, filters={"label": NETWORK}):
            container.remove(force=True)
        made.remove()


def start(
    engine: docker.DockerClient,
    name: str,
    command: Sequence[str],
    *,
    cpus: float | None = None,
    memory: str | None = None,
    shard: Path | None = None,
    environment: dict[str, str] | None = None,
) -> Any:
    """Start the application image with the ways mounted beside its own code."""
    volumes = {str(HERE / "ways"): {"bind": "/ways", "mode": "ro"}}
    volumes[str(HOME / "shards" / "test")] = {"bind": "/test", "mode": "ro"}
    if shard:
        volumes[str(shard)] = {"bind": "/shard", "mode": "ro"}
    limits: dict[str, Any] = {"nano_cpus": int(cpus * 1e9)} if cpus else {}
    if memory:
        limits |= {"mem_limit": memory, "memswap_limit": memory}
    return engine.containers.run(
        application_image(),
        list(command),
        name=f"{NETWORK}-{name}",
        hostname=name,
        network=NETWORK,
        labels=[NETWORK],
        detach=True,
        volumes=volumes,
        environment={"PYTHONPATH": "/ways:/ways/plain", **(environment or {})},
        **limits,
    )


@dataclass
class Cost:
    """What a container took while it was watched.

    Attributes:
        peak: bytes of its working set (usage without file pages that can be dropped).
        cpu: seconds.
        throttled: share of its periods.
    """

    peak: int = 0
    cpu: float = 0.0
    throttled: float = 0.0
    _first: dict[str, Any] = field(default_factory=dict, repr=False)

    def add(self, stats: dict[str, Any]) -> None:
        """Take a sample of the engine's statistics in."""
        memory = stats.get("memory_stats") or {}
        if "usage" not in memory:  # it has ended
            return
        details = memory["stats"]
        idle = details.get("total_inactive_file", details.get("inactive_file", 0))
        self.peak = max(self.peak, memory["usage"] - idle)
        processor = stats["cpu_stats"]
        first = self._first or processor
        self._first = first
        self.cpu = (processor["cpu_usage"]["total_usage"] - first["cpu_usage"]["total_usage"]) / 1e9
        throttling = processor["throttling_data"]
        periods = throttling["periods"] - first["throttling_data"]["periods"]
        held = throttling["throttled_periods"] - first["throttling_data"]["throttled_periods"]
        self.throttled = held / periods if periods else 0.0


@contextmanager
def watch(containers: dict[str, Any]) -> Iterator[dict[str, Cost]]:
    """Sample containers each second until the block ends."""
    costs = {name: Cost() for name in containers}
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_INTERVAL):
            for name, container in containers.items():
                try:
                    costs[name].add(container.stats(stream=False, one_shot=True))
                except docker.errors.APIError:
                    continue  # gone

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield costs
    finally:
        stop.set()
        thread.join()


def journal(container: Any) -> list[dict[str, Any]]:
    """The lines of JSON that a way has told (`ways/journal.py`), oldest first."""
    lines = container.logs().decode(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"event"')]


def wait_for(container: Any, event: str, timeout: float) -> None:
    """Wait until a way has told `event`, showing each new line of its journal.

    Raises:
        SystemExit: it ended or took too long; with the end of its log.
    """
    deadline = time.monotonic() + timeout
    shown = 0
    while True:
        told = journal(container)
        for line in told[shown:]:
            say(
                f"  {container.name}: {line['event']} {line.get('round', line.get('accuracy', ''))}"
            )
        shown = len(told)
        if any(line["event"] == event for line in told):
            return
        container.reload()
        if container.status == "exited" or time.monotonic() > deadline:
            log = container.logs(tail=40).decode(errors="replace")
            sys.exit(f"{log}\n{container.name} is {container.status} and has not told '{event}'")
        time.sleep(1)


def execute(container: Any, *command: str) -> str:
    """Run a command in a container and return what it prints.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    code, output = container.exec_run(list(command), demux=True)
    printed, errors = ((part or b"").decode(errors="replace") for part in output)
    if code:
        sys.exit(f"{printed}\n{errors}\n{command[:3]} in {container.name} failed: see above")
    return printed


def wait_until_healthy(superlink: Any) -> None:
    """Wait until a container's SuperLink answers.

    Raises:
        SystemExit: it does not within two minutes.
    """
    code = "import urllib.request as u; u.urlopen('http://127.0.0.1:9092/health', timeout=5)"
    deadline = time.monotonic() + 120
    while superlink.exec_run(["python", "-c", code]).exit_code:
        if time.monotonic() > deadline:
            sys.exit(f"{superlink.name} does not answer")
        time.sleep(1)


def round_seconds(told: Iterable[dict[str, Any]]) -> list[float]:
    """Seconds of each round of a journal."""
    times = [line["time"] for line in told if line["event"] in ("round", "end")]
    return [after - before for before, after in itertools.pairwise(times)]


# --- what is left ------------------------------------------------------------------------------


def surroundings(engine: docker.DockerClient) -> dict[str, str]:
    """Machine and versions, for every row."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    # Two generations of a processor may have one name.
    family, model = told.get("cpu family", "?"), told.get("model", "?")
    processor = f"{told.get('model name', 'unknown processor')} (family {family}, model {model})"
    return {
        "machine": f"{os.cpu_count()} x {processor}, Linux {platform.release()}",
        "engine": str(engine.version()["Version"]),
        "commit": commit_of(ROOT),
    }


def commit_of(root: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), "rev-parse", "--short"]
    done = subprocess.run([*command, "HEAD"], check=False, capture_output=True, text=True)
    return done.stdout.strip()


def write_rows(name: str, rows: Rows) -> None:
    """Write rows as results/NAME.csv."""
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and in brackets least and greatest where they differ."""
    middle = f"{median(values):.{digits}f}"
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return middle if low == high else f"{middle} ({low} to {high})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def publish(name: str, table: str) -> None:
    """Show a table and write it where the pages have a place for it.

    A place is between `<!-- NAME -->` and `<!-- /NAME -->`.
    """
    print(f"\n{table}\n", flush=True)
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    for page in PAGES:
        text = page.read_text()
        if begin in text:
            head, _, rest = text.partition(begin)
            tail = rest.partition(end)[2]
            page.write_text(f"{head}{begin}\n{table}\n{end}{tail}")
