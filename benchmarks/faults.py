"""Whether runs survive: random faults of every kind, and the books afterwards.

    python benchmarks/faults.py [--rounds 50] [--seed 1]

A run of each strategy, of a model that is trained in no time, on six devices that are each
available nine times out of ten. Every other round is struck, the same in each run. Afterwards every
message must have one row and count once, and whatever has gone wrong must have its reason;
results/faults.csv has a row a fault and run, with what became of its target.
"""

import argparse
import sys
from collections import Counter
from typing import Any

import docker
import numpy as np
import yaml
from measure import (
    HERE,
    Rows,
    Run,
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
_CLASSES = yaml.safe_load((INVENTORY / "hosts.yml").read_text())["devices"]["children"]
DEVICES = sorted(name for group in _CLASSES.values() for name in group["hosts"])
KINDS = ("disconnect", "fill_memory", "kill", "pause", "restart_superlink", "slow")
"""All but restart_docker, which needs a second machine: on the only one it would end the run."""
LAB = {"training_examples": 3000, "device_availability": 0.9}
RUN = {"training_model": "linear", "training_round_timeout": 60}
STRATEGIES = {"fedavg": "FedAvg", "paced": "paced"}
"""One that waits for all until the time is up, and one whose rounds end without who is late."""
MODELS = ("completed", "partial")
_ECHO = 100.0
"""Seconds after a fault in which it may still be felt: a SuperNode whose connection was lost is let
in again when its old session has expired, after a minute or more."""


def schedule(rounds: int, seed: int) -> list[dict[str, Any]]:
    """A fault every other round, each kind as often as any other, on devices as they are drawn."""
    rng = np.random.default_rng(seed)
    at = range(2, rounds, 2)
    kinds = [KINDS[number % len(KINDS)] for number in range(len(at))]
    faults: list[dict[str, Any]] = []
    for number, kind in zip(at, rng.permutation(kinds), strict=True):
        fault = {"at_round": number, "do": str(kind), "seconds": int(rng.integers(5, 30))}
        if kind != "restart_superlink":
            # None that may still be down: that would be no fault.
            recent = [fault.get("device") for fault in faults[-3:]]
            fault["device"] = str(rng.choice([one for one in DEVICES if one not in recent]))
        faults.append(fault)
    return faults


def check(run: Run, faults: list[dict[str, Any]], rounds: int) -> Rows:
    """Hold the books of a run against each other; a row a fault.

    Raises:
        SystemExit: they do not agree.
    """
    told, devices = run.rounds, run.trained
    struck = [row for row in read_rows(run.directory / "faults.csv") if row["fault"] != "rejoin"]
    wrong = [f"{len(told)} rounds of {rounds}"] if len(told) != rounds else []
    for (device, number), times in Counter((r["device"], r["round"]) for r in devices).items():
        if times > 1:
            wrong.append(f"round {number}: {times} rows of {device}")
    # One that works on something from before, late or lost, is not asked.
    wrong += [
        f"round {row['round']}: no row of {device}"
        for row in told
        for device in DEVICES
        if not any(
            r["device"] == device
            and (
                r["round"] == row["round"]
                or 0 < float(row["started"]) - float(r["started"]) < float(r["seconds"])
            )
            for r in devices
        )
    ]
    for row in told:
        counted = [r for r in devices if r["aggregated"] == row["round"]]
        if int(row["examples"]) != sum(int(r["examples"]) for r in counted):
            wrong.append(f"round {row['round']}: its examples are not those of its devices")
        wrong += [
            f"round {row['round']}: {r['device']} counts, and is {r['outcome']}"
            for r in counted
            if r["outcome"] not in MODELS
        ]
    if len(struck) != len(faults):
        wrong.append(f"{len(struck)} faults of {len(faults)}")
    wrong += [
        f"{row['fault']} {row['target']}: {row['problem']}" for row in struck if row["problem"]
    ]
    became: Rows = []
    explained: set[tuple[str, str]] = set()
    for fault in struck:
        begin = float(fault["time"])
        end = begin + float(fault["seconds"])
        felt = [
            row
            for row in devices
            if fault["target"] in (row["device"], "superlink")
            and row["outcome"] not in (*MODELS, "unavailable")
            and float(row["started"]) + float(row["seconds"]) >= begin
            and float(row["started"]) <= end + _ECHO
        ]
        explained |= {(row["device"], row["round"]) for row in felt}
        became.append(
            {key: fault[key] for key in ("round", "fault", "target", "seconds")}
            | {"felt": " ".join(f"{row['outcome']}:{row['round']}" for row in felt)}
        )
    for row in devices:
        failed = row["outcome"] not in (*MODELS, "unavailable")
        if failed and (row["device"], row["round"]) not in explained:
            wrong.append(f"round {row['round']}: {row['device']} is {row['outcome']} for no reason")
    if wrong:
        sys.exit("The books are wrong:\n" + "\n".join(wrong))
    return became


def main() -> None:
    """Deploy, train under fire, check, publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    faults = schedule(arguments.rounds, arguments.seed)
    here = surroundings(docker.from_env())
    rows: Rows = []
    with lab():
        deploy(INVENTORY, **LAB)
        say(f"{arguments.rounds} rounds, {len(faults)} faults")
        for strategy in STRATEGIES:
            run = train(
                INVENTORY,
                training_strategy=strategy,
                training_rounds=arguments.rounds,
                training_faults=faults,
                **LAB,
                **RUN,
            )
            outcomes = Counter(row["outcome"] for row in run.trained)
            told = ", ".join(f"{times} {outcome}" for outcome, times in outcomes.most_common())
            say(f"{strategy}: {told}")
            checked = check(run, faults, arguments.rounds)
            rows += [{"strategy": strategy} | row | here for row in checked]
    write_rows("faults", rows)
    publish("faults", table())


def table() -> str:
    """A row a kind of fault: how often it was struck, and what came of it with each strategy."""
    rows = results("faults")
    body = []
    for kind in KINDS:
        line: list[Any] = [f"`{kind}`"]
        for strategy in STRATEGIES:
            own = [r for r in rows if (r["strategy"], r["fault"]) == (strategy, kind)]
            felt = Counter(
                part.partition(":")[0] for row in own for part in row["felt"].split() if row["felt"]
            )
            line += [
                f"{sum(not row['felt'] for row in own)} of {len(own)}",
                ", ".join(f"{times} `{outcome}`" for outcome, times in felt.most_common()) or "-",
            ]
        body.append(line)
    columns = [
        column
        for title in STRATEGIES.values()
        for column in (f"{title}: harmless", "device rounds that it cost")
    ]
    return markdown(["fault", *columns], body)


if __name__ == "__main__":
    main()
