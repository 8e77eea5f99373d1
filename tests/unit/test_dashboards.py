"""Grafana's dashboards: complete, and asking for nothing that nobody measures."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from metrics import flowerbed_metrics
from repository import ROOT, read_yaml

DASHBOARDS = sorted((ROOT / "files/grafana").glob("*.json"))
OTHERS = re.compile(r"(?:container|machine|cadvisor|prometheus|scrape)_\w+|up")
"""What cAdvisor and Prometheus itself tell."""
KEYWORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


def _dashboard(path: Path) -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads(path.read_text())
    return dashboard


def _panels(path: Path) -> Iterator[dict[str, Any]]:
    """The panels, those inside rows too; a row or a text shows no metric."""
    waiting = list(_dashboard(path)["panels"])
    while waiting:
        panel = waiting.pop(0)
        waiting += panel.get("panels", [])
        if panel["type"] not in ("row", "text"):
            yield panel


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    """All mappings inside a document."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, dict | list):
            yield from _walk(child)


def _provisioned() -> set[str]:
    """The data sources that the role `grafana` provisions, by uid."""
    return {
        source["uid"]
        for tasks in (ROOT / "roles/grafana/tasks").glob("*.yml")
        for node in _walk(read_yaml(tasks))
        for source in node.get("datasources", [])
    }


def metric_names(expression: str) -> set[str]:
    """The names of metrics in a PromQL expression."""
    rest = re.sub(r'"(?:\\.|[^"\\])*"', "", expression)
    rest = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", rest)
    rest = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", rest)
    words = re.findall(r"(?<![\w:$])[a-zA-Z_:][\w:]*\b(?!\s*\()", rest)
    return {word for word in words if word.lower() not in KEYWORDS}


def test_metric_names_are_found_in_an_expression() -> None:
    expression = (
        'sum by (name) (rate(one_total{part="x", name=~"a(b)}"}[$__rate_interval] offset 5m))'
        " / on(name) group_left(two) (three:sum > 0.5) or up and -four{}"
    )
    assert metric_names(expression) == {"one_total", "three:sum", "up", "four"}


def test_there_are_dashboards_and_the_home_page_is_one_of_them() -> None:
    deploy = (ROOT / "roles/grafana/tasks/deploy.yml").read_text()
    home = re.findall(r"GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH: /dashboards/(\S+)", deploy)
    assert home
    assert home[0] in {path.name for path in DASHBOARDS}


def test_no_two_dashboards_have_the_same_uid_or_title() -> None:
    for key in ("uid", "title"):
        values = [_dashboard(path)[key] for path in DASHBOARDS]
        assert all(values)
        assert len(set(values)) == len(values), key


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_every_panel_is_complete(path: Path) -> None:
    panels = list(_panels(path))
    assert panels
    (source,) = _provisioned()
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        title = panel.get("title")
        assert title, panel
        assert panel.get("description"), title
        assert panel["fieldConfig"]["defaults"].get("unit"), title
        assert panel["targets"], title
        for asker in (panel, *panel["targets"]):
            assert asker["datasource"] == {"type": "prometheus", "uid": source}, title


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_every_metric_asked_for_is_measured(path: Path) -> None:
    known = flowerbed_metrics()
    for panel in _panels(path):
        for target in panel["targets"]:
            names = metric_names(target["expr"])
            assert names, panel["title"]
            unknown = {n for n in names - known if not OTHERS.fullmatch(n)}
            assert not unknown, panel["title"]
