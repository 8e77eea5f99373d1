"""What a device needs for the default app: the peak of its memory by network, width, batch size.

    python benchmarks/memory.py

Measures as `make measure` does, writes the table of the memory planner (app/memory.csv), and then
checks the planner with settings that are not in the table: each device gets the memory that the
planner asks for, and none may be killed. results/memory.csv has a row for each setting; those with
a limit were held out. Needs the application image (`make images`), and no lab.

A device that was held out is a container as the role `device` starts it, with a SuperLink of its
own, and works on a run of two rounds. What counts is the memory that the kernel cannot take back:
it drops file pages, images among them, before it kills anything. Adam and FedProx's term are on,
which take more vectors than others do.
"""

import csv
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import docker
import numpy as np
import picture
from containers import (
    BUILT_IMAGE,
    CONNECTION,
    SUPERLINK,
    execute,
    network,
    output_of,
    repeating,
    start,
    wait_until_healthy,
)
from measure import (
    MEBIBYTE,
    ROOT,
    Record,
    Row,
    Rows,
    command_line,
    markdown,
    publish,
    results,
    say,
)

sys.path.append(str(ROOT / "plugins" / "filter"))
import memory_plan as plan

APP = ROOT / "app"
BATCHES = (8, 64, 256)
WIDTHS = (0.25, 1.0)
FEW, MANY = 1200, 48000
"""Training images: as many as hold all batches, and 140 MiB of them."""
ROUNDS = 2
STRATEGY = {"strategy": "fedprox", "strategy-parameters": json.dumps({"proximal_mu": 0.1})}
HARDENED: dict[str, Any] = {
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "environment": {
        "MALLOC_ARENA_MAX": "2",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        "FLOWERBED_DATA": "/data",
    },
}
"""What the containers of devices and of `make measure` have in common, see roles/device."""
_INTERVAL = 0.02
_PATIENCE = 600.0


@dataclass(frozen=True)
class Setting:
    """What a device trains."""

    model: str
    recipe: str
    alpha: float
    batch: int
    images: int = FEW

    @property
    def config(self) -> dict[str, Any]:
        """The run configuration."""
        return {"model": self.model, "alpha": self.alpha} | (
            {"recipe": self.recipe} if self.recipe else {}
        )

    @property
    def planned(self) -> int:
        """Bytes that the planner asks for."""
        need = plan.need_of(plan.App(APP, self.config))
        if need is None:
            sys.exit(f"{self} is in no row of {APP / plan.TABLE}")
        return int(plan.needed(need, self.batch))


NETWORKS = [
    ("linear", "", 1.0),
    *(
        (model, recipe, alpha)
        for model in ("mobilenet", "mobilenetv2")
        for recipe in ("original", "small-images")
        for alpha in WIDTHS
    ),
]
IN_TABLE = [Setting(*network_, batch) for network_ in NETWORKS for batch in BATCHES]
HELD_OUT = [
    Setting("linear", "", 1.0, 200),
    Setting("mobilenet", "small-images", 0.25, 48),
    Setting("mobilenet", "small-images", 0.25, 48, MANY),
    Setting("mobilenet", "small-images", 0.25, 200),
    Setting("mobilenet", "small-images", 1.4, 20),
    Setting("mobilenet", "original", 0.75, 400),
    Setting("mobilenet", "original", 2.0, 16),
    Setting("mobilenetv2", "original", 0.1, 48),
    Setting("mobilenetv2", "small-images", 0.35, 200),
    Setting("mobilenetv2", "small-images", 0.75, 32),
]
DRAWN = {
    f"{model} {alpha:g} ({recipe})" if recipe else model: (model, recipe, alpha)
    for model, recipe, alpha in (
        ("linear", "", 1.0),
        ("mobilenet", "small-images", 0.25),
        ("mobilenet", "small-images", 1.0),
        ("mobilenetv2", "original", 0.25),
        ("mobilenetv2", "small-images", 1.0),
    )
}


# --- devices -----------------------------------------------------------------------------------


def occupied(container: Any) -> int:
    """Bytes of a container that the kernel cannot take back: usage without file pages.

    Read from outside, so that looking takes no memory of the container.
    """
    root = Path(f"/proc/{container.attrs['State']['Pid']}/root/sys/fs/cgroup")
    usage, details, prefix = root / "memory.current", root / "memory.stat", ""
    if not usage.exists():
        usage, details = (root / "memory" / f"memory.{name}" for name in ("usage_in_bytes", "stat"))
        prefix = "total_"
    stat = dict(line.split() for line in details.read_text().splitlines())
    files = sum(int(stat[f"{prefix}{state}_file"]) for state in ("active", "inactive"))
    return int(usage.read_text()) - files


@contextmanager
def peak_of(container: Any) -> Iterator[list[int]]:
    """A list whose only number is the greatest `occupied` of a container until the block ends."""
    peaks = [0]
    container.reload()

    def look() -> None:
        with suppress(OSError):  # it has ended
            peaks[0] = max(peaks[0], occupied(container))

    with repeating(look, _INTERVAL):
        yield peaks


class Devices:
    """Devices of a benchmark without a lab."""

    def __init__(self, engine: docker.DockerClient, directory: Path) -> None:
        self.engine = engine
        self.image = BUILT_IMAGE.read_text().strip()
        self.directory = directory
        directory.chmod(0o755)
        for images in sorted({FEW, MANY}):
            write_shard(directory / "shards" / str(images), images)

    def _start(self, name: str, command: list[str], **options: Any) -> Any:
        return start(self.engine, name, self.image, command, **options)

    def _shard(self, images: int) -> str:
        return f"{self.directory / 'shards' / str(images)}:/data:ro"

    def measure(self, network_: tuple[str, str, float]) -> dict[int, float]:
        """Batch size to the MiB that a device takes, as `make measure` measures it.

        Raises:
            SystemExit: the app has failed.
        """
        batches = ",".join(map(str, BATCHES))
        config = Setting(*network_, BATCHES[0]).config | STRATEGY
        command = ["python", "-m", "flowerbed.device.measure", "/app", "--batch-sizes", batches]
        command += ["--server-data", "/data", "--run-config", json.dumps(config)]
        container = self._start(
            "-".join(map(str, network_)),
            command,
            volumes=[self._shard(FEW)],
            cpus=1,
            tmpfs={"/tmp": ""},  # noqa: S108 - of the container
            init=True,
            **HARDENED,
        )
        answer = json.loads(output_of(container).splitlines()[-1])
        container.remove()
        if answer["problem"]:
            sys.exit(f"{network_}: {answer['problem']}")
        return {int(batch): peak for batch, peak in answer["peaks"].items()}

    def run(self, setting: Setting, memory: str, cores: int = 1) -> dict[str, Any]:
        """Let a device with such limits train; the `peak` of it, and of what its worker `died`.

        Raises:
            SystemExit: the run could not be started.
        """
        name = "-".join(map(str, (*astuple(setting), memory)))
        results_, flower = (self.directory / name / part for part in ("results", "flwr"))
        write_run(results_ / name, name, setting.config | STRATEGY | {"num-server-rounds": ROUNDS})
        flower.mkdir()
        (flower / "config.toml").write_text(CONNECTION)
        for path in (flower, results_, results_ / name):
            path.chmod(0o777)  # for the user of the container
        shard = self._shard(setting.images)
        superlink = self._start(
            f"{name}-superlink",
            SUPERLINK,
            volumes=[shard, f"{results_}:/results", f"{flower}:/flwr"],
            environment=HARDENED["environment"] | {"FLWR_HOME": "/flwr"},
            init=True,
        )
        container = None
        try:
            wait_until_healthy(superlink)
            flags = ["--insecure", "--superlink", f"{superlink.name}:9092", "--node-config"]
            container = self._start(
                name,
                ["python", "-m", "flowerbed.device", "--", *flags, node_config(setting)],
                cpus=cores,
                memory=memory,
                tmpfs={"/tmp": "size=64m"},  # noqa: S108 - of the container
                volumes=[shard],
                **HARDENED,
            )
            with peak_of(container) as peaks:
                died = follow_run(superlink, results_, name)
            return {"peak": peaks[0], "died": died}
        except SystemExit:
            say((container or superlink).logs(tail=40).decode(errors="replace"))
            raise
        finally:
            for each in filter(None, (container, superlink)):
                each.remove(force=True)
            shutil.rmtree(self.directory / name)


def write_shard(directory: Path, images: int) -> None:
    """A shard of noise; see `flowerbed.data`."""
    noise = np.random.default_rng(0)
    for split, count in (("train", images), ("test", images // 4)):
        (directory / split).mkdir(parents=True)
        pixels = noise.integers(0, 256, (count, 32, 32, 3), np.uint8)
        np.save(directory / split / "image.npy", pixels)
        np.save(directory / split / "label.npy", noise.integers(0, 10, count))
    record = {"arrays": ["image", "label"], "partition": 0, "fraction": 1.0, "classes": 10}
    record |= {"labels": [], "fingerprint": "", "origin": {}}
    (directory / "shard.json").write_text(json.dumps(record))


def write_run(directory: Path, name: str, config: dict[str, Any]) -> None:
    """Write what the control node writes into the results of a run of the default app."""
    shutil.copytree(APP, directory / "app", ignore=shutil.ignore_patterns("tests", "__pycache__"))
    settings: dict[str, Any] = {
        "run_name": name,
        "app": "benchmark",
        "layer": "",
        "devices": ["measured"],
    }
    settings |= {"device_wait": 300, "round_timeout": _PATIENCE, "seed": 1}
    (directory / "run.json").write_text(json.dumps(settings | {"config": config}))


def node_config(setting: Setting) -> str:
    """The argument of flower-supernode."""
    values: dict[str, Any] = {"device": "measured", "device-class": "measured", "machine": "local"}
    values |= {"partition-id": 0, "num-partitions": 1, "batch-size": setting.batch}
    values |= {"optimizer": "adam", "learning-rate": 0.001}
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


def follow_run(superlink: Any, results_: Path, name: str) -> str:
    """Start a run and wait for its end; return of what the worker died, if it did.

    Raises:
        SystemExit: it could not be started, or does not end.
    """
    answer = execute(superlink, "python", "-m", "flowerbed.server.start", name)
    if "run" not in json.loads(answer.splitlines()[-1]):
        sys.exit(f"{name} is not started: {answer}")
    deadline = time.monotonic() + _PATIENCE
    status: dict[str, Any] = {"state": "", "message": ""}
    while status["state"] not in ("completed", "failed"):
        if time.monotonic() > deadline:
            sys.exit(f"{name} does not end: {status}")
        time.sleep(1)
        file = results_ / name / "status.json"
        status = json.loads(file.read_text()) if file.exists() else status
    with (results_ / name / "devices.csv").open(newline="") as lines:
        outcomes = [row["outcome"] for row in csv.DictReader(lines)]
    if "out_of_memory" in outcomes or "out_of_memory" in status["message"]:
        return "out_of_memory"
    if status["state"] == "failed":
        sys.exit(f"{name} has failed: {status['message']}")
    return ""


@contextmanager
def devices_without_a_lab(engine: docker.DockerClient) -> Iterator[Devices]:
    """Devices, and nothing of them afterwards."""
    with network(engine), tempfile.TemporaryDirectory(dir=ROOT / ".cache") as directory:
        yield Devices(engine, Path(directory))


# --- the table ---------------------------------------------------------------------------------


def fitted(rows: Rows) -> list[dict[str, str]]:
    """The planner's table, from the rows without a limit; without widths that are not complete.

    The linear model has no width and no recipe: its cells are empty, which stands for all.
    """
    points: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        if not row["limit_mib"]:
            key = (row["model"], row["recipe"], str(row["alpha"]) if row["recipe"] else "")
            points.setdefault(key, {})[int(row["batch_size"])] = float(row["peak_mib"])
    return [
        {"model": model, "recipe": recipe, "alpha": alpha} | plan.row_of(plan.fit(peaks))
        for (model, recipe, alpha), peaks in points.items()
        if peaks.keys() == set(BATCHES)
    ]


def row_of(setting: Setting, peak: float, limit: int | None = None, died: str = "") -> Row:
    """A row of results/memory.csv; `peak` and `limit` are MiB."""
    row = {"model": setting.model, "recipe": setting.recipe, "alpha": setting.alpha}
    row |= {"batch_size": setting.batch, "images": setting.images}
    return row | {"limit_mib": limit or "", "peak_mib": round(peak), "died": died}


def main() -> None:
    """Measure, write the planner's table, check the planner with what is not in it, publish."""
    command_line(__doc__).parse_args()
    record = Record("memory")
    cores = os.cpu_count() or 1
    with (
        restored_if_interrupted(APP / plan.TABLE),
        devices_without_a_lab(docker.from_env()) as devices,
    ):
        with ThreadPoolExecutor(cores) as pool:
            measured = pool.map(devices.measure, NETWORKS)
            for network_, peaks in zip(NETWORKS, measured, strict=True):
                record.add(*(row_of(Setting(*network_, batch), p) for batch, p in peaks.items()))
        (APP / plan.TABLE).write_text(plan.table_text(fitted(record.rows)))
        for setting in HELD_OUT:
            limit = -(-setting.planned // MEBIBYTE)
            done = devices.run(setting, f"{limit}m", cores)
            record.add(row_of(setting, done["peak"] / MEBIBYTE, limit, done["died"]))
    publish(table, record)
    picture.lines("memory", curves(), "batch size", "peak, MiB")


@contextmanager
def restored_if_interrupted(path: Path) -> Iterator[None]:
    """Restore a file unless the block is completed."""
    before = path.read_text()
    try:
        yield
    except BaseException:
        path.write_text(before)
        raise


# --- what is shown -----------------------------------------------------------------------------


def curves() -> dict[str, tuple[list[float], list[float]]]:
    """Batch sizes and peaks of some of the networks."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for title, network_ in DRAWN.items():
        points = sorted(
            (int(row["batch_size"]), float(row["peak_mib"]))
            for row in results("memory")
            if (row["model"], row["recipe"], float(row["alpha"])) == network_
            and not row["limit_mib"]
        )
        found[title] = ([batch for batch, _ in points], [peak for _, peak in points])
    return found


def table() -> str:
    """Peaks by network and batch size, and what the planner asked for where it was held out."""
    rows = results("memory")
    peaks: dict[tuple[str, str, str], dict[int, str]] = {}
    tried = []
    for row in rows:
        network_ = (row["model"], row["recipe"], row["alpha"] if row["recipe"] else "")
        if not row["limit_mib"]:
            peaks.setdefault(network_, {})[int(row["batch_size"])] = row["peak_mib"]
            continue
        limit, peak = int(row["limit_mib"]), int(row["peak_mib"])
        spare = f"{100 * (limit - peak) / limit:.0f}"
        cells = [row["batch_size"], row["images"], limit, peak, spare, row["died"] or "no"]
        tried.append([*network_, *cells])
    measured = [[*who, *(of.get(batch, "") for batch in BATCHES)] for who, of in peaks.items()]
    first = markdown(["peak, MiB, by batch size", "recipe", "width", *map(str, BATCHES)], measured)
    header = ["held out", "recipe", "width", "batch", "images", "planned, MiB", "peak, MiB"]
    second = markdown([*header, "spare, %", "killed"], tried)
    return f"{first}\n\n{second}" if tried else first


if __name__ == "__main__":
    main()
