"""Preflight: bad inventories and machines are refused before any change, with a remedy."""

import ipaddress
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT, load, program, texts

ROLE = ROOT / "roles/preflight"
ANY = str(ipaddress.IPv4Address(0))


variables = load(ROOT / "plugins/filter/variable_problems.py")
inventories = load(ROOT / "plugins/filter/inventory_problems.py")
machines = load(ROOT / "plugins/filter/machine_problems.py")
machine_state = load(ROOT / "plugins/modules/machine_state.py")
look = load(ROOT / "plugins/action/inspect_machine.py")
playbook_filters = load(ROOT / "plugins/filter/inventory.py")

ROLE_VARS = yaml.safe_load((ROLE / "vars/main.yml").read_text())
RULES = ROLE_VARS["__preflight_rules"]
OPTIONS = variables.role_options(str(ROOT / "roles"))
for role, of_role in ROLE_VARS["__preflight_of_playbooks"].items():
    OPTIONS[role] = OPTIONS.get(role, {}) | of_role


@dataclass
class Played:
    """What a playbook printed, and how it ended."""

    output: str
    code: int
    seconds: float

    @property
    def told(self) -> list[str]:
        """The lines of the refusal, from the failure's message; none where nothing is refused."""
        message = re.search(r"^  FAILED .*\n  /.*\n((?:    .*\n)+)", self.output, re.MULTILINE)
        return [line.strip() for line in message[1].splitlines()] if message else []

    @property
    def plays(self) -> list[str]:
        """The plays that have a line."""
        return re.findall(r"^(\S.*?) +\d+\.\d s", self.output, re.MULTILINE)[:-1]

    def assert_nothing_changed(self) -> None:
        """No task of any host has changed anything."""
        assert re.search(r"^localhost +: ok=\d+ +changed=0", self.output, re.MULTILINE)
        assert not re.search(r"changed=[1-9]", self.output)


def play(inventory: Path, *arguments: str, playbook: str = "preflight") -> Played:
    """Run a playbook as a user does."""
    begin = time.monotonic()
    command = [
        program("ansible-playbook"),
        f"playbooks/{playbook}.yml",
        "-i",
        str(inventory),
        *arguments,
    ]
    done = subprocess.run(
        command, cwd=ROOT, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return Played(done.stdout, done.returncode, time.monotonic() - begin)


@dataclass
class Bad:
    """inventory/local with one mistake.

    Attributes:
        says: what the one line of the refusal holds: culprit, variable and value, remedy.
        hosts: place in hosts.yml, with slashes, to what is put there; None takes it away.
        files: file to what is added to it.
        without: file that is taken away.
        arguments: of the command line.
    """

    says: tuple[str, ...]
    hosts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    without: str = ""
    arguments: tuple[str, ...] = ()

    def write(self, inventory: Path) -> None:
        """Make the inventory."""
        shutil.copytree(ROOT / "inventory/local", inventory)
        tree = yaml.safe_load((inventory / "hosts.yml").read_text())
        for place, value in self.hosts.items():
            *path, last = place.split("/")
            node = tree
            for key in path:
                node[key] = node.get(key) or {}
                node = node[key]
            if value is None:
                del node[last]
            else:
                node[last] = value
        (inventory / "hosts.yml").write_text(yaml.safe_dump(tree))
        for name, text in self.files.items():
            file = inventory / name
            file.parent.mkdir(exist_ok=True)
            with file.open("a") as opened:
                opened.write(f"{text}\n")
        if self.without:
            (inventory / self.without).unlink()


def of_laptop(text: str, *says: str) -> Bad:
    """One device with a value of its own."""
    return Bad(says=("laptop-1: ", *says), files={"host_vars/laptop-1.yml": text})


def of_run(text: str, *says: str) -> Bad:
    """A value of a run or a service."""
    return Bad(says=("local: ", *says), files={"host_vars/local.yml": text})


HERE = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
LAPTOP = "devices/children/laptop/hosts"
BAD = {
    # Names of variables
    "typo": of_laptop("device_cpu: 0.5", "device_cpu is 0.5", "write device_cpus"),
    "typo_of_a_run": Bad(
        says=("all hosts: ", "training_round is 7", "write training_rounds"),
        files={"group_vars/all.yml": "training_round: 7"},
    ),
    "typo_in_extra": Bad(
        says=("all hosts: ", "lab_grafana_prot is '3001'", "write lab_grafana_port"),
        arguments=("-e", "lab_grafana_prot=3001"),
    ),
    "unknown_and_secret": of_run(
        "grafana_admin_password: hunter2",
        "grafana_admin_password is set (not shown here)",
        "preflight_foreign_variables",
    ),
    "set_by_the_lab": of_laptop(
        "device_image: mine", "device_image is 'mine'", "playbooks/devices.yml", "remove it"
    ),
    "derived": of_run(
        "gate_superlink: here:9092",
        "gate_superlink is 'here:9092'",
        "playbooks/machines.yml: superlink:9092",
        "remove it",
    ),
    "read_elsewhere": of_laptop(
        "training_recipe: original", "training_recipe is 'original'", "read on machines", "all.yml"
    ),
    # Values
    "address_with_port": of_run(
        "lab_address: server:9092", "lab_address is 'server:9092'", "without port"
    ),
    "decimal_comma": of_laptop('device_cpus: "0,5"', "device_cpus is '0,5'", "write 0.5 (cores"),
    "yes": of_laptop("device_cpus: yes", "device_cpus is true", "YAML reads yes", "0.01 or more"),
    "nan": of_laptop("device_learning_rate: .nan", "is .nan", "no finite number", "above 0"),
    "half_a_batch": of_laptop("device_batch_size: 1.5", "is 1.5", "no whole number", "1 or more"),
    "empty": of_laptop("device_local_epochs:", "device_local_epochs is empty", "remove the line"),
    "too_much": of_laptop("device_data_fraction: 1.2", "is 1.2", "too large", "up to 1"),
    "choice": of_laptop("device_optimizer: adm", "device_optimizer is 'adm'", "write adam"),
    "rate": of_laptop("device_network_rate: 20", "device_network_rate is 20", "20mbit or 500kbit"),
    "loss": of_laptop("device_network_loss: 101", "is 101", "too large", "from 0 to 100"),
    "config_of_the_lab": of_laptop(
        "device_config: {camera: front, batch-size: 3}",
        "device_config: key 'batch-size' is the lab's own",
        "write another name",
    ),
    "config_that_is_no_value": of_laptop(
        "device_config: {lenses: [1, 2]}", "device_config: lenses is [1, 2]", "write text, a number"
    ),
    "config_that_is_no_dictionary": of_laptop(
        "device_config: front", "device_config is 'front', which is no dictionary", "write one"
    ),
    "jitter": of_laptop("device_network_jitter: 5ms", "jitter is 5ms", "device_network_delay, too"),
    "no_size": of_laptop("device_memory: 2 GB", "device_memory is '2 GB'", "write 2g"),
    "neither_size_nor_auto": of_laptop(
        "device_batch_size: automatic", "is 'automatic'", "of 1 or more, such as 32, or auto"
    ),
    "little_memory": of_laptop(
        "device_memory: 300m",
        "device_memory is '300m', less than the ",
        "that app (model mobilenet, recipe small-images, alpha 0.25) takes with device_batch_size",
        "m or more, or train a smaller model",
    ),
    "large_batch": of_laptop(
        "device_memory: 900m\ndevice_batch_size: 4096",
        "device_memory is '900m', less than the ",
        "with device_batch_size 4096: write ",
        "m or more, or device_batch_size of ",
    ),
    "little_memory_for_auto": of_laptop(
        "device_memory: 300m\ndevice_batch_size: auto", "device_batch_size auto, which is 8 or more"
    ),
    "wide_network": Bad(
        says=("(group devices): ", "app (model mobilenet, recipe small-images, alpha 2.0) takes"),
        arguments=("-e", "training_model_alpha=2 device_memory=1g device_batch_size=32"),
    ),
    "undefined": of_laptop(
        'device_cpus: "{{ cores_of_laptops }}"',
        "device_cpus is '{{ cores_of_laptops }}'",
        "'cores_of_laptops' is undefined",
        "write the value itself",
    ),
    "no_template": of_laptop(
        'device_memory: "{{ 1000 m }}"', "device_memory is '{{ 1000 m }}'", "cannot be resolved"
    ),
    "strategy": of_run("training_strategy: fedavgg", "is 'fedavgg'", "write fedavg (of bulyan"),
    "partitioner": of_run(
        "training_partitioner: dirichlets", "is 'dirichlets'", "write dirichlet (of iid"
    ),
    "run": of_run("training_run: ../mine", "training_run is '../mine'", "letters, digits"),
    "port": of_run("lab_cadvisor_port: 80800", "lab_cadvisor_port is 80800", "from 1 to 65535"),
    "old_name": of_run(
        "prometheus_port: 9091",
        "prometheus_port is 9091, but has another name now: write lab_prometheus_port",
    ),
    "old_name_of_a_role_that_is_gone": of_run(
        "shards_directory: /data", "shards_directory is '/data'", "write lab_directory"
    ),
    "directory_of_a_part_of_the_lab": of_laptop(
        "lab_directory: /data",
        "lab_directory is '/data', but '/var/lib/flowerbed' for ",
        "group_vars/all.yml",
    ),
    "one_port_twice": of_run(
        "lab_grafana_port: 9090",
        "lab_prometheus_port and lab_grafana_port are both 9090",
        "lab_grafana_port: 9091",
    ),
    # Groups and names
    "no_such_machine": of_laptop(
        "device_machine: locla", "device_machine is 'locla'", "write local", "group machines"
    ),
    "no_machine": Bad(
        says=("budget-1, laptop-1, phone-1 and 1 more", "no device_machine", "one of local"),
        without="group_vars/devices.yml",
    ),
    "one_name_for_two": Bad(
        says=("laptop-1: ", "the name of Laptop-1 once normalised", "rename one of them"),
        hosts={f"{LAPTOP}/Laptop-1": {}},
    ),
    "no_name": Bad(
        says=("my laptop: ", "letters, digits, '_', '.' and '-', such as my-laptop"),
        hosts={f"{LAPTOP}/my laptop": {}},
    ),
    "no_coordinator": Bad(
        says=("group coordinator: ", "has no host", "exactly one machine"),
        hosts={"coordinator/hosts/local": None},
    ),
    "two_coordinators": Bad(
        says=("group coordinator: ", "has 2 hosts (local, other)", "exactly one machine"),
        hosts={"coordinator/hosts/other": {}, "machines/hosts/other": {}},
    ),
    "coordinator_elsewhere": Bad(
        says=("other: ", "in the group coordinator, but is no machine", "put it into machines"),
        hosts={"coordinator/hosts": {"other": {}}},
    ),
    "no_devices": Bad(
        says=("group devices: ", "missing or empty", "child groups"),
        hosts={f"devices/children/{name}/hosts": {} for name in (
            "laptop", "raspberry_pi_4", "mid_range_phone", "budget_phone"
        )},
    ),
    "no_class": Bad(
        says=("lonely: ", "in no device class", "child group of devices"),
        hosts={"devices/hosts": {"lonely": {}}},
    ),
    "two_classes": Bad(
        says=("laptop-1: ", "in 2 device classes, budget_phone, laptop", "device_class: <class>"),
        hosts={"devices/children/budget_phone/hosts/laptop-1": {}},
    ),
    "class_of_another": of_laptop(
        "device_class: budget_phone", "device_class is 'budget_phone'", "write one of laptop"
    ),
    "file_for_nobody": Bad(
        says=("group_vars/budget_fone.yml: ", "no such group", "the group budget_phone"),
        files={"group_vars/budget_fone.yml": "device_cpus: 0.2"},
        without="group_vars/budget_phone.yml",  # else it is one file more, and no slip of the pen
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_inventory_is_refused_by_name(name: str, tmp_path: Path) -> None:
    bad = BAD[name]
    bad.write(tmp_path / "bad")
    played = play(tmp_path / "bad", *bad.arguments)
    assert played.code != 0
    heading, *lines = played.told
    assert heading == "Wrong in the inventory (1; nothing has been changed):", played.output
    for words in bad.says:
        assert words in lines[0]
    assert "hunter2" not in played.output
    played.assert_nothing_changed()
    assert played.plays == ["Check the inventory"]


def test_everything_wrong_is_in_one_list(tmp_path: Path) -> None:
    names = ("typo", "two_classes", "two_coordinators", "one_port_twice", "file_for_nobody")
    chosen = [BAD[name] for name in names]
    together = Bad(
        says=(),
        hosts={place: value for bad in chosen for place, value in bad.hosts.items()},
        files={file: text for bad in chosen for file, text in bad.files.items()},
        without=BAD["file_for_nobody"].without,
    )
    together.write(tmp_path / "bad")
    heading, *lines = play(tmp_path / "bad").told
    assert heading.startswith("Wrong in the inventory (5;")
    for bad in chosen:
        assert any(all(words in line for words in bad.says) for line in lines), bad.says


def test_the_whole_site_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    BAD["decimal_comma"].write(tmp_path / "bad")
    before = sorted(tmp_path.rglob("*"))
    directories = {
        "lab_directory": f"{tmp_path}/made",
    }
    played = play(tmp_path / "bad", "-e", json.dumps(directories), playbook="site")
    assert played.code != 0
    assert "device_cpus is '0,5'" in played.told[1]
    assert played.plays == ["Check the inventory"]
    played.assert_nothing_changed()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_local_inventory_is_good(tmp_path: Path) -> None:
    for check in ((), ("--check", "--diff")):
        played = play(ROOT / "inventory/local", *check)
        assert played.code == 0, played.output
        played.assert_nothing_changed()


@pytest.mark.parametrize(
    "inventory",
    [
        hosts.removesuffix("/hosts.yml")
        for hosts, text in texts("inventory", "molecule", "benchmarks")
        if hosts.endswith("/hosts.yml") and "\ndevices:" in text and hosts.split("/")[1] != "local"
    ],
)
def test_the_other_inventories_are_good(inventory: str) -> None:
    """Whatever is wrong with this machine in the place of all of theirs."""
    here = HERE | {"ansible_become": False}
    played = play(ROOT / inventory, "-e", json.dumps(here))
    assert "Wrong in the inventory" not in played.output
    assert "Check the machines" in played.plays, played.output


def test_what_is_unusual_may_still_be_good(tmp_path: Path) -> None:
    """Text from the command line, boards in a rack, nested classes, another role's variables."""
    inventory = Bad(
        says=(),
        hosts={
            "machines/hosts/board-1": HERE,
            "rack_a/hosts/board-1": {},
            "devices/children/raspberry_pi_4/hosts/board-1": {"device_machine": "board-1"},
            "devices/children/phones": {"children": {"budget_phone": {}, "mid_range_phone": {}}},
        },
        files={
            f"group_vars/{name}.yml": f"device_class: {name}"
            for name in ("raspberry_pi_4", "budget_phone", "mid_range_phone")
        }
        | {
            "group_vars/all.yml": "docker_users: [me]\npreflight_foreign_variables: [docker_users]",
            "host_vars/laptop-2.yml": "device_cpus: 1",
        },
        arguments=("-e", "training_rounds=3 training_model_alpha=0.5 training_dataset=/tmp"),
    )
    inventory.write(tmp_path / "unusual")
    played = play(tmp_path / "unusual", *inventory.arguments)
    assert played.code == 0, played.output
    # The device has gone, and its file is still there.
    assert "WARNING: host_vars/laptop-2.yml: there is no such host" in played.output


def test_five_hundred_devices_take_seconds_and_share_a_line(tmp_path: Path) -> None:
    boards = {f"m-{number:02}": {"ansible_connection": "local"} for number in range(50)}
    tree = {
        "machines": {"hosts": boards},
        "coordinator": {"hosts": {"m-00": {}}},
        "devices": {"children": {
            f"class_{letter}": {"hosts": {
                f"{letter}-{number:03}": {"device_machine": f"m-{number % 50:02}"}
                for number in range(125)
            }} for letter in "abcd"
        }},
    }  # fmt: skip
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(tree))
    (tmp_path / "group_vars").mkdir()
    for letter in "abcd":
        values = {"device_cpus": 0.2, "device_batch_size": 0 if letter == "c" else 16}
        (tmp_path / f"group_vars/class_{letter}.yml").write_text(yaml.safe_dump(values))
    played = play(tmp_path)
    assert len(played.told) == 2
    assert played.told[1].startswith(
        "c-000, c-001, c-002 and 122 more (group class_c): device_batch_size is 0, "
    )
    assert played.seconds < 20


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("device_cpus", "0.5", (", which is no number", "write 0.5 without quotes")),
        ("device_cpus", "two", (", which is no number", "write a number of 0.01 or more")),
        ("device_cpus", float("inf"), (", which is no finite number", "0.01 or more")),
        ("device_cpus", 0, (", which is too small", "0.01 or more")),
        ("device_learning_rate", "1e-3", (", which is no number", "write 0.001")),
        ("device_learning_rate", 0, (", which is too small", "above 0, such as 0.05")),
        ("device_batch_size", [16], (", which is no whole number", "1 or more, such as 32")),
        ("device_batch_size", True, (", which is no whole number (YAML reads yes", "1 or more")),
        ("device_memory", 1024, (", which has no unit", "write a size")),
        ("device_memory", "1,5 GiB", (", which is no size", "write 1.5g")),
        ("device_memory", True, (", which is no size", "write a size")),
        ("device_optimizer", False, (", which is no text", "write one of sgd, adam")),
        ("training_run", 2024, (", which is no text", "write it in quotes, '2024'")),
        ("training_rounds", 0, (", which is too small", "1 or more")),
        ("training_strategy_parameters", "mu", (", which is no dictionary", "write one")),
        ("images_wanted", ["grafna"], (", of which 'grafna' is wrong", "write grafana (of")),
        ("images_wanted", "grafana", (", which is no list", "write a list")),
    ],
)
def test_values_that_yaml_or_people_get_wrong(
    variable: str, value: Any, says: tuple[str, str]
) -> None:
    option = settable()[variable]
    what, remedy = variables.value_problem(value, option, RULES.get(variable, {}))
    assert what.startswith(says[0])
    assert says[1] in remedy


def test_a_template_may_make_a_whole_number_of_a_fraction() -> None:
    assert variables.value_problem(32.0, {"type": "int"}, {"minimum": 1}) is None


# --- machines ------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_machines_that_cannot_bear_the_lab_are_refused_in_one_list(
    tmp_path: Path, taken: int
) -> None:
    inventory = Bad(
        says=(),
        hosts={
            "machines/hosts/away": {"ansible_host": "127.0.0.1", "ansible_port": 1},
            "machines/hosts/snakeless": {
                "ansible_connection": "local", "ansible_python_interpreter": "/no/such/python"
            },
        },
        files={
            "host_vars/local.yml": f"lab_prometheus_port: {taken}",
            "host_vars/laptop-1.yml": "device_memory: 90000g\ndevice_cpus: 4000",
        },
    )  # fmt: skip
    inventory.write(tmp_path / "poor")
    played = play(tmp_path / "poor", "-e", "training_dataset=/no/such/data", playbook="site")
    heading, *lines = played.told
    assert played.code != 0
    assert heading == f"Wrong with the machines ({len(lines)}; nothing has been changed):"
    for words in (
        ("local: ", f"lab_prometheus_port is {taken}", "taken (", ", process ", "to a free port"),
        ("local: ", "laptop-1 90000.0 GiB", "the machine has", "another device_machine"),
        ("local: ", "device_cpus of laptop-1 is 4000", "cores: write", "another device_machine"),
        ("local: ", "training_dataset is '/no/such/data'", "no directory there", "copy"),
        ("away: ", "cannot be reached", "ansible_host"),
        ("snakeless: ", "Python does not answer", "install python3"),
    ):
        assert any(all(word in line for word in words) for line in lines), (words, lines)
    assert re.search(r"WARNING: local: device_cpus of its 4 devices\s+add up to", played.output)
    assert played.plays == ["Check the inventory", "Look at the machines", "Check the machines"]
    played.assert_nothing_changed()


def test_the_lab_may_do_without_a_machine_that_is_away(tmp_path: Path) -> None:
    inventory = Bad(
        says=(),
        hosts={
            "machines/hosts/away": {"ansible_host": "127.0.0.1", "ansible_port": 1},
            "devices/children/laptop/hosts/laptop-9": {"device_machine": "away"},
        },
    )
    inventory.write(tmp_path / "lab")
    played = play(tmp_path / "lab", "-e", "lab_require_all_machines=false")
    assert [line for line in played.told if line.startswith("away: ")] == []
    said = " ".join(played.output.split())
    assert re.search(r"WARNING: away: cannot be reached .* with its devices \(laptop-9\)", said)


GOOD_STATE: dict[str, Any] = {
    "system": "Linux",
    "architecture": "aarch64",
    "bits": 64,
    "root": True,
    "cores": 4,
    "memory": 4 * 2**30,
    "cgroup": 2,
    "controllers": ["cpu", "memory", "pids"],
    "listeners": [],
    "disks": {
        "/var/lib/docker": {"free": 20 * 2**30, "filesystem": 1},
        "/shards": {"free": 20 * 2**30, "filesystem": 1},
    },
    "qdiscs": ["netem", "tbf"],
    "missing": [],
    "time": 0.0,
}
ENGINE: dict[str, Any] = {"silence": "", "root": "/var/lib/docker", "containers": []}
PLAN: dict[str, Any] = {
    "ports": {"lab_cadvisor_port": 8080},
    "devices": {
        "pi-1": {
            "cpus": 2.0,
            "limit": "device_cpus",
            "memory": 2**30,
            "network": {"device_network_delay": "40ms", "device_network_rate": "20mbit"},
        },
        "pi-2": {"cpus": None, "memory": None, "network": {"device_network_rate": "5mbit"}},
    },
    "data": "/shards",
    "dataset": "",
    "source": "auto",
}


def judged(
    state: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    skew: float = 0.0,
) -> list[str]:
    """What is wrong with a machine that is good but for what is given."""
    seen = {"state": GOOD_STATE | (state or {}), "engine": ENGINE | (engine or {}), "skew": skew}
    limits = {"disk_minimum": "8g", "data_minimum": "1g", "clock_skew_maximum": 5.0}
    found = machines.machine_problems(seen, "m", PLAN | (plan or {}), **limits)
    assert all(machine == "m" for machine, _ in found)
    return [text for _, text in found]


def test_a_good_machine_has_no_problem() -> None:
    assert judged() == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"controllers": ["cpu"]}, ("memory controller is off (cgroup v2)", "pi-1", "cmdline.txt")),
        ({"controllers": ["memory"]}, ("cpu controller is off", "device_cpus", "CFS_BANDWIDTH")),
        ({"architecture": "armv7l", "bits": 32}, ("32-bit system on armv7l", "64-bit image")),
        ({"bits": 32}, ("32-bit system on aarch64", "64-bit image")),
        ({"system": "Darwin"}, ("runs Darwin", "need Linux")),
        ({"root": False}, ("not root", "ansible_become")),
        ({"memory": 2**29}, ("add up to 1.0 GiB", "has 512 MiB", "take 512 MiB away")),
        ({"cores": 1}, ("device_cpus of pi-1 is 2", "has 1 cores", "write 1 or less")),
        (
            {"qdiscs": ["tbf"]},
            ("device_network_delay of pi-1 needs", "netem", "its module"),
        ),
        ({"qdiscs": ["netem"]}, ("device_network_rate of pi-2 needs", "tbf", "sch_tbf")),
        ({"missing": ["/data"]}, ("training_dataset is '/data'", "no directory")),
    ],
)
def test_what_is_wrong_with_a_machine(wrong: dict[str, Any], says: tuple[str, ...]) -> None:
    (text,) = judged(wrong)
    assert all(words in text for words in says), text


def test_a_controller_is_needed_where_there_is_a_limit() -> None:
    unlimited: dict[str, Any] = {"devices": {"pi-1": {"cpus": None, "memory": None, "network": {}}}}
    assert judged({"controllers": []}, plan=unlimited) == []


def test_memory_is_summed_over_devices() -> None:
    devices: dict[str, Any] = {
        f"pi-{number}": {"cpus": None, "memory": 2**30, "network": {}} for number in range(4)
    }
    assert judged(plan={"devices": devices}) == []
    (text,) = judged({"memory": 4 * 2**30 - 1}, plan={"devices": devices})
    assert "pi-0 1.0 GiB, pi-1 1.0 GiB, pi-2 1.0 GiB and 1 more add up to 4.0 GiB" in text


def test_cores_may_be_oversubscribed_with_a_warning() -> None:
    plan = PLAN | {"devices": {
        f"pi-{n}": {"cpus": 3.0, "memory": None, "network": {}} for n in range(2)
    }}  # fmt: skip
    assert judged(plan=plan) == []
    ((machine, text),) = machines.machine_warnings({"state": GOOD_STATE}, "m", plan)
    assert machine == "m"
    assert "2 devices add up to 6 cores, and it has 4" in text
    assert machines.machine_warnings({"state": GOOD_STATE}, "m", PLAN) == []


def listener(address: str, port: int = 8080) -> dict[str, Any]:
    """Somebody who listens."""
    return {"address": address, "port": port, "process": "nginx, process 7"}


@pytest.mark.parametrize("address", ["127.0.0.1", ANY, "::", "::ffff:127.0.0.1"])
def test_a_port_of_another_program_is_taken(address: str) -> None:
    (text,) = judged({"listeners": [listener(address)]})
    assert "lab_cadvisor_port is 8080, which is taken (nginx, process 7)" in text


@pytest.mark.parametrize("address", ["::1", "192.168.1.7"])
def test_another_address_leaves_the_port_free(address: str) -> None:
    assert judged({"listeners": [listener(address), listener("127.0.0.1", 80)]}) == []


def test_the_labs_own_containers_keep_their_ports() -> None:
    state = {"listeners": [listener("127.0.0.1")]}
    container = {"name": "web", "ports": [8080], "ours": False}
    assert judged(state, {"containers": [container | {"ours": True}]}) == []
    (text,) = judged(state, {"containers": [container]})
    assert "taken (the container web)" in text


def test_disks_are_summed_where_they_are_one() -> None:
    def disks(docker: int, shards: int, *, same: bool) -> dict[str, Any]:
        return {"disks": {
            "/var/lib/docker": {"free": docker * 2**30, "filesystem": 1},
            "/shards": {"free": shards * 2**30, "filesystem": 1 if same else 2},
        }}  # fmt: skip

    assert judged(disks(9, 9, same=True)) == judged(disks(8, 1, same=False)) == []
    (text,) = judged(disks(8, 8, same=True))
    assert "8.0 GiB of disk free and needs 8g for the images in /var/lib/docker" in text
    assert "preflight_disk_minimum" in text
    (text,) = judged(disks(8, 0, same=False))
    assert "needs 1g for the data in /shards (preflight_data_minimum)" in text
    standing = {"containers": [{"name": "flowerbed-cadvisor", "ports": [8080], "ours": True}]}
    assert judged(disks(0, 0, same=True), standing) == []


def test_a_clock_is_wrong_beyond_the_maximum() -> None:
    assert judged(skew=5.0) == judged(skew=-4.9) == []
    assert "320 s ahead of the control node's, and 5 s" in judged(skew=320.2)[0]
    assert "6 s behind" in judged(skew=-6.0)[0]


@pytest.mark.parametrize(
    ("before", "remote", "after", "skew"),
    [
        (100.0, 100.1, 100.2, 0.0),
        (100.0, 107.0, 108.0, 0.0),  # a slow way there is no skew
        (100.0, 130.0, 110.0, 20.0),
        (100.0, 90.0, 110.0, -10.0),
    ],
)
def test_the_way_to_a_machine_is_no_skew(
    before: float, remote: float, after: float, skew: float
) -> None:
    assert look.clock_skew(before, remote, after) == skew


@pytest.mark.parametrize(
    ("seen", "says"),
    [
        ({"unreached": "ssh: connect: timed out"}, "cannot be reached (ssh: connect: timed out)"),
        ({"unreached": "Missing sudo password"}, "--ask-become-pass"),
        ({"unanswered": "/bin/sh: python3: not found"}, "install python3"),
        ({"unanswered": "no space"}, "cannot be examined (no space)"),
    ],
)
def test_a_silent_machine_is_a_problem(seen: dict[str, str], says: str) -> None:
    limits = {"disk_minimum": "8g", "data_minimum": "1g", "clock_skew_maximum": 5.0}
    ((machine, text),) = machines.machine_problems(seen, "m", PLAN, **limits)
    assert machine == "m"
    assert says in text


def test_a_machine_out_of_reach_may_be_left_out() -> None:
    limits = {"disk_minimum": "8g", "data_minimum": "1g", "clock_skew_maximum": 5.0}
    seen = {"unreached": "timed out"}
    assert machines.machine_problems(seen, "m", PLAN, required=False, **limits) == []
    ((machine, text),) = machines.machine_warnings(seen, "m", PLAN, required=False)
    assert machine == "m"
    assert "cannot be reached (timed out)" in text
    assert text.endswith("It is left out, with its devices (pi-1, pi-2)")
    # One that answers and cannot be used is mended, not left out.
    broken = {"unanswered": "/bin/sh: python3: not found"}
    assert machines.machine_problems(broken, "m", PLAN, required=False, **limits)
    assert machines.machine_warnings(broken, "m", PLAN, required=False) == []


def test_an_archive_of_images_needs_an_engine() -> None:
    silent = {"silence": "no such file"}
    assert judged(engine=silent) == []
    (text,) = judged(engine=silent, plan={"source": "archive"})
    assert "does not answer there (no such file)" in text
    assert "images_source is archive" in text
    assert "docker.io" in text
    assert judged(plan={"source": "archive"}) == []


def test_what_counts_of_the_engine() -> None:
    container = {
        "Names": ["/flowerbed-cadvisor"],
        "Labels": {"flowerbed.part": "cadvisor"},
        "Ports": [{"PrivatePort": 8080, "PublicPort": 8080}, {"PrivatePort": 9}],
    }
    answer = {"host_info": {"DockerRootDir": "/data"}, "containers": [container]}
    ours = {"name": "flowerbed-cadvisor", "ours": True, "ports": [8080]}
    wanted = {"silence": "", "root": "/data", "containers": [ours]}
    assert look.engine_facts(answer) == wanted
    told = look.engine_facts({"failed": True, "msg": "no engine"})
    assert told == ENGINE | {"silence": "no engine"}


# --- what the module reads -----------------------------------------------------------------------

TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:2382 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0
   1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4712 1 0
   2: 0100007F:C350 0100007F:2382 01 00000000:00000000 00:00000000 00000000     0        0 4713 1 0
"""
TCP6 = """\
sl local_address                         remote_address                        st
0: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 81
1: 00000000000000000000000001000000:0BB8 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 82
2: 0000000000000000FFFF00000100007F:2382 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 83
"""


@pytest.mark.skipif(sys.byteorder != "little", reason="the tables are those of such a machine")
def test_listeners_are_read_from_the_kernels_tables() -> None:
    assert machine_state.listeners(TCP) == [("127.0.0.1", 9090, "4711"), (ANY, 80, "4712")]
    assert machine_state.listeners(TCP6) == [
        ("::", 8080, "81"), ("::1", 3000, "82"), ("::ffff:127.0.0.1", 9090, "83"),
    ]  # fmt: skip
    assert machine_state.listeners("") == []


def test_a_listener_here_is_found_with_its_process(taken: int) -> None:
    (found,) = machine_state.state([taken], [], [])["listeners"]
    assert found["address"] == "127.0.0.1"
    assert found["process"].endswith(f"process {Path('/proc/self').resolve().name}")


def test_memory_is_read_in_bytes() -> None:
    assert machine_state.memory("MemTotal:        3885396 kB\nMemFree: 1 kB\n") == 3885396 * 1024
    assert machine_state.memory("") == 0


def cgroup(root: Path, **files: str) -> Path:
    """A machine's files."""
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "proc").mkdir()
    for name, text in files.items():
        place = "sys/fs/cgroup/cgroup.controllers" if name == "unified" else "proc/cgroups"
        (root / place).write_text(text)
    return root


def test_controllers_of_cgroup_v1(tmp_path: Path) -> None:
    table = (
        "#subsys_name\thierarchy\tnum_cgroups\tenabled\n"
        "cpuset\t3\t1\t1\ncpu\t1\t1\t1\nmemory\t0\t33\t0\n"
    )
    assert machine_state.controllers(cgroup(tmp_path, table=table)) == (1, ["cpu", "cpuset"])


def test_controllers_of_cgroup_v2(tmp_path: Path) -> None:
    root = cgroup(tmp_path, unified="cpuset cpu io memory pids\n", table="memory\t0\t33\t0\n")
    assert machine_state.controllers(root) == (2, ["cpu", "cpuset", "io", "memory", "pids"])


def test_a_disk_is_that_of_the_nearest_directory(tmp_path: Path) -> None:
    found = machine_state.disk(str(tmp_path / "not/yet/there"))
    assert found["filesystem"] == tmp_path.stat().st_dev
    assert found["free"] > 0


# --- one place for everything --------------------------------------------------------------------


def settable() -> dict[str, dict[str, Any]]:
    """What an inventory may hold, and no playbook sets."""
    passed = variables.passed_variables(str(ROOT / "playbooks"))
    found = {name: option for role in OPTIONS.values() for name, option in role.items()}
    return {name: option for name, option in found.items() if name not in passed}


def test_every_number_has_a_range() -> None:
    numbers = {name for name, option in settable().items() if option["type"] in ("int", "float")}
    assert numbers - RULES.keys() == set()


def test_every_rule_is_for_a_variable() -> None:
    of_playbooks = ROLE_VARS["__preflight_of_playbooks"].values()
    known = settable().keys() | {name for options in of_playbooks for name in options}
    assert RULES.keys() - known == set()


def test_the_specs_defaults_are_good() -> None:
    rules = {name: rule for name, rule in RULES.items() if isinstance(rule, dict)}
    for name, option in settable().items():
        default = option.get("default")
        if default is not None and not re.search(r"{{|<", str(default)):
            problem = variables.value_problem(default, option, rules.get(name, {}))
            assert problem is None, (name, problem)


def accepts(settings: Callable[[dict[str, Any]], Any], values: dict[str, Any]) -> bool:
    """Whether the app takes these settings."""
    try:
        settings(values)
    except ValueError:
        return False
    return True


def test_ranges_are_those_of_the_runtime_and_the_default_app() -> None:
    runtime: Any = load(ROOT / "runtime/flowerbed/settings.py")
    default_app: Any = load(ROOT / "app/mobilenet/settings.py")
    device = {"device": "d", "device_class": "c", "machine": "m"}
    app = tomllib.loads((ROOT / "app/pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    run = {name.replace("-", "_"): value for name, value in app.items()}
    variables_of = {
        "num_server_rounds": "training_rounds",
        "alpha": "training_model_alpha",
        "run_name": "training_run",
    }
    known = settable()
    for base, settings, prefix, names in (
        (device, runtime.DeviceSettings, "device", (
            "batch_size", "learning_rate", "local_epochs", "data_fraction", "optimizer"
        )),
        ({"run_name": "r"}, runtime.LabSettings, "training", (
            "run_name", "round_timeout", "device_wait"
        )),
        (run, default_app.RunSettings, "training", (
            "num_server_rounds", "alpha", "model", "recipe"
        )),
    ):  # fmt: skip
        for name in names:
            variable = variables_of.get(name, f"{prefix}_{name}")
            option, rule = known[variable], RULES.get(variable, {})
            text = option["type"] == "str"
            numbers = (-1, 0, 1, 2, 3) if option["type"] == "int" else (-1, 0, 0.5, 1, 1.5, 2, 3)
            for value in ("a-1", "../a", "", "sgd", "adam", "original") if text else numbers:
                here = variables.value_problem(value, option, rule) is None
                there = accepts(settings.parse, base | {name: value})
                assert here == there, (variable, value)


def test_strategies_are_those_of_the_runtime() -> None:
    source = (ROOT / "runtime/flowerbed/strategies/__init__.py").read_text()
    listed = re.findall(r"^    (?:flower\.)?([A-Z]\w+),$", source, re.MULTILINE)
    choices = settable()["training_strategy"]["choices"]
    assert choices == sorted(name.lower() for name in listed)


def test_what_playbooks_set_is_found() -> None:
    passed = variables.passed_variables(str(ROOT / "playbooks"))
    assert passed["gate_superlink"] == "playbooks/machines.yml: superlink:9092"
    assert {"device_image", "device_wanted", "training_devices"} <= passed.keys()
    assert "training_start" not in passed


def test_prometheus_finds_every_machine() -> None:
    hosts = {
        "server": {"ansible_host": "192.0.2.1"},
        "pi": {},
        "desk": {"ansible_host": "desk.example.org", "lab_address": "192.0.2.3"},
        "far": {"ansible_host": "192.0.2.4"},
    }
    told = playbook_filters.cadvisor_targets(list(hosts), hosts, ["server"], ["server", "pi"], 8081)
    assert {target["labels"]["machine"]: target["address"] for target in told} == {
        "server": "flowerbed-cadvisor:8080",
        "pi": "pi:8081",
        "desk": "192.0.2.3:8081",
        "far": "192.0.2.4:8081",
    }
    away = {target["labels"]["machine"] for target in told if target.get("away")}
    assert away == {"desk", "far"}


def test_who_is_out_of_reach_is_told_by_machine() -> None:
    hosts = {"phone": {"device_machine": "desk"}, "tablet": {"device_machine": "desk"}}
    hosts |= {"board": {}, "laptop": {"device_machine": "server"}}
    names = ["server", "desk", "board", "idle"]

    def told(*reached: str) -> tuple[list[str], dict[str, list[str]]]:
        return (
            playbook_filters.in_reach(list(hosts), list(reached), hosts),
            playbook_filters.out_of_reach(list(hosts), names, list(reached), hosts),
        )

    everybody = {*names, *hosts}
    assert told(*everybody) == (list(hosts), {})
    assert told(*everybody - {"desk"}) == (["board", "laptop"], {"desk": ["phone", "tablet"]})
    assert told(*everybody - {"phone"}) == (["tablet", "board", "laptop"], {"desk": ["phone"]})
    assert told(*everybody - {"board"})[1] == {"board": ["board"]}
    assert told(*everybody - {"idle"}) == (list(hosts), {"idle": []})


def test_a_device_has_one_class() -> None:
    groups = {"devices": ["a", "b"], "phone": ["a", "b"], "rack": ["a", "server"]}
    assert playbook_filters.class_of(["devices", "phone", "rack"], groups) == "phone"
    with pytest.raises(Exception, match="in no device class"):
        playbook_filters.class_of(["devices", "rack"], groups)


def test_a_certificate_is_for_all_that_a_machine_is_called() -> None:
    hosts = {"server": {"lab_address": "192.0.2.1"}, "board": {"ansible_host": "board.example"}}
    assert playbook_filters.names_of("server", hosts, ["server"]) == [
        "DNS:server",
        "IP:192.0.2.1",
        "DNS:localhost",
        "IP:127.0.0.1",
        "DNS:flowerbed-superlink",
    ]
    board = playbook_filters.names_of("board", hosts, ["server"])
    assert "DNS:board.example" in board
    assert "DNS:flowerbed-superlink" not in board


def test_the_registry_serves_what_was_built_and_what_was_pulled_under_a_hash() -> None:
    references = {
        "application": "flowerbed/application:0123456789ab",
        "cadvisor": f"ghcr.io/google/cadvisor@sha256:{'c' * 64}",
        "grafana": "not asked for",
    }
    assert playbook_filters.served(references, ["application", "cadvisor"]) == {
        "application": "flowerbed/application:0123456789ab",
        "cadvisor": f"flowerbed/cadvisor:{'c' * 64}",
    }


def test_a_device_whose_machine_was_not_asked_has_no_known_key() -> None:
    hosts = {"server": {"certificates_public_keys": {"phone": "ecdsa A"}}, "away": {}}
    keys = playbook_filters.keys_of(["phone", "board"], ["server", "away"], hosts)
    assert keys == {"board": None, "phone": "ecdsa A"}
