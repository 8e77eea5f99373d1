"""Metrics by their names: those of the original stay, and the README lists them all."""

import re

from metrics import flowerbed_metrics
from repository import ROOT

ROW = re.compile(r"^\| *(?P<first>[^|]+)\|", re.MULTILINE)


def _table(text: str) -> set[str]:
    """Names in the first column of the tables under the heading Metrics."""
    heading = re.search(r"^(?P<level>#+) Metrics$", text, re.MULTILINE)
    assert heading, "README.md has no heading 'Metrics'"
    rest = text[heading.end() :]
    end = re.search(rf"^#{{1,{len(heading['level'])}}} ", rest, re.MULTILINE)
    section = rest[: end.start()] if end else rest
    cells = [row["first"] for row in ROW.finditer(section)]
    return {name for cell in cells for name in re.findall(r"`([a-zA-Z_]\w*)", cell)}


def test_the_names_of_the_original_stay() -> None:
    assert {"model_accuracy", "model_loss"} <= flowerbed_metrics()


def test_all_other_names_carry_the_projects() -> None:
    others = {name for name in flowerbed_metrics() if not name.startswith("flowerbed_")}
    assert {name for name in others if not name.startswith("model_")} == set()


def test_the_readme_lists_every_metric_and_no_other() -> None:
    readme = ROOT / "README.md"
    assert readme.exists(), "there is no README.md to look for the table in"
    assert _table(readme.read_text()) == flowerbed_metrics()
