"""A lab of three machines over ssh, from nothing to nothing; in this order.

The machines are those of the Molecule scenario lab: one of Debian 12, one that is its own device.
"""

import csv
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import (
    DATA,
    RESULTS,
    ROOT,
    Play,
    Played,
    assert_no_more_rights_than_needed,
    program,
    published,
    secret_in,
)

SCENARIO = ROOT / "molecule/lab"
EPHEMERAL = ROOT / ".cache/lab-machines"
RUN = "test-lab"
GONE, NEW = "phone-2", "phone-3"
# What a lab might leave behind beside what the engine knows of.
PLACES = ("/home", "/opt", "/root", "/srv", "/tmp", "/usr/local", "/var/lib")
NOT_THE_LABS = (
    r"^/var/lib/(docker|containerd|apt|dpkg|systemd|python|ucf)\b|/\.ansible\b|/systemd-private-"
)

On = Callable[..., str]


def _molecule(action: str) -> None:
    """Create or remove the machines; Molecule finds ansible-playbook on the PATH."""
    environment = os.environ | {
        "PATH": f"{Path(program('molecule')).parent}:{os.environ['PATH']}",
        "MOLECULE_EPHEMERAL_DIRECTORY": str(EPHEMERAL),
        "MOLECULE_COMMAND_BORDERS": "false",
        "FLOWERBED_TEST_DATA": str(DATA),
    }
    command = [program("molecule"), action, "-s", "lab"]
    print(f"\n$ {' '.join(command)}", flush=True)
    subprocess.run(command, cwd=ROOT, check=True, env=environment)


@pytest.fixture(scope="module")
def on() -> On:
    """Run a command as root on a machine, with ssh as Ansible does."""

    def run(machine: str, *command: str) -> str:
        ssh = ["ssh", "-F", str(EPHEMERAL / "ssh_config"), machine, shlex.join(["sudo", *command])]
        return subprocess.run(ssh, check=True, stdout=subprocess.PIPE, text=True).stdout

    return run


def _files(on: On, machine: str) -> set[str]:
    found = on(machine, "find", *PLACES, "-xdev").splitlines()
    return {path for path in found if not re.search(NOT_THE_LABS, path)}


@pytest.fixture(scope="module")
def found(on: On) -> Iterator[dict[str, set[str]]]:
    """Three machines, and the files that were on each before anything was done to it."""
    _molecule("destroy")
    _molecule("create")
    files = {machine: _files(on, machine) for machine in ("server", "desk", "pi-1")}
    yield files
    _molecule("destroy")


@pytest.fixture(scope="module")
def machines(found: dict[str, set[str]]) -> list[str]:
    """The same with an engine and the images."""
    _molecule("prepare")
    return sorted(found)


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the scenario's inventory, to be edited."""
    path = tmp_path_factory.mktemp("lab") / "inventory"
    subprocess.run(["cp", "-r", str(SCENARIO / "inventory"), str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def ssh() -> dict[str, str]:
    """How Ansible finds the machines; as in ansible.cfg, one that falls silent is given up."""
    return {"ANSIBLE_SSH_ARGS": f"-F {EPHEMERAL}/ssh_config"}


@pytest.fixture(scope="module")
def over_ssh(play: Play, inventory: Path, ssh: dict[str, str]) -> Callable[..., Played]:
    """Run a playbook on the three machines."""

    def run(playbook: str, *arguments: str, **variables: Any) -> Played:
        return play(playbook, *arguments, inventory=inventory, env=ssh, **variables)

    return run


@pytest.fixture(scope="module")
def lab(machines: list[str], over_ssh: Callable[..., Played]) -> Played:
    """site.yml on machines without a lab, as talkative as can be: deployed and trained."""
    subprocess.run(["rm", "-rf", str(RESULTS / RUN)], check=True)
    return over_ssh("site", "--diff", "-v")


def _devices(inventory: Path) -> dict[str, dict[str, Any]]:
    command = [program("ansible-inventory"), "-i", str(inventory), "--list"]
    listed = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    return {
        device: {"class": group, "machine": device} | listed["_meta"]["hostvars"].get(device, {})
        for group in listed["devices"]["children"]
        for device in listed[group]["hosts"]
    }


def _containers(on: On, machine: str) -> dict[str, Any]:
    """The containers of a machine's lab by name, as the engine describes them."""
    names = on(machine, "docker", "ps", "-q", "--filter", "label=flowerbed.part").split()
    described = json.loads(on(machine, "docker", "inspect", *names)) if names else []
    return {container["Name"].removeprefix("/"): container for container in described}


def test_each_device_runs_on_its_machine_with_its_limits(
    lab: Played, machines: list[str], on: On, inventory: Path
) -> None:
    devices = _devices(inventory)
    assert len(devices) == 6
    assert len({each["class"] for each in devices.values()}) == 3
    for machine in machines:
        running = _containers(on, machine)
        here = {
            name: each
            for name, each in devices.items()
            if each.get("device_machine", name) == machine
        }
        assert here
        wanted = {f"device-{name}" for name in here} | {"cadvisor", "gate"}
        if machine == "server":
            wanted |= {"superlink", "serverapp", "metrics", "prometheus", "registry"}
        # Grafana is there where a registry is in reach.
        assert set(running) - {"flowerbed-grafana"} == {f"flowerbed-{name}" for name in wanted}
        for name, each in here.items():
            host = running[f"flowerbed-device-{name}"]["HostConfig"]
            assert host["NanoCpus"] == round(each.get("device_cpus", 0) * 1e9)
            memory = int(each.get("device_memory", "0m").removesuffix("m")) * 2**20
            assert host["Memory"] == memory


def test_every_device_took_part_in_every_round(lab: Played, inventory: Path) -> None:
    with (RESULTS / RUN / "devices.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert {(row["device"], row["round"]) for row in rows} == {
        (device, number) for device in _devices(inventory) for number in ("1", "2")
    }
    assert {row["outcome"] for row in rows} == {"completed"}
    told = yaml.safe_load((RESULTS / RUN / "run.yml").read_text())
    for device, each in _devices(inventory).items():
        assert told["devices"][device]["machine"] == each.get("device_machine", device)
        assert told["devices"][device]["device_class"] == each["class"]
    assert len({each["shard"] for each in told["devices"].values()}) == 6


LET_IN = """
import socket, ssl, sys
host, port, certificate = sys.argv[1:]
own = "/var/lib/flowerbed/certificates"
context = ssl.create_default_context(cafile=f"{own}/ca.crt")
if certificate == "with":
    context.load_cert_chain(f"{own}/machine.crt", f"{own}/machine.key")
try:
    plain = socket.create_connection((host, int(port)), 5)
    with context.wrap_socket(plain, server_hostname=host) as link:
        link.settimeout(3)
        print("out" if link.recv(1) == b"" else "in")
except TimeoutError:
    print("in")  # it waits for what will be asked
except (ssl.SSLError, ConnectionError):
    print("out")
"""


@pytest.mark.parametrize(
    ("origin", "gate", "certificate", "answer"),
    [
        ("server", "pi-1.test 8080", "with", "in"),
        ("server", "pi-1.test 8080", "without", "out"),
        ("desk", "pi-1.test 8080", "with", "out"),  # cAdvisor is for the coordinator alone
        ("desk", "server.test 5000", "with", "in"),
        ("desk", "server.test 5000", "without", "out"),
        ("desk", "server.test 9092", "with", "in"),
        ("desk", "server.test 9092", "without", "out"),
    ],
)
@pytest.mark.usefixtures("lab")
def test_a_gate_lets_in_whom_it_should(
    on: On, origin: str, gate: str, certificate: str, answer: str
) -> None:
    told = on(origin, "python3", "-c", LET_IN, *gate.split(), certificate)
    assert told.strip() == answer


def test_nothing_but_gates_is_published(lab: Played, machines: list[str], on: On) -> None:
    ports = {"server": {"9092", "5000"}, "desk": {"8080"}, "pi-1": {"8080"}}
    for machine in machines:
        for name, container in _containers(on, machine).items():
            outside = {port for address, port in published(container) if address != "127.0.0.1"}
            assert outside == (ports[machine] if name == "flowerbed-gate" else set()), name


def test_containers_have_no_more_rights_than_they_need(
    lab: Played, machines: list[str], on: On
) -> None:
    for machine in machines:
        for container in _containers(on, machine).values():
            assert_no_more_rights_than_needed(container)


def test_no_secret_is_shown(lab: Played, machines: list[str], on: On, inventory: Path) -> None:
    """Not when everything is new and Ansible tells all that it does."""
    texts = {str(path): path.read_text() for path in (inventory / ".secrets").rglob("*.key")}
    for machine in machines:
        home = "/var/lib/flowerbed"
        found = on(machine, "find", f"{home}/keys", "-name", "key").split()
        found.append(f"{home}/certificates/machine.key")
        if machine == "server":
            found.append(f"{home}/superlink/secrets/superexec")
        texts |= {f"{machine}:{path}": on(machine, "cat", path) for path in found}
    assert len(texts) == 1 + 3 + 3 + 6 + 1  # authority, machines (there too), devices, executor
    password = inventory / ".secrets/grafana_admin_password"
    if password.exists():  # where there is a Grafana
        texts[str(password)] = password.read_text()
    assert [name for name, text in texts.items() if secret_in(text.strip()) in lab.output] == []


def test_machines_without_the_build_have_the_registrys_images(lab: Played, on: On) -> None:
    for machine in ("desk", "pi-1"):
        names = on(machine, "docker", "images", "--format", "{{.Repository}}").split()
        assert sorted(names) == [
            f"server.test:5000/flowerbed/{image}" for image in ("application", "cadvisor", "gate")
        ]


def test_a_second_run_changes_nothing(lab: Played, over_ssh: Callable[..., Played]) -> None:
    played = over_ssh("site")
    assert played.changed == 0
    assert f"has trained before ({RUN})" in played.output


def test_a_machine_that_is_away_takes_its_devices_with_it(
    lab: Played, machines: list[str], over_ssh: Callable[..., Played], inventory: Path
) -> None:
    """Then nothing is done, unless the lab may do without it. The next test has it back."""
    away = {"training_start": "always", "training_rounds": 1, "training_run": "test-away"}
    subprocess.run(["rm", "-rf", str(RESULTS / "test-away")], check=True)
    subprocess.run(["docker", "pause", "flowerbed-test-lab-pi-1"], check=True)
    try:
        refused = over_ssh("site", ok=False, **away)
        stopped = over_ssh("train", ok=False, **away)
        assert not (RESULTS / "test-away").exists()
        played = over_ssh("site", ok=False, lab_require_all_machines=False, **away)
    finally:
        subprocess.run(["docker", "unpause", "flowerbed-test-lab-pi-1"], check=True)
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
    with (RESULTS / "test-away/devices.csv").open() as lines:
        took_part = {row["device"] for row in csv.DictReader(lines)}
    assert took_part == _devices(inventory).keys() - {"pi-1"}
    told = yaml.safe_load((RESULTS / "test-away/run.yml").read_text())
    assert told["lab"]["out_of_reach"] == {"pi-1": ["pi-1"]}


def test_a_device_comes_and_one_goes(
    lab: Played, machines: list[str], over_ssh: Callable[..., Played], on: On, inventory: Path
) -> None:
    """The newcomer is of the same place in the order of names, so the others keep their shards."""
    before = {m: _containers(on, m) for m in machines}
    hosts = yaml.safe_load((inventory / "hosts.yml").read_text())
    phones = hosts["devices"]["children"]["mid_range_phone"]["hosts"]
    del phones[GONE]
    phones[NEW] = {"device_machine": "pi-1"}
    (inventory / "hosts.yml").write_text(yaml.safe_dump(hosts))
    over_ssh("site")
    after = {m: _containers(on, m) for m in machines}
    assert f"flowerbed-device-{GONE}" not in after["desk"]
    assert f"flowerbed-device-{NEW}" in after["pi-1"]
    for machine in machines:
        for name, container in after[machine].items():
            if name != f"flowerbed-device-{NEW}":
                assert container["Id"] == before[machine][name]["Id"], name
    assert on("desk", "ls", "/var/lib/flowerbed/shards/devices").split() == ["laptop-1", "pi-2"]
    assert GONE not in on("desk", "ls", "/var/lib/flowerbed/keys")
    known = json.loads(on("server", "cat", "/var/lib/flowerbed/superlink/state/nodes.json"))
    assert known.keys() == _devices(inventory).keys()


def test_teardown_leaves_the_machines_as_they_were(
    lab: Played,
    machines: list[str],
    over_ssh: Callable[..., Played],
    on: On,
    found: dict[str, set[str]],
) -> None:
    over_ssh("teardown", teardown_purge=True)
    for machine in machines:
        for listing in (("ps", "-aq"), ("images", "-aq"), ("volume", "ls", "-q")):
            assert on(machine, "docker", *listing) == "", (machine, listing)
        networks = on(machine, "docker", "network", "ls", "--format", "{{.Name}}").split()
        assert sorted(networks) == ["bridge", "host", "none"]
        assert on(machine, "find", "/etc/docker", "-name", "server.test*") == ""
        assert _files(on, machine) == found[machine]


def _alone(inventory: Path, machine: str) -> Path:
    """A lab of one of the machines with the devices that live on it."""
    alone = inventory.with_name("alone")
    subprocess.run(["cp", "-r", str(SCENARIO / "inventory"), str(alone)], check=True)
    hosts = yaml.safe_load((alone / "hosts.yml").read_text())
    hosts["machines"]["hosts"] = {machine: hosts["machines"]["hosts"][machine]}
    for group in hosts["devices"]["children"].values():
        there = group["hosts"].items()
        group["hosts"] = {n: v for n, v in there if v and v["device_machine"] == machine}
    (alone / "hosts.yml").write_text(yaml.safe_dump(hosts))
    return alone


def test_a_bundle_installs_a_lab_that_reaches_nothing(
    machines: list[str], play: Play, on: On, inventory: Path, ssh: dict[str, str]
) -> None:
    """On a machine that has nothing but an engine, and no way out of its own network."""
    bundle, alone = inventory.with_name("bundle"), _alone(inventory, "server")
    play("bundle", images_archive=str(bundle))
    manifest = yaml.safe_load((bundle / "manifest.yml").read_text())
    images = manifest["images"]
    wanted = {"dependencies", "application", "cadvisor", "prometheus", "gate"}
    assert set(images) - {"grafana"} == wanted
    assert {path.name for path in bundle.iterdir()} == {"manifest.yml", *manifest["files"]}
    assert on("server", "docker", "images", "-q") == ""
    on("server", "ip", "route", "delete", "default")
    more = {"images_source": "archive", "images_archive": str(bundle), "training_rounds": 1}
    more |= {"training_run": "test-archive", "training_model": "linear"}
    played = play("site", inventory=alone, env=ssh, **more)
    assert not re.search(r"TASK \[images : (Build|Pull: |Make a D|Bring the code)", played.output)
    told = yaml.safe_load((RESULTS / "test-archive/run.yml").read_text())
    assert told["lab"]["images"] == {
        name: images[name]["reference"] for name in images if name not in ("dependencies", "gate")
    }
    with (RESULTS / "test-archive/devices.csv").open() as lines:
        outcomes = {row["device"]: row["outcome"] for row in csv.DictReader(lines)}
    assert outcomes == {"laptop-2": "completed", "phone-1": "completed"}
    assert play("machines", inventory=alone, env=ssh, **more).changed == 0
