"""The ClientApp of every app that runs in the lab: hands messages to the device's worker.

Flower starts a process of this for each message, so it imports no app. The app itself is named in
the table `tool.flowerbed` of its pyproject.toml, where the lab has put it, and is loaded by the
worker (`flowerbed.device.worker`), which outlives the message.

The lab's server sends envelopes (`flowerbed.messages.seal`) with a header of

- `records`: the content of the app's message; its arrays are the envelope's data; and
  `reply_seconds`, what the device's replies have taken on their way lately; or
- `introduce`: load the app, call its `query.warm_up` if it has one, and describe the device; or
- `end`: the run is over.

The reply is an envelope with the `outcome` and what the lab records about the work. A message of
any other content, from a server that knows nothing of the lab, gets the app's reply as it is.
"""

import contextlib
import json
import logging
import os
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flowerbed.device.handoff import (
    DIRECTORY,
    AbandonedError,
    WorkerDiedError,
    ended_mark,
    request,
    write_whole,
)
from flowerbed.flower import APP_RAISED
from flowerbed.messages import Buffer, is_sealed, pack, seal, unpack, unseal

log = logging.getLogger("flwr")

_OUT_OF_MEMORY = "out_of_memory"
_BATCH_SIZE = "batch-size"
_METADATA = (
    "run_id",
    "message_id",
    "src_node_id",
    "dst_node_id",
    "reply_to_message_id",
    "group_id",
    "created_at",
    "ttl",
    "message_type",
)
_TABLE = "tool", "flowerbed"
_MARGIN = 1.0
"""Seconds before a message expires at which the device gives it up."""


@dataclass(frozen=True)
class HostedApp:
    """Where the app is, and what its pyproject.toml says about it.

    Attributes:
        clientapp: such as `package.client_app:app`.
        app: hash of the app's files.
        layer: directory of its further dependencies; empty if it has none.
        reuse_worker: whether what the app keeps in memory does not depend on a run.
    """

    directory: str
    clientapp: str
    app: str
    layer: str
    reuse_worker: bool

    @classmethod
    def find(cls, path: list[str]) -> "HostedApp":
        """Find the app that Flower has unpacked and put on the module search path."""
        for directory in path:
            try:
                table = tomllib.loads((Path(directory) / "pyproject.toml").read_text())
                for key in _TABLE:
                    table = table[key]
                clientapp = table["clientapp"]
            except (OSError, KeyError, ValueError):
                continue
            return cls(
                directory,
                clientapp,
                table.get("app") or directory,
                table.get("layer", ""),
                bool(table.get("reuse-worker", False)),
            )
        raise RuntimeError("no directory of the app with a table tool.flowerbed was found")


# --- memory -------------------------------------------------------------------------------


def batch_record(app: str) -> Path:
    """The file with the batch that the device's memory has proved large enough for.

    It holds as long as the container runs, and for this app alone.
    """
    return DIRECTORY / f"batch-size-{app.replace('/', '-')}"


def fitting(node_config: Mapping[str, Any], app: str) -> dict[str, Any]:
    """The node configuration with no larger batch than has been found to fit."""
    config = dict(node_config)
    if isinstance(size := config.get(_BATCH_SIZE), int):
        with contextlib.suppress(FileNotFoundError):
            config[_BATCH_SIZE] = min(size, int(batch_record(app).read_text()))
    return config


def halved(node_config: Mapping[str, Any], app: str) -> dict[str, Any] | None:
    """The node configuration after the worker was out of memory; None: there is no way out."""
    size = node_config.get(_BATCH_SIZE)
    if node_config.get("out-of-memory-policy") != "halve_batch":
        return None
    if not isinstance(size, int) or size <= 1:
        return None
    write_whole(batch_record(app), str(size // 2))
    return dict(node_config) | {_BATCH_SIZE: size // 2}


# --- messages -----------------------------------------------------------------------------


def _still_wanted(message: Message) -> Callable[[], None]:
    """What raises AbandonedError when nobody waits for the reply to a message any more."""
    metadata = message.metadata
    # Flower refuses a reply that comes later.
    margin = min(_MARGIN, metadata.ttl / 10)
    expires = time.monotonic() + metadata.created_at + metadata.ttl - margin - time.time()
    mark = ended_mark(metadata.run_id)

    def check() -> None:
        if time.monotonic() >= expires:
            raise AbandonedError(f"the message has expired after {metadata.ttl:.0f} s")
        if mark.exists():
            raise AbandonedError("the run is over")

    return check


@dataclass
class Done:
    """What the worker has made of a message.

    Attributes:
        reply: the header of its reply.
        data: arrays of the reply, then those of the context's state.
        node_config: with the batch size that was in force.
        said: what there is to say of the way to it.
    """

    reply: dict[str, Any]
    data: memoryview
    node_config: dict[str, Any]
    said: str = ""


def ask_worker(
    hosted: HostedApp, header: dict[str, Any], blocks: list[Buffer], check: Callable[[], None]
) -> Done:
    """Ask the worker; where it is out of memory and the device may, again with half the batch.

    Raises:
        AbandonedError: nobody waits for the reply any more.
    """
    node_config = fitting(header["context"]["node_config"], hosted.app)
    said = ""
    while True:
        header["context"]["node_config"] = node_config
        try:
            reply, data = request(header, blocks, check=check)
        except WorkerDiedError as error:
            smaller = halved(node_config, hosted.app) if error.cause == _OUT_OF_MEMORY else None
            if smaller is None:
                outcome = _OUT_OF_MEMORY if error.cause == _OUT_OF_MEMORY else "error"
                reply = {"outcome": outcome, "reason": str(error)}
                return Done(reply, memoryview(b""), node_config, said)
            said = (
                f"out of memory with batches of {node_config[_BATCH_SIZE]}, "
                f"went on with {smaller[_BATCH_SIZE]}"
            )
            log.warning("%s", said)
            node_config = smaller
        else:
            return Done(reply, memoryview(data), node_config, said)


def _placed_shard() -> dict[str, Any]:
    """The record of the data that the lab has placed on this device."""
    path = Path(os.environ.get("FLOWERBED_DATA", "/data")) / "shard.json"
    try:
        shard: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return shard


def _report(done: Done, started: float, received: int) -> dict[str, Any]:
    """What the lab records of the work on a message."""
    reply = done.reply
    report = {
        "outcome": reply["outcome"],
        "reason": "; ".join(filter(None, (reply["reason"], done.said))),
        "started": started,
        "queue_seconds": max(0.0, reply.get("began", started) - started),
        "work_seconds": reply.get("work_seconds", time.time() - started),
        "throttled_share": reply.get("throttled_share", 0.0),
        "throttled_seconds": reply.get("throttled_seconds", 0.0),
        "bytes_received": received,
        "bytes_sent": reply.get("content_size", 0),
        "batch_size": done.node_config.get(_BATCH_SIZE),
        "memory": reply.get("memory"),
        "recycled": reply.get("recycled", ""),
    }
    if "traceback" in reply:
        report["traceback"] = reply["traceback"]
    return report


class HostedClientApp(ClientApp):
    """Stands in for an app's ClientApp, which the worker calls."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Have the worker do what a message asks."""
        started = time.time()
        sealed = is_sealed(message.content)
        question: dict[str, Any] = {}
        blocks: list[Buffer] = [b""]
        if sealed:
            question, blocks[0] = unseal(message.content)
            records = question.get("records", [])
        else:
            records, blocks = pack(message.content)
        # The arrays are in `blocks`: they need not be in memory twice while the app works.
        message.content = RecordDict()
        received = sum(len(block) for block in blocks)
        hosted = HostedApp.find(sys.path)
        header = self._header(hosted, question, message, context)
        header |= {"content": records, "content_size": received}
        header["state"], state_blocks = pack(context.state)
        blocks += state_blocks
        try:
            done = ask_worker(hosted, header, blocks, _still_wanted(message))
        except AbandonedError as error:
            return Message(Error(APP_RAISED, str(error)), reply_to=message)
        del blocks, state_blocks

        content_size = done.reply.get("content_size", 0)
        if "state" in done.reply:
            context.state = unpack(done.reply["state"], done.data[content_size:])
        content = done.data[:content_size]
        if not sealed:
            if done.reply["outcome"] != "completed":
                return Message(Error(APP_RAISED, done.reply["reason"]), reply_to=message)
            return Message(unpack(done.reply["records"], content), reply_to=message)
        report = _report(done, started, received)
        if question.get("introduce"):
            warm_up = unpack(done.reply.get("records", []), content)
            report |= {
                "node_config": done.node_config,
                "shard": _placed_shard(),
                "warm_up": _metrics(warm_up),
                "environment": done.reply.get("environment", {}),
            }
            content = memoryview(b"")
        elif "records" in done.reply:
            report["records"] = done.reply["records"]
        return Message(seal(report, content), reply_to=message)

    @staticmethod
    def _header(
        hosted: HostedApp, question: dict[str, Any], message: Message, context: Context
    ) -> dict[str, Any]:
        metadata = {name: getattr(message.metadata, name) for name in _METADATA}
        # The app sees a message that expires earlier (`TimeLimit`): replies take so long to arrive.
        metadata["ttl"] -= min(float(question.get("reply_seconds", 0.0)), metadata["ttl"] / 2)
        operations = [name for name in ("introduce", "end") if question.get(name)]
        return {
            "operation": operations[0] if operations else "message",
            "directory": hosted.directory,
            "clientapp": hosted.clientapp,
            "app": hosted.app,
            "layer": hosted.layer,
            "reuse_worker": hosted.reuse_worker,
            "run_id": context.run_id,
            "metadata": metadata,
            "context": {
                "run_id": context.run_id,
                "node_id": context.node_id,
                "node_config": dict(context.node_config),
                "run_config": dict(context.run_config),
                "series_id": context.series_id,
            },
        }


def _metrics(records: RecordDict) -> dict[str, Any]:
    """All metrics by name."""
    found: dict[str, Any] = {}
    for record in records.values():
        if isinstance(record, MetricRecord):
            found |= record
    return found


app = HostedClientApp()
