"""What happens to a lab of three machines; in this order, and nothing is left of it."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from control_node import HOME, PROJECT, ControlNode
from labs import play
from ssh_lab import INVENTORY, RESULTS, RUN, containers, devices, rows, run_yml, trained
from testinfra.host import Host

GONE, NEW = "phone-2", "phone-3"
# What a lab might leave behind beside what the engine knows of.
PLACES = r"^/(home|opt|root|srv|tmp|usr/local|var/lib)/"
NOT_THE_LABS = (
    r"^/var/lib/(docker|containerd|apt|dbus|dpkg|systemd|python|ucf)\b|/\.ansible\b|/systemd-private-"
    r"|^/srv/(cifar10$|control\b|lab/\.ssh\b)|^/tmp/\.\w+-unix$"
)


def _container(machine: str) -> str:
    return f"flowerbed-test-default-{machine}"


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the scenario's inventory with its secrets, to be edited."""
    return Path(shutil.copytree(INVENTORY, tmp_path_factory.mktemp("lab") / "inventory"))


@pytest.fixture(scope="module")
def elsewhere(machines: dict[str, Host], tmp_path_factory: pytest.TempPathFactory) -> ControlNode:
    """A control node on the coordinator, which has a newer Python than Debian 12."""
    return ControlNode(machines["server"], _container("server"), tmp_path_factory.mktemp("brought"))


@contextmanager
def _away(machine: str) -> Iterator[None]:
    """A machine that answers nobody."""
    subprocess.run(["docker", "pause", _container(machine)], check=True)
    try:
        yield
    finally:
        subprocess.run(["docker", "unpause", _container(machine)], check=True)


def test_another_control_node_takes_the_lab_over(
    machines: dict[str, Host], inventory: Path, elsewhere: ControlNode
) -> None:
    """With the inventory and its secrets, and with the other ansible-core that there is."""
    elsewhere.bring(inventory, "inventory")
    again = elsewhere.make("lab", "inventory")
    tasks = re.split(r"^TASK \[", again.output, flags=re.MULTILINE)
    changing = [task.partition("]")[0] for task in tasks if "\nchanged: " in task]
    # What the newest run has left is brought, and nothing else is done.
    assert changing
    assert all(name.startswith("training : ") for name in changing), changing
    there = machines["server"].file(f"{HOME}/results/{RUN}").listdir()
    assert set(there) >= {path.name for path in (RESULTS / RUN).glob("*.*")}
    version = machines["server"].check_output(f"{PROJECT}/.venv/bin/ansible --version")
    assert "[core 2.21" in version
    assert "python version = 3.13" in version
    elsewhere.make(
        "train", "inventory", training_model="linear", training_rounds=1, training_run="elsewhere"
    )
    elsewhere.fetch_results()
    outcomes = {row["device"]: row["outcome"] for row in trained("elsewhere")}
    assert outcomes == dict.fromkeys(devices(inventory), "completed")
    assert (RESULTS / "elsewhere" / "report.html").exists()


def test_a_run_survives_full_memory_and_a_restart_of_docker(
    machines: dict[str, Host], inventory: Path
) -> None:
    """A phone goes on, with half its batch, and a machine's devices come back by themselves."""
    desk, property_ = machines["desk"], "systemctl show docker --property ExecMainStartTimestamp"
    began = desk.check_output(property_)
    play(
        "train",
        inventory=inventory,
        training_run="test-faults",
        training_rounds=2,
        training_strategy="paced",
        training_strategy_parameters={"box": 30, "grace": 60},
        training_faults=[
            {"at_second": 12, "do": "fill_memory", "device": "phone-1"},
            {"at_round": 2, "do": "restart_docker", "machine": "desk"},
        ],
    )
    assert desk.check_output(property_) != began
    injected = rows("test-faults", "faults.csv")
    assert [(row["fault"], row["target"], row["problem"]) for row in injected] == [
        ("fill_memory", "phone-1", ""),
        ("restart_docker", "desk", ""),
    ]
    told = {(row["device"], row["round"]): row for row in trained("test-faults")}
    # Whenever the kernel came to it: while the phone trained, or while it waited for a round.
    died = "the worker died of: out_of_memory"
    assert died in machines["server"].check_output("docker logs flowerbed-device-phone-1 2>&1")
    assert {told["phone-1", number]["outcome"] for number in "12"} <= {"completed", "partial"}
    for device, each in devices(inventory).items():
        if each["device_machine"] == "desk":
            assert told[device, "2"]["outcome"] == "offline", device
        else:
            assert told[device, "2"]["outcome"] in ("completed", "partial"), device


def test_a_machine_that_is_away_takes_its_devices_with_it(inventory: Path) -> None:
    """Then nothing is done, unless the lab may do without it. The next test has it back."""
    away: dict[str, Any] = {
        "training_model": "linear",
        "training_rounds": 1,
        "training_run": "test-away",
        "training_start": "always",
    }
    with _away("pi-1"):
        refused = play("site", inventory=inventory, ok=False, **away)
        stopped = play("train", inventory=inventory, ok=False, **away)
        assert not (RESULTS / "test-away").exists()
        played = play("site", inventory=inventory, ok=False, lab_require_all_machines=False, **away)
    assert refused.code != 0
    assert "pi-1: cannot be reached" in refused.output
    assert not re.search(r"changed=[1-9]", refused.output)
    assert stopped.code != 0
    assert "Nothing is trained without all machines" in stopped.output
    assert re.search(r"^ +pi-1: pi-1$", stopped.output, re.MULTILINE)
    # Ansible's own way to say that a host was not reached.
    assert played.code == 4
    warning = r"WARNING: pi-1: cannot be reached .* with its devices \(pi-1\)"
    assert re.search(warning, " ".join(played.output.split()))
    assert re.search(r"pi-1: pi-1\W*$", played.output, re.MULTILINE)
    took_part = {row["device"] for row in trained("test-away")}
    assert took_part == devices(inventory).keys() - {"pi-1"}
    assert run_yml("test-away")["lab"]["out_of_reach"] == {"pi-1": ["pi-1"]}


def test_a_device_comes_and_one_goes(machines: dict[str, Host], inventory: Path) -> None:
    """The newcomer is of the same place in the order of names, so the others keep their shards."""
    before = {name: containers(machine) for name, machine in machines.items()}
    hosts = yaml.safe_load((inventory / "hosts.yml").read_text())
    phones = hosts["devices"]["children"]["mid_range_phone"]["hosts"]
    del phones[GONE]
    phones[NEW] = {"device_machine": "pi-1"}
    (inventory / "hosts.yml").write_text(yaml.safe_dump(hosts))
    play("site", inventory=inventory)
    after = {name: containers(machine) for name, machine in machines.items()}
    assert f"flowerbed-device-{GONE}" not in after["desk"]
    assert f"flowerbed-device-{NEW}" in after["pi-1"]
    for name in machines:
        for container, described in after[name].items():
            if container != f"flowerbed-device-{NEW}":
                assert described["Id"] == before[name][container]["Id"], container
    desk = machines["desk"]
    home = "/var/lib/flowerbed"
    assert desk.file(f"{home}/shards/devices").listdir() == ["laptop-1", "pi-2"]
    assert GONE not in desk.file(f"{home}/keys").listdir()
    known = machines["server"].file(f"{home}/superlink/state/nodes.json").content_string
    assert json.loads(known).keys() == devices(inventory).keys()


def test_teardown_leaves_the_machines_as_they_were(
    machines: dict[str, Host], inventory: Path
) -> None:
    play("teardown", inventory=inventory, teardown_purge=True)
    for name, machine in machines.items():
        for listing in ("ps -aq", "images -aq", "volume ls -q"):
            assert machine.check_output(f"docker {listing}") == "", (name, listing)
        networks = machine.check_output("docker network ls --format '{{.Name}}'").split()
        assert sorted(networks) == ["bridge", "host", "none"]
        assert machine.check_output("find /etc -name 'server.test*'") == ""
        # All that is not as in the image that the machine was made of.
        differs = subprocess.run(
            ["docker", "diff", _container(name)], check=True, capture_output=True, text=True
        )
        paths = [line.split(" ", 1) for line in differs.stdout.splitlines()]
        left = [path for kind, path in paths if kind != "C" and re.search(PLACES, path)]
        assert [path for path in left if not re.search(NOT_THE_LABS, path)] == []


def _alone(inventory: Path, machine: str) -> Path:
    """A lab of one of the machines with the devices that live on it."""
    alone = Path(shutil.copytree(INVENTORY, inventory.with_name("alone")))
    hosts = yaml.safe_load((alone / "hosts.yml").read_text())
    hosts["machines"]["hosts"] = {machine: hosts["machines"]["hosts"][machine]}
    for group in hosts["devices"]["children"].values():
        there = group["hosts"].items()
        group["hosts"] = {n: v for n, v in there if v and v["device_machine"] == machine}
    (alone / "hosts.yml").write_text(yaml.safe_dump(hosts))
    return alone


def test_a_bundle_installs_a_lab_that_reaches_nothing(
    machines: dict[str, Host], inventory: Path, elsewhere: ControlNode
) -> None:
    """On a machine, its control node, that has an engine and no way out of its own network."""
    bundle, alone = inventory.with_name("bundle"), _alone(inventory, "server")
    play("bundle", images_archive=str(bundle))
    manifest = yaml.safe_load((bundle / "manifest.yml").read_text())
    images = manifest["images"]
    wanted = {"dependencies", "application", "cadvisor", "prometheus", "gate"}
    assert set(images) - {"grafana"} == wanted
    assert {path.name for path in bundle.iterdir()} == {"manifest.yml", *manifest["files"]}
    elsewhere.bring(bundle, "bundle")
    elsewhere.bring(alone, "alone")
    server = machines["server"]
    assert server.check_output("docker images -q") == ""
    server.check_output("ip route delete default")
    more: dict[str, Any] = {
        "images_source": "archive",
        "images_archive": f"{HOME}/bundle",
        "training_model": "linear",
        "training_rounds": 1,
        "training_run": "test-archive",
    }
    made = elsewhere.make("lab", "alone", **more)
    assert not re.search(r"TASK \[images : (Build|Pull: |Copy the code)", made.output)
    elsewhere.fetch_results()
    assert run_yml("test-archive")["lab"]["images"] == {
        name: images[name]["reference"] for name in images if name != "dependencies"
    }
    outcomes = {row["device"]: row["outcome"] for row in trained("test-archive")}
    assert outcomes == {"laptop-2": "completed", "phone-1": "completed"}
    assert elsewhere.make("lab", "alone", **more).changed == 0
