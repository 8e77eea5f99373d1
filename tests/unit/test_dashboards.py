"""Grafana's dashboards: complete, and their queries are for metrics that exist."""

import importlib
import json
import pkgutil
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboards import DASHBOARDS, metric_names, panels, queries, read, variables
from grafana_foundation_sdk import models
from grafana_foundation_sdk.cog import encoder, plugins
from grafana_foundation_sdk.models.dashboard import Dashboard, DataTransformerConfig, Panel
from metrics import flowerbed_metrics, outcomes
from pydantic import ConfigDict, TypeAdapter, ValidationError
from repository import ROOT, read_yaml

OTHERS = re.compile(r"(?:container|machine|scrape)_\w+|up|ALERTS")
"""Metrics of cAdvisor and of Prometheus itself."""
OF_PROMETHEUS = {"step", "textFormat", "titleFormat", "useValueForTime"}
"""Keys of an annotation for Prometheus; the schema covers what all data sources have in common."""


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    """All mappings inside a document."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, dict | list):
            yield from _walk(child)


def _provisioned() -> set[str]:
    """The uids of the data sources that the role `grafana` provisions."""
    return {
        source["uid"]
        for tasks in (ROOT / "roles/grafana/tasks").glob("*.yml")
        for node in _walk(read_yaml(tasks))
        for source in node.get("datasources", [])
    }


def _rules() -> list[dict[str, Any]]:
    return [
        rule
        for path in sorted((ROOT / "files/prometheus").glob("*.yml"))
        for group in read_yaml(path)["groups"]
        for rule in group["rules"]
    ]


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
        values = [read(path)[key] for path in DASHBOARDS]
        assert all(values)
        assert len(set(values)) == len(values), key


def _unknown(document: Any, kept: Any, where: str = "") -> Iterator[str]:
    """Where a document has keys that the schema does not have."""
    if isinstance(document, dict):
        for key, value in document.items():
            if not isinstance(kept, dict) or key not in kept:
                yield f"{where}.{key}"
            else:
                yield from _unknown(value, kept[key], f"{where}.{key}")
    elif isinstance(document, list):
        for number, value in enumerate(document):
            yield from _unknown(value, kept[number], f"{where}[{number}]")
    elif document != kept:
        yield f"{where}: {document!r} became {kept!r}"


def _mistyped(node: Any, where: str = "") -> Iterator[str]:
    """Where a value has another type than in the schema, or is none of its choices."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _mistyped(value, f"{where}[{key}]")
    elif type(node).__module__.startswith(models.__name__) and hasattr(node, "__dict__"):
        for name, kind in typing.get_type_hints(type(node)).items():
            value = getattr(node, name)
            adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
            try:
                adapter.validate_python(value)
            except ValidationError as error:
                yield f"{where}.{name}: {error.errors()[0]['msg']}"
            yield from _mistyped(value, f"{where}.{name}")


def _problems(document: dict[str, Any]) -> list[str]:
    """Violations of Grafana's schema in a dashboard."""
    plugins.register_default_plugins()
    dashboard = Dashboard.from_json(document)
    for panel in dashboard.panels or []:
        if isinstance(panel, Panel):  # from_json leaves transformations as they are
            found: list[Any] = panel.transformations or []
            panel.transformations = [DataTransformerConfig.from_json(each) for each in found]
    kept = json.loads(json.dumps(dashboard, cls=encoder.JSONEncoder))
    problems = [*_unknown(document, kept), *_mistyped(dashboard)]
    return [p for p in problems if p.rsplit(".", 1)[-1] not in OF_PROMETHEUS]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_a_dashboard_is_valid(path: Path) -> None:
    assert _problems(read(path)) == []
    kinds = {module.name for module in pkgutil.iter_modules(models.__path__)}
    for panel in panels(path):
        kind = panel["type"].replace("-", "")
        assert kind in kinds, panel["title"]
        assert hasattr(importlib.import_module(f"{models.__name__}.{kind}"), "Options")


def test_problems_of_a_dashboard_are_found() -> None:
    dashboard = read(DASHBOARDS[0])
    panel = next(p for p in dashboard["panels"] if p["type"] == "timeseries")
    panel["fieldConfig"]["defaults"]["untit"] = "s"
    panel["options"]["legend"]["placement"] = "above"
    panel["gridPos"]["h"] = "tall"
    problems = " ".join(_problems(dashboard))
    assert all(word in problems for word in ("untit", "placement", "h:"))


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_every_panel_is_complete(path: Path) -> None:
    (source,) = _provisioned()
    mine = {"type": "prometheus", "uid": source}
    listed = list(panels(path))
    assert listed
    assert len({panel["id"] for panel in listed}) == len(listed)
    for panel in listed:
        title = panel.get("title")
        assert title, panel
        assert panel.get("description"), title
        assert panel["fieldConfig"]["defaults"].get("unit"), title
        assert panel["targets"], title
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for each in (panel, *panel["targets"]):
            assert each["datasource"] == mine, title
    dashboard = read(path)
    for other in (*dashboard["templating"]["list"], *dashboard["annotations"]["list"]):
        assert other["datasource"] == mine, other["name"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_no_two_panels_overlap(path: Path) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels(path):
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_rounds_and_faults_are_annotations(path: Path) -> None:
    names = [annotation["name"] for annotation in read(path)["annotations"]["list"]]
    assert names == ["Rounds", "Faults", "Failed devices", "Alerts"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_every_variable_in_a_query_exists(path: Path) -> None:
    known = set(variables(path))
    used = {name for query in queries(path) for name in re.findall(r"\$(\w+)", query.expression)}
    assert used == known


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_every_metric_in_a_query_exists(path: Path) -> None:
    known = set(flowerbed_metrics()) | {rule["record"] for rule in _rules() if "record" in rule}
    for query in queries(path):
        names = metric_names(query.expression)
        assert names or "ALERTS" in query.expression, query.where
        unknown = {n for n in names - known if not OTHERS.fullmatch(n)}
        assert not unknown, query.where


def test_every_metric_in_a_rule_exists() -> None:
    rules = _rules()
    known = set(flowerbed_metrics()) | {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        unknown = {n for n in metric_names(rule["expr"]) - known if not OTHERS.fullmatch(n)}
        assert not unknown, rule


def test_every_metric_is_used_in_a_dashboard_or_a_rule() -> None:
    expressions = [query.expression for path in DASHBOARDS for query in queries(path)]
    expressions += [rule["expr"] for rule in _rules()]
    used = {name for expression in expressions for name in metric_names(expression)}
    assert set(flowerbed_metrics()) - used == {"flowerbed_run_started_seconds"}


def test_every_outcome_has_a_colour() -> None:
    by_title = {panel["title"]: panel for path in DASHBOARDS for panel in panels(path)}
    bars = by_title["Outcomes"]["fieldConfig"]["overrides"]
    assert {override["matcher"]["options"] for override in bars} == outcomes()
    timeline = by_title["Last outcome"]
    values = timeline["fieldConfig"]["defaults"]["mappings"][0]["options"]
    expression = timeline["targets"][0]["expr"]
    asked = re.findall(r'(\d) \* max by \(device\) \(\w+\{outcome="(\w+)"', expression)
    assert {number: value["text"] for number, value in values.items()} == dict(asked)
    assert {outcome for _, outcome in asked} == outcomes()
