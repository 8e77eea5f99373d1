"""How long deploying takes: the first time, again, with more devices, after a change of code.

    python benchmarks/deployment.py

Devices run the model `linear`, so that forty fit. results/deployment.csv has a row for each
measurement.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import docker
import yaml
from measure import (
    ROOT,
    Rows,
    application_image,
    lab,
    markdown,
    play,
    publish,
    results,
    say,
    surroundings,
    write_rows,
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


def code_layers(engine: docker.DockerClient, before: str, after: str) -> int:
    """Bytes of the layers that `after` has and `before` has not: what other machines are sent."""
    layers = [set(engine.images.get(image).attrs["RootFS"]["Layers"]) for image in (before, after)]
    new = len(layers[1] - layers[0])
    sizes = [layer["Size"] for layer in engine.images.get(after).history() if layer["Size"]]
    return sum(sizes[:new])


def change_code(runtime: Path) -> None:
    """Write another comment into a copy of the runtime."""
    with (runtime / "flowerbed" / "settings.py").open("a") as file:
        file.write(f"# changed {time.time()}\n")


def main() -> None:
    """Deploy few and many, change the code, publish."""
    engine = docker.from_env()
    rows: Rows = []
    here = surroundings(engine)

    def measured(what: str, devices: int, value: float, unit: str = "s") -> None:
        rows.append({"what": what, "devices": devices, "value": round(value, 2), "unit": unit})
        say(f"{what}, {devices} devices: {value:.1f} {unit}")
        write_rows("deployment", [row | here for row in rows])

    with lab(), tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        few, many = write_inventory(directory, FEW), write_inventory(directory, MANY)

        def deploy(inventory: Path, devices: int) -> None:
            for what in ("first site.yml", *["second site.yml"] * REPEATS):
                measured(what, devices, play("playbooks/site.yml", inventory, **SETTINGS))

        deploy(few, FEW)
        before = application_image()
        copy = Path(shutil.copytree(ROOT / "runtime", directory / "runtime"))
        changed = {"images_runtime_directory": str(copy)}
        for _ in range(REPEATS):
            change_code(copy)
            seconds = play("tests/image.yml", few, **changed)
            measured("image rebuilt after a change of code", FEW, seconds)
        seconds = play("playbooks/site.yml", few, **changed, **SETTINGS)
        measured("site.yml after a change of code", FEW, seconds)
        sent = code_layers(engine, before, application_image())
        measured("sent to each machine after a change of code", FEW, sent / 1e6, "MB")
        measured("application image", FEW, engine.images.get(before).attrs["Size"] / 1e9, "GB")
        deploy(many, MANY)
    publish("deployment", table())


def _values(rows: Rows, what: str, devices: int) -> list[float]:
    return [
        float(row["value"])
        for row in rows
        if row["what"] == what and int(row["devices"]) == devices
    ]


def table() -> str:
    """A row a measurement, a column a number of devices."""
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
        ["second site.yml, for each device more", "", f"{(many - few) / (MANY - FEW):.2f} s"]
    )
    return markdown(["", f"{FEW} devices", f"{MANY} devices"], body)


if __name__ == "__main__":
    main()
