"""How long deploying takes: the first time, again, with more devices, after a change of code.

    python benchmarks/deployment.py

Devices run the model `linear`, so that forty of them fit. The images are there from the beginning.
results/deployment.csv has a row for each measurement.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import docker
import yaml
from measure import (
    ROOT,
    Record,
    Rows,
    command_line,
    device_image,
    lab,
    markdown,
    play,
    publish,
    results,
)

FEW, MANY = 4, 40
REPEATS = 3
SETTINGS = {
    "training_model": "linear",
    "training_rounds": 1,
    "training_examples": 4000,
    "training_device_wait": 600,
}


def write_inventory(directory: Path, devices: int) -> Path:
    """One machine and `devices` devices of one class."""
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    limits = {
        "device_machine": "local",
        "device_cpus": 0.25,
        "device_memory": "400m",
        "device_batch_size": 16,
    }
    hosts = {f"phone-{number:02}": None for number in range(1, devices + 1)}
    path = directory / f"{devices}.yml"
    path.write_text(
        yaml.safe_dump(
            {
                "machines": {"hosts": {"local": local}},
                "coordinator": {"hosts": {"local": None}},
                "devices": {"children": {"phone": {"hosts": hosts, "vars": limits}}},
            }
        )
    )
    return path


@contextmanager
def changed_code(
    engine: docker.DockerClient, scratch: Path, inventory: Path
) -> Iterator[dict[str, str]]:
    """Copy `runtime/` and `app/`, and remove what is built of the copies at the end.

    Yields:
        The variables that make playbooks build and deploy the copies.
    """

    def applications() -> set[str]:
        images = engine.images.list("flowerbed/application")
        return {tag for image in images for tag in image.tags}

    before = applications()
    variables = {}
    for name, part in (("runtime", "runtime"), ("application", "app")):
        ignored = shutil.ignore_patterns("tests", "__pycache__")
        copy = shutil.copytree(ROOT / part, scratch / part, ignore=ignored)
        variables[f"images_{name}_directory"] = str(copy)
    try:
        yield variables
    finally:
        # Notes this checkout's own image again (.cache/application-image).
        play("tests/image.yml", inventory)
        for tag in applications() - before - _used(engine):
            engine.images.remove(tag)


def _used(engine: docker.DockerClient) -> set[str]:
    """The images that containers use."""
    return {each.attrs["Config"]["Image"] for each in engine.containers.list(all=True)}


def change_code(copies: dict[str, str]) -> None:
    """Write another comment into the copy of the runtime."""
    path = Path(copies["images_runtime_directory"], "flowerbed", "settings.py")
    with path.open("a") as file:
        file.write(f"# changed {time.time()}\n")


def code_layers(engine: docker.DockerClient, before: str, after: str) -> int:
    """Bytes of the layers that `after` has and `before` has not: what other machines are sent."""
    layers = [set(engine.images.get(image).attrs["RootFS"]["Layers"]) for image in (before, after)]
    new = len(layers[1] - layers[0])
    sizes = [layer["Size"] for layer in engine.images.get(after).history() if layer["Size"]]
    return sum(sizes[:new])


def main() -> None:
    """Deploy few, change the code, deploy many, publish."""
    command_line(__doc__).parse_args()
    engine = docker.from_env()
    record = Record("deployment")

    def measured(what: str, devices: int, value: float, unit: str = "s") -> None:
        record.add({"what": what, "devices": devices, "value": round(value, 2), "unit": unit})

    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        settings: dict[str, Any] = SETTINGS | {"training_results": str(scratch / "results")}
        few, many = (write_inventory(scratch, devices) for devices in (FEW, MANY))
        play("tests/image.yml", few)

        def deploy(inventory: Path, devices: int) -> None:
            for what in ("first site.yml", *["second site.yml"] * REPEATS):
                seconds = play("playbooks/site.yml", inventory, **settings).seconds
                measured(what, devices, seconds)

        # Around the lab: images that a container uses cannot be removed.
        with changed_code(engine, scratch, few) as changed, lab(few):
            deploy(few, FEW)
            before = device_image(engine)
            for _ in range(REPEATS):
                change_code(changed)
                seconds = play("tests/image.yml", few, **changed).seconds
                measured("image rebuilt after a change of code", FEW, seconds)
            seconds = play("playbooks/site.yml", few, **changed, **settings).seconds
            measured("site.yml after a change of code", FEW, seconds)
            sent = code_layers(engine, before, device_image(engine))
            measured("sent to each machine after a change of code", FEW, sent / 1e6, "MB")
            measured("application image", FEW, engine.images.get(before).attrs["Size"] / 1e9, "GB")
        with lab(many):
            deploy(many, MANY)
    publish(table, record)


def _values(rows: Rows, what: str, devices: int) -> list[float]:
    return [
        float(row["value"])
        for row in rows
        if row["what"] == what and int(row["devices"]) == devices
    ]


def table() -> str:
    """A row for each measurement, a column for each number of devices."""
    rows = results("deployment")
    body = []
    for what in dict.fromkeys(row["what"] for row in rows):
        unit = next(row["unit"] for row in rows if row["what"] == what)
        cells = [
            f"{median(values):.1f} {unit}" if (values := _values(rows, what, devices)) else ""
            for devices in (FEW, MANY)
        ]
        body.append([what, *cells])
    few, many = (median(_values(rows, "second site.yml", devices)) for devices in (FEW, MANY))
    body.append(
        ["second site.yml, for each further device", "", f"{(many - few) / (MANY - FEW):.2f} s"]
    )
    return markdown(["", f"{FEW} devices", f"{MANY} devices"], body)


if __name__ == "__main__":
    main()
