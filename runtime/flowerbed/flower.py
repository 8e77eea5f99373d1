"""The private names of Flower that the lab uses, and nothing else uses any.

An upgrade of Flower that moves one of them fails in `tests/test_flower.py` and is mended here.
"""
# ruff: noqa: SLF001 - see above

import contextlib
import importlib
import random
import threading
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

__all__ = [
    "APP_RAISED",
    "NODE_UNAVAILABLE",
    "PROGRAMS",
    "SUPERNODE_PORT",
    "ObjectPushError",
    "SuperNodeLoop",
    "extend_patience",
    "has_function",
    "has_waiting_reply",
    "identify_process",
    "load_programs",
    "seed_sampling",
    "wake_superexec",
]

NODE_UNAVAILABLE = 5
"""Flower's error code for a node that has gone (flwr.common.constant.ErrorCode is not public)."""
APP_RAISED = 2
"""Flower's error code for a ClientApp that has raised an exception."""

# --- a device's programs ------------------------------------------------------------------

PROGRAMS = ("flower-supernode", "flower-superexec", "flwr-clientapp")
"""The first starts the second, and that the third for each message."""
SUPERNODE_PORT = 9094
"""Of 127.0.0.1, where a SuperNode serves the other two, and `/health`; its option --port."""

_SUPERNODE = "flwr.supernode.start_client_internal"
_SUPEREXEC = "flwr.supercore.superexec.run_superexec"


def load_programs() -> dict[str, Callable[[], object]]:
    """Import what PROGRAMS run, by their names."""
    points = entry_points(group="console_scripts")
    return {name: points[name].load() for name in PROGRAMS}


def has_function(app: ClientApp, message_type: str) -> bool:
    """Whether an app has a function for messages of this type, such as `query.warm_up`."""
    return message_type in app._registered_funcs


class _Clock:
    """The module `time` with another `sleep`."""

    def __init__(self, sleep: Callable[[float], object]) -> None:
        self.sleep = sleep

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def replace_sleep(module: str, sleep: Callable[[float], object]) -> None:
    """Let a module of Flower that calls `time.sleep` call `sleep`."""
    importlib.import_module(module).time = _Clock(sleep)  # type: ignore[attr-defined]


class SuperNodeLoop:
    """Follows the loop of a SuperNode, makes it quicker where it pays, and sees runs end.

    The loop asks for a message, sleeps 3 s where there is none, and looks for the reply to one
    every 0.5 s. It asks for the next message at once when it has sent a reply: too early, so that
    each message to a device that is waited for would arrive up to 3 s late. Here, the pause between
    two questions grows with the time since the last message, up to what it is without this.

    Flower does not tell a SuperNode that a run is over. It learns so when it next sends something:
    after hours, if that is how long the app works. Here, it asks.

    Args:
        on_message: called when a message is there to be worked on.
        on_end: called with the run's id when the run of the last message is over.
    """

    IDLE = 3.0
    """Seconds that Flower sleeps between two questions."""
    _SHORTEST = 0.3
    _SHARE = 0.1
    """Pause between two questions, of the time since the last message."""
    _REPLY = 0.1
    """Seconds between two looks for the reply."""
    _RUN_BUSY = 4.0
    _RUN_IDLE = 30.0
    """Seconds between two questions whether the run goes on, with a message and without one."""
    _OUTPUT = 2.0
    """Seconds to wait for what the last ClientApp has left in its context."""

    def __init__(self, on_message: Callable[[], object], on_end: Callable[[int], object]) -> None:
        self._on_message = on_message
        self._on_end = on_end
        self._run: int | None = None
        self._pull_object: Callable[[int, str], object] = lambda *_: None
        self._active = -self.IDLE / self._SHARE
        self._next_question = 0.0
        self._replied = False
        self._asking = threading.Thread()
        self._not_running: type[BaseException] = BaseException

    def install(self, lab_message_type: str) -> None:
        """Let Flower's loop, in this process and its forks, call this object.

        Args:
            lab_message_type: of messages that the lab alone sends; the last one of a run says that
                the run is over.
        """
        module: Any = importlib.import_module(_SUPERNODE)
        original = module._pull_and_store_message
        self._not_running = module.RunNotRunningException

        def pull_and_store_message(**arguments: Any) -> int | None:
            self._await_output(arguments["state"])
            pulled = []

            def receive() -> Any:
                if received := arguments["receive"]():
                    pulled.append(received[0].metadata)
                return received

            run: int | None = original(**arguments | {"receive": receive})
            if run is not None:
                self._run, self._pull_object = run, arguments["pull_object"]
                self._next_question = time.monotonic() + self._RUN_BUSY
                self._on_message()
            elif pulled and pulled[0].message_type == lab_message_type:
                # It was sent, and could not be read: the run has ended in between.
                self._on_end(pulled[0].run_id)
            if run is None and has_waiting_reply(arguments["state"]):
                return 0  # any number lets the loop send what is waiting
            return run

        module._pull_and_store_message = pull_and_store_message
        replace_sleep(_SUPERNODE, self.sleep)

    def _await_output(self, state: Any) -> None:
        """Let the last ClientApp end.

        It sends its context after its reply, and the next one must not start from an older one.
        """
        deadline = time.monotonic() + self._OUTPUT
        while self._replied and state.get_tasks(statuses=["running"]):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        self._replied = False

    def sleep(self, seconds: float) -> None:
        """Sleep in the loop."""
        now = time.monotonic()
        if seconds < self.IDLE:
            self._active, self._replied = now, True
            self._ask_for_run(now, self._RUN_BUSY)
            time.sleep(min(seconds, self._REPLY))
        else:
            self._ask_for_run(now, self._RUN_IDLE)
            time.sleep(min(seconds, max(self._SHORTEST, self._SHARE * (now - self._active))))

    def _ask_for_run(self, now: float, interval: float) -> None:
        """Ask for an object that does not exist: only the end of its run is an answer."""
        if self._run is None or now < self._next_question or self._asking.is_alive():
            return
        self._next_question = now + interval
        # Where the SuperLink cannot be reached, the question takes until it can be.
        question = (self._run, self._pull_object)
        self._asking = threading.Thread(target=self._ask, args=question, daemon=True)
        self._asking.start()

    def _ask(self, run: int, pull_object: Callable[[int, str], object]) -> None:
        try:
            with contextlib.suppress(Exception):
                pull_object(run, "")
        except self._not_running:
            if self._run == run:
                self._run = None
                self._on_end(run)


def has_waiting_reply(state: Any) -> bool:
    """Whether a SuperNode holds a reply that it has not sent.

    Its loop looks for replies only after it has received a message. It then sends those that are
    there: where one of a run that is over comes first, the reply that was waited for would stay
    until the next message, which may never come.
    """
    with state.lock_msg_store:
        return any(
            not entry.is_retrieved and entry.message.metadata.reply_to_message_id
            for entry in state.msg_store.values()
        )


_STATES = ("flwr.supercore.corestate.in_memory_corestate", "flwr.supercore.corestate.sql_corestate")


def extend_patience(intervals: int) -> None:
    """Let a SuperLink, in this process, take a ServerApp for dead after more missed heartbeats.

    Flower does so after two intervals of 30 s, by the SuperLink's own clock. A SuperLink that has
    stood still for longer thus ends every run when it goes on. When devices count as offline is
    not changed.
    """
    for state in _STATES:
        importlib.import_module(state).HEARTBEAT_PATIENCE = intervals  # type: ignore[attr-defined]


_SAMPLERS = ("flwr.serverapp.strategy.strategy_utils", "flwr.server.client_manager")


def seed_sampling(seed: int) -> random.Random:
    """Let Flower's strategies sample nodes with a generator of their own, which is returned.

    They use Python's global one, from which other threads draw as well, at times of their own.
    """
    generator = random.Random(seed)  # noqa: S311 - not for secrets
    for module in _SAMPLERS:
        importlib.import_module(module).random = generator  # type: ignore[attr-defined]
    return generator


def identify_process(run_id: int) -> None:
    """Make this process a ServerApp's of the given run, so that it can create messages."""
    identity = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
    identity.run_id, identity.node_id, identity.task_id = run_id, 1, 1


def wake_superexec(wait: Callable[[float], object]) -> None:
    """Let SuperExec, in this process and its forks, call `wait` between two looks for a message."""
    replace_sleep(_SUPEREXEC, wait)
