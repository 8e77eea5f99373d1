"""What managing unequal devices is worth: strategies on the same six devices and shards.

    python benchmarks/strategies.py [--ways paced fedbuff] [--seeds 42 43 44] [--rounds 6]

With each seed the data are dealt anew, FedAvg runs for some rounds and every other way for about as
long. Ways and seeds that are not named keep their figures. results/strategies.csv has a row for
each way, seed and round, with the seconds since the run began.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

import picture
from measure import (
    HERE,
    Record,
    Row,
    Rows,
    Run,
    accuracy_curve,
    command_line,
    deploy,
    lab,
    markdown,
    publish,
    results,
    say,
    spread,
    train,
)

INVENTORY = HERE / "unequal"
BOX, GRACE = 16.0, 5.0  # seconds; somewhat more than half of FedAvg's round
DATA = {"training_examples": 36000}
BASE = "fedavg"
UNLIKE = {
    "training_partitioner": "dirichlet",
    "training_partitioner_parameters": {"alpha": 0.3},
}
_BUSY = ("receive", "queue", "evaluate", "train", "send")
_CHANCE = 0.1


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        title: in tables and pictures.
        pace: about how many of its rounds take as long as one of FedAvg's.
        run: variables of the run.
        lab: variables of devices and data.
        base: the way that it is compared with.
    """

    title: str
    pace: float
    run: dict[str, Any]
    lab: dict[str, Any] = field(default_factory=dict)
    base: str = BASE


def _paced(**parameters: Any) -> dict[str, Any]:
    parameters = {"box": BOX, "grace": GRACE} | parameters
    return {"training_strategy": "paced", "training_strategy_parameters": parameters}


WAYS = {
    "original": Way(
        "Flower's example: MobileNetV2 0.1 as Keras has it, Adam, FedAvg",
        1,
        {
            "training_model": "mobilenetv2",
            "training_model_alpha": 0.1,
            "training_recipe": "original",
        },
        {"device_optimizer": "adam", "device_learning_rate": 0.001},
    ),
    BASE: Way("FedAvg", 1, {}),
    "tifl": Way("TiFL", 1.2, {"training_strategy": "tifl"}),
    "oort": Way("Oort", 2, {"training_strategy": "oort"}),
    "fedbuff": Way("FedBuff", 4, {"training_strategy": "fedbuff"}),
    "paced": Way("paced", 1.6, _paced()),
    "fednova": Way("paced, with FedNova's correction", 1.6, _paced(normalise=True)),
    "dropout": Way(
        "paced, a third missing: other devices in each round",
        1.6,
        _paced(),
        {"device_availability": 0.67},
    ),
    "fedavg-unlike": Way("unlike data: FedAvg", 1, {}, UNLIKE, "fedavg-unlike"),
    "paced-unlike": Way("unlike data: paced", 1.6, _paced(), UNLIKE, "fedavg-unlike"),
    "fednova-unlike": Way(
        "unlike data: paced, with FedNova's correction",
        1.6,
        _paced(normalise=True),
        UNLIKE,
        "fedavg-unlike",
    ),
}


def waiting(trained: Run) -> float:
    """Share of the devices' time in which they waited for others."""
    rows = trained.messages
    waited = sum(float(row["wait_seconds"]) for row in rows)
    busy = sum(float(row[f"{part}_seconds"]) for row in rows for part in _BUSY)
    return waited / (waited + busy)


def least(trained: Run) -> float:
    """Of all devices the least accuracy on their own test images: the mean of the last 3 rounds."""
    rows = [row for row in trained.trained if row["accuracy"]]
    names = {row["device"] for row in rows}
    return min(
        fmean([float(row["accuracy"]) for row in rows if row["device"] == name][-3:])
        for name in names
    )


def summary(trained: Run) -> Row:
    """What is known of a run as a whole."""
    return {
        "waiting": round(waiting(trained), 3),
        "longest_round": round(max(float(row["devices_seconds"]) for row in trained.rounds), 1),
        "least_device": round(least(trained), 4),
    }


def main() -> None:
    """Deploy, train each way with each seed, publish."""
    parser = command_line(__doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--rounds", type=int, default=6, help="of FedAvg")
    arguments = parser.parse_args()

    def others(row: Row) -> bool:
        return row["way"] not in arguments.ways or int(row["seed"]) not in arguments.seeds

    record = Record("strategies", keep=others)
    with lab(INVENTORY):
        deployed: dict[str, Any] = {}
        for seed in arguments.seeds:
            for name in arguments.ways:
                way = WAYS[name]
                say(f"seed {seed}: {way.title}")
                wanted = DATA | way.lab | {"training_seed": seed}
                if wanted != deployed:
                    deploy(INVENTORY, **wanted)
                    deployed = wanted
                rounds = math.ceil(arguments.rounds * way.pace)
                done = train(INVENTORY, training_rounds=rounds, **wanted, **way.run)
                head, tail = {"way": name, "seed": seed}, summary(done)
                record.add(*(head | row | tail for row in accuracy_curve(done)))
    publish(table, record)
    show()


def show() -> None:
    """The picture: a line for each way, and the range over the seeds."""
    rows = results("strategies")
    end = min(_curve(rows, BASE, seed)[-1][0] for seed in _seeds(rows))
    curves = {}
    for name, way in WAYS.items():
        own = [_curve(rows, name, seed) for seed in _seeds(rows) if _of(rows, name, seed)]
        if own and way.base == BASE:
            curves[way.title.partition(":")[0]] = own
    picture.ribbons("strategies", curves, end, "seconds", "central accuracy")


def _of(rows: Rows, name: str, seed: int) -> Rows:
    return [row for row in rows if row["way"] == name and int(row["seed"]) == seed]


def _seeds(rows: Rows, base: str = BASE) -> list[int]:
    return sorted({int(row["seed"]) for row in rows if row["way"] == base})


def _curve(rows: Rows, name: str, seed: int) -> list[tuple[float, float]]:
    """Seconds and accuracy, from the beginning on."""
    own = _of(rows, name, seed)
    return [(0.0, _CHANCE), *((float(row["seconds"]), float(row["accuracy"])) for row in own)]


def accuracy_at(points: list[tuple[float, float]], seconds: float) -> float:
    """Return the accuracy of the last round that had ended after so many seconds."""
    return [accuracy for when, accuracy in points if when <= seconds][-1]


def reached(points: list[tuple[float, float]], accuracy: float) -> float:
    """Return the seconds until a run has an accuracy, interpolated between two rounds."""
    for (before, low), (after, high) in pairwise(points):
        if high >= accuracy:
            return before + (after - before) * (accuracy - low) / (high - low)
    return math.inf


def table() -> str:
    """A row for each way; each seed is compared with FedAvg with the same seed."""
    rows = results("strategies")
    body = []
    for name, way in WAYS.items():
        seeds = [seed for seed in _seeds(rows, way.base) if _of(rows, name, seed)]
        if not seeds:
            continue
        accuracies, shares, better = [], [], 0
        for seed in seeds:
            own, base = (_curve(rows, each, seed) for each in (name, way.base))
            end, goal = base[-1]
            accuracies.append(accuracy_at(own, end))
            shares.append(reached(own, goal) / end)
            better += accuracies[-1] > goal
        last = [_of(rows, name, seed)[-1] for seed in seeds]
        missed = sum(map(math.isinf, shares))
        body.append(
            [
                way.title,
                spread(accuracies, 3),
                "" if name == way.base else f"{better} of {len(seeds)}",
                f"not with {missed} of {len(seeds)}" if missed else spread(shares, 2),
                spread([100 * float(row["waiting"]) for row in last], 0),
                spread([float(row["longest_round"]) for row in last], 0),
            ]
        )
    return markdown(
        [
            "",
            "accuracy when FedAvg ends",
            "above FedAvg, seeds",
            "has FedAvg's last accuracy after, of its time",
            "waiting, %",
            "longest round, s",
        ],
        body,
    )


if __name__ == "__main__":
    main()
