"""Where the control node hands over to containers: both sides have the same names and choices."""

import ast
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from repository import ROOT, load, read_yaml

RUNTIME = "runtime/flowerbed/settings.py"
APP = "app/mobilenet/settings.py"
PLAN = "runtime/flowerbed/data/plan.py"

read_app = load(ROOT / "plugins/action/read_app.py")
device_config = load(ROOT / "plugins/action/merge_device_config.py")


def _fields(module: str, name: str) -> dict[str, ast.AnnAssign]:
    """The fields of a settings class, those of its bases too."""
    body = ast.parse((ROOT / module).read_text()).body
    here = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == name)
    found: dict[str, ast.AnnAssign] = {}
    for base in here.bases:
        if isinstance(base, ast.Name) and base.id != "BaseModel":
            found |= _fields(module, base.id)
    for node in here.body:
        match node:
            case ast.AnnAssign(ast.Name(field)):
                found[field] = node
    return found


def _choices(field: ast.AnnAssign) -> list[Any]:
    """The values of a field that is a Literal."""
    match field.annotation:
        case ast.Subscript(ast.Name("Literal"), values):
            told = ast.literal_eval(values)
            return list(told) if isinstance(told, tuple) else [told]
    raise AssertionError(f"{ast.unparse(field)} is no Literal")


def _default(field: ast.AnnAssign) -> Any:
    assert field.value is not None, f"{ast.unparse(field)} has no default"
    return ast.literal_eval(field.value)


def _options(role: str, entry: str = "main") -> dict[str, dict[str, Any]]:
    specs = read_yaml(ROOT / f"roles/{role}/meta/argument_specs.yml")
    options: dict[str, dict[str, Any]] = specs["argument_specs"][entry]["options"]
    return options


def _render(template: str, **variables: Any) -> str:
    """A template of a role, with the filters of Ansible that they use."""
    environment = jinja2.Environment(
        autoescape=False,  # noqa: S701 - what is written is no page
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["to_json"] = json.dumps
    environment.filters["basename"] = os.path.basename
    return environment.from_string((ROOT / "roles" / template).read_text()).render(variables)


def _kebab(names: Any) -> set[str]:
    return {name.replace("_", "-") for name in names}


def _of_playbooks(role: str) -> dict[str, dict[str, Any]]:
    told = read_yaml(ROOT / "roles/preflight/vars/main.yml")["__preflight_of_playbooks"][role]
    options: dict[str, dict[str, Any]] = told
    return options


def test_a_device_is_told_what_it_knows() -> None:
    settings = read_yaml(ROOT / "roles/device/vars/main.yml")["__device_settings"]
    assert set(settings) == _kebab(_fields(RUNTIME, "DeviceSettings"))
    assert set(settings) == set(device_config.LAB_KEYS)
    assert _kebab(_fields(APP, "DeviceSettings")) <= set(settings)


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("device_batch", "batch_size"),
        ("device_learning_rate", "learning_rate"),
        ("device_local_epochs", "local_epochs"),
        ("device_optimizer", "optimizer"),
        ("device_partition", "partition_id"),
        ("device_partitions", "num_partitions"),
        ("device_share", "data_fraction"),
    ],
)
def test_a_device_has_one_default(option: str, field: str) -> None:
    told = _options("device")[option]["default"]
    assert told == _default(_fields(RUNTIME, "DeviceSettings")[field])


def test_a_plan_is_what_shards_are_dealt_by() -> None:
    variables = read_yaml(ROOT / "roles/training/vars/main.yml")
    shards, rest = variables["__training_data"], variables["__training_plan"]
    added, app = re.findall(r"'(\w+)':", rest.partition("'app'")[0]), rest.partition("'app'")[2]
    assert {*shards, *added, "app"} == set(_fields(PLAN, "Plan"))
    assert set(re.findall(r"'(\w+)':", app)) == set(_fields(PLAN, "AppArrays"))
    share = _options("training", "deal")["training_shares"]["options"]
    assert set(share) == set(_fields(PLAN, "DeviceShare"))


def _placed() -> dict[str, Any]:
    """What is placed for a run by the role."""
    tasks = read_yaml(ROOT / "roles/training/tasks/prepare.yml")
    asked = (t for block in tasks for t in block.get("block", ()) if "ask_container" in t)
    (task,) = (each for each in asked if "input" in each["ask_container"])
    told: dict[str, Any] = task["ask_container"]
    return told


def test_a_run_is_told_of_whole() -> None:
    """But for its layer and whether it is resumed, which the coordinator adds."""
    settings = _placed()["input"]["settings"]
    added = {"layer", "resume"}
    assert set(settings) == set(_fields(RUNTIME, "LabSettings")) - added | {"config"}
    names = _options("training", "prepare")["training_metrics"]["options"]
    assert set(names) == set(_fields(RUNTIME, "MetricNames"))


def test_the_names_for_keys_are_keys_of_the_default_app() -> None:
    app = tomllib.loads((ROOT / "app/pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert set(read_app.VARIABLES.values()) <= set(app["config"])
    assert set(app["config"]) == _kebab(_fields(APP, "RunSettings"))
    known = _of_playbooks("training").keys() | _options("training", "prepare").keys()
    assert set(read_app.VARIABLES) | {"training_app", "training_config"} <= known


@pytest.mark.parametrize(
    ("option", "settings", "field"),
    [
        (_options("device")["device_optimizer"], (RUNTIME, "DeviceSettings"), "optimizer"),
        (
            _options("device")["device_out_of_memory_policy"],
            (RUNTIME, "DeviceSettings"),
            "out_of_memory_policy",
        ),
        (_of_playbooks("training")["training_model"], (APP, "ModelSettings"), "model"),
        (_of_playbooks("training")["training_recipe"], (APP, "ModelSettings"), "recipe"),
        (_options("training", "deal")["training_dataset_fallback"], (PLAN, "Plan"), "fallback"),
        (_options("training", "deal")["training_partitioner"], (PLAN, "Plan"), "partitioner"),
    ],
)
def test_both_sides_offer_the_same(
    option: dict[str, Any], settings: tuple[str, str], field: str
) -> None:
    known = _fields(*settings)[field]
    assert option["choices"] == _choices(known)
    if "default" in option:
        assert option["default"] == _default(known)


def test_prometheus_scrapes_every_target_of_every_job() -> None:
    targets: list[dict[str, Any]] = [
        {"job": "training", "address": "metrics:8000"},
        {"job": "cadvisor", "address": "one:8080", "labels": {"machine": "one: first"}},
        {"job": "cadvisor", "address": "two:8080", "labels": {"machine": "two"}},
    ]
    rendered = _render(
        "prometheus/templates/prometheus.yml.j2",
        __prometheus_jobs=["training", "cadvisor"],
        __prometheus_rules=["/files/alerts.yml"],
        prometheus_scrape_interval="5s",
    )
    assert yaml.safe_load(rendered)["rule_files"] == ["rules/alerts.yml"]
    files = {
        job["job_name"]: Path(file).stem
        for job in yaml.safe_load(rendered)["scrape_configs"]
        for config in job["file_sd_configs"]
        for file in config["files"]
    }
    assert files == {"training": "training", "cadvisor": "cadvisor"}
    placed = yaml.safe_load(
        _render(
            "prometheus/templates/targets.yml.j2",
            __prometheus_jobs=["training", "cadvisor"],
            prometheus_targets=targets,
        )
    )
    assert [file["path"] for file in placed] == [f"config/targets/{job}.yml" for job in files]
    scraped = [
        {"job": Path(file["path"]).stem, "address": address, "labels": group["labels"]}
        for file in placed
        for group in yaml.safe_load(file["content"])
        for address in group["targets"]
    ]
    assert scraped == [{"labels": {}} | target for target in targets]


def test_flwr_is_told_where_the_superlink_is() -> None:
    told = tomllib.loads((ROOT / "roles/superlink/files/config.toml").read_text())["superlink"]
    assert told[told["default"]]["address"] == "127.0.0.1:9092"
    parts = read_yaml(ROOT / "roles/superlink/vars/main.yml")["__superlink_parts"]
    assert "--port=9092" in next(p["command"] for p in parts if p["part"] == "superlink")
