"""Grafana's dashboards as files: their panels, queries and variables."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARDS = sorted((Path(__file__).parents[1] / "files/grafana").glob("*.json"))

KEYWORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


@dataclass(frozen=True)
class Query:
    """An expression, and its place: the dashboard's file and the panel's title."""

    where: str
    expression: str

    def expand(self, values: Mapping[str, list[str]]) -> str:
        """The expression that Grafana sends if all values of each variable are selected."""
        return re.sub(
            r"\$(\w+)", lambda found: "(" + "|".join(values[found[1]]) + ")", self.expression
        )


def read(path: Path) -> dict[str, Any]:
    """The content of a dashboard's file."""
    dashboard: dict[str, Any] = json.loads(path.read_text())
    return dashboard


def panels(path: Path) -> Iterator[dict[str, Any]]:
    """The panels that show metrics, also those inside rows."""
    waiting = list(read(path)["panels"])
    while waiting:
        panel = waiting.pop(0)
        waiting += panel.get("panels", [])
        if panel["type"] not in ("row", "text"):
            yield panel


def queries(path: Path) -> Iterator[Query]:
    """All queries of a dashboard, including those of its annotations."""
    for panel in panels(path):
        for target in panel["targets"]:
            yield Query(f"{path.name}: {panel['title']}", target["expr"])
    for annotation in read(path)["annotations"]["list"]:
        yield Query(f"{path.name}: annotation {annotation['name']}", annotation["expr"])


def variables(path: Path) -> dict[str, tuple[str, str]]:
    """The series and the label whose values a variable has, by the variable's name."""
    found = {}
    for variable in read(path)["templating"]["list"]:
        query = re.fullmatch(r"label_values\((.+), *(\w+)\)", variable["query"]["query"])
        assert query, variable
        found[str(variable["name"])] = (query[1], query[2])
    return found


def metric_names(expression: str) -> set[str]:
    """The names of metrics in a PromQL expression."""
    rest = re.sub(r'"(?:\\.|[^"\\])*"', "", expression)
    rest = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", rest)
    rest = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", rest)
    words = re.findall(r"(?<![\w:$])[a-zA-Z_:][\w:]*\b(?!\s*\()", rest)
    return {word for word in words if word.lower() not in KEYWORDS}
