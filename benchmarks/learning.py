"""What is learned in the time that the legacy way needs for four rounds on the same devices.

    python benchmarks/learning.py [--seeds 42 43 44]

The default app with its default recipe, on the two devices of `rounds`. results/learning.csv has a
row for each seed and round, with the seconds since the run began. Reads results/rounds.csv.
"""

import sys
from statistics import median

import picture
from measure import (
    HERE,
    Record,
    Rows,
    accuracy_curve,
    command_line,
    deploy,
    first_rounds,
    lab,
    later_rounds,
    markdown,
    publish,
    results,
    say,
    train,
)

INVENTORY = HERE / "inventory"
LEGACY_ROUNDS = 4
ROUNDS = 8
# The default app's own values: benchmarks/inventory has those of Flower's example.
RECIPE = {
    "training_model": "mobilenet",
    "training_model_alpha": 0.25,
    "training_recipe": "small-images",
}
DEVICE = {"device_optimizer": "sgd", "device_learning_rate": 0.05, "device_local_epochs": 1}


def legacy_seconds() -> float:
    """What the legacy way takes for its rounds, by results/rounds.csv.

    Raises:
        SystemExit: it was not measured.
    """
    rows = results("rounds")
    first, later = first_rounds(rows, "legacy"), later_rounds(rows, "legacy")
    if not later:
        sys.exit("results/rounds.csv has no row of the legacy way: run benchmarks/rounds.py first")
    return median(first) + (LEGACY_ROUNDS - 1) * median(later)


def main() -> None:
    """Deploy, train with each seed, publish."""
    parser = command_line(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    seeds = parser.parse_args().seeds
    box = legacy_seconds()
    say(f"the legacy way needs {box:.0f} s for its rounds")
    record = Record("learning")
    with lab(INVENTORY):
        deploy(INVENTORY, **DEVICE)
        for seed in seeds:
            say(f"seed {seed}")
            settings = RECIPE | {"training_config": {"seed": seed}, "training_rounds": ROUNDS}
            rows = accuracy_curve(train(INVENTORY, **DEVICE, **settings))
            record.add(*({"seed": seed} | row | {"legacy_seconds": round(box)} for row in rows))
    publish(table, record)
    curves = {f"seed {seed}": _curve(record.rows, seed) for seed in seeds}
    picture.lines("learning", curves, "seconds", "central accuracy")


def _curve(rows: Rows, seed: int) -> tuple[list[float], list[float]]:
    own = [row for row in rows if int(row["seed"]) == seed]
    return [float(row["seconds"]) for row in own], [float(row["accuracy"]) for row in own]


def table() -> str:
    """A row for each seed: the last round that ended within the legacy way's time."""
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
