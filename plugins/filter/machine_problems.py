"""What is wrong with the machines of a lab, from what was seen of them and what they must bear.

A problem is a pair: the machine it is about, and the rest of the sentence.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ansible.module_utils.common.text.formatters import human_to_bytes

Problem = tuple[str, str]

ARCHITECTURES = ("x86_64", "aarch64")
"""Those that the application's dependencies are built for."""
# A listener there takes the port of the loopback address, where the lab publishes its own.
_IN_THE_WAY = ("127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0")  # noqa: S104
_SHOWN_CHARACTERS = 300
_CONTROLLERS = {
    "memory": (
        "add cgroup_enable=memory cgroup_memory=1 to the kernel's command line (Raspberry Pi OS: "
        "the one line of /boot/firmware/cmdline.txt) and reboot"
    ),
    "cpu": "boot a kernel with CONFIG_CFS_BANDWIDTH, and without cgroup_disable=cpu",
}


def machine_problems(
    seen: Mapping[str, Any],
    machine: str,
    plan: Mapping[str, Any],
    *,
    required: bool = True,
    disk_minimum: str,
    data_minimum: str,
    clock_skew_maximum: float,
) -> list[Problem]:
    """All that is wrong with a machine.

    Args:
        seen: what `inspect_machine` returned.
        machine: its name.
        plan: what it must bear, see `machine_plans`.
        required: whether the lab cannot do without it where it is out of reach.
        disk_minimum: free space for the engine, such as 8g, where the lab has no container yet.
        data_minimum: the same for the shards.
        clock_skew_maximum: seconds.
    """
    if "state" not in seen:
        return [(machine, _silent(machine, seen))] if required or "unreached" not in seen else []
    state, engine = seen["state"], seen["engine"]
    needs = {engine["root"]: ("images", disk_minimum, "preflight_disk_minimum")}
    needs[plan["data"]] = ("data", data_minimum, "preflight_data_minimum")
    texts = [
        *_system(state),
        *_engine(engine, plan["source"]),
        *_limits(state, plan["devices"]),
        *_memory(state, plan["devices"]),
        *_networks(state, plan["devices"]),
        *_ports(state, engine, plan["ports"]),
        # What stands has its images and its data.
        *(() if any(c["ours"] for c in engine["containers"]) else _disks(state, needs)),
        *_clock(seen["skew"], clock_skew_maximum),
        *(
            f"training_dataset is '{path}', which is no directory there: copy the data set to the "
            "machine, or write a name on the hub"
            for path in state["missing"]
        ),
    ]
    return [(machine, text) for text in texts]


def machine_warnings(
    seen: Mapping[str, Any], machine: str, plan: Mapping[str, Any], *, required: bool = True
) -> list[Problem]:
    """What works, but not as somebody may think; see `machine_problems`."""
    if "state" not in seen:
        if required or "unreached" not in seen:
            return []
        devices = ", ".join(sorted(plan["devices"])) or "none"
        text = f"{_silent(machine, seen)}. It is left out, with its devices ({devices})"
        return [(machine, text)]
    cores = seen["state"]["cores"]
    promised = sum(device["cpus"] or 0 for device in plan["devices"].values())
    if promised <= cores + 1e-9:
        return []
    text = (
        f"device_cpus of its {len(plan['devices'])} devices add up to {promised:g} cores, and it "
        f"has {cores}: they slow each other down whenever all of them train"
    )
    return [(machine, text)]


def _silent(machine: str, seen: Mapping[str, Any]) -> str:
    """The sentence on a machine that could not be examined."""
    unreached = seen.get("unreached")
    reason = unreached or seen.get("unanswered") or ""
    shown, lower = _short(reason), reason.lower()
    if any(word in lower for word in ("sudo", "become", "privilege")):
        return (
            f"Ansible cannot become root there ({shown}): give --ask-become-pass, or let "
            "ansible_user use sudo without a password"
        )
    if unreached:
        return (
            f"cannot be reached ({shown}): check ansible_host, ansible_user and the key; try "
            f"'ansible {machine} -m ansible.builtin.ping'"
        )
    if "python" in lower:
        return (
            f"Python does not answer there ({shown}): install python3, or name the right one in "
            "ansible_python_interpreter"
        )
    return f"cannot be examined ({shown}): try 'ansible {machine} -m ansible.builtin.ping'"


def _engine(engine: Mapping[str, Any], source: str) -> Iterable[str]:
    """An engine that nobody will install."""
    if source == "archive" and engine["silence"]:
        yield (
            f"the Docker Engine does not answer there ({_short(engine['silence'])}), and "
            "images_source is archive, which brings images alone: first install and start the "
            "engine, and python3-requests (Debian: docker.io, since Debian 13 with docker-cli)"
        )


def _system(state: Mapping[str, Any]) -> Iterable[str]:
    if not state["root"]:
        yield (
            "Ansible is not root there: set ansible_become to true for it, and give "
            "--ask-become-pass where sudo asks for a password"
        )
    if state["system"] != "Linux":
        yield f"runs {state['system']}: containers need Linux"
    elif state["architecture"] not in ARCHITECTURES or state["bits"] != 64:  # noqa: PLR2004
        yield (
            f"runs a {state['bits']}-bit system on {state['architecture']}, and the application is "
            f"for {' and '.join(ARCHITECTURES)} with 64 bits: install a 64-bit system (Raspberry "
            "Pi OS: the 64-bit image)"
        )


def _limits(state: Mapping[str, Any], devices: Mapping[str, Any]) -> Iterable[str]:
    """Limits that the kernel cannot keep, or the engine refuses."""
    for limit, controller in (("memory", "memory"), ("cpus", "cpu")):
        limited = sorted(name for name, device in devices.items() if device[limit])
        if limited and controller not in state["controllers"]:
            yield (
                f"the kernel's {controller} controller is off (cgroup v{state['cgroup']}), and "
                f"{_some(limited)} have device_{limit}: {_CONTROLLERS[controller]}"
            )
    cores = state["cores"]
    for name, device in sorted(devices.items()):
        if (device["cpus"] or 0) <= cores:
            continue
        if device["limit"] == "device_speed":
            yield (
                f"device_speed of {name} takes {device['cpus']:g} of its cores (at their "
                f"lab_core_speed), and the machine has {cores}: give {name} another "
                f"device_machine, or device_cpus of {cores} or less"
            )
        else:
            yield (
                f"device_cpus of {name} is {device['cpus']:g}, and the machine has {cores} cores: "
                f"write {cores} or less, or give {name} another device_machine"
            )


def _networks(state: Mapping[str, Any], devices: Mapping[str, Any]) -> Iterable[str]:
    """Limits of networks for which the kernel has no queueing discipline."""
    limited: dict[tuple[str, str], list[str]] = {}
    for name, device in sorted(devices.items()):
        # A rate alone takes tbf; anything else takes netem, and the rate with it.
        others = [limit for limit in device["network"] if limit != "device_network_rate"]
        for limit in others or device["network"]:
            kind = "netem" if others else "tbf"
            limited.setdefault((kind, limit), []).append(name)
    for (kind, limit), names in limited.items():
        if kind not in state["qdiscs"]:
            yield (
                f"{limit} of {_some(names)} needs the queueing discipline {kind}, which the "
                f"kernel does not have: install its module sch_{kind} (Ubuntu: "
                "linux-modules-extra, the RHEL family: kernel-modules-extra), remove "
                f"{limit}, or give the device another device_machine"
            )


def _memory(state: Mapping[str, Any], devices: Mapping[str, Any]) -> Iterable[str]:
    limits = {name: device["memory"] for name, device in devices.items() if device["memory"]}
    promised = sum(limits.values())
    if promised > state["memory"]:
        largest = sorted(limits, key=lambda name: (-limits[name], name))
        shares = _some([f"{name} {_size(limits[name])}" for name in largest])
        yield (
            f"device_memory of {shares} add up to {_size(promised)}, and the machine has "
            f"{_size(state['memory'])}: take {_size(promised - state['memory'])} away, or give "
            "some of them another device_machine"
        )


def _ports(
    state: Mapping[str, Any], engine: Mapping[str, Any], ports: Mapping[str, int]
) -> Iterable[str]:
    """Ports that somebody else has; the lab's own containers keep theirs in a second run."""
    for name, port in ports.items():
        holders = [c for c in engine["containers"] if port in c["ports"]]
        if any(container["ours"] for container in holders):
            continue
        blocking = [
            listener
            for listener in state["listeners"]
            if listener["port"] == port and listener["address"] in _IN_THE_WAY
        ]
        if not blocking:
            continue
        who = f"the container {holders[0]['name']}" if holders else blocking[0]["process"]
        yield (
            f"{name} is {port}, which is taken{f' ({who})' if who else ''}: stop what listens "
            f"there, or set {name} to a free port"
        )


def _disks(state: Mapping[str, Any], needs: Mapping[str, tuple[str, str, str]]) -> Iterable[str]:
    """File systems with too little room; two directories on one share what is free there."""
    filesystems: dict[int, list[str]] = {}
    for path in needs:
        filesystems.setdefault(state["disks"][path]["filesystem"], []).append(path)
    for paths in filesystems.values():
        wanted = sum(human_to_bytes(needs[path][1]) for path in paths)
        free = min(state["disks"][path]["free"] for path in paths)
        if free < wanted:
            parts = " and ".join(
                f"{needs[path][1]} for the {needs[path][0]} in {path} ({needs[path][2]})"
                for path in paths
            )
            yield (
                f"has {_size(free)} of disk free and needs {parts}: free some, or put the "
                "directories on a larger disk"
            )


def _clock(skew: float, maximum: float) -> Iterable[str]:
    if abs(skew) > maximum:
        yield (
            f"the clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the control "
            f"node's, and {maximum:g} s are allowed (preflight_clock_skew_maximum): turn time "
            "synchronisation on, as with 'timedatectl set-ntp true'"
        )


def _short(text: str) -> str:
    """What somebody else said, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 2] + " …"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"  # noqa: PLR2004


def _size(number: int) -> str:
    """Bytes for people."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


class FilterModule:
    """Ansible's way to find the filters."""

    def filters(self) -> dict[str, Any]:
        """The filters by name."""
        return {
            "machine_problems": machine_problems,
            "machine_warnings": machine_warnings,
        }
