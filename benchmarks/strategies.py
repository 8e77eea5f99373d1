"""What pacing is worth: the same unequal devices and shards under FedAvg and time-boxed rounds.

    python benchmarks/strategies.py [--seeds 42 43 44] [--rounds 4]

FedAvg runs for some rounds; `paced` for as long, in rounds of its own box. results/strategies.csv
has a row for each strategy, seed and round, with the seconds since the run began.
"""

import argparse
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import docker
import picture
from measure import (
    HERE,
    Rows,
    curve,
    deploy,
    lab,
    markdown,
    publish,
    read_rows,
    results,
    say,
    surroundings,
    train,
    write_rows,
)

INVENTORY = HERE / "unequal"
BOX, GRACE = 30.0, 5.0
DATA = {"training_examples": 24000}
PACED = {
    "training_strategy": "paced",
    "training_strategy_parameters": {"box": BOX, "grace": GRACE},
}
_BUSY = ("receive", "queue", "evaluate", "train", "send")


def waiting(directory: Path) -> float:
    """Share of the devices' time in which they waited for others."""
    rows = read_rows(directory / "devices.csv")
    waited = sum(float(row["wait_seconds"]) for row in rows)
    busy = sum(float(row[f"{part}_seconds"]) for row in rows for part in _BUSY)
    return waited / (waited + busy)


def run(strategy: str, seed: int, rounds: int, **variables: Any) -> Rows:
    """Train once; a row a round."""
    directory = train(INVENTORY, training_seed=seed, training_rounds=rounds, **DATA, **variables)
    share = {"waiting": round(waiting(directory), 3)}
    rows: Rows = [{"strategy": strategy, "seed": seed} | row | share for row in curve(directory)]
    say(f"{strategy}, seed {seed}: {[(row['seconds'], row['accuracy']) for row in rows]}")
    return rows


def main() -> None:
    """Deploy once, train with each strategy and seed, publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--rounds", type=int, default=4, help="of FedAvg")
    arguments = parser.parse_args()
    here = surroundings(docker.from_env())
    rows: Rows = []
    with lab():
        deploy(INVENTORY, **DATA)
        for seed in arguments.seeds:
            average = run("fedavg", seed, arguments.rounds)
            boxes = max(1, round(average[-1]["seconds"] / (BOX + 1)))
            rows += [*average, *run("paced", seed, boxes, **PACED)]
            write_rows("strategies", [row | here for row in rows])
    publish("strategies", table())
    curves = {}
    for strategy in ("fedavg", "paced"):
        for seed in arguments.seeds:
            own = _of(rows, strategy, seed)
            curves[f"{strategy}, seed {seed}"] = (
                [float(row["seconds"]) for row in own],
                [float(row["accuracy"]) for row in own],
            )
    picture.lines("strategies", curves, "seconds", "central accuracy")


def _of(rows: Rows, strategy: str, seed: int) -> Rows:
    return [row for row in rows if row["strategy"] == strategy and int(row["seed"]) == seed]


def reached(rows: Rows, accuracy: float) -> float | None:
    """Seconds until a run has an accuracy, between two rounds by the straight line."""
    points = [(0.0, 0.1)] + [(float(row["seconds"]), float(row["accuracy"])) for row in rows]
    for (before, low), (after, high) in pairwise(points):
        if high >= accuracy:
            return before + (after - before) * (accuracy - low) / (high - low)
    return None


def table() -> str:
    """A row a seed: when `paced` is where FedAvg ends, and where it is when FedAvg ends."""
    rows = results("strategies")
    body = []
    shares = []
    for seed in sorted({int(row["seed"]) for row in rows}):
        average, paced = _of(rows, "fedavg", seed), _of(rows, "paced", seed)
        end, goal = float(average[-1]["seconds"]), float(average[-1]["accuracy"])
        when = reached(paced, goal)
        within = [row for row in paced if float(row["seconds"]) <= end] or paced[:1]
        shares.append(when / end if when else float("inf"))
        waited = [100 * float(rows_of[0]["waiting"]) for rows_of in (average, paced)]
        body.append(
            [
                seed,
                f"{goal:.3f} after {end:.0f} s",
                f"after {when:.0f} s" if when else "not reached",
                f"{shares[-1]:.2f}",
                f"{float(within[-1]['accuracy']):.3f}",
                f"{waited[0]:.0f} / {waited[1]:.0f}",
            ]
        )
    body.append(["median", "", "", f"{median(shares):.2f}", "", ""])
    return markdown(
        [
            "seed",
            "FedAvg's accuracy",
            "`paced` has it",
            "share of the time",
            "`paced` at that time",
            "waiting, %, FedAvg / `paced`",
        ],
        body,
    )


if __name__ == "__main__":
    main()
