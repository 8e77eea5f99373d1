"""Run a container of the lab, or leave it alone where it runs as defined."""

import hashlib
import json
from typing import Any

from ansible.plugins.action import ActionBase

DEFINITION = "flowerbed.definition"
"""The label with a hash of all that a container was made of."""


def definition_of(arguments: dict[str, Any]) -> str:
    """A hash of the arguments of community.docker.docker_container."""
    return hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()


class ActionModule(ActionBase):
    """`run_container: …`: as community.docker.docker_container, which takes a second to compare.

    Whether it runs is what the role docker has found (`docker_engine`); without that it is run.
    """

    TRANSFERS_FILES = False

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        """Compare, and have it run."""
        result = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        definition = definition_of(arguments)
        running = {
            (name, (found["Labels"] or {}).get(DEFINITION))
            for found in (task_vars or {}).get("docker_engine", {}).get("containers", [])
            if found["State"] == "running"
            for name in found["Names"] or []
        }
        if (f"/{arguments['name']}", definition) in running:
            return dict(result | {"changed": False})
        arguments["labels"] = arguments.get("labels", {}) | {DEFINITION: definition}
        answer = self._execute_module(
            module_name="community.docker.docker_container",
            module_args=arguments,
            task_vars=task_vars,
        )
        return dict(result | answer)
