"""What a device needs: the peak of its memory by model and batch size.

    python benchmarks/memory.py

Two devices as the role starts them, with more memory than they need, in a round of one epoch.
Images are read from disk as they are needed, so their number matters little; the peak with 12,000
is in results/cost.csv. results/memory.csv has a row for each setting and device.
"""

from typing import Any

import docker
import picture
from measure import (
    HERE,
    MEBIBYTE,
    Rows,
    devices,
    lab,
    markdown,
    play,
    publish,
    results,
    say,
    surroundings,
    train,
    watch,
    write_rows,
)

INVENTORY = HERE / "inventory"
BATCHES = (16, 32, 64, 128, 256, 512)
MODELS: dict[str, dict[str, Any]] = {
    "MobileNet 0.25": {"training_model": "mobilenet", "training_model_alpha": 0.25},
    "MobileNetV2 0.1": {
        "training_model": "mobilenetv2",
        "training_model_alpha": 0.1,
        "training_recipe": "original",
    },
    "linear": {"training_model": "linear"},
}
TRAINING = {"training_rounds": 1, "training_examples": 6000}


def main() -> None:
    """Deploy with each batch size, train each model, publish."""
    engine = docker.from_env()
    rows: Rows = []
    here = surroundings(engine)
    with lab():
        for part in ("preflight", "machines", "coordinator"):
            play(f"playbooks/{part}.yml", INVENTORY, **TRAINING)
        for batch in BATCHES:
            for title, model in MODELS.items():
                # Deployed anew each time: the peak of a container is of this setting alone.
                variables = {"device_batch_size": batch, "device_memory": "3g", "device_cpus": 0.9}
                for container in devices(engine).values():
                    container.remove(force=True)
                play("playbooks/devices.yml", INVENTORY, **TRAINING, **variables)
                settings = {"training_recipe": "small-images"} | model
                with watch(devices(engine)) as costs:
                    train(INVENTORY, **TRAINING, **settings)
                peaks = {name: round(cost.peak / MEBIBYTE) for name, cost in costs.items()}
                say(f"{title}, batch {batch}: {peaks} MiB")
                setting = {"model": title, "batch_size": batch}
                rows += [setting | {"device": d, "peak_mib": peak} for d, peak in peaks.items()]
                write_rows("memory", [row | here for row in rows])
    publish("memory", table())
    curves = {
        title: (BATCHES, [_peak(rows, title, batch) for batch in BATCHES]) for title in MODELS
    }
    picture.lines("memory", curves, "batch size", "peak, MiB")


def _peak(rows: Rows, model: str, batch: int) -> int:
    """The greater of the two devices' peaks."""
    return max(
        int(row["peak_mib"])
        for row in rows
        if row["model"] == model and int(row["batch_size"]) == batch
    )


def table() -> str:
    """A row a model, a column a batch size."""
    rows = results("memory")
    body = [[model, *(_peak(rows, model, batch) for batch in BATCHES)] for model in MODELS]
    return markdown(["peak of a device, MiB, by batch size", *map(str, BATCHES)], body)


if __name__ == "__main__":
    main()
