"""How a worker starts anew without anybody noticing.

It replaces its own program by `exec`: the process number, its place in the process group and its
rank with the OOM killer stay, and so do the listening socket and a connection whose request waits.
Everything else goes: globals, generators of random numbers, caches, threads, child processes.

A process that is to do the same app's work again first imports the libraries that the app has
loaded, which is most of what starting it takes, and nothing of the app itself.
"""

import contextlib
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

log = logging.getLogger("flowerbed.worker")

_START_ENVIRONMENT = dict(os.environ)
_START_DIRECTORY = Path.cwd()
_AT_START = frozenset(sys.modules)


@dataclass(frozen=True)
class Libraries:
    """What an app has loaded beside its own modules.

    Attributes:
        app: hash of the app.
        layer: directory of its further dependencies; empty if it has none.
        names: modules in the order in which they were first imported.
        blocked: names that the app has kept from being imported (None in sys.modules).
        environment: variables as the app's import has left them: libraries read them.
    """

    app: str
    layer: str
    names: list[str]
    blocked: list[str]
    environment: dict[str, str]

    @classmethod
    def of(
        cls, app: str, layer: str, directories: list[str], environment: dict[str, str]
    ) -> "Libraries":
        """Those of this process, whose app's own modules are in `directories`."""
        # None stands for a module that must not be imported.
        loaded: dict[str, ModuleType | None] = {**sys.modules}
        modules = {name: module for name, module in loaded.items() if name not in _AT_START}
        own = {
            name
            for name, module in modules.items()
            if "." not in name and module is not None and _is_below(module, directories)
        }
        return cls(
            app,
            layer,
            [
                name
                for name, module in modules.items()
                if module is not None
                and name.partition(".")[0] not in own
                and getattr(module, "__spec__", None) is not None
            ],
            [name for name, module in modules.items() if module is None],
            environment,
        )

    def load(self) -> None:
        """Import them; what cannot be imported by its name is left to the app."""
        started = time.monotonic()
        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(self.environment)
        for name in self.blocked:
            sys.modules[name] = None  # type: ignore[assignment]
        with layer_on_path(self.layer):
            for name in self.names:
                if name not in sys.modules:
                    with contextlib.suppress(Exception, SystemExit):
                        importlib.import_module(name)
        os.environ.clear()
        os.environ.update(before)
        log.info(
            "ready for the same app's next run: its libraries are loaded (%.1f s)",
            time.monotonic() - started,
        )


def _is_below(module: ModuleType, directories: list[str]) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(
        Path(place).is_relative_to(directory)
        for place in places
        if isinstance(place, str)
        for directory in directories
    )


def layer_directory(layer: str) -> str:
    """Where the further dependencies of an app are; see `/apps` in the device's image."""
    return str(Path("/apps") / layer)


@contextlib.contextmanager
def layer_on_path(layer: str) -> Iterator[None]:
    """Let modules of a layer be found, before those of the image."""
    if not layer:
        yield
        return
    directory = layer_directory(layer)
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)


@dataclass
class Inheritance:
    """What a worker leaves to the process that it becomes.

    Attributes:
        listener: descriptor of the listening socket.
        connection: descriptor of a connection whose request is to be worked on.
        header: that request's header; its payload is still in the connection.
        libraries: to be loaded before the next request.
        recycled: what the next reply must report.
    """

    listener: int
    connection: int | None = None
    header: dict[str, Any] | None = None
    libraries: Libraries | None = None
    recycled: str = ""

    @classmethod
    def read(cls, descriptor: int) -> "Inheritance":
        """Read what the process before has left."""
        with open(descriptor, "rb") as file:
            values = json.loads(file.read())
        if libraries := values["libraries"]:
            values["libraries"] = Libraries(**libraries)
        return cls(**values)


def start_anew(inheritance: Inheritance) -> NoReturn:
    """Replace this process by a new worker."""
    _end_children()
    descriptor = os.memfd_create("worker")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(json.dumps(asdict(inheritance)).encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    kept = {0, 1, 2, descriptor, inheritance.listener, inheritance.connection}
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            os.set_inheritable(int(path.name), int(path.name) in kept)
    os.chdir(_START_DIRECTORY)
    if threading.current_thread() is threading.main_thread():  # else that may hold their locks
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
    command = [sys.executable, "-P", "-m", "flowerbed.device.worker", str(descriptor)]
    try:
        os.execve(sys.executable, command, _START_ENVIRONMENT)  # noqa: S606 - no shell is wanted
    except OSError:
        log.exception("the worker cannot start anew, and ends")
    finally:
        os._exit(1)  # the supervisor starts another one


def _end_children() -> None:
    """End the processes that the app has started and left running."""
    own = os.getpid()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == own:
                child = int(stat.parent.name)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
