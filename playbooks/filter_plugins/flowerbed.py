"""What playbooks derive from the inventory's groups; roles know nothing of groups."""

from collections.abc import Mapping
from typing import Any


def machine_of(device: str, hostvars: Mapping[str, Any]) -> str:
    """The machine that a device lives on: `device_machine`, by default the host itself."""
    return str(hostvars[device].get("device_machine", device))


def devices_on(
    devices: list[str], machine: str, hostvars: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The devices that live on a machine, each with its partition and share of the data.

    Partitions are numbered by name, so that an inventory in another order deals out the same.
    """
    return [
        {
            "device": device,
            "partition": partition,
            "fraction": float(hostvars[device].get("device_data_fraction", 1.0)),
        }
        for partition, device in enumerate(sorted(devices))
        if machine_of(device, hostvars) == machine
    ]


class FilterModule:
    """Ansible's way to find the filters."""

    def filters(self) -> dict[str, Any]:
        """The filters by name."""
        return {"devices_on": devices_on, "machine_of": machine_of}
