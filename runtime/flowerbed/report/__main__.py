"""The command line; see the package."""

import argparse
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from flowerbed.prometheus import ADDRESS, Prometheus
from flowerbed.report.comparison import comparison_page
from flowerbed.report.page import run_page
from flowerbed.report.record import NoSuchRunError, read_record
from flowerbed.report.usage import read_usage
from flowerbed.results import RESULTS, write

_LONGEST_NAME = 120
"""Characters; a file system allows 255 bytes."""


def comparison_name(runs: Sequence[str]) -> str:
    """Name of the page that compares runs: their names, or a digest if these are too long."""
    name = "-".join(runs)
    if len(name) > _LONGEST_NAME:
        name = f"comparison-of-{len(runs)}-runs-{sha256(name.encode()).hexdigest()[:8]}"
    return f"{name}.html"


def main() -> None:
    """Write the report and print its path."""
    parser = argparse.ArgumentParser(
        prog="python -m flowerbed.report",
        description="Write the report of a run, or a page that compares several runs.",
    )
    parser.add_argument("run", nargs="+")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--prometheus", default=ADDRESS)
    arguments = parser.parse_args()
    root: Path = arguments.results
    runs = list(dict.fromkeys(arguments.run))
    try:
        records = [read_record(root, run) for run in runs]
    except NoSuchRunError as error:
        sys.exit(str(error))
    if len(records) == 1:
        (record,) = records
        path = root / record.name / "report.html"
        usage, why_not = read_usage(Prometheus(arguments.prometheus), record)
        write(path, run_page(record, usage, why_not))
    else:
        path = root / comparison_name(runs)
        write(path, comparison_page(records))
    print(path)


if __name__ == "__main__":
    main()
