"""What is learned in the time that the legacy way needs for four rounds on the same devices.

    python benchmarks/learning.py [--seeds 42 43 44]

The default recipe on the two devices of `rounds`; results/learning.csv has a row for
each seed and round, with the seconds since the run began. Reads results/rounds.csv.
"""

import argparse
from statistics import median

import docker
import picture
from measure import (
    HERE,
    Rows,
    curve,
    deploy,
    devices,
    lab,
    markdown,
    publish,
    results,
    say,
    surroundings,
    train,
    write_rows,
)

INVENTORY = HERE / "inventory"
LEGACY_ROUNDS = 4
ROUNDS = 8
# inventory/local's own values, where benchmarks/inventory has those of Flower's example.
RECIPE = {
    "training_model": "mobilenet",
    "training_model_alpha": 0.25,
    "training_recipe": "small-images",
}
DEVICE = {"device_optimizer": "sgd", "device_learning_rate": 0.05, "device_local_epochs": 1}


def legacy_seconds() -> float:
    """What the legacy way takes for its rounds, by results/rounds.csv."""
    rows = [row for row in results("rounds") if row["way"] == "legacy"]
    first = [float(row["seconds"]) for row in rows if row["round"] == "1"]
    later = [float(row["seconds"]) for row in rows if row["round"] != "1"]
    return median(first) + (LEGACY_ROUNDS - 1) * median(later)


def main() -> None:
    """Deploy, train with each seed, publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    seeds = parser.parse_args().seeds
    engine = docker.from_env()
    box = legacy_seconds()
    rows: Rows = []
    here = surroundings(engine)
    with lab():
        deploy(INVENTORY, **DEVICE)
        say(f"{len(devices(engine))} devices; the legacy way needs {box:.0f} s for its rounds")
        for seed in seeds:
            settings = RECIPE | {"training_config": {"seed": seed}, "training_rounds": ROUNDS}
            told = curve(train(INVENTORY, **DEVICE, **settings))
            rows += [{"seed": seed} | row for row in told]
            say(f"seed {seed}: " + ", ".join(f"{r['accuracy']}" for r in rows if r["seed"] == seed))
            write_rows("learning", [row | {"legacy_seconds": round(box)} | here for row in rows])
    publish("learning", table())
    curves = {f"seed {seed}": _curve(rows, seed) for seed in seeds}
    picture.lines("learning", curves, "seconds", "central accuracy")


def _curve(rows: Rows, seed: int) -> tuple[list[float], list[float]]:
    own = [row for row in rows if int(row["seed"]) == seed]
    return [float(row["seconds"]) for row in own], [float(row["accuracy"]) for row in own]


def table() -> str:
    """A row a seed: the last round that ended within the legacy way's time."""
    rows = results("learning")
    box = float(rows[0]["legacy_seconds"])
    body = []
    for seed in sorted({int(row["seed"]) for row in rows}):
        within = [row for row in rows if int(row["seed"]) == seed and float(row["seconds"]) <= box]
        last = within[-1]
        body.append([seed, last["round"], f"{float(last['seconds']):.0f}", last["accuracy"]])
    return markdown(["seed", "rounds", f"seconds, of {box:.0f}", "central accuracy"], body)


if __name__ == "__main__":
    main()
