"""What the inventory gives to a device's app is merged over its groups and itself."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT, load, program

config = load(ROOT / "plugins/action/merge_device_config.py")


def merge(tmp_path: Path, files: dict[str, Any], *arguments: str) -> dict[str, Any]:
    """What the action returns for inventory/local with `device_config` in these files."""
    inventory = tmp_path / "inventory"
    shutil.copytree(ROOT / "inventory/local", inventory)
    for name, value in files.items():
        path = inventory / name
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write("\n" + yaml.safe_dump({"device_config": value}))
    answer = tmp_path / "answer.json"
    tasks = [
        {
            "merge_device_config": {"devices": "{{ groups['devices'] }}"},
            "register": "answer",
        },
        {"ansible.builtin.copy": {"content": "{{ answer | to_json }}", "dest": str(answer)}},
    ]
    play = [{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]
    (tmp_path / "play.yml").write_text(json.dumps(play))
    command = [program("ansible-playbook"), "-i", str(inventory), str(tmp_path / "play.yml")]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    told: dict[str, Any] = json.loads(answer.read_text())
    return told


FILES = {
    "group_vars/all.yml": {"a": 1, "b": "all", "c": "all", "name": "{{ inventory_hostname }}"},
    "group_vars/devices.yml": {"b": "devices", "c": "devices"},
    "host_vars/laptop-1.yml": {"c": "laptop-1", "d": True},
}


def test_each_file_adds_its_keys_and_the_nearest_wins(tmp_path: Path) -> None:
    devices = merge(tmp_path, FILES)["devices"]
    assert devices["laptop-1"] == {
        "a": 1, "b": "devices", "c": "laptop-1", "name": "laptop-1", "d": True
    }  # fmt: skip
    assert devices["phone-1"] == {
        "a": 1, "b": "devices", "c": "devices", "name": "phone-1"
    }  # fmt: skip


def test_a_class_lies_between_all_devices_and_one(tmp_path: Path) -> None:
    inventory = ROOT / "inventory/local/group_vars/laptop.yml"
    assert inventory.exists()
    told = merge(
        tmp_path, {"group_vars/devices.yml": {"a": 1, "b": 1}, "group_vars/laptop.yml": {"b": 2}}
    )
    assert told["devices"]["laptop-1"] == {"a": 1, "b": 2}
    assert told["devices"]["phone-1"] == {"a": 1, "b": 1}
    assert told["problems"] == []


def test_the_command_line_is_above_all(tmp_path: Path) -> None:
    given = ("-e", json.dumps({"device_config": {"c": "given", "e": 0.5}}))
    devices = merge(tmp_path, FILES, *given)["devices"]
    assert devices["laptop-1"]["c"] == devices["phone-1"]["c"] == "given"
    assert devices["laptop-1"]["e"] == 0.5
    assert devices["laptop-1"]["a"] == 1


def test_without_any_there_is_none(tmp_path: Path) -> None:
    assert merge(tmp_path, {})["devices"] == {
        name: {} for name in ("budget-1", "laptop-1", "phone-1", "pi4-1")
    }


def test_what_cannot_be_resolved_is_told_of(tmp_path: Path) -> None:
    (problem,) = merge(tmp_path, {"host_vars/pi4-1.yml": {"a": "{{ nowhere }}"}})["problems"]
    assert problem[0] == "pi4-1"
    assert "device_config cannot be resolved" in problem[1]
    assert "'nowhere' is undefined" in problem[1]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        *(({key: 1}, f"key '{key}' is the lab's own") for key in config.LAB_KEYS),
        ({"a b": 1}, "key 'a b' is no name"),
        ({3: 1}, "key '3' is no name"),
        ({"a": None}, "a is null: write text, a number, true or false"),
        ({"a": [1]}, "a is [1]: write text"),
        ({"a": {"b": 1}}, 'a is {"b": 1}: write text'),
        ({"a": float("nan")}, "a is NaN: write text"),
        ({"a": 'say "hi"'}, "Flower takes no double quotes"),
    ],
)
def test_what_flower_does_not_take_is_refused(wrong: dict[Any, Any], says: str) -> None:
    ((device, text),) = config.config_problems("one", wrong)
    assert device == "one"
    assert text.startswith("device_config: ")
    assert says in text


def test_values_of_all_kinds_are_taken() -> None:
    values = {"a": 1, "b": 0.5, "c": True, "d": "text with 'quotes', spaces and ü", "e_f-2": ""}
    assert config.config_problems("one", values) == []
