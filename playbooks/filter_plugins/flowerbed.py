"""What playbooks derive from the inventory's groups; roles know nothing of groups."""

import ipaddress
import re
from collections.abc import Mapping
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


def cadvisor_targets(
    machines: list[str], hostvars: Mapping[str, Any], coordinators: list[str]
) -> list[dict[str, Any]]:
    """The cAdvisor of each machine, as Prometheus on the coordinator reaches it.

    The coordinator's own by the container's name in the lab's Docker network, another machine's by
    its address, where the gate wants to see a certificate.
    """

    def target(machine: str) -> dict[str, Any]:
        labels = {"machine": machine}
        if machine in coordinators:
            return {"address": "flowerbed-cadvisor:8080", "labels": labels}
        port = hostvars[machine].get("cadvisor_port", 8080)
        return {
            "address": f"{address_of(machine, hostvars)}:{port}",
            "labels": labels | {"__scheme__": "https"},
        }

    return [{"job": "cadvisor", **target(machine)} for machine in machines]


class FilterModule:
    """Ansible's way to find the filters."""

    def filters(self) -> dict[str, Any]:
        """The filters by name."""
        return {
            "address_of": address_of,
            "cadvisor_targets": cadvisor_targets,
            "class_of": class_of,
            "devices_on": devices_on,
            "keys_of": keys_of,
            "machine_of": machine_of,
            "named_in": named_in,
            "names_of": names_of,
            "networks_on": networks_on,
            "quota_of": quota_of,
            "served": served,
        }
