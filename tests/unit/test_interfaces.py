"""Where roles hand over to the app: both sides have the same names, choices and defaults."""

import ast
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from repository import ROOT, read_yaml

APP = ROOT / "app/flowerbed"


def _class(module: str, name: str) -> ast.ClassDef:
    body = ast.parse((APP / f"{module}.py").read_text()).body
    return next(n for n in body if isinstance(n, ast.ClassDef) and n.name == name)


def _fields(module: str, name: str) -> dict[str, ast.AnnAssign]:
    """The fields of a settings class of the app, those of its bases too."""
    found: dict[str, ast.AnnAssign] = {}
    here = _class(module, name)
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


def _options(role: str) -> dict[str, dict[str, Any]]:
    specs = read_yaml(ROOT / f"roles/{role}/meta/argument_specs.yml")
    options: dict[str, dict[str, Any]] = specs["argument_specs"]["main"]["options"]
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


def _run_toml(**changes: Any) -> dict[str, Any]:
    options = _options("training")
    variables = {name: spec["default"] for name, spec in options.items() if "default" in spec}
    variables |= {"training_name": "first", "training_devices": ["pi", "phone"]} | changes
    return tomllib.loads(_render("training/templates/run.toml.j2", **variables))


def _kebab(names: Any) -> set[str]:
    return {name.replace("_", "-") for name in names}


def test_a_device_is_told_what_it_knows() -> None:
    settings = read_yaml(ROOT / "roles/device/vars/main.yml")["__device_settings"]
    assert set(settings) == _kebab(_fields("config", "DeviceSettings"))


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("device_batch", "batch_size"),
        ("device_learning_rate", "learning_rate"),
        ("device_local_epochs", "local_epochs"),
        ("device_share", "data_fraction"),
    ],
)
def test_a_device_has_one_default(option: str, field: str) -> None:
    told = _options("device")[option]["default"]
    assert told == _default(_fields("config", "DeviceSettings")[field])


def test_a_plan_is_what_shards_are_cut_by() -> None:
    plan = read_yaml(ROOT / "roles/shards/vars/main.yml")["__shards_plan"]
    assert set(plan) == set(_fields("data", "Plan"))
    share = _options("shards")["shards_devices"]["options"]
    assert set(share) == set(_fields("data", "DeviceShare"))


def test_a_run_is_configured_whole() -> None:
    wanted = _kebab(_fields("config", "RunSettings"))
    app = tomllib.loads((ROOT / "app/pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert set(_run_toml()) == wanted
    assert set(app["config"]) == wanted


def test_a_run_by_hand_and_one_by_the_lab_have_the_same_defaults() -> None:
    app = tomllib.loads((ROOT / "app/pyproject.toml").read_text())["tool"]["flwr"]["app"]
    of_the_run = {"run-name", "devices"}
    lab = _run_toml()
    assert {k: v for k, v in lab.items() if k not in of_the_run} == {
        k: v for k, v in app["config"].items() if k not in of_the_run
    }


def test_a_run_survives_quotes_in_its_parameters() -> None:
    parameters = {"name": 'a "quoted" \\ value', "beta": 0.5}
    run = _run_toml(training_strategy_parameters=parameters, training_strategy='x"y')
    assert json.loads(run["strategy-parameters"]) == parameters
    assert run["strategy"] == 'x"y'
    assert run["devices"] == "phone,pi"


@pytest.mark.parametrize(
    ("role", "option", "module", "settings", "field"),
    [
        ("device", "device_optimizer", "config", "DeviceSettings", "optimizer"),
        ("training", "training_model", "config", "ModelSettings", "model"),
        ("training", "training_recipe", "config", "ModelSettings", "recipe"),
        ("shards", "shards_fallback", "data", "Plan", "fallback"),
        ("shards", "shards_partitioner", "data", "Plan", "partitioner"),
    ],
)
def test_both_sides_offer_the_same(
    role: str, option: str, module: str, settings: str, field: str
) -> None:
    spec, known = _options(role)[option], _fields(module, settings)[field]
    assert spec["choices"] == _choices(known)
    assert spec["default"] == _default(known)


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
