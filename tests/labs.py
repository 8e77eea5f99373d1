"""What the tests of labs have in common: playbooks run as a user runs them, containers, secrets."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repository import ROOT, program

DATA = Path(os.environ.get("FLOWERBED_TEST_DATA", ROOT.parent / "shared" / "data" / "cifar10"))
AS_A_USER_SEES_IT = {
    "ANSIBLE_FORCE_COLOR": "false",
    "ANSIBLE_VERBOSITY": "0",
    "ANSIBLE_STDOUT_CALLBACK": "steps",
}
"""Whatever Molecule, which may run the tests, wants of its own playbooks."""
TASK_BY_TASK = {"ANSIBLE_STDOUT_CALLBACK": "default"}
"""Ansible's ordinary output, for tests that look for single tasks."""


@dataclass
class Played:
    """What a playbook printed and how it ended."""

    output: str
    code: int

    @property
    def changed(self) -> int:
        """Changed tasks over all hosts, from the recap."""
        counts = re.findall(r"^\S+\s+: ok=\d+\s+changed=(\d+)", self.output, re.MULTILINE)
        assert counts, self.output[-2000:]
        return sum(map(int, counts))


def show(
    command: Sequence[str],
    *,
    ok: bool = True,
    env: dict[str, str] | None = None,
    until: str = "",
) -> Played:
    """Run what runs a playbook; its output goes to the terminal as it comes.

    With `until`, kill it with all that it has started, a second after it has said so. This may be
    the name of a task: the output is then Ansible's ordinary one.
    """
    name = " ".join(command[:2])
    print(f"\n$ {' '.join(command)}", flush=True)
    lines = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | AS_A_USER_SEES_IT | (TASK_BY_TASK if until else {}) | (env or {}),
        start_new_session=True,
    ) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
            if until and until in line:
                time.sleep(1)
                os.killpg(process.pid, signal.SIGKILL)
    played = Played("".join(lines), process.returncode)
    if until:
        assert played.code == -signal.SIGKILL, f"{name} has not come to '{until}'"
    else:
        assert played.code == 0 or not ok, f"{name} failed: see the output above"
    return played


def play(
    playbook: str,
    *arguments: str,
    inventory: Path = ROOT / "inventory/local",
    ok: bool = True,
    env: dict[str, str] | None = None,
    until: str = "",
    **variables: Any,
) -> Played:
    """Run a playbook as a user does; see `show`."""
    command = [program("ansible-playbook"), f"playbooks/{playbook}.yml", "-i", str(inventory)]
    command += ["-e", json.dumps(variables), *arguments]
    return show(command, ok=ok, env=env, until=until)


def assert_no_more_rights_than_needed(container: dict[str, Any]) -> None:
    """Of a container that stays, as the engine describes it."""
    name = container["Name"].removeprefix("/")
    host, config = container["HostConfig"], container["Config"]
    assert not host["Privileged"], name
    assert host["CapDrop"] == ["ALL"], name
    assert not host["CapAdd"], name
    assert host["ReadonlyRootfs"], name
    assert any(option.startswith("no-new-privileges") for option in host["SecurityOpt"]), name
    assert host["PidsLimit"], name
    assert host["LogConfig"]["Config"]["max-size"], name
    assert host["RestartPolicy"]["Name"] == "unless-stopped", name
    assert config["Healthcheck"], name
    if name != "flowerbed-cadvisor":  # reads every cgroup, and holds no capability
        assert config["User"] not in ("", "0", "root"), name
        assert not any("docker.sock" in bind for bind in host["Binds"] or []), name


def published(container: dict[str, Any]) -> set[tuple[str, str]]:
    """Address and port of all that a container publishes."""
    return {
        (binding["HostIp"], binding["HostPort"])
        for bindings in (container["HostConfig"]["PortBindings"] or {}).values()
        for binding in bindings
    }


def secret_in(text: str) -> str:
    """The line of a secret's file that no other key has and that is not public."""
    lines = text.splitlines()
    if len(lines) == 1:
        return lines[0]
    # OpenSSH writes the public half first and padding last, OpenSSL the private half first.
    return lines[-3] if "OPENSSH" in lines[0] else lines[1]


ANSWERS = """
import http.client, json, socket, ssl, sys
context = ssl.create_default_context(cafile="/ca.crt")
told = {}
for path in sys.argv[1:]:
    link = http.client.HTTPSConnection("flowerbed-superlink", 9092, timeout=10, context=context)
    link.request("POST", path, b"", {"Content-Type": "application/x-protobuf"})
    told[path] = link.getresponse().status
try:
    told["superlink"] = socket.gethostbyname("superlink")
except OSError:
    told["superlink"] = ""
print(json.dumps(told))
"""
"""Asks the SuperLink as a device that shows no key; and for the address of the SuperLink itself."""


def assert_a_device_reaches_the_fleet_api_alone(run: Callable[[list[str]], str]) -> None:
    """Of the three APIs that the SuperLink has on one port.

    Args:
        run: runs a command in a device's container and returns what it prints.
    """
    denied = [
        *("/v1/control/list-nodes", "/v1/control/register-node", "/v1/control/start-run"),
        *("/v1/runtime/get-nodes", "/health", "/", "/v1/fleet/", "//v1/control/list-nodes"),
        *("/v1/fleet/../control/list-nodes", "/v1/fleet/%2e%2e/control/list-nodes"),
        *("/v1/fleet/pull-messages/../../control/list-nodes", "/V1/FLEET/pull-messages"),
    ]
    told = json.loads(run(["python", "-c", ANSWERS, "/v1/fleet/pull-messages", *denied]))
    assert told.pop("superlink") == ""
    assert told.pop("/v1/fleet/pull-messages") in (400, 401, 415)
    assert told == dict.fromkeys(denied, 403)
