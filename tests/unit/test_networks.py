"""Limits of networks: what is asked of tc, and what its answers say."""

import json
from typing import Any

import pytest
from repository import ROOT, load

shaping = load(ROOT / "plugins/modules/shape_networks.py")
machine_state = load(ROOT / "plugins/modules/machine_state.py")
playbooks = load(ROOT / "plugins/filter/inventory.py")

# What tc has printed, 6.1 and for netem 6.15: seconds, shares, bytes a second.
UNLIMITED = '[{"kind":"noqueue","handle":"0:","root":true,"refcnt":2,"options":{}}]'
TBF = (
    '[{"kind":"tbf","handle":"8005:","root":true,"refcnt":3,'
    '"options":{"rate":2500000,"burst":12500,"lat":200000}}]'
)
NETEM = (
    '[{"kind":"netem","handle":"8001:","root":true,"refcnt":2,"options":{"limit":1000,'
    '"delay":{"delay":0.04,"jitter":0.005,"correlation":0},'
    '"loss-random":{"loss":0.005,"correlation":0},'
    '"rate":{"rate":2500000,"packetoverhead":0,"cellsize":0,"celloverhead":0},'
    '"seed":8541289704354762557,"ecn":false,"gap":0}}]'
)
# Loss alone, 12.345678 %; and all of them, as odd as they come.
LOSS = (
    '[{"kind":"netem","handle":"8003:","root":true,"refcnt":2,"options":{"limit":1000,'
    '"loss-random":{"loss":0.123457,"correlation":0},'
    '"seed":12153313333920596792,"ecn":false,"gap":0}}]'
)
ODD = (
    '[{"kind":"netem","handle":"8004:","root":true,"refcnt":2,"options":{"limit":1000,'
    '"delay":{"delay":0.123457,"jitter":1e-06,"correlation":0},'
    '"loss-random":{"loss":1,"correlation":0},'
    '"rate":{"rate":15432098,"packetoverhead":0,"cellsize":0,"celloverhead":0},'
    '"seed":17905124319466268474,"ecn":false,"gap":0}}]'
)
OTHER = '[{"kind":"fq_codel","handle":"1:","root":true,"refcnt":2,"options":{}}]'
ALL = {"rate": "20mbit", "delay": "40ms", "jitter": "5ms", "loss": 0.5}
ODD_LIMITS = {"rate": "123456789bit", "delay": "123457us", "jitter": "1us", "loss": 100}


@pytest.mark.parametrize(
    ("wanted", "printed"),
    [
        ({}, UNLIMITED),
        ({}, ""),
        ({}, "[]"),
        ({"rate": "20mbit"}, TBF),
        (ALL, NETEM),
        ({"loss": 12.345678}, LOSS),
        (ODD_LIMITS, ODD),
    ],
)
def test_what_the_kernel_keeps_is_what_was_asked(wanted: dict[str, Any], printed: str) -> None:
    assert shaping.read(printed).is_close(shaping.parse(wanted))


@pytest.mark.parametrize("limit", ALL)
def test_every_limit_counts(limit: str) -> None:
    other = ALL | {limit: {"rate": "21mbit", "loss": 0.51}.get(limit, "41ms")}
    without = {name: value for name, value in ALL.items() if name != limit}
    without |= {"jitter": "0ms"} if limit == "delay" else {}
    for changed in (other, without):
        assert not shaping.read(NETEM).is_close(shaping.parse(changed)), changed


def test_another_discipline_is_no_limit_that_is_known() -> None:
    assert shaping.read(OTHER) is None


def test_a_rate_alone_needs_no_netem() -> None:
    arguments = shaping.discipline(shaping.parse({"rate": "20mbit"}))
    assert arguments == ["tbf", "rate", "20000000bit", "burst", "12500b", "latency", "200ms"]
    assert shaping.discipline(shaping.parse({"rate": "8kbit"}))[4] == "10000b"
    assert shaping.discipline(shaping.NO_LIMITS) == []
    assert shaping.discipline(shaping.parse({"rate": "20mbit", "delay": "0ms"}))[0] == "tbf"


def test_netem_takes_everything_else_and_the_rate_with_it() -> None:
    arguments = shaping.discipline(shaping.parse(ALL))
    assert arguments[:4] == ["netem", "delay", "40000us", "5000us"]
    assert arguments[4:] == ["loss", "0.500000%", "rate", "20000000bit"]


@pytest.mark.parametrize("wrong", [{"rate": "20"}, {"rate": "20mb"}, {"delay": "40"}])
def test_a_value_without_unit_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="is no number with one of the units"):
        shaping.parse(wrong)


def test_six_digits_of_a_long_delay_are_enough() -> None:
    printed = ODD.replace("0.123457", "1.23457")
    assert shaping.read(printed).is_close(shaping.parse(ODD_LIMITS | {"delay": "1234567us"}))
    assert not shaping.read(printed).is_close(shaping.parse(ODD_LIMITS | {"delay": "1234us"}))


def test_a_jitter_of_no_delay_is_refused() -> None:
    with pytest.raises(ValueError, match="jitter is 5ms, and there is no delay"):
        shaping.parse({"jitter": "5ms"})


class Kernel:
    """Both ends of one container's network, as `ip` and `tc` tell of them."""

    def __init__(self, inside: str, outside: str) -> None:
        self.kept = {"eth0": inside, "veth7": outside}
        self.commands: list[list[str]] = []

    def run(self, command: list[str]) -> str:
        """Answer as the programs do."""
        if command[0] == "nsenter":
            assert command[1] == "--net=/proc/7/ns/net"
            if "tc" in command:
                assert command[-1] == "eth0" or "eth0" in command
                return self._tc(command[2:])
            return json.dumps([
                {"ifindex": 1, "ifname": "lo"},
                {"ifindex": 8, "link_index": 9, "ifname": "eth0"},
            ])  # fmt: skip
        if command[0] == "ip":
            return json.dumps([{"ifindex": 1, "ifname": "lo"}, {"ifindex": 9, "ifname": "veth7"}])
        return self._tc(command)

    def _tc(self, command: list[str]) -> str:
        interface = command[command.index("dev") + 1]
        if "show" not in command:
            self.commands.append(command)
            self.kept[interface] = TBF if "add" in command else UNLIMITED
        return self.kept[interface]


@pytest.mark.parametrize(
    ("inside", "outside", "wanted", "done"),
    [
        (TBF, TBF, {"rate": "20mbit"}, []),
        (UNLIMITED, UNLIMITED, {}, []),
        (UNLIMITED, UNLIMITED, {"rate": "20mbit"}, ["add eth0", "add veth7"]),
        (TBF, UNLIMITED, {"rate": "20mbit"}, ["add veth7"]),
        (NETEM, TBF, {"rate": "20mbit"}, ["del eth0", "add eth0"]),
        (TBF, OTHER, {}, ["del eth0", "del veth7"]),
    ],
)
def test_only_what_differs_is_changed(
    inside: str, outside: str, wanted: dict[str, str], done: list[str]
) -> None:
    for pretend in (True, False):
        kernel = Kernel(inside, outside)
        limits = shaping.parse(wanted)
        found = shaping.ends(7, shaping.interfaces(kernel.run), kernel.run)
        assert shaping.shape("c", found, limits, kernel.run, pretend=pretend) == bool(done)
        changes = [f"{command[2]} {command[4]}" for command in kernel.commands]
        assert changes == ([] if pretend else done)


def test_a_kernel_that_keeps_other_limits_is_an_error() -> None:
    kernel = Kernel(UNLIMITED, UNLIMITED)
    found = shaping.ends(7, shaping.interfaces(kernel.run), kernel.run)
    with pytest.raises(RuntimeError, match="c: eth0 was given"):
        shaping.shape("c", found, shaping.parse({"rate": "5mbit"}), kernel.run, pretend=False)


def test_a_container_without_a_network_of_its_own_is_an_error() -> None:
    found = shaping.ends(7, {}, lambda _: "[]")
    with pytest.raises(RuntimeError, match="no network of its own"):
        shaping.shape("c", found, shaping.NO_LIMITS, lambda _: "[]", pretend=False)


def test_the_kernels_disciplines_are_tried() -> None:
    assert set(machine_state.qdiscs()) <= {"netem", "tbf"}
    assert not machine_state._has_qdisc("no_such", [])


def test_a_class_is_as_fast_on_a_slow_machine_as_on_a_fast_one() -> None:
    hostvars = {
        "fast": {"lab_core_speed": 2.0},
        "slow": {"lab_core_speed": 0.5},
        "plain": {},
        "a": {"device_speed": 0.6, "device_machine": "fast"},
        "b": {"device_speed": 0.6, "device_machine": "slow"},
        "c": {"device_speed": 0.6, "device_machine": "plain"},
        "d": {"device_speed": 0.6, "device_cpus": 0.25, "device_machine": "slow"},
        "e": {"device_machine": "slow"},
    }
    quotas = {device: playbooks.quota_of(device, hostvars) for device in "abcde"}
    assert quotas == {"a": 0.3, "b": 1.2, "c": 0.6, "d": 0.25, "e": 0.0}


def test_a_machine_is_told_the_limits_of_its_own_devices() -> None:
    hostvars = {
        "a": {"device_machine": "m", "device_network_rate": "1mbit", "device_network_loss": 2},
        "b": {"device_machine": "m"},
        "c": {"device_machine": "other"},
    }
    assert playbooks.networks_on(["b", "a", "c"], "m", hostvars) == [
        {"name": "flowerbed-device-a", "rate": "1mbit", "loss": 2},
        {"name": "flowerbed-device-b"},
    ]
