"""Which devices may connect: the SuperLink's list of keys, held to the inventory.

    python -m flowerbed.nodes RECORD < WANTED

beside the SuperLink. WANTED is a JSON object, from the device's name to its public key; RECORD is
the file that holds what has been registered, because the SuperLink tells nobody which node has
which key. Prints what was registered and removed.
"""

import contextlib
import io
import json
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

    In this process: importing Flower takes seconds, and there may be forty devices.

    Raises:
        NodesError: it failed.
    """
    from flwr.cli.app import app

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        app(["supernode", *arguments, "--format", "json"], prog_name="flwr")
    try:
        told: dict[str, Any] = json.loads(out.getvalue())
    except json.JSONDecodeError:
        raise NodesError(f"flwr supernode {arguments[0]}: {out.getvalue()!r}") from None
    if not told.get("success"):
        raise NodesError(f"flwr supernode {arguments[0]}: {told.get('error-message', told)}")
    return told


def register(device: str, key: str) -> str:
    """Let a device connect; return its node's number."""
    with tempfile.NamedTemporaryFile("w", suffix=".pub") as file:
        file.write(key)
        file.flush()
        return str(flwr("register", file.name, "--name", device)["node-id"])


def hold(record: Path, wanted: dict[str, str]) -> dict[str, list[str]]:
    """Register devices that are not, remove those that are not wanted or have another key.

    The record is written after each, so that it is right wherever this is broken off.

    Raises:
        NodesError: the SuperLink refused.
    """
    known = {d: Node(**told) for d, told in json.loads(record.read_text()).items()} if (
        record.exists()
    ) else {}
    listed = {node["node-id"] for node in flwr("list")["nodes"]}

    def write() -> None:
        draft = record.with_suffix(".draft")
        draft.write_text(json.dumps({device: asdict(node) for device, node in known.items()}))
        draft.replace(record)

    changed: dict[str, list[str]] = {"registered": [], "removed": []}
    for device, node in sorted(known.items()):
        if wanted.get(device) == node.key and node.node_id in listed:
            continue
        if node.node_id in listed:
            flwr("unregister", node.node_id)
        del known[device]
        write()
        changed["removed"].append(device)
    for device in sorted(wanted.keys() - known.keys()):
        known[device] = Node(wanted[device], register(device, wanted[device]))
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
