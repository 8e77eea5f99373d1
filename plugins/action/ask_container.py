"""Run a command in a container of the lab that prints JSON, and return what it has printed.

An action plugin and not community.docker.docker_container_exec: as a module it would take a second
to reach the machine and to import Docker's library, for a command that takes less.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    """`ask_container: container=… command=…`: the JSON object that the command prints.

    With `input`, a dictionary, the command reads it as JSON from its standard input; `files`, names
    to paths on the control node, are read and added to it under that name, with their texts.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("container", "command", "input", "files"))

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        """Ask."""
        super().run(tmp, task_vars)
        wanted = self._task.args
        told = None
        if "input" in wanted:
            files = {
                name: Path(path).read_text(encoding="utf-8")
                for name, path in (wanted.get("files") or {}).items()
            }
            told = json.dumps({**wanted["input"], "files": files}, default=str).encode()
        options = ["--interactive"] if told else []
        command = ["docker", "exec", *options, wanted["container"], *wanted["command"]]
        result = self._low_level_execute_command(shlex.join(command), in_data=told)
        said = result["stdout"].strip().splitlines()
        try:
            answer: dict[str, Any] = json.loads(said[-1])
        except (IndexError, json.JSONDecodeError):
            reason = result["stderr"].strip() or result["stdout"].strip()
            text = f"{shlex.join(command)} failed ({result['rc']}): {reason}"
            if "No such container" in reason or "is not running" in reason:
                text += " The lab is not deployed here, or not all of it runs: make lab deploys it."
            raise AnsibleActionFail(text) from None
        return {"changed": told is not None, "answer": answer}
