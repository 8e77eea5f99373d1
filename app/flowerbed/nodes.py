"""Which devices may connect: the SuperLink's list of keys, held to the inventory.

    python -m flowerbed.nodes RECORD < WANTED

beside the SuperLink. WANTED is a JSON object, from the device's name to its public key, or to null
where the key is not known now and what is registered stays. RECORD is the file that holds what has
been registered, because the SuperLink tells nobody which node has which key. Prints what was
registered and removed.
"""

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Node:
    """A device as the SuperLink has it."""

    key: str
    """Public key as OpenSSH writes it."""
    node_id: str


class NodesError(RuntimeError):
    """The SuperLink refused; the message is its own."""


def flwr(*arguments: str) -> dict[str, Any]:
    """Run `flwr supernode`, as on the command line; return its JSON.

    In a fork, which need not import Flower again: that takes seconds, and there may be forty
    devices.

    Raises:
        NodesError: it failed.
    """
    from flwr.cli.app import app

    out, told_to = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(told_to, sys.stdout.fileno())
        with contextlib.suppress(BaseException):  # its end is told in what it has printed
            app(["supernode", *arguments, "--format", "json"], prog_name="flwr")
        sys.stdout.flush()
        os._exit(0)
    os.close(told_to)
    with os.fdopen(out) as file:
        text = file.read()
    os.waitpid(child, 0)
    try:
        told: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError:
        raise NodesError(f"flwr supernode {arguments[0]}: {text!r}") from None
    if not told.get("success"):
        raise NodesError(f"flwr supernode {arguments[0]}: {told.get('error-message', told)}")
    return told


def register(device: str, key: str) -> str:
    """Let a device connect; return its node's number."""
    with tempfile.NamedTemporaryFile("w", suffix=".pub") as file:
        file.write(key)
        file.flush()
        return str(flwr("register", file.name, "--name", device)["node-id"])


def hold(record: Path, wanted: dict[str, str | None]) -> dict[str, list[str]]:
    """Register devices that are not, remove those that are not wanted or have another key.

    The record is written after each, so that it is right wherever this is broken off; a node that
    is in none was registered just then, and is removed.

    Raises:
        NodesError: the SuperLink refused.
    """
    told = json.loads(record.read_text()) if record.exists() else {}
    known = {device: Node(**node) for device, node in told.items()}
    listed = {node["node-id"] for node in flwr("list")["nodes"] if node["status"] != "unregistered"}

    def write() -> None:
        draft = record.with_suffix(".draft")
        draft.write_text(json.dumps({device: asdict(node) for device, node in known.items()}))
        draft.replace(record)

    changed: dict[str, list[str]] = {"registered": [], "removed": []}
    for stray in sorted(listed - {node.node_id for node in known.values()}):
        flwr("unregister", stray)
    for device, node in sorted(known.items()):
        right = device in wanted and wanted[device] in (node.key, None)
        if right and node.node_id in listed:
            continue
        if node.node_id in listed:
            flwr("unregister", node.node_id)
        del known[device]
        write()
        changed["removed"].append(device)
    for device, key in sorted(wanted.items()):
        if device in known or key is None:
            continue
        known[device] = Node(key, register(device, key))
        write()
        changed["registered"].append(device)
    return changed


def main() -> None:
    """Read what is wanted, and hold the SuperLink to it."""
    try:
        print(json.dumps(hold(Path(sys.argv[1]), json.load(sys.stdin))))
    except NodesError as error:
        sys.exit(f"ERROR: {error}")


if __name__ == "__main__":
    main()
