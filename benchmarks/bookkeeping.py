"""What the server's bookkeeping costs in a lab of many devices, which are simulated.

    python benchmarks/bookkeeping.py [--devices 500] [--rounds 3] [--weights 220000] [--most 5]

Measures the seconds that each part takes in a round: sending, reading and recording messages,
writing the status file, and FedAvg's aggregation. The time in which the server only waits does not
count. Fails if a round takes more than `--most` seconds. results/bookkeeping.csv has a row for each
part. Needs the application image (`make images`).
"""

import json
import sys

import docker
from containers import BUILT_IMAGE, network, output_of, start
from measure import HERE, Record, command_line, markdown, publish, results, say


def main() -> None:
    """Measure in a container of the application image, publish."""
    parser = command_line(__doc__)
    parser.add_argument("--devices", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", type=int, default=220_000)
    parser.add_argument("--most", type=float, default=5.0, help="seconds of a round")
    arguments = parser.parse_args()
    engine = docker.from_env()
    sizes = {name: getattr(arguments, name) for name in ("devices", "rounds", "weights")}
    record = Record("bookkeeping")
    with network(engine):
        say(", ".join(f"{value} {name}" for name, value in sizes.items()))
        container = start(
            engine,
            "server",
            BUILT_IMAGE.read_text().strip(),
            ["python", "/ways/many_devices.py", *map(str, sizes.values())],
            volumes=[f"{HERE / 'ways'}:/ways:ro"],
        )
        measured = json.loads(output_of(container).splitlines()[-1])
    for part, seconds in sorted(measured["seconds"].items(), key=lambda item: -item[1]):
        row = {"part": part, "seconds": round(seconds, 3), "peak_mib": measured["peak_mib"]}
        record.add(row | sizes)
    publish(table, record)
    total = sum(measured["seconds"].values())
    if total > arguments.most:
        sys.exit(f"the bookkeeping of a round takes {total:.1f} s, more than {arguments.most:g} s")


def table() -> str:
    """A row for each part, and the sum."""
    rows = results("bookkeeping")
    body = [[row["part"], f"{float(row['seconds']):.2f}"] for row in rows]
    body.append(["together", f"{sum(float(row['seconds']) for row in rows):.2f}"])
    return markdown([f"{rows[0]['devices']} devices", "seconds of a round"], body)


if __name__ == "__main__":
    main()
