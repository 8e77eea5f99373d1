"""Faults on a schedule: what is refused, what is injected when, and with which commands."""

import math
import re
from typing import Any

import pytest
from repository import ROOT, load

inventory = load(ROOT / "plugins/filter/inventory.py")
follow_run = load(ROOT / "plugins/action/follow_run.py")
module = load(ROOT / "plugins/modules/inject_fault.py")

GROUPS = {
    "machines": ["server", "desk"],
    "coordinator": ["server"],
    "devices": ["phone-1", "phone-2", "pi"],
    "phone": ["phone-2", "phone-1"],
    "board": ["pi"],
}
HOSTVARS: dict[str, dict[str, Any]] = {
    "server": {},
    "desk": {"lab_core_speed": 2},
    "phone-1": {"device_machine": "server", "device_speed": 0.5, "device_memory": "1g"},
    "phone-2": {
        "device_machine": "desk",
        "device_speed": 0.5,
        "device_memory": "1g",
        "device_network_rate": "20mbit",
    },
    "pi": {"device_machine": "desk"},
}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"do": "explode", "at_round": 1}, "do is explode: write one of disconnect, "),
        ({"at_round": 1, "device": "pi"}, "do is missing"),
        ({"do": "kill", "device": "pi"}, "write when: at_round"),
        ({"do": "kill", "device": "pi", "at_round": 1, "at_second": 1}, "write when: at_round"),
        ({"do": "kill", "device": "pi", "at_round": 0}, "at_round is 0: write a number of 1 or m"),
        ({"do": "kill", "device": "pi", "at_second": "3"}, "at_second is '3': write a number"),
        ({"do": "kill", "device": "pi", "at_round": 1, "seconds": 0}, "seconds is 0: write a n"),
        ({"do": "slow", "device": "pi", "at_round": 1, "share": 2}, "share is 2: write what is"),
        ({"do": "kill", "device": "phone-3", "at_round": 1}, "write phone-1|write phone-2"),
        ({"do": "kill", "at_round": 1}, "there is no device or class ''"),
        ({"do": "kill", "device": "machines", "at_round": 1}, "no device or class 'machines'"),
        ({"do": "kill", "device": "pi", "when": 1, "at_round": 1}, "there is no when: write one"),
        ({"do": "kill", "device": "pi", "machine": "desk", "at_round": 1}, "machine is of no use"),
        (
            {"do": "restart_docker", "machine": "dusk", "at_round": 1},
            "no machine 'dusk': write one of desk",
        ),
        ({"do": "restart_docker", "machine": "server", "at_round": 1}, "runs the run itself"),
        ({"do": "fill_memory", "device": "pi", "at_round": 1}, "pi has no device_memory"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(fault: dict[str, Any], said: str) -> None:
    (problem,) = inventory.fault_problems([fault], GROUPS, HOSTVARS)
    assert problem.startswith("fault 1 (")
    assert re.search(said, problem)


def test_faults_of_every_kind_are_accepted() -> None:
    faults = [
        {"do": kind, "at_second": 2.5} | ({told["on"]: "phone"} if told["on"] == "device" else {})
        for kind, told in inventory.FAULTS.items()
        if kind != "restart_docker"
    ]
    faults.append({"do": "restart_docker", "machine": "desk", "at_round": 3})
    assert inventory.fault_problems(faults, GROUPS, HOSTVARS) == []
    assert inventory.fault_problems([{"do": "kill", "device": "pi"}], GROUPS, HOSTVARS, True) == []
    assert {one["do"] for one in inventory.injections_of(faults, GROUPS, HOSTVARS)} == set(
        inventory.FAULTS
    )


def test_the_module_knows_every_kind() -> None:
    documented = re.findall(r"^      - (\w+)$", module.DOCUMENTATION, re.MULTILINE)
    assert sorted(inventory.FAULTS) == documented


def test_a_class_is_all_its_devices_each_with_its_way_back() -> None:
    faults = [{"do": "pause", "device": "phone", "at_round": 2, "seconds": 9}]
    planned = inventory.injections_of(faults, GROUPS, HOSTVARS)
    assert [(one["do"], one["target"], one["machine"], one["id"]) for one in planned] == [
        ("pause", "phone-1", "server", 0),
        ("rejoin", "phone-1", "server", 1),
        ("pause", "phone-2", "desk", 2),
        ("rejoin", "phone-2", "desk", 3),
    ]
    assert [one.get("after") for one in planned] == [None, 0, None, 2]
    assert planned[3]["seconds"] == 9
    # Half a reference core is a quarter of a core that is twice as fast.
    assert (planned[1]["cpus"], planned[3]["cpus"]) == (0.5, 0.25)
    assert (planned[1]["networks"], planned[3]["networks"]) == (
        [],
        [{"name": "flowerbed-device-phone-2", "rate": "20mbit"}],
    )


def test_a_machine_has_all_its_networks_back() -> None:
    faults = [{"do": "restart_docker", "machine": "desk", "at_round": 2}]
    (planned,) = inventory.injections_of(faults, GROUPS, HOSTVARS)
    assert (planned["target"], planned["machine"]) == ("desk", "desk")
    assert [one["name"] for one in planned["networks"]] == [
        "flowerbed-device-phone-2",
        "flowerbed-device-pi",
    ]


def _status(**changes: Any) -> dict[str, Any]:
    status = {
        "state": "running",
        "now": 1030.0,
        "begun": 2,
        "round_started": 1025.0,
        "history": [{"started": 1000.0}],
    }
    return status | changes


@pytest.mark.parametrize(
    ("fault", "status", "seconds"),
    [
        ({"at_round": 2}, _status(), 0),
        ({"at_round": 3}, _status(), math.inf),
        ({"at_second": 20}, _status(), -10),
        ({"at_second": 40}, _status(), 10),
        ({"at_second": 10}, _status(begun=1, history=[]), 5),
        ({"at_second": 10}, _status(begun=0, history=[], round_started=None), math.inf),
        ({"after": 4, "seconds": 20}, _status(), 15),
        ({"after": 5, "seconds": 20}, _status(), math.inf),
        ({"seconds": 20}, _status(begun=0), 0),
        ({}, _status(state="completed"), 0),
        ({"at_round": 1}, _status(state="completed"), math.inf),
        ({"after": 4, "seconds": 20}, _status(state="failed"), math.inf),
    ],
)
def test_when_a_fault_is_due(fault: dict[str, Any], status: dict[str, Any], seconds: float) -> None:
    assert follow_run.due_in(fault, {"4": 1025.0}, status) == seconds


def test_faults_in_effect_are_undone_in_the_end() -> None:
    planned = inventory.injections_of(
        [
            {"do": "kill", "device": "phone-1", "at_round": 1},
            {"do": "pause", "device": "phone-2", "at_round": 1, "seconds": 5},
            {"do": "slow", "device": "pi", "at_round": 9},
            {"do": "restart_superlink", "at_round": 1},
        ],
        GROUPS,
        HOSTVARS,
    )
    injected = {"0": 10.0, "1": 11.0, "2": 16.0, "4": 17.0}
    down = inventory.left_down(planned, injected)
    assert [(one["do"], one["target"]) for one in down] == [
        ("rejoin", "phone-1"),
        ("rejoin", "superlink"),
    ]
    assert inventory.left_down(planned, {}) == []


def _inspected(**state: Any) -> dict[str, Any]:
    return {
        "State": {"Paused": False, "Running": True} | state,
        "HostConfig": {"NanoCpus": 500_000_000},
        "NetworkSettings": {"Networks": {"flowerbed": {}}},
    }


def _commands(do: str, state: dict[str, Any], **told: Any) -> list[str]:
    options = {"do": do, "container": "c", "network": "flowerbed", "cpus": 0.5, "share": 0.25}
    commands = module.commands_for(options | {"seconds": 20} | told, state, cores=4)
    return [" ".join(command) for command in commands]


@pytest.mark.parametrize(
    ("do", "command"),
    [
        ("kill", "kill c"),
        ("restart_superlink", "kill c"),
        ("pause", "pause c"),
        ("disconnect", "network disconnect flowerbed c"),
        ("slow", "update --cpus 0.125 c"),
        ("fill_memory", "exec --detach c python -m flowerbed.device.pressure 20"),
    ],
)
def test_the_commands_of_docker(do: str, command: str) -> None:
    assert _commands(do, _inspected()) == [command]


def test_a_container_recovers_from_any_fault() -> None:
    assert _commands("rejoin", _inspected()) == []
    assert _commands("rejoin", _inspected(Paused=True)) == ["unpause c"]
    away = _inspected(Running=False) | {"NetworkSettings": {"Networks": {}}}
    assert _commands("rejoin", away) == ["network connect flowerbed c", "start c"]
    slowed = _inspected() | {"HostConfig": {"NanoCpus": 125_000_000}}
    assert _commands("rejoin", slowed) == ["update --cpus 0.5 c"]
    # Docker takes no limit away.
    assert _commands("rejoin", slowed, cpus=0) == ["update --cpus 4 c"]
    unlimited = _inspected() | {"HostConfig": {"NanoCpus": 0}}
    assert _commands("rejoin", unlimited, cpus=0) == []
    assert _commands("slow", unlimited) == ["update --cpus 1 c"]
