"""What watching costs: cAdvisor, Prometheus, Grafana and the metrics endpoint during a run.

    python benchmarks/watching.py

On the lab of inventory/local with its four devices; results/watching.csv has a row for each
container. Where no image of Grafana can be had, it is missing from the sum, and the table says so.
"""

import time

import docker
from measure import (
    MEBIBYTE,
    ROOT,
    Rows,
    deploy,
    lab,
    markdown,
    publish,
    results,
    say,
    surroundings,
    train,
    watch,
    write_rows,
)

INVENTORY = ROOT / "inventory" / "local"
PARTS = ("cadvisor", "prometheus", "grafana", "metrics")
SETTINGS = {"training_examples": 12000, "training_rounds": 8}


def main() -> None:
    """Deploy, watch the watchers during a run, publish."""
    engine = docker.from_env()
    here = surroundings(engine)
    with lab():
        deploy(INVENTORY, **SETTINGS)
        found = engine.containers.list(filters={"label": "flowerbed.part"})
        watchers = {
            container.labels["flowerbed.part"]: container
            for container in found
            if container.labels["flowerbed.part"] in PARTS
        }
        started = time.monotonic()
        with watch(watchers) as costs:
            train(INVENTORY, **SETTINGS)
        seconds = time.monotonic() - started
    rows: Rows = [
        {
            "part": part,
            "core_percent": round(100 * cost.cpu / seconds, 2),
            "peak_mib": round(cost.peak / MEBIBYTE),
            "seconds": round(seconds),
        }
        for part, cost in costs.items()
    ]
    write_rows("watching", [row | here for row in rows])
    say(f"watched for {seconds:.0f} s")
    publish("watching", table())


def table() -> str:
    """A row a part, and the sum."""
    rows = results("watching")
    body = [[row["part"], f"{float(row['core_percent']):.1f}", row["peak_mib"]] for row in rows]
    share = sum(float(row["core_percent"]) for row in rows)
    memory = sum(int(row["peak_mib"]) for row in rows)
    missing = [part for part in PARTS if part not in {row["part"] for row in rows}]
    together = "together" + (f" (without {', '.join(missing)})" if missing else "")
    return markdown(["", "of a core, %", "peak, MiB"], [*body, [together, f"{share:.1f}", memory]])


if __name__ == "__main__":
    main()
