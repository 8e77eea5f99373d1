"""Which devices may connect: the SuperLink's list of keys, held to the inventory.

    python -m flowerbed.server.nodes RECORD < WANTED

beside the SuperLink. WANTED is a JSON object, from the device's name to its public key, or to null
where the key is not known now and what is registered stays. RECORD is the file that holds what has
been registered, because the SuperLink tells nobody which node has which key. Prints what was
registered and removed.
"""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from flowerbed.server.cli import FlowerError, flwr


@dataclass(frozen=True)
class Node:
    """A device as the SuperLink has it."""

    key: str
    """Public key as OpenSSH writes it."""
    node_id: str


def register(device: str, key: str) -> str:
    """Let a device connect; return its node's number."""
    with tempfile.NamedTemporaryFile("w", suffix=".pub") as file:
        file.write(key)
        file.flush()
        return str(flwr("supernode", "register", file.name, "--name", device)["node-id"])


def hold(record: Path, wanted: dict[str, str | None]) -> dict[str, list[str]]:
    """Register devices that are not, remove those that are not wanted or have another key.

    The record is written after each, so that it is right wherever this is broken off; a node that
    is in none was registered just then, and is removed.

    Raises:
        FlowerError: the SuperLink refused.
    """
    told = json.loads(record.read_text()) if record.exists() else {}
    known = {device: Node(**node) for device, node in told.items()}
    listed = {
        node["node-id"]
        for node in flwr("supernode", "list")["nodes"]
        if node["status"] != "unregistered"
    }

    def write() -> None:
        draft = record.with_suffix(".draft")
        draft.write_text(json.dumps({device: asdict(node) for device, node in known.items()}))
        draft.replace(record)

    changed: dict[str, list[str]] = {"registered": [], "removed": []}
    for stray in sorted(listed - {node.node_id for node in known.values()}):
        flwr("supernode", "unregister", stray)
    for device, node in sorted(known.items()):
        right = device in wanted and wanted[device] in (node.key, None)
        if right and node.node_id in listed:
            continue
        if node.node_id in listed:
            flwr("supernode", "unregister", node.node_id)
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
    except FlowerError as error:
        sys.exit(f"ERROR: {error}")


if __name__ == "__main__":
    main()
