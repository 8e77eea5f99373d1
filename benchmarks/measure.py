"""What the benchmarks have in common: the command line, the lab, figures, tables."""

import argparse
import csv
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import docker

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
DRAFTS = ROOT / ".cache" / "benchmarks"
DATA = Path(os.environ.get("FLOWERBED_TEST_DATA", ROOT.parent / "shared" / "data" / "cifar10"))
HOME = Path("/var/lib/flowerbed")
DEFAULT_LAB = ROOT / "inventory" / "local"
PAGES = (ROOT / "docs" / "measurements.md",)
NOT_YET = "Not measured yet."
"""What a page shows in place of a table until `publish` writes one."""
MEBIBYTE = 2**20
Row = dict[str, Any]
Rows = list[Row]
_ROUND_LINE = re.compile(r"\s*\d+/(\d+|-)\s")
"""The line that a playbook shows for a finished round."""


def say(text: str) -> None:
    """Print a line of progress with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a benchmark's arguments.

    From now on SIGTERM ends the benchmark as Ctrl-C does, so that it removes what it has deployed.
    """
    # A shell lets its background jobs ignore SIGINT, and what they start ignores it as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter)


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

    Shows the rounds of a run as they end. The program is in a process group of its own: when the
    benchmark is interrupted, the program is interrupted once, and its end is awaited.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    lines = []
    with subprocess.Popen(
        [str(Path(sys.executable).with_name(name)), *arguments],
        cwd=root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            for line in process.stdout or ():
                lines.append(line)
                if _ROUND_LINE.match(line):
                    say(f"  {line.strip()}")
        except BaseException:
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise
    output = "".join(lines)
    if process.returncode:
        sys.exit(f"{output}\n{name} {arguments[0]} failed: see above")
    return output


def checkout_of(inventory: Path) -> Path:
    """Return the checkout that an inventory belongs to; this one if it is in none."""
    found = (p for p in inventory.resolve().parents if (p / "playbooks" / "site.yml").exists())
    return next(found, ROOT)


def play(playbook: str, inventory: Path, **variables: Any) -> Played:
    """Run a playbook, such as playbooks/site.yml, of the checkout that the inventory belongs to.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    variables = {"training_dataset": str(DATA.resolve()), **variables}
    arguments = [playbook, "-i", str(inventory), "-e", json.dumps(variables)]
    started = time.monotonic()
    output = run("ansible-playbook", *arguments, root=checkout_of(inventory))
    played = Played(time.monotonic() - started, output)
    say(f"{playbook}: {played.seconds:.0f} s")
    return played


def remove(inventory: Path) -> None:
    """Remove a lab with its data. Images stay, so that the next benchmark need not build them."""
    play("playbooks/teardown.yml", inventory)
    shutil.rmtree(HOME, ignore_errors=True)
    if inventory != DEFAULT_LAB:  # whose keys belong to the user
        shutil.rmtree(inventory / ".secrets", ignore_errors=True)


@contextmanager
def lab(inventory: Path) -> Iterator[None]:
    """Make room for a benchmark's own lab, and remove that lab at the end.

    A lab that is deployed already is removed. Its data are set aside and come back at the end.
    """
    aside = HOME.with_name("flowerbed.before-benchmark")
    play("playbooks/teardown.yml", DEFAULT_LAB)
    if aside.exists():  # HOME is that of a benchmark that was killed
        shutil.rmtree(HOME, ignore_errors=True)
    elif HOME.exists():
        HOME.rename(aside)
    try:
        yield
    finally:
        remove(inventory)
        if aside.exists():
            aside.rename(HOME)


def deploy(inventory: Path, **variables: Any) -> None:
    """Deploy a lab without training. The first time, its images are built."""
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
        """One row per round."""
        return read_rows(self.directory / "rounds.csv")

    @property
    def messages(self) -> Rows:
        """One row per message to a device."""
        return read_rows(self.directory / "devices.csv")

    @property
    def trained(self) -> Rows:
        """The messages that asked for training."""
        # Before version 0.2.0 there were no others, and no such column.
        return [row for row in self.messages if row.get("type", "train").startswith("train")]


def train(inventory: Path, **variables: Any) -> Run:
    """Train on a deployed lab. The results stay in results/benchmark-TIME of its checkout."""
    name = f"benchmark-{time.strftime('%Y%m%d-%H%M%S')}"
    played = play("playbooks/train.yml", inventory, training_run=name, **variables)
    return Run(checkout_of(inventory) / "results" / name, played.seconds)


def accuracy_curve(trained: Run) -> Rows:
    """Round, seconds since the run began, and central accuracy of each round of a run."""
    rounds = trained.rounds
    begin = float(rounds[0]["started"])
    return [
        {
            "round": row["round"],
            "seconds": round(float(row["started"]) - begin + float(row["seconds"]), 1),
            "accuracy": round(float(row["central_accuracy"]), 4),
        }
        for row in rounds
    ]


def parts(engine: docker.DockerClient) -> list[Any]:
    """Return the lab's containers, running or not."""
    found: list[Any] = engine.containers.list(all=True, filters={"label": "flowerbed.part"})
    return found


def devices(engine: docker.DockerClient) -> dict[str, Any]:
    """Return the lab's device containers, running or not, by the device's name."""
    return {
        container.labels["flowerbed.device"]: container
        for container in parts(engine)
        if container.labels["flowerbed.part"] == "device"
    }


def device_image(engine: docker.DockerClient) -> str:
    """Return the image that the lab's devices run."""
    return str(next(iter(devices(engine).values())).attrs["Config"]["Image"])


def stop(engine: docker.DockerClient) -> None:
    """Stop the lab's containers, so that they take no time from what is measured next."""
    for container in parts(engine):
        container.stop(timeout=20)


@contextmanager
def started(engine: docker.DockerClient) -> Iterator[None]:
    """Start the containers of a stopped lab, and stop them afterwards."""
    for container in parts(engine):
        container.start()
    yield
    stop(engine)


# --- figures -----------------------------------------------------------------------------------


def surroundings() -> dict[str, str]:
    """Machine and versions, for every row."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    # Two generations of a processor may have one name.
    family, model = cpu.get("cpu family", "?"), cpu.get("model", "?")
    processor = f"{cpu.get('model name', 'unknown processor')} (family {family}, model {model})"
    return {
        "machine": f"{os.cpu_count()} x {processor}, Linux {platform.release()}",
        "engine": str(docker.from_env().version()["Version"]),
        "commit": commit_of(ROOT),
    }


def commit_of(root: Path) -> str:
    """Return the commit of a checkout."""
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), "rev-parse", "--short"]
    done = subprocess.run([*command, "HEAD"], check=False, capture_output=True, text=True)
    return done.stdout.strip()


def read_rows(path: Path) -> Rows:
    """Read the rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))


def results(name: str) -> Rows:
    """Read the rows of results/NAME.csv; none if nothing was measured yet."""
    path = RESULTS / f"{name}.csv"
    return read_rows(path) if path.exists() else []


class Record:
    """The figures of a benchmark, with machine and versions in each row.

    Until they are published, they are in .cache/benchmarks/NAME.csv: an interrupted benchmark does
    not change what was published before.

    Args:
        name: of the file in results/.
        keep: says which of the published rows stay, for a benchmark that measures a part of them
            again. Rows from another machine never stay.
    """

    def __init__(self, name: str, keep: Callable[[Row], bool] = lambda _: False) -> None:
        self.name = name
        self._here = surroundings()
        machine = self._here["machine"]
        self.rows = [row for row in results(name) if row["machine"] == machine and keep(row)]

    def add(self, *rows: Row) -> None:
        """Show rows and write them down; values of their own replace those of the surroundings."""
        for row in rows:
            say(f"{self.name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
        self.rows += [row | (self._here | row) for row in rows]
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        DRAFTS.mkdir(parents=True, exist_ok=True)
        with self._draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
            writer.writeheader()
            writer.writerows(self.rows)

    @property
    def _draft(self) -> Path:
        return DRAFTS / f"{self.name}.csv"

    def finish(self) -> None:
        """Make the figures the published ones."""
        if self._draft.exists():
            RESULTS.mkdir(exist_ok=True)
            shutil.move(self._draft, RESULTS / self._draft.name)


def publish(table: Callable[[], str], *records: Record) -> None:
    """Publish records, and write the table of them where the pages have a place for it.

    A place is between `<!-- NAME -->` and `<!-- /NAME -->`, NAME being that of the first record.
    """
    for record in records:
        record.finish()
    text = table()
    print(f"\n{text}\n", flush=True)
    begin, end = (f"<!-- {slash}{records[0].name} -->" for slash in ("", "/"))
    for page in PAGES:
        head, found, rest = page.read_text().partition(begin)
        if found:
            page.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def first_rounds(rows: Rows, way: str) -> list[float]:
    """Return the seconds of a way's first rounds."""
    return [float(row["seconds"]) for row in rows if row["way"] == way and int(row["round"]) == 1]


def later_rounds(rows: Rows, way: str, repeat: str = "") -> list[float]:
    """Return the seconds of a way's later rounds, of all repeats or of one."""
    return [
        float(row["seconds"])
        for row in rows
        if row["way"] == way and int(row["round"]) > 1 and repeat in ("", str(row["repeat"]))
    ]


def ratios(rows: Rows, way: str, base: str) -> list[float]:
    """Divide a way's later rounds by those of another one, repeat by repeat."""
    repeats = sorted({str(row["repeat"]) for row in rows if row["way"] == base})
    return [
        median(later_rounds(rows, way, repeat)) / median(later_rounds(rows, base, repeat))
        for repeat in repeats
    ]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and in brackets least and greatest where they differ."""
    middle = f"{median(values):.{digits}f}"
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return middle if low == high else f"{middle} ({low} to {high})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
