"""The values that the lab derives for a device, and what its container is made of."""

from typing import Any

import pytest
from repository import ROOT, load, read_yaml

inventory = load(ROOT / "plugins/filter/inventory.py")
run_container = load(ROOT / "plugins/action/run_container.py")
ROLE = ROOT / "roles/device"
OPTIONS = read_yaml(ROLE / "meta/argument_specs.yml")["argument_specs"]["main"]["options"]
SHARD = {"fingerprint": "one", "fraction": 0.5}


def _lab() -> dict[str, dict[str, Any]]:
    return {
        "board": {
            "images_references": {"application": "flowerbed/application:1"},
            "device_shards": {"pi": dict(SHARD)},
            "certificates_identities": {"pi": "two"},
        },
        "pi": {"device_machine": "board", "device_class": "raspberry_pi_4", "device_cpus": 0.5},
    }


def _values(lab: dict[str, dict[str, Any]], *others: str) -> dict[str, Any]:
    values = inventory.device_values(
        ["pi"],
        "board",
        lab,
        everybody=[*others, "pi"],
        batches={"pi": 32},
        configs={"pi": {"camera": "front"}},
    )
    assert values.keys() == {"pi"}
    found: dict[str, Any] = values["pi"]
    return found


def test_a_device_has_the_values_that_were_found_on_its_machine() -> None:
    assert _values(_lab()) == {
        "image": "flowerbed/application:1",
        "quota": 0.5,
        "batch": 32,
        "share": 0.5,
        "partition": 0,
        "partitions": 1,
        "app_config": {"camera": "front"},
        "shard": "one",
        "key": "two",
    }


def test_a_device_without_a_shard_and_a_key_has_values() -> None:
    lab = _lab()
    lab["board"] |= {"device_shards": {}, "certificates_identities": {}}
    values = _values(lab)
    assert (values["share"], values["shard"], values["key"]) == (1.0, "", "")


def test_partitions_are_numbered_by_name() -> None:
    values = _values(_lab(), "laptop", "tablet")
    assert (values["partition"], values["partitions"]) == (1, 3)


def test_every_value_is_an_option_that_the_playbook_passes() -> None:
    derived = {f"device_{name}" for name in _values(_lab())}
    assert derived <= OPTIONS.keys()
    (play,) = (
        play for play in read_yaml(ROOT / "playbooks/devices.yml") if play["hosts"] == "devices"
    )
    (task,) = play["tasks"]
    assert task["vars"].keys() == derived


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_every_option_is_part_of_the_container(option: str) -> None:
    """So that a change of any option starts a new container."""
    (start,) = (
        task["run_container"]
        for task in read_yaml(ROLE / "tasks/main.yml")
        if "run_container" in task
    )
    variables = read_yaml(ROLE / "vars/main.yml")
    text, before = str(start), ""
    while text != before:  # until no variable of the role is left
        before = text
        for name, value in variables.items():
            text = text.replace(name, f"({value})")
    assert option in text
