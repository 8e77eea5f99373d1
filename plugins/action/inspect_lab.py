"""List the lab's containers and images of layers on a machine.

An action plugin and not community.docker.docker_host_info: this is asked before each run, and the
module takes a second to reach the machine and to import Docker's library.
"""

import json
import shlex
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

_CONTAINERS = ["docker", "ps", "--all", "--filter", "label=flowerbed.part"]
_VERSION = ["docker", "version"]
_LAYERS = ["docker", "images", "--filter", "label=flowerbed.image=layer"]


def labels_of(text: str) -> dict[str, str]:
    """Labels as `docker ps` writes them; no value of the lab's own has a comma in it."""
    return dict(label.split("=", 1) for label in text.split(",") if "=" in label)


class ActionModule(ActionBase):
    """`inspect_lab:`: what is there.

    Returns:
        `containers`, each with its `Names`, `Image`, `State` and `Labels`, as docker_host_info has
        them, `layers`, references of images, and `engine`, the version of the Docker Engine.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS: frozenset[str] = frozenset()

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        """Ask the engine."""
        super().run(tmp, task_vars)
        containers = [
            {
                "Names": [f"/{told['Names']}"],
                "Image": told["Image"],
                "State": told.get("State", ""),
                "Labels": labels_of(told["Labels"]),
            }
            for told in self._lines(_CONTAINERS)
        ]
        layers = [f"{told['Repository']}:{told['Tag']}" for told in self._lines(_LAYERS)]
        (version,) = self._lines(_VERSION)
        engine = version["Server"]["Version"]
        return {"changed": False, "containers": containers, "layers": layers, "engine": engine}

    def _lines(self, command: list[str]) -> list[dict[str, Any]]:
        text = shlex.join([*command, "--format", "{{json .}}"])
        result = self._low_level_execute_command(text)
        if result["rc"] != 0:
            reason = result["stderr"].strip() or result["stdout"].strip()
            raise AnsibleActionFail(f"the Docker Engine does not answer: {reason}")
        return [json.loads(line) for line in result["stdout_lines"] if line]
