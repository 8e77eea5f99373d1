"""Prometheus' rules and the dashboards' queries, checked by the promtool of the lab's image."""

import subprocess
from pathlib import Path

import pytest
import yaml
from dashboards import DASHBOARDS, queries, variables

ROOT = Path(__file__).parents[2]
RULES = ROOT / "files/prometheus"
IMAGE = ROOT / ".cache/prometheus-image"
HERE = Path(__file__).parent


def _promtool(*arguments: str, directory: Path) -> str:
    """Run promtool with the files of a directory in /tests and the rules in /files.

    Returns:
        What promtool printed; the test fails if promtool does.
    """
    assert IMAGE.exists(), f"{IMAGE} is missing: make images"
    command = ["docker", "run", "--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp"]
    command += [
        "--cap-drop",
        "ALL",
        "--volume",
        f"{RULES}:/files:ro",
        "--volume",
        f"{directory}:/tests:ro",
    ]
    command += ["--entrypoint", "/usr/bin/env", IMAGE.read_text().strip(), "promtool"]
    done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rules_are_valid() -> None:
    names = [f"/files/{path.name}" for path in sorted(RULES.glob("*.yml"))]
    assert names
    _promtool("check", "rules", "--lint=all", "--lint-fatal", *names, directory=HERE)


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("*.yml")))
def test_the_rules_have_the_expected_results(name: str) -> None:
    _promtool("test", "rules", f"/tests/{name}", directory=HERE)


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    rules = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in rules for rule in group["rules"]}
    tests = yaml.safe_load((HERE / "alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == alerts


def test_every_query_of_every_dashboard_parses(tmp_path: Path) -> None:
    rules: list[dict[str, str]] = []
    for path in DASHBOARDS:
        anything = {name: [".*"] for name in variables(path)}
        for query in queries(path):
            record = f"query:{len(rules)}"
            rules.append({"record": record, "expr": query.expand(anything)})
    (tmp_path / "queries.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "q", "rules": rules}]})
    )
    tmp_path.chmod(0o755)
    printed = _promtool("check", "rules", "--lint=none", "/tests/queries.yml", directory=tmp_path)
    assert f"{len(rules)} rules found" in printed
