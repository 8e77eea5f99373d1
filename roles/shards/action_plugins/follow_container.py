"""Run a container to its end, and show the lines that it prints as they come.

An action plugin and not community.docker.docker_container alone: a task shows nothing until it
ends, and a data set may take an hour to be downloaded.
"""

import shlex
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()

PATIENCE = 5
"""Seconds that one look waits for the end of the container."""
SHOWN_LINES = 5
"""Lines of output in the message of a container that failed without saying why."""
ERROR = "ERROR: "


def failure(code: int, lines: list[str]) -> str:
    """Why a container failed: what it said last, or its last lines."""
    if lines and lines[-1].startswith(ERROR):
        return lines[-1].removeprefix(ERROR)
    return "\n".join([f"the container ended with exit code {code}:", *lines[-SHOWN_LINES:]])


class ActionModule(ActionBase):
    """`follow_container: …`: the arguments are those of community.docker.docker_container.

    A container of this name that an interrupted playbook has left is replaced; the new one is
    removed when it has ended, however that was.
    """

    TRANSFERS_FILES = False

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        """Start the container, and follow it."""
        result = super().run(tmp, task_vars)
        name = str(self._task.args["name"])
        started = self._execute_module(
            module_name="community.docker.docker_container",
            module_args=self._task.args | {"detach": True, "recreate": True},
            task_vars=task_vars,
        )
        if started.get("failed"):
            return dict(result | started)
        try:
            code, lines = self._follow(name, str((task_vars or {}).get("inventory_hostname", "")))
        finally:
            self._low_level_execute_command(shlex.join(["docker", "rm", "--force", name]))
        if code:
            raise AnsibleActionFail(failure(code, lines))
        return dict(result | {"changed": True})

    def _follow(self, name: str, host: str) -> tuple[int, list[str]]:
        """The exit code of a container and all that it has printed."""
        container = shlex.quote(name)
        # The first line is the exit code, or empty as long as there is none.
        look = f'echo "$(timeout {PATIENCE} docker wait {container})"; docker logs {container} 2>&1'
        shown = 0
        while True:
            found = self._low_level_execute_command(look)
            code, *lines = found["stdout"].splitlines() or [""]
            if found["rc"] != 0:
                reason = found["stderr"].strip() or "\n".join(lines[-SHOWN_LINES:])
                raise AnsibleActionFail(f"the container {name} is lost: {reason}")
            for line in lines[shown:]:
                display.display(f"  {host}: {line}")
            shown = len(lines)
            if code:
                return int(code), lines
