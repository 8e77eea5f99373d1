"""The names of metrics: those of the original stay, and the pages list all of them."""

import re

import pytest
from dashboards import DASHBOARDS, metric_names, queries, read
from metrics import flowerbed_metrics
from repository import ROOT, read_yaml

RULES = ROOT / "files/prometheus"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def _section(heading: str) -> list[list[str]]:
    """The cells of the tables under the headings of this name in the pages, without heads."""
    pattern = re.compile(rf"^#+ {heading}$(.*?)(?=^#+ |\Z)", re.MULTILINE | re.DOTALL)
    texts = [found[1] for page in PAGES for found in pattern.finditer(page.read_text())]
    assert texts, f"neither README.md nor docs/ has a heading {heading!r}"
    tables = re.findall(r"(?:^\|.*\n)+", "\n".join(texts), re.MULTILINE)
    rows = [row.strip("| ").split("|") for table in tables for row in table.splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def _names(cell: str) -> list[str]:
    return re.findall(r"`([a-zA-Z_]\w*)`", cell)


def test_the_metrics_of_the_original_keep_their_names() -> None:
    assert {"model_accuracy", "model_loss"} <= set(flowerbed_metrics())


def test_all_other_metrics_have_the_prefix_of_the_project() -> None:
    others = {name for name in flowerbed_metrics() if not name.startswith("flowerbed_")}
    assert {name for name in others if not name.startswith("model_")} == set()


def test_a_page_lists_every_metric_with_its_labels_and_dashboards() -> None:
    shown: dict[str, set[str]] = {}
    for path in DASHBOARDS:
        for query in queries(path):
            # All dashboards have the same annotations.
            for name in metric_names(query.expression) if "annotation" not in query.where else ():
                shown.setdefault(name, set()).add(read(path)["title"])
    listed = {
        name: (tuple(_names(labels)), set(dashboards.split(", ")) - {""})
        for names, labels, dashboards, _ in _section("Metrics")
        for name in _names(names)
    }
    assert listed == {
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
def test_a_page_lists_every_dashboard_and_alert(heading: str, known: set[str]) -> None:
    assert {row[0].strip("*`") for row in _section(heading)} == known
