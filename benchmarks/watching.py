"""What watching costs: cAdvisor, Prometheus, Grafana and the metrics endpoint during a run.

    python benchmarks/watching.py

On the lab of inventory/local with its four devices. results/watching.csv has a row for each
container. If no image of Grafana can be had, it is missing from the sum, and the table says so.
"""

import time

import docker
from containers import watch
from measure import (
    DEFAULT_LAB,
    MEBIBYTE,
    Record,
    command_line,
    deploy,
    lab,
    markdown,
    parts,
    publish,
    results,
    train,
)

PARTS = ("cadvisor", "prometheus", "grafana", "metrics")
SETTINGS = {"training_examples": 12000, "training_rounds": 8}


def main() -> None:
    """Deploy, watch the monitoring during a run, publish."""
    command_line(__doc__).parse_args()
    engine = docker.from_env()
    record = Record("watching")
    with lab(DEFAULT_LAB):
        deploy(DEFAULT_LAB, **SETTINGS)
        found = {container.labels["flowerbed.part"]: container for container in parts(engine)}
        started = time.monotonic()
        with watch({part: found[part] for part in PARTS if part in found}) as costs:
            train(DEFAULT_LAB, **SETTINGS)
        seconds = time.monotonic() - started
    record.add(
        *(
            {
                "part": part,
                "core_percent": round(100 * cost.cpu / seconds, 2),
                "peak_mib": round(cost.peak / MEBIBYTE),
                "seconds": round(seconds),
            }
            for part, cost in costs.items()
        )
    )
    publish(table, record)


def table() -> str:
    """A row for each part, and the sum."""
    rows = results("watching")
    body = [[row["part"], f"{float(row['core_percent']):.1f}", row["peak_mib"]] for row in rows]
    share = sum(float(row["core_percent"]) for row in rows)
    memory = sum(int(row["peak_mib"]) for row in rows)
    missing = [part for part in PARTS if part not in {row["part"] for row in rows}]
    together = "together" + (f" (without {', '.join(missing)})" if missing else "")
    return markdown(["", "of a core, %", "peak, MiB"], [*body, [together, f"{share:.1f}", memory]])


if __name__ == "__main__":
    main()
