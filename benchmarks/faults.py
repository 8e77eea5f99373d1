"""Whether runs survive random faults of every kind, and whether their records are correct.

    python benchmarks/faults.py [--rounds 50] [--seed 1]

One run with each strategy, of a model that is trained in no time, on six devices that are each
available in nine rounds out of ten. In every other round a fault is injected, the same in each run.
Afterwards every message must have one row and count once, and whatever has failed must have its
reason. results/faults.csv has a row for each fault and run, with what it cost its target.
"""

import sys
from collections import Counter
from typing import Any

import numpy as np
import yaml
from measure import (
    HERE,
    Record,
    Row,
    Rows,
    Run,
    command_line,
    deploy,
    lab,
    markdown,
    publish,
    read_rows,
    results,
    say,
    train,
)

INVENTORY = HERE / "unequal"
_CLASSES = yaml.safe_load((INVENTORY / "hosts.yml").read_text())["devices"]["children"]
DEVICES = sorted(name for group in _CLASSES.values() for name in group["hosts"])
KINDS = ("disconnect", "fill_memory", "kill", "pause", "restart_superlink", "slow")
"""All but restart_docker: on the only machine it would end the run."""
LAB = {"training_examples": 3000, "device_availability": 0.9}
RUN = {"training_model": "linear", "training_round_timeout": 60}
STRATEGIES = {"fedavg": "FedAvg", "paced": "paced"}
"""FedAvg waits for all devices until the time is up. Rounds of paced end without late devices."""
MODELS = ("completed", "partial")
_ECHO = 100.0
"""Seconds after a fault in which it may still cost something. A SuperNode whose connection was lost
is admitted again when its old session has expired, after a minute or more."""


def schedule(rounds: int, seed: int) -> list[dict[str, Any]]:
    """Draw a fault for every other round, each kind as often as any other."""
    rng = np.random.default_rng(seed)
    at = range(2, rounds, 2)
    kinds = [KINDS[number % len(KINDS)] for number in range(len(at))]
    faults: list[dict[str, Any]] = []
    for number, kind in zip(at, rng.permutation(kinds), strict=True):
        fault = {"at_round": number, "do": str(kind), "seconds": int(rng.integers(5, 30))}
        if kind != "restart_superlink":
            # A fault of a device that may still be down would be no fault.
            recent = [fault.get("device") for fault in faults[-3:]]
            fault["device"] = str(rng.choice([one for one in DEVICES if one not in recent]))
        faults.append(fault)
    return faults


def failed(row: Row) -> bool:
    """Whether a device that was asked has returned no model in time."""
    return row["outcome"] not in (*MODELS, "unavailable")


def wrong_messages(rounds: Rows, messages: Rows) -> list[str]:
    """Find messages without a row, or with more than one."""
    rows = Counter((row["device"], row["round"]) for row in messages)
    problems = [
        f"round {number}: {times} rows of {device}"
        for (device, number), times in rows.items()
        if times > 1
    ]
    for each in rounds:
        # A device that works on an earlier message, late or lost, is not asked.
        busy = {
            row["device"]
            for row in messages
            if 0 < float(each["started"]) - float(row["started"]) < float(row["seconds"])
        }
        problems += [
            f"round {each['round']}: no row of {device}"
            for device in DEVICES
            if device not in busy and not rows[device, each["round"]]
        ]
    return problems


def wrong_models(rounds: Rows, messages: Rows) -> list[str]:
    """Find models that were aggregated and are none, and rounds with another number of examples."""
    problems = []
    for each in rounds:
        counted = [row for row in messages if row["aggregated"] == each["round"]]
        if int(each["examples"]) != sum(int(row["examples"]) for row in counted):
            problems.append(f"round {each['round']}: its examples are not those of its devices")
        problems += [
            f"round {each['round']}: {row['device']} counts, and is {row['outcome']}"
            for row in counted
            if row["outcome"] not in MODELS
        ]
    return problems


def costs_of(fault: Row, messages: Rows) -> Rows:
    """Find the messages that failed while a fault may have been the reason."""
    begin = float(fault["time"])
    end = begin + float(fault["seconds"]) + _ECHO
    return [
        row
        for row in messages
        if fault["target"] in (row["device"], "superlink")
        and failed(row)
        and float(row["started"]) + float(row["seconds"]) >= begin
        and float(row["started"]) <= end
    ]


def check(run: Run, planned: list[dict[str, Any]], rounds: int) -> Rows:
    """Compare the records of a run with each other; return a row for each fault.

    Raises:
        SystemExit: they do not agree.
    """
    done, messages = run.rounds, run.trained
    faults = [row for row in read_rows(run.directory / "faults.csv") if row["fault"] != "rejoin"]
    problems = [f"{len(done)} rounds of {rounds}"] if len(done) != rounds else []
    problems += wrong_messages(done, messages) + wrong_models(done, messages)
    if len(faults) != len(planned):
        problems.append(f"{len(faults)} faults of {len(planned)}")
    problems += [
        f"{row['fault']} {row['target']}: {row['problem']}" for row in faults if row["problem"]
    ]
    costs = [costs_of(fault, messages) for fault in faults]
    problems += [
        f"round {row['round']}: {row['device']} is {row['outcome']} for no reason"
        for row in messages
        if failed(row) and not any(row in cost for cost in costs)
    ]
    if problems:
        sys.exit(f"the records of {run.directory} are wrong:\n" + "\n".join(problems))
    return [
        {key: fault[key] for key in ("round", "fault", "target", "seconds")}
        | {"felt": " ".join(f"{row['outcome']}:{row['round']}" for row in cost)}
        for fault, cost in zip(faults, costs, strict=True)
    ]


def main() -> None:
    """Deploy, train with faults, check the records, publish."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    faults = schedule(arguments.rounds, arguments.seed)
    record = Record("faults")
    with lab(INVENTORY):
        deploy(INVENTORY, **LAB)
        for strategy in STRATEGIES:
            say(f"{strategy}: {arguments.rounds} rounds, {len(faults)} faults")
            run = train(
                INVENTORY,
                training_strategy=strategy,
                training_rounds=arguments.rounds,
                training_faults=faults,
                **LAB,
                **RUN,
            )
            checked = check(run, faults, arguments.rounds)
            record.add(*({"strategy": strategy} | row for row in checked))
    publish(table, record)


def table() -> str:
    """A row for each kind of fault: how often it was harmless, and what it cost."""
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
