"""Give devices' networks their rate, delay, jitter and loss, from outside their containers.

A container's network is a pair of interfaces: one end in the container's namespace, the other on
the machine. What leaves an end goes through its queueing discipline, so the same one at both ends
limits both directions, and the container needs no right to it. One discipline an end: `tbf` where
only a rate is asked for, which every kernel has, and `netem` for everything else
(https://man7.org/linux/man-pages/man8/tc-netem.8.html).

It runs on the machine's own Python, so it stays with what Python 3.9 knows.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: shape_networks
short_description: Limit the networks of running containers from outside
description:
  - Reads what the kernel has, changes what differs, and reads it again. Nothing is restarted.
  - Limits last as long as the container runs; a container that does not run is passed over.
  - Needs root, docker, and of iproute2 tc and ip; where these are missing, it says so and does
    nothing. In check mode it changes nothing.
author: Flowerbed
options:
  containers:
    description: Containers with their limits, each of them in either direction.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the container.
        type: str
        required: true
      rate:
        description: Bits a second, such as 20mbit; not given, no limit.
        type: str
      delay:
        description: What a packet is held back, such as 40ms; a round trip takes it twice.
        type: str
      jitter:
        description: By how much that varies, such as 5ms.
        type: str
      loss:
        description: Percent of packets that are lost.
        type: float
"""

EXAMPLES = r"""
- name: Shape the networks of two containers
  shape_networks:
    containers:
      - {name: slow, rate: 20mbit, delay: 40ms, jitter: 5ms, loss: 0.5}
      - {name: unlimited}
"""

RETURN = r"""
shaped:
  description: Containers whose network was changed, or would be.
  type: list
  elements: str
  returned: always
idle:
  description: Containers that do not run.
  type: list
  elements: str
  returned: always
missing:
  description: Programs without which nothing can be done.
  type: list
  elements: str
  returned: where some are missing
"""

RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
# The longest that a packet waits for its turn where there is only a rate, seconds.
_PATIENCE = 0.2
# What may go out at once there: what the rate makes of so many seconds, and some packets at least.
_BURST, _LEAST_BURST = 0.005, 10_000
# The kernel counts time in ticks and loss in steps of 2^-32, and tc prints six digits of either.
_CLOSE = {"rate": 0, "delay": 2e-6, "jitter": 2e-6, "loss": 1e-6}
_DIGITS = 5e-6

_LINKS = ["ip", "-json", "link", "show"]

Run = Callable[[list[str]], str]
"""Runs a command and returns what it printed."""


class Limits(NamedTuple):
    """What one direction has; 0 for none.

    Attributes:
        rate: bytes a second, as the kernel counts.
        delay: seconds.
        jitter: seconds.
        loss: share of the packets, from 0 to 1.
    """

    rate: int = 0
    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0

    def is_close(self, other: Limits) -> bool:
        """Whether the kernel could not tell one from the other."""
        return all(
            abs(getattr(self, name) - getattr(other, name))
            <= (close and max(close, _DIGITS * getattr(other, name)))
            for name, close in _CLOSE.items()
        )


NO_LIMITS = Limits()


def number(text: str, units: dict[str, float]) -> float:
    """A number with a unit, in the unit that counts 1.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", text)
    if not found or found[2] not in units:
        raise ValueError(f"'{text}' is no number with one of the units {', '.join(units)}")
    return float(found[1]) * units[found[2]]


def parse(wanted: dict[str, Any]) -> Limits:
    """The limits that a container is to have.

    Raises:
        ValueError: a value is none, or there is a jitter of no delay, of which tc tells nothing.
    """
    limits = Limits(
        rate=int(number(wanted.get("rate") or "0bit", RATES) / 8),
        delay=number(wanted.get("delay") or "0s", TIMES),
        jitter=number(wanted.get("jitter") or "0s", TIMES),
        loss=float(wanted.get("loss") or 0.0) / 100,
    )
    if limits.jitter and not limits.delay:
        raise ValueError(
            f"jitter is {wanted['jitter']}, and there is no delay that could vary: give one, too"
        )
    return limits


def discipline(limits: Limits) -> list[str]:
    """The arguments of `tc qdisc add … root` that make these limits; none for no limits."""
    rate = ["rate", f"{limits.rate * 8}bit"] if limits.rate else []
    if limits.delay or limits.jitter or limits.loss:
        delay, jitter = (f"{seconds * 1e6:.0f}us" for seconds in (limits.delay, limits.jitter))
        return ["netem", "delay", delay, jitter, "loss", f"{limits.loss * 100:.6f}%", *rate]
    if not rate:
        return []
    burst = max(int(limits.rate * _BURST), _LEAST_BURST)
    return ["tbf", *rate, "burst", f"{burst}b", "latency", f"{_PATIENCE * 1000:.0f}ms"]


def read(told: str) -> Limits | None:
    """The limits in what `tc -json qdisc show dev …` printed; None for another discipline."""
    root = next((entry for entry in json.loads(told or "[]") if entry.get("root")), None)
    kind = root["kind"] if root else "noqueue"
    options = root.get("options", {}) if root else {}
    if kind == "noqueue":
        return NO_LIMITS
    if kind == "tbf":
        return Limits(rate=options["rate"])
    if kind == "netem":
        delay = options.get("delay", {})
        return Limits(
            rate=options.get("rate", {}).get("rate", 0),
            delay=delay.get("delay", 0.0),
            jitter=delay.get("jitter", 0.0),
            loss=options.get("loss-random", {}).get("loss", 0.0),
        )
    return None


class End(NamedTuple):
    """One end of a container's network: how to get to where it is, and its name there."""

    prefix: tuple[str, ...]
    interface: str

    def tc(self, *arguments: str) -> list[str]:
        """A command on it."""
        return [*self.prefix, "tc", *arguments]

    def has(self, limits: Limits, run: Run) -> bool:
        """Whether the kernel keeps these limits on what leaves it."""
        kept = read(run(self.tc("-json", "qdisc", "show", "dev", self.interface)))
        return kept is not None and kept.is_close(limits)

    def shape(self, limits: Limits, run: Run) -> None:
        """Limit what leaves it. Made anew, as a changed netem keeps a rate not given again."""
        if not self.has(NO_LIMITS, run):
            run(self.tc("qdisc", "del", "dev", self.interface, "root"))
        arguments = discipline(limits)
        if arguments:
            run(self.tc("qdisc", "add", "dev", self.interface, "root", *arguments))


def interfaces(run: Run) -> dict[int, str]:
    """The machine's own interfaces by their numbers."""
    return {link["ifindex"]: link["ifname"] for link in json.loads(run(_LINKS))}


def ends(pid: int, here: dict[int, str], run: Run) -> list[End]:
    """Both ends of each network of the container with this process; `here` as of `interfaces`."""
    inside = ("nsenter", f"--net=/proc/{pid}/ns/net")
    found = []
    for link in json.loads(run([*inside, *_LINKS])):
        # The loopback interface has no other end.
        if link.get("link_index") in here:
            found += [End(inside, link["ifname"]), End((), here[link["link_index"]])]
    return found


def processes(names: list[str], run: Run) -> dict[str, int]:
    """The first process of each container that runs."""
    listed = run(["docker", "ps", "--format", "{{.Names}}"]).split()
    running = [name for name in names if name in listed]
    if not running:
        return {}
    told = run(["docker", "inspect", "--format", "{{.Name}} {{.State.Pid}}", *running])
    pids = dict(line.lstrip("/").split() for line in told.splitlines())
    return {name: int(pids[name]) for name in running if int(pids[name])}


def shape(name: str, found: list[End], limits: Limits, run: Run, *, pretend: bool) -> bool:
    """Bring one container's network to its limits; whether there was anything to do.

    Args:
        found: the ends of its network.

    Raises:
        RuntimeError: it has none, or the kernel keeps others than it was given.
    """
    if not found:
        raise RuntimeError(f"{name} has no network of its own that could be limited")
    differing = [end for end in found if not end.has(limits, run)]
    for end in [] if pretend else differing:
        end.shape(limits, run)
        if not end.has(limits, run):
            kept = run(end.tc("-json", "qdisc", "show", "dev", end.interface))
            raise RuntimeError(f"{name}: {end.interface} was given {limits} and has {kept}")
    return bool(differing)


def run_here(command: list[str]) -> str:
    """Run it on this machine. Not by Ansible's own way, which takes three times as long.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"'{' '.join(command)}' failed: {done.stderr.strip()}")
    return done.stdout


def main() -> None:
    """Answer Ansible."""
    limit: dict[str, Any] = {"type": "str"}
    module = AnsibleModule(
        argument_spec={
            "containers": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "rate": limit,
                    "delay": limit,
                    "jitter": limit,
                    "loss": {"type": "float"},
                },
            },
        },
        supports_check_mode=True,
    )

    missing = [name for name in ("tc", "ip") if not module.get_bin_path(name)]
    if missing:
        module.exit_json(changed=False, shaped=[], idle=[], missing=missing)

    wanted = {entry["name"]: entry for entry in module.params["containers"]}
    running: dict[str, int] = {}
    shaped: list[str] = []
    try:
        limits = {name: parse(entry) for name, entry in wanted.items()}
        running = processes(sorted(wanted), run_here)
        here = interfaces(run_here) if running else {}
        shaped = [
            name
            for name, pid in running.items()
            if shape(
                name, ends(pid, here, run_here), limits[name], run_here, pretend=module.check_mode
            )
        ]
    except (ValueError, RuntimeError) as error:
        module.fail_json(msg=str(error))
    idle = sorted(wanted.keys() - running.keys())
    module.exit_json(changed=bool(shaped), shaped=shaped, idle=idle)


if __name__ == "__main__":
    main()
