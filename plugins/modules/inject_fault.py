"""Inject a fault into a container or a machine's Docker Engine, or undo one.

The module uses Docker's command line from outside, so that the target cannot prepare for it.

It runs on the machine's own Python and must work with Python 3.9.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: inject_fault
short_description: Inject a fault into a container, or undo it
description:
  - With rejoin, a container recovers from any fault. One without a fault is left unchanged.
  - After restart_docker on a machine without systemd the engine is stopped; start it afterwards.
author: Flowerbed
options:
  do:
    description:
      - The fault. With slow the container has fewer cores; fill_memory starts a process in the
        container that allocates memory until the kernel kills a process.
    type: str
    required: true
    choices:
      - disconnect
      - fill_memory
      - kill
      - pause
      - rejoin
      - restart_docker
      - restart_superlink
      - slow
  container:
    description: Name of the container; not for restart_docker.
    type: str
    default: ""
  network:
    description: Docker network that the container is disconnected from and connected to.
    type: str
    default: flowerbed
  cpus:
    description: Cores of the container after it has recovered; 0 for all.
    type: float
    default: 0
  share:
    description: Share of its cores that the container keeps with slow.
    type: float
    default: 0.25
  seconds:
    description: Seconds for which its memory is filled.
    type: float
    default: 0
"""

EXAMPLES = r"""
- name: Pause a device
  inject_fault:
    do: pause
    container: flowerbed-device-one
"""

RETURN = r"""
commands:
  description: What was done, by Docker's command line but for the engine itself.
  type: list
  elements: list
  returned: always
"""

_FREEZES = 10
"""More attempts to pause a container: runc cannot freeze one of cgroup v1 in the moments in which
its quota holds it back."""
_LEAST_CPUS = 0.01
"""Docker's own least number of cores."""
_ENGINE_PID = Path("/run/docker.pid")
_PATIENCE = 30.0
"""Seconds in which an engine stops after it was asked to."""


def commands_for(options: dict[str, Any], state: dict[str, Any], cores: int) -> list[list[str]]:
    """Docker's commands for what is options.

    Args:
        options: the module's options.
        state: what `docker inspect` says of the container.
        cores: of the machine.
    """
    container, network = options["container"], options["network"]
    limit = state["HostConfig"]["NanoCpus"] / 1e9
    if options["do"] == "pause":
        return [["pause", container]]
    if options["do"] == "disconnect":
        return [["network", "disconnect", network, container]]
    if options["do"] == "slow":
        left = max(_LEAST_CPUS, options["share"] * (limit or cores))
        return [["update", "--cpus", f"{left:g}", container]]
    if options["do"] == "fill_memory":
        fill = ["python", "-m", "flowerbed.device.pressure", f"{options['seconds']:g}"]
        return [["exec", "--detach", container, *fill]]
    if options["do"] != "rejoin":
        return [["kill", container]]
    commands = []
    if state["State"]["Paused"]:
        commands.append(["unpause", container])
    if network not in state["NetworkSettings"]["Networks"]:
        commands.append(["network", "connect", network, container])
    # A container that has had a limit cannot be without one again: all cores are as good.
    wanted = options["cpus"] or cores
    if limit and round(limit - wanted, 6):
        commands.append(["update", "--cpus", f"{wanted:g}", container])
    if not state["State"]["Running"]:
        commands.append(["start", container])
    return commands


def _restart_engine(module: AnsibleModule) -> list[str]:
    """With systemd, restart it. Without, end it: who knows how it is started starts it."""
    if Path("/run/systemd/system").is_dir():
        command = ["systemctl", "restart", "docker"]
        module.run_command(command, check_rc=True)
        return command
    pid = int(_ENGINE_PID.read_text())
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _PATIENCE
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            module.fail_json(msg=f"dockerd (process {pid}) has not ended in {_PATIENCE:.0f} s")
        time.sleep(0.2)
    return ["kill", str(pid)]


def main() -> None:
    """Do it."""
    kinds = "disconnect fill_memory kill pause rejoin restart_docker restart_superlink slow"
    module = AnsibleModule(
        argument_spec={
            "do": {"type": "str", "required": True, "choices": kinds.split()},
            "container": {"type": "str", "default": ""},
            "network": {"type": "str", "default": "flowerbed"},
            "cpus": {"type": "float", "default": 0},
            "share": {"type": "float", "default": 0.25},
            "seconds": {"type": "float", "default": 0},
        }
    )

    def docker(*arguments: str) -> str:
        code, out, error = module.run_command(["docker", *arguments])
        more = _FREEZES if arguments[0] == "pause" else 0
        while code and more:
            code, out, error = module.run_command(["docker", *arguments])
            more -= 1
        if code:
            module.fail_json(msg=error.strip() or f"docker {' '.join(arguments)} ended with {code}")
        return str(out)

    if module.params["do"] == "restart_docker":
        module.exit_json(changed=True, commands=[_restart_engine(module)])
    (state,) = json.loads(docker("inspect", module.params["container"]))
    cores = int(docker("info", "--format", "{{.NCPU}}"))
    commands = commands_for(module.params, state, cores)
    for command in commands:
        docker(*command)
    module.exit_json(changed=bool(commands), commands=commands)


if __name__ == "__main__":
    main()
