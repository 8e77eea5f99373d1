"""The inventories as Ansible resolves them; devices and classes come without a role's help."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.common.text.formatters import human_to_bytes
from repository import ROOT, program, texts

LOCAL = ROOT / "inventory/local"
LAB = ROOT / "inventory/lab"
DIFFERENT = (
    "device_speed",
    "device_memory",
    "device_batch_size",
    "device_learning_rate",
    "device_data_fraction",
)
Hosts = dict[str, Any]


class Inventory:
    """What ansible-inventory makes of a directory."""

    def __init__(self, path: Path) -> None:
        command = [program("ansible-inventory"), "-i", str(path), "--list"]
        told = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        listed: dict[str, Any] = json.loads(told.stdout)
        self.variables: dict[str, dict[str, Any]] = listed["_meta"]["hostvars"]
        self.classes: dict[str, list[str]] = {
            group: listed[group]["hosts"] for group in listed["devices"]["children"]
        }
        self.machines: list[str] = listed["machines"]["hosts"]
        self.coordinators: list[str] = listed["coordinator"]["hosts"]

    @property
    def devices(self) -> dict[str, dict[str, Any]]:
        """Each device's variables."""
        return {name: self.variables[name] for hosts in self.classes.values() for name in hosts}


@pytest.fixture(scope="module")
def local() -> Inventory:
    """inventory/local as it is."""
    return Inventory(LOCAL)


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Inventory]:
    """inventory/local with other hosts, and with files of variables added."""

    def change(
        edit: Callable[[Hosts], object] = lambda _: None,
        files: dict[str, dict[str, Any]] | None = None,
    ) -> Inventory:
        path = tmp_path / "inventory"
        shutil.copytree(LOCAL, path)
        hosts = yaml.safe_load((path / "hosts.yml").read_text())
        edit(hosts)
        (path / "hosts.yml").write_text(yaml.safe_dump(hosts))
        for name, variables in (files or {}).items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(yaml.safe_dump(variables))
        return Inventory(path)

    return change


def test_four_devices_of_four_classes_on_one_machine(local: Inventory) -> None:
    assert len(local.classes) == len(local.devices) == 4
    assert all(len(devices) == 1 for devices in local.classes.values())
    assert local.machines == local.coordinators
    assert {each["device_machine"] for each in local.devices.values()} == set(local.machines)


def test_the_devices_differ(local: Inventory) -> None:
    for variable in DIFFERENT:
        assert len({each[variable] for each in local.devices.values()}) > 1, variable
    assert len({tuple(each[v] for v in DIFFERENT) for each in local.devices.values()}) == 4


def test_the_lab_fits_two_cores_and_six_gibibytes(local: Inventory) -> None:
    assert sum(each["device_speed"] for each in local.devices.values()) <= 2
    memory = sum(human_to_bytes(each["device_memory"]) for each in local.devices.values())
    assert memory <= 6 * 2**30


def test_a_line_is_a_device(local: Inventory, changed: Callable[..., Inventory]) -> None:
    group, (example,) = next(iter(local.classes.items()))

    def add(hosts: Hosts) -> None:
        hosts["devices"]["children"][group]["hosts"]["newcomer"] = None

    devices = changed(add).devices
    assert devices["newcomer"] == devices[example] == local.devices[example]
    assert len(devices) == 5


def test_host_vars_change_one_value_of_one_device(
    local: Inventory, changed: Callable[..., Inventory]
) -> None:
    (device,) = next(iter(local.classes.values()))
    devices = changed(files={f"host_vars/{device}.yml": {"device_speed": 0.15}}).devices
    assert devices[device] == local.devices[device] | {"device_speed": 0.15}
    others = set(devices) - {device}
    assert all(devices[name] == local.devices[name] for name in others)


def test_a_group_and_its_file_are_a_class(
    local: Inventory, changed: Callable[..., Inventory]
) -> None:
    values = {"device_cpus": 0.1, "device_memory": "900m", "device_optimizer": "adam"}

    def add(hosts: Hosts) -> None:
        hosts["devices"]["children"]["smart_watch"] = {"hosts": {"watch-1": None}}

    inventory = changed(add, {"group_vars/smart_watch.yml": values})
    assert inventory.classes == local.classes | {"smart_watch": ["watch-1"]}
    watch = inventory.devices["watch-1"]
    assert {name: watch[name] for name in values} == values
    assert watch["device_machine"] == local.machines[0]
    assert all(inventory.devices[name] == variables for name, variables in local.devices.items())


def test_nothing_but_the_inventory_knows_a_device_or_class(local: Inventory) -> None:
    names = "|".join(map(re.escape, [*local.classes, *local.devices]))
    known = re.compile(rf"(?<![\w-])(?:{names})(?![\w-])")
    elsewhere = texts("roles", "playbooks", "runtime/flowerbed", "app", "files")
    assert [name for name, text in elsewhere if known.search(text)] == []


def test_the_pattern_of_a_lab_has_boards_of_their_own_and_twenty_phones_on_a_server() -> None:
    lab = Inventory(LAB)
    assert len(lab.coordinators) == 1
    assert set(lab.coordinators) < set(lab.machines)
    boards = lab.classes["raspberry_pi_4"]
    assert set(boards) < set(lab.machines)
    assert not any("device_machine" in lab.variables[board] for board in boards)
    phones = lab.classes["budget_phone"]
    assert len(phones) == 20
    assert {lab.variables[phone]["device_machine"] for phone in phones} == set(lab.coordinators)
    elsewhere = set(lab.devices) - set(boards)
    assert {lab.variables[name]["device_machine"] for name in elsewhere} < set(lab.machines)


def test_the_pattern_of_a_lab_goes_over_ssh_as_a_user_who_becomes_root() -> None:
    lab = Inventory(LAB)
    for machine in lab.machines:
        variables = lab.variables[machine]
        assert variables.get("ansible_connection", "ssh") == "ssh"
        assert variables["ansible_user"] != "root"
        assert variables["ansible_become"] is True
        assert "StrictHostKeyChecking" not in str(variables)
