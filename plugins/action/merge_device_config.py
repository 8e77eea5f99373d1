"""Merge `device_config` over a device's groups and the device itself.

Ansible replaces a dictionary by the one of higher precedence. Here every file that has
`device_config` adds its keys: those of all, of the device's groups, parents first, and of the
device. `-e` on the command line is above them all.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ansible.errors import AnsibleError
from ansible.inventory.helpers import sort_groups
from ansible.inventory.manager import InventoryManager
from ansible.plugins.action import ActionBase
from ansible.vars.plugins import get_vars_from_inventory_sources

VARIABLE = "device_config"
LAB_KEYS = (
    *("device", "device-class", "machine", "partition-id", "num-partitions", "cpus", "memory"),
    *("batch-size", "learning-rate", "optimizer", "local-epochs", "data-fraction"),
    *("availability", "out-of-memory-policy"),
)
"""Keys of a device's configuration that the lab itself sets, from other variables."""
_KEY = re.compile(r"[A-Za-z0-9_-]+")

Problem = tuple[str, str]


def merged(layers: Iterable[Any]) -> dict[str, Any]:
    """One dictionary of several, the later ones above; what is no dictionary is left out."""
    config: dict[str, Any] = {}
    for layer in layers:
        config |= dict(layer) if isinstance(layer, Mapping) else {}
    return config


def _fits(value: Any) -> bool:
    """Whether Flower's node configuration takes a value."""
    return isinstance(value, bool | int | str) or (
        isinstance(value, float) and math.isfinite(value)
    )


def config_problems(device: str, config: Mapping[Any, Any]) -> list[Problem]:
    """What Flower's node configuration does not take, or the lab sets itself."""
    problems: list[Problem] = []
    for key, value in config.items():
        text = None
        if key in LAB_KEYS:
            text = f"key '{key}' is the lab's own: write another name"
        elif not isinstance(key, str) or not _KEY.fullmatch(key):
            text = f"key '{key}' is no name: write letters, digits, '-' and '_'"
        elif not _fits(value):
            text = f"{key} is {json.dumps(value)}: write text, a number, true or false"
        elif isinstance(value, str) and '"' in value:
            text = f"{key} is '{value}': Flower takes no double quotes there, write it without them"
        if text:
            problems.append((device, f"{VARIABLE}: {text}"))
    return problems


class ActionModule(ActionBase):
    """`merge_device_config: devices=…`: device to its `device_config`, merged.

    Returns `devices`, and `problems`, pairs of a device and the rest of the sentence.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("devices",))

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        """Read the inventory's files again, by group and host, and merge."""
        super().run(tmp, task_vars)
        hostvars, sources = task_vars["hostvars"], task_vars["ansible_inventory_sources"]
        inventory = InventoryManager(loader=self._loader, sources=list(sources))
        known: dict[tuple[type, str], list[Any]] = {}

        def layers_of(entity: Any) -> list[Any]:
            """What the inventory itself and the files beside it say of a group or host."""
            key = (type(entity), entity.name)
            if key not in known:
                beside = get_vars_from_inventory_sources(self._loader, sources, [entity], "task")
                found = (entity.vars, beside)
                known[key] = [values[VARIABLE] for values in found if VARIABLE in values]
            return known[key]

        configs: dict[str, dict[str, Any]] = {}
        problems: list[Problem] = []
        for device in self._task.args["devices"]:
            host = inventory.get_host(device)
            groups = sort_groups(host.get_groups())
            raw = [layer for entity in (*groups, host) for layer in layers_of(entity)]
            try:
                layers = self._resolved(raw, hostvars, device)
            except AnsibleError as error:
                problems.append((device, f"{VARIABLE} cannot be resolved ({error})"))
                continue
            # Plain values: without Ansible's tags.
            configs[device] = json.loads(json.dumps(merged(layers), default=str))
            problems += config_problems(device, configs[device])
        return {"changed": False, "devices": configs, "problems": problems}

    def _resolved(self, raw: list[Any], hostvars: Any, device: str) -> list[Any]:
        """Layers with their templates resolved, and on top what Ansible itself would take."""
        layers = [*raw, *([hostvars[device][VARIABLE]] if VARIABLE in hostvars[device] else [])]
        if not any(self._templar.is_template(layer) for layer in raw):
            return layers
        templar = self._templar.copy_with_new_env(available_variables=hostvars.raw_get(device))
        return [*(templar.template(layer) for layer in raw), *layers[len(raw) :]]
