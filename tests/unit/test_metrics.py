"""Metrics by their names: those of the original stay, and the README lists them all."""

import re

import pytest
from dashboards import DASHBOARDS, metric_names, queries, read
from metrics import flowerbed_metrics
from repository import ROOT, read_yaml

RULES = ROOT / "files/prometheus"


def _section(heading: str) -> list[list[str]]:
    """The cells of the rows of the tables under a heading of the README, without the first row."""
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"^(?P<level>#+) {heading}$", text, re.MULTILINE)
    assert found, f"README.md has no heading {heading!r}"
    rest = text[found.end() :]
    end = re.search(r"^#+ ", rest, re.MULTILINE)
    lines = (rest[: end.start()] if end else rest).splitlines()
    rows = [line.strip("| ").split("|") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def _names(cell: str) -> list[str]:
    return re.findall(r"`([a-zA-Z_]\w*)`", cell)


def test_the_names_of_the_original_stay() -> None:
    assert {"model_accuracy", "model_loss"} <= set(flowerbed_metrics())


def test_all_other_names_carry_the_projects() -> None:
    others = {name for name in flowerbed_metrics() if not name.startswith("flowerbed_")}
    assert {name for name in others if not name.startswith("model_")} == set()


def test_the_readme_lists_every_metric_with_its_labels_and_dashboards() -> None:
    shown: dict[str, set[str]] = {}
    for path in DASHBOARDS:
        for query in queries(path):
            # The annotations are on all of them.
            for name in metric_names(query.expression) if "annotation" not in query.where else ():
                shown.setdefault(name, set()).add(read(path)["title"])
    told = {
        name: (tuple(_names(labels)), set(dashboards.split(", ")) - {""})
        for names, labels, dashboards, _ in _section("Metrics")
        for name in _names(names)
    }
    assert told == {
        name: (labels, shown.get(name, set())) for name, labels in flowerbed_metrics().items()
    }


@pytest.mark.parametrize(
    ("heading", "known"),
    [
        ("Dashboards", {read(path)["title"] for path in DASHBOARDS}),
        (
            "Alerts",
            {
                rule["alert"]
                for group in read_yaml(RULES / "alerts.yml")["groups"]
                for rule in group["rules"]
            },
        ),
    ],
)
def test_the_readme_lists_every_dashboard_and_alert(heading: str, known: set[str]) -> None:
    assert {row[0].strip("*`") for row in _section(heading)} == known
