"""A lab of three machines as it stands after a run: each service is asked what it does."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from labs import (
    assert_a_device_reaches_the_fleet_api_alone,
    assert_no_more_rights_than_needed,
    play,
    published,
    secret_in,
)
from ssh_lab import EPHEMERAL, INVENTORY, RUN, asked, containers, devices, run_yml, trained
from testinfra.host import Host

HOME = "/var/lib/flowerbed"


@pytest.fixture(scope="module")
def inventory() -> dict[str, dict[str, Any]]:
    """The devices' variables."""
    return devices(INVENTORY)


def test_the_engine_runs_and_will_after_a_restart(machines: dict[str, Host]) -> None:
    for machine in machines.values():
        service = machine.service("docker")
        assert service.is_running
        assert service.is_enabled


def test_each_device_runs_on_its_machine_with_its_limits(
    machines: dict[str, Host], inventory: dict[str, dict[str, Any]]
) -> None:
    assert len(inventory) == 6
    assert len({each["class"] for each in inventory.values()}) == 3
    for name, machine in machines.items():
        running = containers(machine)
        here = {device: v for device, v in inventory.items() if v["device_machine"] == name}
        assert here
        wanted = {f"device-{device}" for device in here} | {"cadvisor", "gate"}
        if name == "server":
            wanted |= {"superlink", "serverapp", "metrics", "prometheus", "registry"}
        # Grafana is there where a registry is in reach.
        assert set(running) - {"flowerbed-grafana"} == {f"flowerbed-{part}" for part in wanted}
        for device, each in here.items():
            container = f"flowerbed-device-{device}"
            host = running[container]["HostConfig"]
            memory = int(each.get("device_memory", "0m").removesuffix("m")) * 2**20
            assert host["NanoCpus"] == round(each.get("device_cpus", 0) * 1e9)
            assert host["Memory"] == memory
            told = machine.check_output(
                "docker exec %s python -m flowerbed.device.quota", container
            )
            kept = json.loads(told)
            if memory:
                assert (kept["cores"], kept["memory"]) == (each["device_cpus"], memory)


def test_each_device_has_its_share(
    machines: dict[str, Host], inventory: dict[str, dict[str, Any]]
) -> None:
    """Of 3,000 images, four fifths of them for training."""
    for device, each in inventory.items():
        file = machines[each["device_machine"]].file(f"{HOME}/shards/devices/{device}/shard.json")
        wanted = 3000 / 6 * 0.8 * each.get("device_data_fraction", 1.0)
        assert abs(json.loads(file.content_string)["train_examples"] - wanted) <= 1


def test_every_device_took_part_in_every_round(inventory: dict[str, dict[str, Any]]) -> None:
    took_part = trained(RUN)
    assert {(row["device"], row["round"]) for row in took_part} == {
        (device, number) for device in inventory for number in ("1", "2")
    }
    assert {row["outcome"] for row in took_part} == {"completed"}
    told = run_yml(RUN)
    for device, each in inventory.items():
        assert told["devices"][device]["machine"] == each["device_machine"]
        assert told["devices"][device]["device_class"] == each["class"]
    assert len({each["shard"] for each in told["devices"].values()}) == 6


def test_the_coordinator_sees_every_machine(
    machines: dict[str, Host], inventory: dict[str, dict[str, Any]]
) -> None:
    """Through their gates: what cAdvisor measures, under the names of the inventory."""

    def query(expression: str) -> list[dict[str, Any]]:
        told = asked(machines["server"], f"9090/api/v1/query?query={quote(expression)}")
        result: list[dict[str, Any]] = json.loads(told)["data"]["result"]
        return result

    up = {(s["metric"]["job"], s["metric"].get("machine")): s["value"][1] for s in query("up")}
    assert {machine for job, machine in up if job == "cadvisor"} == machines.keys()
    assert set(up.values()) == {"1"}
    limits = query('container_spec_memory_limit_bytes{device!=""}')
    assert {
        (s["metric"]["machine"], s["metric"]["device_class"], device, int(s["value"][1]))
        for s in limits
        for device in [s["metric"]["device"]]
    } >= {
        (each["device_machine"], each["class"], device, int(each["device_memory"][:-1]) * 2**20)
        for device, each in inventory.items()
        if "device_memory" in each
    }
    assert {s["metric"]["device"] for s in limits} == inventory.keys()
    assert "\nflowerbed_round 2.0\n" in asked(machines["server"], "8000/metrics")


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
def test_a_gate_lets_in_whom_it_should(
    machines: dict[str, Host], origin: str, gate: str, certificate: str, answer: str
) -> None:
    command = "python3 -c %s %s %s %s"
    told = machines[origin].check_output(command, LET_IN, *gate.split(), certificate)
    assert told == answer


@pytest.mark.parametrize("name", ["server", "desk"])
def test_a_device_can_start_no_run(machines: dict[str, Host], name: str) -> None:
    """Neither on the coordinator nor on another machine."""
    here = next(each for each in containers(machines[name]) if each.startswith("flowerbed-device-"))

    def run(command: list[str]) -> str:
        line = "docker exec %s " + "%s " * len(command)
        return str(machines[name].check_output(line, here, *command))

    assert_a_device_reaches_the_fleet_api_alone(run)


def test_nothing_but_gates_is_published(machines: dict[str, Host]) -> None:
    ports = {"server": {"9092", "5000"}, "desk": {"8080"}, "pi-1": {"8080"}}
    for name, machine in machines.items():
        for container, described in containers(machine).items():
            outside = {port for address, port in published(described) if address != "127.0.0.1"}
            assert outside == (ports[name] if container == "flowerbed-gate" else set()), container


def test_containers_have_no_more_rights_than_they_need(machines: dict[str, Host]) -> None:
    for machine in machines.values():
        for container in containers(machine).values():
            assert_no_more_rights_than_needed(container)


def test_no_secret_is_shown(machines: dict[str, Host]) -> None:
    """Not when everything is new and Ansible tells all that it does."""
    secrets = INVENTORY / ".secrets"
    texts = {str(path): path.read_text() for path in secrets.rglob("*.key")}
    for name, machine in machines.items():
        found = machine.check_output("find %s/keys -name key", HOME).split()
        found.append(f"{HOME}/certificates/machine.key")
        if name == "server":
            found.append(f"{HOME}/superlink/secrets/superexec")
        texts |= {f"{name}:{path}": machine.file(path).content_string for path in found}
    assert len(texts) == 1 + 3 + 3 + 6 + 1  # authority, machines (there too), devices, executor
    password = secrets / "grafana_admin_password"
    if password.exists():  # where there is a Grafana
        texts[str(password)] = password.read_text()
    log = (EPHEMERAL / "ansible.log").read_text()
    assert "+++ after" in log  # what --diff shows is in it
    assert [name for name, text in texts.items() if secret_in(text.strip()) in log] == []


def test_machines_without_the_build_have_the_registrys_images(machines: dict[str, Host]) -> None:
    for name in ("desk", "pi-1"):
        images = machines[name].check_output("docker images --format '{{.Repository}}'").split()
        assert sorted(images) == [
            f"server.test:5000/flowerbed/{image}" for image in ("application", "cadvisor", "gate")
        ]


def test_preflight_says_what_the_machines_have(tmp_path: Path) -> None:
    played = play("preflight", inventory=INVENTORY, ok=False, device_cpus=99)
    assert played.code != 0
    assert "device_cpus of laptop-1 is 99, and the machine has" in played.output
