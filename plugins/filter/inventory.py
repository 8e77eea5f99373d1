"""Values that playbooks derive from the inventory: addresses, classes, quotas, faults."""

import difflib
import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError


def machine_of(device: str, hostvars: Mapping[str, Any]) -> str:
    """The machine that runs a device: `device_machine`, by default the host itself."""
    return str(hostvars[device].get("device_machine", device))


def devices_on(
    devices: list[str], machine: str, hostvars: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The devices of a machine, each with its partition of the data.

    Partitions are numbered by sorted names: the order of the inventory does not matter.
    """
    return [
        {"device": device, "partition": partition}
        for partition, device in enumerate(sorted(devices))
        if machine_of(device, hostvars) == machine
    ]


def quota_of(device: str, hostvars: Mapping[str, Any]) -> float:
    """Cores of its machine that a device may use; 0 for all of them.

    `device_cpus` as it is, or else `device_speed`, in reference cores, by the speed of the
    machine's own cores, so that a class is as fast on a slow machine as on a fast one.
    """
    variables = hostvars[device]
    if "device_cpus" in variables:
        return float(variables["device_cpus"])
    if "device_speed" not in variables:
        return 0.0
    core = float(hostvars[machine_of(device, hostvars)].get("lab_core_speed", 1.0))
    return round(float(variables["device_speed"]) / core, 2)


def device_values(
    devices: list[str],
    machine: str,
    hostvars: Mapping[str, Any],
    *,
    everybody: list[str],
    batches: Mapping[str, int],
    configs: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Values that the lab derives for each device of a machine, for the role `device`.

    Args:
        devices: the devices of the machine.
        machine: its name. The facts that roles have set for it are among its variables.
        hostvars: the variables of all hosts.
        everybody: all devices of the lab. Partitions are numbered by their sorted names.
        batches: batch size by device.
        configs: further node configuration by device, for the app.
    """
    here = hostvars[machine]
    partitions = {device: number for number, device in enumerate(sorted(everybody))}
    shards, keys = here["device_shards"], here.get("certificates_identities", {})
    return {
        device: {
            "image": here["images_references"].get("application", ""),
            "quota": quota_of(device, hostvars),
            "batch": batches[device],
            "share": shards.get(device, {}).get("fraction", 1.0),
            "partition": partitions[device],
            "partitions": len(partitions),
            "app_config": dict(configs[device]),
            "shard": shards.get(device, {}).get("fingerprint", ""),
            "key": keys.get(device, ""),
        }
        for device in devices
    }


def networks_on(
    devices: list[str], machine: str, hostvars: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The containers of a machine's devices, each with its network's limits."""
    return [
        {"name": f"flowerbed-device-{device}"}
        | {
            limit: hostvars[device][f"device_network_{limit}"]
            for limit in ("rate", "delay", "jitter", "loss")
            if f"device_network_{limit}" in hostvars[device]
        }
        for device in sorted(devices)
        if machine_of(device, hostvars) == machine
    ]


def address_of(machine: str, hostvars: Mapping[str, Any]) -> str:
    """The address at which other machines reach a machine: `lab_address`, else Ansible's."""
    variables = hostvars[machine]
    return str(variables.get("lab_address", variables.get("ansible_host", machine)))


def names_of(machine: str, hostvars: Mapping[str, Any], coordinators: list[str]) -> list[str]:
    """The names in a machine's certificate: its own, its address, and those of its services.

    Returns:
        Subject alternative names with their kind, as in DNS:name and IP:192.0.2.1.
    """
    names = [machine, address_of(machine, hostvars), "localhost", "127.0.0.1"]
    if machine in coordinators:
        names.append("flowerbed-superlink")
    return [f"{_kind_of(name)}:{name}" for name in dict.fromkeys(names)]


def _kind_of(name: str) -> str:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "DNS"
    return "IP"


def served(references: Mapping[str, str], images: list[str]) -> dict[str, str]:
    """Repository and tag of each image in the coordinator's registry.

    The tag is the hash in what the coordinator's engine calls the image: its tag where the lab has
    built it, its digest where it was pulled.
    """
    return {image: f"flowerbed/{image}:{references[image].split(':')[-1]}" for image in images}


_IMAGES = {
    "superlink": "application",
    **{part: part for part in ("cadvisor", "gate", "grafana", "prometheus")},
}
"""Parts of the lab and the image that their container runs."""


def images_of(containers: list[dict[str, Any]]) -> dict[str, str]:
    """What the engine calls the images that containers of a lab run, by name.

    Args:
        containers: as docker_host_info lists them.
    """
    parts = {(each.get("Labels") or {}).get("flowerbed.part"): each["Image"] for each in containers}
    images = {image: parts[part] for part, image in _IMAGES.items() if part in parts}
    return {"application": parts["device"], **images} if "device" in parts else images


def keys_of(
    devices: list[str], machines: list[str], hostvars: Mapping[str, Any]
) -> dict[str, str | None]:
    """Each device's public key; None if its machine cannot be reached."""
    known: dict[str, str] = {}
    for machine in machines:
        known |= hostvars[machine].get("certificates_public_keys", {})
    return {device: known.get(device) for device in sorted(devices)}


# Classes by what they depend on: going through Ansible's list of hosts again for each device would
# take longer than all the rest.
_classes: dict[tuple[tuple[str, int], ...], list[str]] = {}


def class_of(own: list[str], groups: Mapping[str, list[str]]) -> str:
    """The class of a device: the one of its groups that holds devices only.

    Ansible tells a playbook who is in a group, not which group is below which. A group of devices
    that is no class (a rack, say) makes two; the inventory then names the class by device_class.

    Args:
        own: names of the groups that the device is in.
        groups: the inventory's groups.

    Raises:
        AnsibleFilterError: there is none or more than one; the message says what to do.
    """
    key = tuple((group, len(groups[group])) for group in own)
    if key not in _classes:
        devices = set(groups.get("devices", ()))
        others = [group for group in own if group not in ("devices", "machines", "coordinator")]
        _classes[key] = [group for group in others if devices.issuperset(groups[group])]
    classes = _classes[key]
    if not classes:
        raise AnsibleFilterError(
            "in no device class: put the device into a child group of devices, named after its "
            "class, that holds devices only"
        )
    if len(classes) > 1:
        raise AnsibleFilterError(
            f"in {len(classes)} device classes, {', '.join(classes)}: take the device out of all "
            "but one, or write in group_vars/<class>.yml device_class: <class>"
        )
    return classes[0]


def named_in(devices: list[str], text: str) -> list[str]:
    """The devices whose names occur in a text, sorted."""
    return [
        device
        for device in sorted(devices)
        if re.search(rf"(?<![\w.-]){re.escape(device)}(?![\w-]|\.\w)", text)
    ]


def in_reach(devices: list[str], reached: list[str], hostvars: Mapping[str, Any]) -> list[str]:
    """The devices that are `reached` and whose machines are."""
    return [
        device
        for device in devices
        if device in reached and machine_of(device, hostvars) in reached
    ]


def out_of_reach(
    devices: list[str], machines: list[str], reached: list[str], hostvars: Mapping[str, Any]
) -> dict[str, list[str]]:
    """The other devices by their machines, and machines without a device that are not reached."""
    away: dict[str, list[str]] = {machine: [] for machine in machines if machine not in reached}
    for device in sorted(set(devices) - set(in_reach(devices, reached, hostvars))):
        away.setdefault(machine_of(device, hostvars), []).append(device)
    return dict(sorted(away.items()))


def cadvisor_targets(
    machines: list[str],
    hostvars: Mapping[str, Any],
    coordinators: list[str],
    reached: list[str],
    port: int,
) -> list[dict[str, Any]]:
    """The cAdvisor of each machine, as Prometheus on the coordinator reaches it.

    Prometheus reaches the coordinator's own by the container's name in the lab's Docker network,
    and another machine's at its address, where the gate asks for a certificate. A machine that is
    not `reached` is `away`.
    """

    def target(machine: str) -> dict[str, Any]:
        labels = {"machine": machine}
        if machine in coordinators:
            return {"address": "flowerbed-cadvisor:8080", "labels": labels}
        away = {} if machine in reached else {"away": True}
        return {
            "address": f"{address_of(machine, hostvars)}:{port}",
            "labels": labels | {"__scheme__": "https"},
        } | away

    return [{"job": "cadvisor", **target(machine)} for machine in machines]


FAULTS: dict[str, dict[str, Any]] = {
    "disconnect": {"on": "device", "lasts": True},
    "fill_memory": {"on": "device", "seconds": 20.0},
    "kill": {"on": "device", "lasts": True},
    "pause": {"on": "device", "lasts": True},
    "rejoin": {"on": "device"},
    "restart_docker": {"on": "machine"},
    "restart_superlink": {"on": "", "lasts": True, "seconds": 5.0},
    "slow": {"on": "device", "lasts": True, "share": 0.25},
}
"""Kinds of faults: what each acts `on`, whether it `lasts` until a rejoin, and its defaults."""
_FAULT_KEYS = ("do", "at_round", "at_second", "device", "machine", "seconds", "share")


def fault_problems(
    faults: list[dict[str, Any]],
    groups: Mapping[str, list[str]],
    hostvars: Mapping[str, Any],
    at_once: bool = False,
) -> list[str]:
    """What is wrong with `training_faults`, one line for each mistake.

    Args:
        faults: the list.
        groups: the inventory's groups.
        hostvars: the variables of its hosts.
        at_once: whether a fault without a time is injected at once.
    """
    return [
        f"fault {number} ({', '.join(f'{k}: {v}' for k, v in fault.items())}): {text}"
        for number, fault in enumerate(faults, 1)
        for text in _problems_of(fault, groups, hostvars, at_once=at_once)
    ]


def _problems_of(
    fault: Mapping[str, Any],
    groups: Mapping[str, list[str]],
    hostvars: Mapping[str, Any],
    *,
    at_once: bool,
) -> Iterator[str]:
    for key in set(fault) - set(_FAULT_KEYS):
        yield f"there is no {key}: write one of {', '.join(_FAULT_KEYS)}"
    kind = FAULTS.get(str(fault.get("do")))
    if kind is None:
        yield f"do is {fault.get('do', 'missing')}: write one of {', '.join(FAULTS)}"
        return
    times = [key for key in ("at_round", "at_second") if key in fault]
    if len(times) > 1 or not (times or at_once):
        yield "write when: at_round (from 1) or at_second (since the first round began)"
    for key, least in (("at_round", 1), ("at_second", 0), ("seconds", 0.1)):
        value = fault.get(key, least)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            yield f"{key} is {value!r}: write a number of {least} or more"
    share = fault.get("share", 0.5)
    if not isinstance(share, int | float) or not 0 < share < 1:
        yield f"share is {share!r}: write what is left of its cores, between 0 and 1"
    for key in {"device", "machine"} - {kind["on"]}:
        if key in fault:
            yield f"{key} is of no use here: remove it"
    yield from _target_problems(fault, str(kind["on"]), groups, hostvars)


def _target_problems(
    fault: Mapping[str, Any], on: str, groups: Mapping[str, list[str]], hostvars: Mapping[str, Any]
) -> Iterator[str]:
    """What is wrong with the target of a fault."""
    name = str(fault.get(on, ""))
    if on == "machine":
        others = sorted(set(groups["machines"]) - set(groups["coordinator"]))
        if name in groups["coordinator"]:
            yield f"the Docker of {name} runs the run itself, which would end: name another machine"
        elif name not in others:
            yield f"there is no machine {name!r}: write one of {', '.join(others) or 'none'}"
    elif on == "device":
        devices = _named(name, groups)
        if not devices:
            known = [*groups["devices"], *(g for g in groups if _named(g, groups))]
            near = difflib.get_close_matches(name, known, n=1) or sorted(groups["devices"])
            yield f"there is no device or class {name!r}: write {' or '.join(near)}"
        for device in devices:
            if fault["do"] == "fill_memory" and "device_memory" not in hostvars[device]:
                yield f"{device} has no device_memory: its machine's memory would be filled"


def _named(name: str, groups: Mapping[str, list[str]]) -> list[str]:
    """The devices that a name means: one of them, or a group of them."""
    if name in groups["devices"]:
        return [name]
    members = sorted(groups.get(name, ()))
    return members if set(members) <= set(groups["devices"]) else []


def injections_of(
    faults: list[dict[str, Any]], groups: Mapping[str, list[str]], hostvars: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """`training_faults` as the role `training` injects them: one for each target.

    A fault that lasts some seconds is followed by a rejoin `after` it. The faults must have no
    problems, see `fault_problems`.
    """
    injections: list[dict[str, Any]] = []
    for fault in faults:
        kind = FAULTS[fault["do"]]
        values: dict[str, Any] = {key: kind[key] for key in ("seconds", "share") if key in kind}
        values |= {key: value for key, value in fault.items() if key not in ("device", "machine")}
        for target in _targets(fault, str(kind["on"]), groups, hostvars):
            injection = values | target | {"id": len(injections)}
            injections.append(injection)
            if kind.get("lasts") and "seconds" in values:
                back = {"do": "rejoin", "after": injection["id"], "seconds": values["seconds"]}
                injections.append(back | target | {"id": len(injections)})
    return injections


def _targets(
    fault: Mapping[str, Any], on: str, groups: Mapping[str, list[str]], hostvars: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Targets of a fault: name, machine, container, and the limits after it has recovered."""
    devices = groups["devices"]
    if on == "device":
        for device in _named(fault["device"], groups):
            machine, container = machine_of(device, hostvars), f"flowerbed-device-{device}"
            limits = networks_on([device], machine, hostvars)
            yield {
                "target": device,
                "machine": machine,
                "container": container,
                "cpus": quota_of(device, hostvars),
                "networks": [limit for limit in limits if len(limit) > 1],
            }
    elif on == "machine":
        machine = fault["machine"]
        limits = networks_on(devices, machine, hostvars)
        yield {"target": machine, "machine": machine, "networks": limits}
    else:
        yield {
            "target": "superlink",
            "machine": next(iter(groups["coordinator"])),
            "container": "flowerbed-superlink",
            "networks": [],
        }


def left_down(
    injections: list[dict[str, Any]], injected: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A rejoin for each target that has not recovered from its last fault.

    Args:
        injections: all that were planned.
        injected: time of each injection so far, by its id.
    """
    last: dict[str, dict[str, Any]] = {}
    done = [each for each in injections if str(each["id"]) in injected]
    for injection in sorted(done, key=lambda each: injected[str(each["id"])]):
        last[injection["target"]] = injection
    up = ("rejoin", "fill_memory", "restart_docker")
    return [dict(each, do="rejoin") for each in last.values() if each["do"] not in up]


class FilterModule:
    """Ansible's way to find the filters."""

    def filters(self) -> dict[str, Any]:
        """The filters by name."""
        return {
            "address_of": address_of,
            "cadvisor_targets": cadvisor_targets,
            "class_of": class_of,
            "device_values": device_values,
            "devices_on": devices_on,
            "fault_problems": fault_problems,
            "images_of": images_of,
            "in_reach": in_reach,
            "injections_of": injections_of,
            "keys_of": keys_of,
            "left_down": left_down,
            "machine_of": machine_of,
            "named_in": named_in,
            "names_of": names_of,
            "networks_on": networks_on,
            "out_of_reach": out_of_reach,
            "quota_of": quota_of,
            "served": served,
        }
