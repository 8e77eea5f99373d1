"""The SuperLink's list of keys, held to the inventory."""

import json
from pathlib import Path
from typing import Any

import pytest

from flowerbed.server import nodes
from flowerbed.server.cli import FlowerError


class SuperLink:
    """What `flwr supernode` does, without one."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.dead: set[str] = set()

    def __call__(self, part: str, command: str, *arguments: str) -> dict[str, Any]:
        """Run a command."""
        assert part == "supernode"
        if command == "list":
            return {
                "nodes": [
                    {
                        "node-id": number,
                        "status": "unregistered" if number in self.dead else "offline",
                    }
                    for number in self.keys
                ]
            }
        if command == "unregister":
            self.dead.add(arguments[0])
            return {}
        key = Path(arguments[0]).read_text()
        if key in self.registered.values():
            raise FlowerError("the key is in use")
        number = str(len(self.keys))
        self.keys[number] = key
        return {"node-id": number}

    @property
    def registered(self) -> dict[str, str]:
        """Nodes that may connect, with their keys."""
        return {number: key for number, key in self.keys.items() if number not in self.dead}


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    """One that knows nobody."""
    made = SuperLink()
    monkeypatch.setattr(nodes, "flwr", made)
    return made


def test_devices_come_and_go(superlink: SuperLink, tmp_path: Path) -> None:
    record = tmp_path / "nodes.json"
    assert nodes.hold(record, {"pi": "A", "phone": "B"})["registered"] == ["phone", "pi"]
    assert nodes.hold(record, {"pi": "A", "phone": "C"}) == {
        "registered": ["phone"],
        "removed": ["phone"],
    }
    # One whose machine is out of reach stays as it is.
    assert nodes.hold(record, {"pi": None}) == {"registered": [], "removed": ["phone"]}
    assert set(superlink.registered.values()) == {"A"}


def test_a_registration_that_was_broken_off_is_done_again(
    superlink: SuperLink, tmp_path: Path
) -> None:
    record = tmp_path / "nodes.json"
    nodes.hold(record, {"pi": "A"})
    before = record.read_text()
    nodes.hold(record, {"pi": "A", "phone": "B"})
    record.write_text(before)  # as if it had ended between the two
    nodes.hold(record, {"pi": "A", "phone": "B"})
    assert sorted(superlink.registered.values()) == ["A", "B"]
    assert {each["node_id"] for each in json.loads(record.read_text()).values()} == {
        *superlink.registered
    }
