"""What playbooks derive from the inventory's groups; roles know nothing of groups."""

import difflib
import hashlib
import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError


def machine_of(device: str, hostvars: Mapping[str, Any]) -> str:
    """The machine that a device lives on: `device_machine`, by default the host itself."""
    return str(hostvars[device].get("device_machine", device))


def devices_on(
    devices: list[str], machine: str, hostvars: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The devices that live on a machine, each with its partition of the data.

    Partitions are numbered by name, so that an inventory in another order deals out the same.
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


OF_ITS_OWN = (
    *("device_class", "device_memory", "device_learning_rate", "device_optimizer"),
    *("device_local_epochs", "device_availability", "device_out_of_memory_policy"),
    *("device_docker_network", "device_shards_directory", "device_certificates_directory"),
    *("device_keys_directory", "device_apps_directory"),
)
"""What the role device takes from the inventory as it is."""


def given_to(
    devices: list[str],
    machine: str,
    hostvars: Mapping[str, Any],
    *,
    everybody: list[str],
    batches: Mapping[str, int],
    configs: Mapping[str, Mapping[str, Any]],
    recipe: list[str],
) -> dict[str, dict[str, Any]]:
    """What the role device is given for each of the devices on a machine.

    Args:
        devices: those that live there.
        machine: its name. What has been found on it is among its variables.
        hostvars: the variables of all hosts.
        everybody: the devices of the lab, among whom partitions are numbered by name.
        batches: examples a training step of each device.
        configs: further configuration of each device, for the app.
        recipe: what the role makes of it, as text.

    Returns:
        The values by device; `definition` is a hash of all that the device's container is made of,
        its shard and its key included.
    """
    here = hostvars[machine]
    partitions = {device: number for number, device in enumerate(sorted(everybody))}
    given = {}
    for device in devices:
        own = hostvars[device]
        shard = here["device_shards"].get(device, {})
        values = {
            "image": here["images_references"].get("application", ""),
            "quota": quota_of(device, hostvars),
            "batch": batches[device],
            "share": shard.get("fraction", 1.0),
            "partition": partitions[device],
            "partitions": len(partitions),
            "app_config": dict(configs[device]),
        }
        parts = [
            *(values, machine, recipe, shard.get("fingerprint")),
            here.get("certificates_identities", {}).get(device),
            [own.get(name) for name in OF_ITS_OWN],
        ]
        text = json.dumps(parts, sort_keys=True)
        given[device] = values | {"definition": hashlib.sha256(text.encode()).hexdigest()}
    return given


def networks_on(
    devices: list[str], machine: str, hostvars: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The containers of the devices that live on a machine, each with its network's limits."""
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
    """Where other machines find a machine: `lab_address`, by default where Ansible does."""
    variables = hostvars[machine]
    return str(variables.get("lab_address", variables.get("ansible_host", machine)))


def names_of(machine: str, hostvars: Mapping[str, Any], coordinators: list[str]) -> list[str]:
    """What a machine's certificate is for: its name, its address, and what runs on it.

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
    """Each device's public key; None where its machine has not been asked (it is out of reach)."""
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
    """The devices that a text names, in the order of their names."""
    return [
        device
        for device in sorted(devices)
        if re.search(rf"(?<![\w.-]){re.escape(device)}(?![\w-]|\.\w)", text)
    ]


def in_reach(devices: list[str], reached: list[str], hostvars: Mapping[str, Any]) -> list[str]:
    """The devices that nothing has happened to, nor to their machines, among hosts `reached`."""
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
) -> list[dict[str, Any]]:
    """The cAdvisor of each machine, as Prometheus on the coordinator reaches it.

    The coordinator's own by the container's name in the lab's Docker network, another machine's by
    its address, where the gate wants to see a certificate. One that is not `reached` is `away`.
    """

    def target(machine: str) -> dict[str, Any]:
        labels = {"machine": machine}
        if machine in coordinators:
            return {"address": "flowerbed-cadvisor:8080", "labels": labels}
        port = hostvars[machine].get("cadvisor_port", 8080)
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
"""What may be struck: `on` what it is, whether it `lasts` until a rejoin, and the defaults."""
_FAULT_KEYS = ("do", "at_round", "at_second", "device", "machine", "seconds", "share")


def fault_problems(
    faults: list[dict[str, Any]],
    groups: Mapping[str, list[str]],
    hostvars: Mapping[str, Any],
    at_once: bool = False,
) -> list[str]:
    """What is wrong with `training_faults`, a line a fault and mistake.

    Args:
        faults: the list.
        groups: the inventory's groups.
        hostvars: the variables of its hosts.
        at_once: whether a fault that says no time is struck at once.
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
    """What is wrong with what shall be struck."""
    name = str(fault.get(on, ""))
    if on == "machine":
        others = sorted(set(groups["machines"]) - set(groups["coordinator"]))
        if name in groups["coordinator"]:
            yield f"the Docker of {name} runs the run itself, which would end: name another machine"
        elif name not in others:
            yield f"there is no machine {name!r}: write one of {', '.join(others) or 'none'}"
    elif on == "device":
        devices = _meant(name, groups)
        if not devices:
            known = [*groups["devices"], *(g for g in groups if _meant(g, groups))]
            near = difflib.get_close_matches(name, known, n=1) or sorted(groups["devices"])
            yield f"there is no device or class {name!r}: write {' or '.join(near)}"
        for device in devices:
            if fault["do"] == "fill_memory" and "device_memory" not in hostvars[device]:
                yield f"{device} has no device_memory: its machine's memory would be filled"


def _meant(name: str, groups: Mapping[str, list[str]]) -> list[str]:
    """The devices of a name, which is one of them or a group of them."""
    if name in groups["devices"]:
        return [name]
    members = sorted(groups.get(name, ()))
    return members if set(members) <= set(groups["devices"]) else []


def strikes_of(
    faults: list[dict[str, Any]], groups: Mapping[str, list[str]], hostvars: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """`training_faults` as the role `training` strikes them: one a target, with its way back.

    What lasts some seconds is followed by a rejoin `after` it. Faults have no problems, see
    `fault_problems`.
    """
    strikes: list[dict[str, Any]] = []
    for fault in faults:
        kind = FAULTS[fault["do"]]
        told: dict[str, Any] = {key: kind[key] for key in ("seconds", "share") if key in kind}
        told |= {key: value for key, value in fault.items() if key not in ("device", "machine")}
        for target in _targets(fault, str(kind["on"]), groups, hostvars):
            strike = told | target | {"id": len(strikes)}
            strikes.append(strike)
            if kind.get("lasts") and "seconds" in told:
                back = {"do": "rejoin", "after": strike["id"], "seconds": told["seconds"]}
                strikes.append(back | target | {"id": len(strikes)})
    return strikes


def _targets(
    fault: Mapping[str, Any], on: str, groups: Mapping[str, list[str]], hostvars: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """What a fault strikes: name, machine, container, and what that has when it is back."""
    devices = groups["devices"]
    if on == "device":
        for device in _meant(fault["device"], groups):
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


class FilterModule:
    """Ansible's way to find the filters."""

    def filters(self) -> dict[str, Any]:
        """The filters by name."""
        return {
            "address_of": address_of,
            "cadvisor_targets": cadvisor_targets,
            "class_of": class_of,
            "devices_on": devices_on,
            "fault_problems": fault_problems,
            "given_to": given_to,
            "images_of": images_of,
            "in_reach": in_reach,
            "keys_of": keys_of,
            "machine_of": machine_of,
            "named_in": named_in,
            "names_of": names_of,
            "networks_on": networks_on,
            "out_of_reach": out_of_reach,
            "quota_of": quota_of,
            "served": served,
            "strikes_of": strikes_of,
        }
