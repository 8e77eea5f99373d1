"""The Flower Apps of tests/apps: what Flower and the lab read of them before they run."""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT, files

APPS = ROOT / "tests/apps"
NAMES = sorted({path.relative_to(APPS).parts[0] for path in files("tests/apps")})
# What Flower packs into a FAB. It drops tests and some directories even of these.
PACKED = {".json", ".jsonl", ".md", ".py", ".toml", ".yaml", ".yml"}
DROPPED = re.compile(r"(^|/)(test_[^/]*|[^/]*_test)\.py$|^(build|eggs|env|lib|lib64|parts|venv)/")

each_app = pytest.mark.parametrize("name", NAMES)


def _pyproject(name: str) -> dict[str, Any]:
    return tomllib.loads((APPS / name / "pyproject.toml").read_text())


def _modules(name: str) -> dict[Path, ast.Module]:
    """Return the syntax trees of an app's Python files by path."""
    paths = [path for path in files(f"tests/apps/{name}") if path.suffix == ".py"]
    return {path: ast.parse(path.read_text()) for path in paths}


def _distribution(requirement: str) -> str:
    """Return the normalised name of a requirement such as `flwr[simulation]>=1.42.0`."""
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def test_the_apps_of_all_kinds_are_there() -> None:
    assert NAMES == ["keras-cnn", "numpy-only", "sklearn-extra", "text-tokens"]


@each_app
def test_an_app_is_a_page_a_project_and_one_package(name: str) -> None:
    package = name.replace("-", "_")
    assert {path.name for path in (APPS / name).iterdir() if path.name[0] != "."} == {
        "README.md",
        "pyproject.toml",
        package,
    }
    modules = {path.name for path in _modules(name)}
    assert {"__init__.py", "client_app.py", "server_app.py", "task.py"} <= modules
    assert _pyproject(name)["project"]["name"] == name


@each_app
@pytest.mark.parametrize(
    ("component", "kind"), [("serverapp", "ServerApp"), ("clientapp", "ClientApp")]
)
def test_a_component_is_assigned_in_its_module(name: str, component: str, kind: str) -> None:
    reference = _pyproject(name)["tool"]["flwr"]["app"]["components"][component]
    module, _, attribute = reference.partition(":")
    path = APPS / name / f"{module.replace('.', '/')}.py"
    assigned = {
        target.id: node.value.func.id
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert assigned.get(attribute) == kind


@each_app
def test_an_app_does_not_import_the_lab(name: str) -> None:
    imported = {
        root.split(".")[0]
        for tree in _modules(name).values()
        for node in ast.walk(tree)
        for root in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert "flwr" in imported
    assert "flowerbed" not in imported


@each_app
def test_a_fab_holds_every_file(name: str) -> None:
    paths = [path.relative_to(APPS / name) for path in files(f"tests/apps/{name}")]
    assert [str(path) for path in paths if path.suffix not in PACKED] == []
    assert [str(path) for path in paths if DROPPED.search(path.as_posix())] == []


@each_app
def test_the_run_configuration_is_what_the_code_reads(name: str) -> None:
    app = _pyproject(name)["tool"]["flwr"]["app"]
    assert app["publisher"]
    code = "".join(path.read_text() for path in _modules(name))
    assert [key for key in app["config"] if f'"{key}"' not in code] == []
    read = set(re.findall(r'run_config(?:\[|\.get\()"([\w-]+)"', code))
    assert read - set(app["config"]) == set()


def test_one_app_needs_what_the_image_lacks() -> None:
    lock = (ROOT / "runtime/requirements.lock").read_text()
    image = {line.partition("==")[0] for line in lock.splitlines() if "==" in line}
    missing = {
        name: {_distribution(text) for text in _pyproject(name)["project"]["dependencies"]} - image
        for name in NAMES
    }
    assert {name: names for name, names in missing.items() if names} == {
        "sklearn-extra": {"more-itertools", "scikit-learn"}
    }
