"""What a device needs: the peak of its memory by network, width and batch size.

    python benchmarks/memory.py

Writes the table that the memory planner goes by (playbooks/filter_plugins/memory_plan.csv), and
then holds the planner to settings that are not in it: each device gets the memory that the planner
asks for, and none may be killed. results/memory.csv has a row a setting; one with a limit was held
out.

A device is a container as the role starts it, with a SuperLink that it is registered with and a
process such as Flower starts for a message (ways/message.py). What counts is the memory that the
kernel cannot take back: file pages, images among them, it drops before it kills anything. Adam and
FedProx's term are on, which take more vectors than others do.
"""

import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import docker
import numpy as np
import picture
from measure import (
    HERE,
    MEBIBYTE,
    NETWORK,
    ROOT,
    Rows,
    markdown,
    network,
    publish,
    results,
    say,
    surroundings,
    wait_until_healthy,
    write_rows,
)

PLANNER = ROOT / "playbooks" / "filter_plugins"
BATCHES = (8, 64, 256)
WIDTHS = (0.25, 1.0)
AMPLE = "6g"
FEW, MANY = 1200, 48000
"""Training images: as many as hold all batches, and 140 MiB of them."""
DEVICE = ("python", "-m", "flowerbed.device")


@dataclass(frozen=True)
class Setting:
    """What a device trains."""

    model: str
    recipe: str
    alpha: float
    batch: int
    images: int = FEW


IN_TABLE = [
    *(Setting("linear", "", 1.0, batch) for batch in BATCHES),
    *(
        Setting(model, recipe, alpha, batch)
        for model in ("mobilenet", "mobilenetv2")
        for recipe in ("original", "small-images")
        for alpha in WIDTHS
        for batch in BATCHES
    ),
]
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


class Devices:
    """Devices of a benchmark without a lab: an image, shards, and a SuperLink for all of them."""

    def __init__(self, engine: docker.DockerClient, directory: Path) -> None:
        self.engine = engine
        self.image = (ROOT / ".cache" / "application-image").read_text().strip()
        self.directory = directory
        directory.chmod(0o755)
        for images in (FEW, MANY):
            write_shard(directory / str(images), images)
        arguments = ["flower-superlink", "--insecure", "--host", "0.0.0.0", "--port", "9092"]  # noqa: S104
        self.superlink = self._start("superlink", arguments)
        wait_until_healthy(self.superlink)

    def _start(self, name: str, command: list[str], **options: Any) -> Any:
        return self.engine.containers.run(
            self.image,
            command,
            name=f"{NETWORK}-{name}",
            network=NETWORK,
            labels=[NETWORK],
            detach=True,
            volumes={
                str(self.directory): {"bind": "/shards", "mode": "ro"},
                str(HERE / "ways"): {"bind": "/ways", "mode": "ro"},
            },
            **options,
        )

    def run(self, setting: Setting, memory: str, cores: int = 1) -> dict[str, Any]:
        """Let a device with such limits work; the `peak` of it, and of what its trainer `died`.

        Raises:
            SystemExit: it could not be asked.
        """
        name = "-".join(map(str, (*astuple(setting), memory)))
        shard = ["--shard", f"/shards/{setting.images}"]
        container = self._start(
            name,
            [*DEVICE, *shard, "--", "--insecure", "--superlink", f"{self.superlink.name}:9092"],
            environment={"MALLOC_ARENA_MAX": "2", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"},
            mem_limit=memory,
            memswap_limit=memory,
            nano_cpus=cores * 10**9,
            read_only=True,
            tmpfs={"/tmp": "size=64m"},  # noqa: S108 - of the container
        )
        try:
            deadline = time.monotonic() + 300
            while container.exec_run(["test", "-e", "/tmp/flowerbed/healthy"]).exit_code:  # noqa: S108
                if time.monotonic() > deadline:
                    sys.exit(f"{container.logs(tail=40).decode()}\n{name} is not healthy")
                time.sleep(0.5)
            done = container.exec_run(
                ["python", "/ways/message.py", json.dumps(_job(setting))], stderr=False
            )
            told: dict[str, Any] = json.loads(done.output.decode().splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            sys.exit(f"{container.logs(tail=40).decode()}\n{name} has told nothing")
        finally:
            container.remove(force=True)
        return told


def write_shard(directory: Path, images: int) -> None:
    """A shard of noise; see `flowerbed.data`."""
    directory.mkdir()
    noise = np.random.default_rng(0)
    for split, count in (("train", images), ("test", images // 4)):
        pixels = noise.integers(0, 256, (count, 32, 32, 3), np.uint8)
        np.save(directory / f"{split}_images.npy", pixels)
        np.save(directory / f"{split}_labels.npy", noise.integers(0, 10, count))
    record = {"partition": 0, "classes": 10, "fingerprint": "", "train_labels": []}
    (directory / "shard.json").write_text(json.dumps(record))


def _job(setting: Setting) -> dict[str, Any]:
    """What a device is asked to do."""
    task = {"model": setting.model, "alpha": setting.alpha, "proximal_mu": 0.1}
    return {
        "task": task | ({"recipe": setting.recipe} if setting.recipe else {}),
        "device": {
            "device": "any",
            "device-class": "any",
            "machine": "local",
            "batch-size": setting.batch,
            "optimizer": "adam",
            "learning-rate": 0.001,
        },
        "seconds": 2,
    }


@contextmanager
def devices_without_a_lab(engine: docker.DockerClient) -> Iterator[Devices]:
    """Devices, and nothing of them afterwards."""
    with network(engine), tempfile.TemporaryDirectory(dir=ROOT / ".cache") as directory:
        yield Devices(engine, Path(directory))


# --- the table ---------------------------------------------------------------------------------


def fit(points: list[tuple[int, float]]) -> tuple[float, float]:
    """A line that no measured point is above: MiB without a batch, and for each example of it."""
    points = sorted(points)
    slope = max((more - less) / (b - a) for (a, less), (b, more) in pairwise(points))
    slope = max(slope, 0.01)
    return max(peak - slope * batch for batch, peak in points), slope


def fitted(rows: Rows) -> Rows:
    """The planner's table, from the rows without a limit; without widths that are not complete."""
    points: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if not row["limit_mib"]:
            key = (row["model"], row["recipe"], str(row["alpha"]))
            points.setdefault(key, []).append((int(row["batch_size"]), float(row["peak_mib"])))
    return [
        {"model": model, "recipe": recipe, "alpha": alpha}
        | {"fixed_mib": f"{fixed:.0f}", "example_mib": f"{example:.3f}"}
        for (model, recipe, alpha), measured in points.items()
        if {batch for batch, _ in measured} == set(BATCHES)
        for fixed, example in (fit(measured),)
    ]


def write_table(rows: Rows) -> None:
    """Give the planner its table."""
    with (PLANNER / "memory_plan.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Measure, write the planner's table, hold the planner to what is not in it, publish."""
    engine = docker.from_env()
    rows: Rows = []
    here = surroundings(engine)

    def measured(devices: Devices, setting: Setting, limit: int | None, cores: int = 1) -> None:
        told = devices.run(setting, f"{limit}m" if limit else AMPLE, cores)
        peak = round(told["peak"] / MEBIBYTE)
        say(f"{setting}, limit {limit}: {peak} MiB {told['died']}")
        row = {"model": setting.model, "recipe": setting.recipe, "alpha": setting.alpha}
        row |= {"batch_size": setting.batch, "images": setting.images}
        row |= {"limit_mib": limit or "", "peak_mib": peak, "died": told["died"]}
        rows.append(row | here)

    cores = os.cpu_count() or 1
    with devices_without_a_lab(engine) as devices, ThreadPoolExecutor(cores) as pool:
        list(pool.map(lambda setting: measured(devices, setting, None), IN_TABLE))
        rows.sort(key=_order)
        write_rows("memory", rows)
        write_table(fitted(rows))
        sys.path.append(str(PLANNER))
        import memory_plan  # reads the table

        for setting in HELD_OUT:
            model = memory_plan.Model(setting.model, setting.alpha, setting.recipe)
            limit = -(-memory_plan.needed(model, setting.batch) // MEBIBYTE)
            measured(devices, setting, limit, cores)
            write_rows("memory", rows)
    publish("memory", table())
    picture.lines("memory", curves(), "batch size", "peak, MiB")


def _order(row: dict[str, Any]) -> tuple[str, str, float, int]:
    return row["model"], row["recipe"], float(row["alpha"]), int(row["batch_size"])


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
