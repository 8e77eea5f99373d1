"""The worker: a process that has loaded the app of the current run, and stays.

    python -m flowerbed.device.worker

Works on the requests of ClientApp processes one after another (`flowerbed.device.handoff`). What an
app keeps at module level, such as a compiled model or loaded data, is there for the next message
of the same run. For another run or another app, the worker starts anew (`renewal`).
"""

import contextlib
import logging
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, cast

from flwr.app import Context, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp

from flowerbed.device.handoff import (
    WORKER_SOCKET,
    acknowledge,
    receive_header,
    receive_payload,
    send_frame,
)
from flowerbed.device.interrupt import AbandonedWorkError, Watch
from flowerbed.device.logs import log_to_stderr
from flowerbed.device.memory import MemoryGuard
from flowerbed.device.quota import read_quota, read_throttling
from flowerbed.device.renewal import Inheritance, Libraries, layer_directory, start_anew
from flowerbed.environment import describe_environment
from flowerbed.flower import has_function
from flowerbed.messages import Buffer, array_bytes, pack, unpack

log = logging.getLogger("flowerbed.worker")

WARM_UP = "query.warm_up"
_KEPT_APPS = 2
"""Directories of unpacked apps that stay; a device has little room for them."""
_TRACE_LINES = 20
_LONGEST_REASON = 500

Header = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """What a worker has loaded its app for. Another key needs another process.

    Attributes:
        app: hash of the app's files.
        layer: directory of its further dependencies.
        run_id: None for an app whose state does not depend on the run.
    """

    app: str
    layer: str
    run_id: int | None

    @classmethod
    def of(cls, header: Header) -> "Key":
        """The key that a request needs."""
        run_id = None if header["reuse_worker"] else header["run_id"]
        return cls(header["app"], header["layer"], run_id)


def load_app(directory: str, layer: str, reference: str) -> ClientApp:
    """Load a ClientApp from where Flower has unpacked it.

    Args:
        reference: such as `package.client_app:app`.
    """
    sys.path[:0] = [directory, layer_directory(layer)] if layer else [directory]
    module, _, attributes = reference.partition(":")
    app: Any = import_module(module)
    for name in attributes.split("."):
        app = getattr(app, name)
    if not isinstance(app, ClientApp):
        raise TypeError(f"{reference} is a {type(app).__name__} and not a ClientApp")
    return app


def prune_apps(keep: set[str]) -> None:
    """Remove all but the newest directories of apps that Flower has unpacked."""
    home = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")
    with contextlib.suppress(OSError):
        unpacked = [path for path in (home / "apps").iterdir() if path.is_dir()]
        unpacked.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in unpacked[_KEPT_APPS:]:
            if str(path) not in keep:
                shutil.rmtree(path, ignore_errors=True)


def failure(error: BaseException) -> Header:
    """The reply to a message for which the app has raised `error`."""
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next  # the app's own frames
    lines = "".join(traceback.format_exception(type(error), error, trace or error.__traceback__))
    only = traceback.format_exception_only(error)
    reason = next((line for line in only if not line.startswith(" ")), only[-1])
    return {
        "outcome": "error",
        "reason": reason.strip().partition("\n")[0][:_LONGEST_REASON],
        "traceback": "\n".join(lines.splitlines()[-_TRACE_LINES:]),
    }


class Worker:
    """Loads an app, hands it one message after another, and starts anew where it must."""

    def __init__(self, listener: socket.socket, inheritance: Inheritance) -> None:
        self._listener = listener
        self._prepared = inheritance.libraries
        self._recycled = inheritance.recycled
        self._guard = MemoryGuard(read_quota().memory)
        self._key: Key | None = None
        self._app: ClientApp | None = None
        self._directories: list[str] = []
        self._environment: dict[str, str] = {}
        self._loading = False

    # --- requests -------------------------------------------------------------------------

    def serve(self) -> NoReturn:
        """Work on requests until the process ends."""
        while True:
            connection, _ = self._listener.accept()
            with contextlib.suppress(AbandonedWorkError):
                self.answer(connection)

    def answer(self, connection: socket.socket, header: Header | None = None) -> None:
        """Work on one request and reply to it; `header` if it has been received before."""
        with connection:
            try:
                header = header or receive_header(connection)
                if header["operation"] == "end":
                    self._end_run(connection, header)
                    return
                if not self._fits(header):
                    self._start_anew(connection, header)
                if not self._work_watched(connection, header):
                    return
            except ConnectionError:
                log.warning("the ClientApp went away before it had its reply")
        if reason := self._guard.reason_to_renew():
            log.warning("%s", reason)
            self._start_anew(prepare=True, recycled=reason)

    def _fits(self, header: Header) -> bool:
        """Whether this process can work on a request: it has loaded the right app, or none."""
        if self._key:
            return self._app is not None and self._key == Key.of(header)
        if self._prepared:
            return (self._prepared.app, self._prepared.layer) == (header["app"], header["layer"])
        return True

    def _end_run(self, connection: socket.socket, header: Header) -> None:
        """Forget a run, and be ready for the next one of the same app."""
        with contextlib.suppress(ConnectionError):  # nobody may wait for the reply
            receive_payload(connection, header)
            acknowledge(connection)
            send_frame(connection, {"outcome": "completed", "reason": ""})
        connection.close()
        self._recycled = ""
        if self._key and self._key.run_id == header["run_id"]:
            log.info("the run is over")
            self._start_anew(prepare=not self._loading)

    def _start_anew(
        self,
        connection: socket.socket | None = None,
        header: Header | None = None,
        *,
        prepare: bool = False,
        recycled: str = "",
    ) -> NoReturn:
        libraries = None
        if prepare and self._key:
            key = self._key
            libraries = Libraries.of(key.app, key.layer, self._directories, self._environment)
        start_anew(
            Inheritance(
                self._listener.fileno(),
                connection.fileno() if connection else None,
                header,
                libraries,
                recycled,
            )
        )

    # --- work -----------------------------------------------------------------------------

    def _work_watched(self, connection: socket.socket, header: Header) -> bool:
        """Work on a request and reply; False if nobody waits for the reply any more."""
        reply: Header | None = None
        blocks: list[Buffer] = []
        threads = threading.active_count()
        watch = Watch(connection, self._stuck)
        try:
            watch.start()
            reply, blocks = self._work(connection, header)
            watch.finish()
        except AbandonedWorkError:
            reply = None
        finally:
            watch.stop()
        if reply is not None:
            send_frame(connection, reply, blocks)
            return True
        log.warning("nobody waits for the reply any more: the work has been ended")
        # Half an app is of no use, and a thread of the app's own works on.
        if self._loading or threading.active_count() > threads:
            self._start_anew(prepare=not self._loading)
        return False

    def _stuck(self) -> NoReturn:
        log.warning("nobody waits for the reply any more, and the work does not end")
        self._start_anew(prepare=not self._loading)

    def _work(self, connection: socket.socket, header: Header) -> tuple[Header, list[Buffer]]:
        metadata = header["metadata"]
        introduces = header["operation"] == "introduce"
        kind = "introduction" if introduces else metadata["message_type"]
        group = metadata["group_id"]
        log.info("%s, round %s" if group else "%s%s", kind, group)
        self._guard.begin()
        failed = self._load(connection, header)
        payload = memoryview(receive_payload(connection, header))
        acknowledge(connection)
        content = unpack(header["content"], payload[: header["content_size"]])
        state = unpack(header["state"], payload[header["content_size"] :])
        del payload
        before = read_throttling()
        began, started = time.time(), time.monotonic()
        reply: Header
        blocks: list[Buffer]
        if failed:
            reply, blocks = failed, []
        elif introduces:
            metadata["message_type"] = WARM_UP
            reply, blocks = self._call(header, content, state, needed=False)
        else:
            reply, blocks = self._call(header, content, state)
        throttled = read_throttling().since(before)
        reply |= {
            "began": began,
            "work_seconds": time.monotonic() - started,
            "throttled_share": throttled.share,
            "throttled_seconds": throttled.seconds,
            "memory": self._guard.end(),
            "recycled": self._recycled,
        }
        self._recycled = ""
        if introduces:
            quota = read_quota()
            reply["environment"] = describe_environment(quota.cores, quota.threads, quota.memory)
        return reply, blocks

    def _load(self, connection: socket.socket, header: Header) -> Header | None:
        """Load the app if it is not there; return the reply where it cannot be loaded."""
        directory = header["directory"]
        if self._app is None:
            self._loading, self._key = True, Key.of(header)
            started = time.monotonic()
            try:
                self._app = load_app(directory, header["layer"], header["clientapp"])
            except AbandonedWorkError:
                raise
            except BaseException as error:
                if self._prepared:
                    # Libraries may depend on what an app does between importing two of them.
                    log.warning("the app cannot be loaded with its libraries there: %s", error)
                    self._start_anew(connection, header, recycled=self._recycled)
                log.exception("%s cannot be loaded", header["clientapp"])
                return failure(error)
            self._loading = False
            self._environment = dict(os.environ)
            log.info("%s loaded (%.1f s)", header["clientapp"], time.monotonic() - started)
        if directory not in self._directories:
            self._directories.append(directory)
            prune_apps(keep={self._directories[0], directory})
        return None

    def _call(
        self, header: Header, content: RecordDict, state: RecordDict, *, needed: bool = True
    ) -> tuple[Header, list[Buffer]]:
        """Hand a message to the app; return what it replies.

        Args:
            needed: False: an app that has no function for the message has nothing to do.
        """
        app = cast(ClientApp, self._app)
        metadata = Metadata(**header["metadata"])
        if not needed and not has_function(app, metadata.message_type):
            return {"outcome": "completed", "reason": ""}, []
        message = Message(content=content, metadata=metadata)
        context = Context(**header["context"], state=state)
        try:
            reply = app(message, context)
            if not isinstance(reply, Message):
                reason = f"the app returned a {type(reply).__name__} and not a Message"
                return {"outcome": "error", "reason": reason}, []
            if reply.has_error():
                return {"outcome": "error", "reason": reply.error.reason or "an error"}, []
            records, blocks = pack(reply.content)
            kept, more = pack(context.state)
        except AbandonedWorkError:
            raise
        except BaseException as error:
            log.exception("the app has raised an exception")
            return failure(error), []
        return {
            "outcome": "completed",
            "reason": "",
            "records": records,
            "content_size": array_bytes(reply.content),
            "state": kept,
        }, blocks + more


def main() -> None:
    """Work on requests until the process ends."""
    log_to_stderr()
    if len(sys.argv) > 1:
        inheritance = Inheritance.read(int(sys.argv[1]))
        listener = _inherited(inheritance.listener)
    else:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        WORKER_SOCKET.unlink(missing_ok=True)
        listener.bind(str(WORKER_SOCKET))
        listener.listen()
        inheritance = Inheritance(listener.fileno())
    worker = Worker(listener, inheritance)
    if inheritance.libraries:
        inheritance.libraries.load()
    if inheritance.connection is not None:
        worker.answer(_inherited(inheritance.connection), inheritance.header)
    worker.serve()


def _inherited(descriptor: int) -> socket.socket:
    """A socket of the process before; processes that the app starts do not inherit it."""
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)


if __name__ == "__main__":
    main()
