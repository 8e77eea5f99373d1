"""Run a container of the lab: a service that stays, or a program that ends."""

import hashlib
import json
import shlex
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()

SPEC = "flowerbed.spec"
"""Label that holds a hash of the arguments that a service was started with."""
PREFIX = "flowerbed-"
HARDENED: dict[str, Any] = {
    "read_only": True,
    "tmpfs": ["/tmp"],  # noqa: S108 - of the container
    "cap_drop": ["ALL"],
    "security_opts": ["no-new-privileges"],
    "pids_limit": 256,
}
"""What every container has unless the task says otherwise."""
SERVICE: dict[str, Any] = {
    "restart_policy": "unless-stopped",
    "log_driver": "json-file",
    "log_options": {"max-size": "10m", "max-file": "3"},
}
# An interrupted playbook may have left a container of the same name.
PROGRAM: dict[str, Any] = {"recreate": True, "network_mode": "none"}

PATIENCE = 5
"""Seconds that one look waits for the end of a program."""
SHOWN_LINES = 5
"""Lines of output in the message of a program that failed without saying why."""
ERROR = "ERROR: "


def container_arguments(task: dict[str, Any]) -> dict[str, Any]:
    """Arguments of community.docker.docker_container, from those of `run_container`.

    The label `flowerbed.part` is by default the container's name without its prefix.
    """
    task = dict(task)
    defaults = PROGRAM if task.pop("wait", False) else SERVICE
    labels = {"flowerbed.part": str(task["name"]).removeprefix(PREFIX)} | task.get("labels", {})
    return {**HARDENED, **defaults, **task, "labels": labels}


def spec_hash(arguments: dict[str, Any]) -> str:
    """A hash of the arguments of community.docker.docker_container."""
    return hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()


def failure(code: int, lines: list[str]) -> str:
    """Why a program failed: the error that it printed last, or its last lines."""
    if lines and lines[-1].startswith(ERROR):
        return lines[-1].removeprefix(ERROR)
    return "\n".join([f"the container ended with exit code {code}:", *lines[-SHOWN_LINES:]])


class ActionModule(ActionBase):
    """`run_container: name=… image=… …`: arguments are those of docker_container.

    A service is left alone if it runs with the same arguments. They are compared by a hash with
    what the role docker has found on the machine (`docker_engine`), because docker_container takes
    a second to compare.

    With `wait: true` the container is a program. The action shows the lines that it prints, waits
    for its end and removes it. A last line in JSON is the program's `answer`, and is not shown.
    """

    TRANSFERS_FILES = False

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        """Start the container where that is needed, and wait for the end of a program."""
        result = super().run(tmp, task_vars)
        variables = task_vars or {}
        arguments = container_arguments(self._task.args)
        if self._task.args.get("wait"):
            if self._task.check_mode:
                return dict(result | {"changed": True})
            return dict(result | self._run_program(arguments, variables))
        machine = self._machine(variables)
        spec = spec_hash(arguments)
        if _runs(machine, str(arguments["name"]), spec):
            return dict(result | {"changed": False})
        if self._task.check_mode and not machine.get("docker_running", True):
            return dict(result | {"changed": True})
        arguments["labels"] |= {SPEC: spec}
        return dict(result | self._docker_container(arguments, variables))

    def _machine(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        """Variables of the machine that the task is delegated to, or else of the task's host."""
        if self._task.delegate_to:
            return dict(task_vars["hostvars"].raw_get(self._task.delegate_to))
        return task_vars

    def _docker_container(self, arguments: Any, task_vars: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._execute_module(
            module_name="community.docker.docker_container",
            module_args=arguments,
            task_vars=task_vars,
        )
        return answer

    def _run_program(self, arguments: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        name = str(arguments["name"])
        started = self._docker_container(arguments, task_vars)
        if started.get("failed"):
            return started
        try:
            code, lines = self._follow(name, str(task_vars.get("inventory_hostname", "")))
        finally:
            self._low_level_execute_command(shlex.join(["docker", "rm", "--force", name]))
        if code:
            raise AnsibleActionFail(failure(code, lines))
        answer = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
        return {"changed": True, "answer": answer}

    def _follow(self, name: str, host: str) -> tuple[int, list[str]]:
        """Show what a container prints; return its exit code and all lines."""
        container = shlex.quote(name)
        # The first line is the exit code; it is empty while the container runs.
        look = f'echo "$(timeout {PATIENCE} docker wait {container})"; docker logs {container} 2>&1'
        shown = 0
        while True:
            found = self._low_level_execute_command(look)
            code, *lines = found["stdout"].splitlines() or [""]
            if found["rc"] != 0:
                reason = found["stderr"].strip() or "\n".join(lines[-SHOWN_LINES:])
                raise AnsibleActionFail(f"the container {name} is lost: {reason}")
            for line in lines[shown:]:
                if not line.startswith("{"):
                    display.display(f"  {host}: {line}")
            shown = len(lines)
            if code:
                return int(code), lines


def _runs(machine: dict[str, Any], name: str, spec: str) -> bool:
    """Whether a container of this name and specification runs on the machine."""
    return any(
        found["State"] == "running"
        and f"/{name}" in (found["Names"] or [])
        and (found["Labels"] or {}).get(SPEC) == spec
        for found in machine.get("docker_engine", {}).get("containers", [])
    )
