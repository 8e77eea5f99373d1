"""Read from a machine what decides whether it can bear its part of the lab; changes nothing.

One module and not many tasks: a machine is asked once. It runs on the machine's own Python, so it
stays with what Python 3.9 knows.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: machine_state
short_description: Read what decides whether a machine can bear its part of the lab
description: Changes nothing, in check mode or not.
author: Flowerbed
options:
  ports:
    description: TCP ports that are looked at.
    type: list
    elements: int
    required: true
  disks:
    description: Directories whose free space is read; one that is not there yet, of its parent.
    type: list
    elements: str
    required: true
  directories:
    description: Directories that are looked for.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Look at the machine
  machine_state:
    ports: [9090]
    disks: [/var/lib/docker]
    directories: []
"""

RETURN = r"""
state:
  description:
    - system, architecture and bits (of the programs, not of the kernel); root (whether Ansible is);
      cores; memory in bytes; cgroup (version) and controllers; listeners (port, address, process);
      disks (directory to free bytes and the number of its file system); missing (directories);
      qdiscs (queueing disciplines that the kernel has, of those that limit a network);
      time (seconds since the epoch).
  type: dict
  returned: always
"""

LISTEN = "0A"


def memory(meminfo: str) -> int:
    """Bytes of memory, from the text of /proc/meminfo; 0 where it does not say."""
    for line in meminfo.splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def controllers(root: Path) -> tuple[int, list[str]]:
    """The version of cgroups under `root`, and the controllers that are on."""
    unified = root / "sys/fs/cgroup/cgroup.controllers"
    if unified.exists():
        return 2, sorted(unified.read_text().split())
    rows = [line.split() for line in _text(root / "proc/cgroups").splitlines() if line[:1] != "#"]
    return 1, sorted(row[0] for row in rows if len(row) == 4 and row[3] == "1")  # noqa: PLR2004


def listeners(table: str) -> list[tuple[str, int, str]]:
    """Address, port and inode of each listening socket, from the text of /proc/net/tcp or tcp6."""
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[3] == LISTEN:  # noqa: PLR2004
            address, port = fields[1].split(":")
            found.append((_address(address), int(port, 16), fields[9]))
    return found


def _address(digits: str) -> str:
    """An address as the kernel prints it: words of 32 bits in the machine's own order."""
    words = [int(digits[start : start + 8], 16) for start in range(0, len(digits), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, packed)


def process(inode: str, proc: Path) -> str:
    """Name and number of the process that has a socket; empty where it cannot be seen."""
    wanted = f"socket:[{inode}]"
    for directory in proc.glob("[0-9]*"):
        try:
            files = list((directory / "fd").iterdir())
        except OSError:  # ended meanwhile, or another user's
            continue
        if any(_target(file) == wanted for file in files):
            return f"{_text(directory / 'comm').strip()}, process {directory.name}"
    return ""


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # closed meanwhile
        return ""


def disk(path: str) -> dict[str, Any]:
    """Free bytes for a directory that may not be there yet, and the number of its file system."""
    there = next(place for place in (Path(path), *Path(path).parents) if place.exists())
    numbers = os.statvfs(there)
    return {"free": numbers.f_bavail * numbers.f_frsize, "filesystem": there.stat().st_dev}


def qdiscs() -> list[str]:
    """Queueing disciplines that the kernel has or can load, of those that limit a network.

    They are tried in a network namespace that ends with the attempt; where nothing is there to
    try them with yet, the modules are looked for.
    """
    options = {
        "netem": ["delay", "1ms"],
        "tbf": ["rate", "1mbit", "burst", "10kb", "latency", "1ms"],
    }
    return [kind for kind in sorted(options) if _has_qdisc(kind, options[kind])]


def _has_qdisc(kind: str, options: list[str]) -> bool:
    add = ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", kind, *options]
    return any(_succeeds(command) for command in (add, ["modprobe", "--dry-run", f"sch_{kind}"]))


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:  # there is no such program
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def state(ports: list[int], disks: list[str], directories: list[str]) -> dict[str, Any]:
    """All that the module returns."""
    root = Path("/")
    version, found = controllers(root)
    uname = os.uname()
    sockets = [
        socket_
        for table in ("tcp", "tcp6")
        for socket_ in listeners(_text(root / "proc/net" / table))
        if socket_[1] in ports
    ]
    return {
        "system": uname.sysname,
        "architecture": uname.machine,
        "bits": 64 if sys.maxsize > 2**32 else 32,
        "root": os.geteuid() == 0,
        "cores": os.cpu_count() or 1,
        "memory": memory(_text(root / "proc/meminfo")),
        "cgroup": version,
        "controllers": found,
        "listeners": [
            {"address": address, "port": port, "process": process(inode, root / "proc")}
            for address, port, inode in sockets
        ],
        "disks": {path: disk(path) for path in disks},
        "qdiscs": qdiscs(),
        "missing": [path for path in directories if not Path(path).is_dir()],
        "time": time.time(),
    }


def main() -> None:
    """Answer Ansible."""
    module = AnsibleModule(
        argument_spec={
            "ports": {"type": "list", "elements": "int", "required": True},
            "disks": {"type": "list", "elements": "str", "required": True},
            "directories": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    wanted = module.params
    answer = state(wanted["ports"], wanted["disks"], wanted["directories"])
    module.exit_json(changed=False, state=answer)


if __name__ == "__main__":
    main()
