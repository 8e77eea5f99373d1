"""A grid in memory for tests of the server: its nodes answer envelopes as the lab's devices do."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.task_identity import TaskIdentity

from flowerbed.messages import array_bytes, pack, seal, unpack, unseal

ClientFunction = Callable[[Message, Mapping[str, Any]], RecordDict]
"""A client: message with the app's content, node configuration; to the content of the reply."""


@dataclass
class Node:
    """A device.

    Attributes:
        delays: seconds before each reply, in order; none where the list has come to its end.
        warm_up: metrics that it introduces itself with.
        broken: traceback of the app's import, if it cannot be loaded.
        deaths: attempts to get ready in which its worker dies.
    """

    client: ClientFunction
    name: str = ""
    delays: list[float] = field(default_factory=list)
    transit: float = 0.0
    """Seconds that its replies take on their way."""
    warm_up: dict[str, float] = field(default_factory=dict)
    shard: dict[str, Any] = field(default_factory=dict)
    availability: float = 1.0
    broken: str = ""
    deaths: int = 0
    threads: int = 1
    session: str = "first"


class Link(Grid):
    """Nodes by number, each a device."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.nodes = nodes
        self.refusals = 0
        """Times that Flower does not take messages."""
        self.unreachable: dict[str, int] = {}
        """Method of the grid to the number of calls in which the SuperLink does not answer."""
        self.lost: set[int] = set()
        """Nodes that connect anew once they have been asked for something."""
        self.asked: list[tuple[int, str, str]] = []
        """Node, type and group of each message of the app."""
        self.reply_seconds: list[tuple[int, float]] = []
        """Node, and what it is told that its replies take."""
        self.goodbyes: list[int] = []
        self._replies: dict[str, tuple[float, Message]] = {}
        self._sent = 0

    def config(self, number: int) -> dict[str, Any]:
        """The node configuration of a device."""
        node = self.nodes[number]
        return {
            "device": node.name or f"d{number}",
            "device-class": "c",
            "machine": "m",
            "partition-id": number - 1,
            "num-partitions": len(self.nodes),
            "batch-size": 16,
            "availability": node.availability,
        }

    @property
    def run(self) -> SimpleNamespace:
        return SimpleNamespace(run_id=1)

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def _reach(self, method: str) -> None:
        if left := self.unreachable.get(method, 0):
            self.unreachable[method] = left - 1
            raise httpx.ConnectTimeout("_ssl.c:999: The handshake operation timed out")

    def get_nodes(self) -> list[NodeInfo]:
        self._reach("get_nodes")
        return [
            NodeInfo(node_id=number, last_activated_at=node.session)
            for number, node in self.nodes.items()
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self._reach("push_messages")
        if self.refusals:
            self.refusals -= 1
            raise ObjectPushError("object", 1, "session")
        ids = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)
            number = message.metadata.dst_node_id
            header, data = unseal(message.content)
            if header.get("end"):
                self.goodbyes.append(number)
            elif header.get("introduce"):
                self._answer(message, self._introduction(number), b"", 0.0)
            else:
                metadata = message.metadata
                self.asked.append((number, metadata.message_type, metadata.group_id))
                self.reply_seconds.append((number, header["reply_seconds"]))
                self._work(message, unpack(header["records"], data))
            ids.append(str(self._sent))
        return ids

    def _introduction(self, number: int) -> dict[str, Any]:
        node = self.nodes[number]
        if node.deaths:
            node.deaths -= 1
            reason = "the worker died: out_of_memory"
            died = {"outcome": "out_of_memory", "reason": reason, "started": time.time()}
            return {"node_config": self.config(number)} | died
        return {
            "node_config": self.config(number),
            "shard": node.shard,
            "warm_up": node.warm_up,
            "environment": {"python": "3.13", "threads": node.threads},
            "outcome": "error" if node.broken else "completed",
            "reason": node.broken.splitlines()[-1] if node.broken else "",
            "traceback": node.broken,
            "started": time.time(),
        }

    def _work(self, message: Message, content: RecordDict) -> None:
        number = message.metadata.dst_node_id
        node = self.nodes[number]
        delay = node.delays.pop(0) if node.delays else 0.0
        if number in self.lost:
            self.lost.discard(number)
            node.session = "later"
            return
        asked = Message(
            content,
            number,
            message.metadata.message_type,
            group_id=message.metadata.group_id,
        )
        header: dict[str, Any] = {
            "outcome": "completed",
            "reason": "",
            "started": time.time(),
            "queue_seconds": 0.0,
            "work_seconds": delay,
            "bytes_received": array_bytes(content),
            "batch_size": 16,
        }
        data = b""
        try:
            reply = node.client(asked, self.config(number))
        except Exception as error:  # noqa: BLE001 - as the worker does
            trace = f"Traceback: in the app\n{type(error).__name__}: {error}"
            header |= {"outcome": "error", "reason": f"{type(error).__name__}: {error}"}
            header |= {"traceback": trace, "records": None}
        else:
            records, blocks = pack(reply)
            data = b"".join(blocks)
            header |= {"records": records, "bytes_sent": len(data)}
        self._answer(message, header, data, delay + node.transit)

    def _answer(self, message: Message, header: dict[str, Any], data: bytes, delay: float) -> None:
        reply = Message(seal(header, data), reply_to=message)
        self._replies[message.metadata.message_id] = time.monotonic() + delay, reply

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self._reach("pull_messages")
        now = time.monotonic()
        ready = [m for m in message_ids if m in self._replies and self._replies[m][0] <= now]
        return [self._replies.pop(m)[1] for m in ready]


# What is not defined above, the lab does not need.
Link.__abstractmethods__ = frozenset()
