"""Look at a machine: its engine, its state and its clock, whether or not it can be reached.

An action plugin and not tasks: a machine that does not answer is a finding like the others, and the
clock can only be compared where the time on this side is read just before and after.
"""

import time
from typing import Any

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase

DOCKER_ROOT = "/var/lib/docker"


def clock_skew(before: float, remote: float, after: float) -> float:
    """Seconds that a clock is certainly ahead of this one, behind it if negative.

    Args:
        before: time here when the question was sent.
        remote: time there when it was answered.
        after: time here when the answer came. A remote time between the two is no skew: how long
            the way to the machine takes and how long the way back is not known.
    """
    return min(remote - before, 0.0) or max(remote - after, 0.0)


def engine_facts(answer: dict[str, Any]) -> dict[str, Any]:
    """What counts of docker_host_info's answer; nothing where no engine answered.

    Returns:
        Its `silence`, the reason why it does not answer, or ""; its directory `root`, and a list of
        its `containers`, each with its `name`, its published `ports`, and whether it is `ours`.
    """
    if answer.get("failed") or "host_info" not in answer:
        silence = str(answer.get("msg") or "no reason given")
        return {"silence": silence, "root": DOCKER_ROOT, "containers": []}
    return {
        "silence": "",
        "root": answer["host_info"].get("DockerRootDir") or DOCKER_ROOT,
        "containers": [
            {
                "name": container["Names"][0].removeprefix("/"),
                "ours": "flowerbed.part" in (container.get("Labels") or {}),
                "ports": sorted(
                    {port["PublicPort"] for port in container["Ports"] if "PublicPort" in port}
                ),
            }
            for container in answer.get("containers", [])
        ],
    }


class ActionModule(ActionBase):
    """`inspect_machine: ports=… disks=… directories=…`: never fails.

    Returns `state` (see the module machine_state), `engine` (see `engine_facts`) and `skew` (see
    `clock_skew`); or `unreached` or `unanswered`, with the reason, and none of them. The engine's
    directory is one of the disks.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("ports", "disks", "directories"))

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        """Ask the engine, then the machine."""
        super().run(tmp, task_vars)
        try:
            return {"changed": False} | self._look(dict(self._task.args), task_vars)
        except AnsibleConnectionFailure as error:
            return {"changed": False, "unreached": str(error).strip()}
        except AnsibleError as error:
            return {"changed": False, "unanswered": str(error).strip()}

    def _look(self, wanted: dict[str, Any], task_vars: Any) -> dict[str, Any]:
        answer = self._execute_module(
            module_name="community.docker.docker_host_info",
            module_args={"containers": True, "containers_all": True, "verbose_output": True},
            task_vars=task_vars,
        )
        engine = engine_facts(answer)
        wanted["disks"] = [engine["root"], *wanted["disks"]]
        before = time.time()
        answer = self._execute_module(
            module_name="machine_state", module_args=wanted, task_vars=task_vars
        )
        after = time.time()
        if answer.get("failed"):
            said = (answer.get("msg"), answer.get("module_stderr"), answer.get("module_stdout"))
            return {"unanswered": " ".join(part.strip() for part in said if part)}
        state = answer["state"]
        return {
            "state": state,
            "engine": engine,
            "skew": clock_skew(before, state["time"], after),
        }
