"""End work that nobody waits for any more.

The ClientApp process that waits for a reply closes its connection when the message has expired or
the run is over, and the kernel does when that process is killed. A thread of the worker sees it and
interrupts the main thread, as Ctrl-C would, until the work has ended. Where native code does not
return to the interpreter, the whole worker starts anew.
"""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable

SIGNAL = signal.SIGUSR1
PATIENCE = 4.0
"""Seconds of interrupting after which the worker starts anew."""
_REPEAT = 0.5
"""Seconds between two interrupts: an app may catch one, or it falls into a callback."""


class AbandonedWorkError(BaseException):
    """Raised in the app's code when nobody waits for its reply.

    It is no Exception, so that an app that catches all exceptions ends, too.
    """


class Watch:
    """Interrupts the main thread when the other side of a connection closes.

    Work is done between `start` and `stop`, by the main thread, which is where AbandonedWorkError
    is raised. `finish` must be called before the reply is sent: afterwards a closed connection
    means that the reply has arrived.

    Args:
        on_stuck: called in the watching thread when interrupts have no effect; must not return.
    """

    def __init__(self, connection: socket.socket, on_stuck: Callable[[], object]) -> None:
        self._connection = connection
        self._on_stuck = on_stuck
        self._working = False
        self._finished = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, name="flowerbed-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        # Set each time: an app may have taken the signal for itself.
        signal.signal(SIGNAL, self._interrupt)
        self._working = True
        self._thread.start()

    def finish(self) -> None:
        """Raise nothing from here on."""
        self._working = False

    def stop(self) -> None:
        """End the watching thread."""
        self._working = False
        os.eventfd_write(self._finished, 1)
        self._thread.join()
        os.close(self._finished)

    def _interrupt(self, *_: object) -> None:
        if self._working:
            raise AbandonedWorkError

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._connection, select.POLLRDHUP)
        poll.register(self._finished, select.POLLIN)
        if any(descriptor == self._finished for descriptor, _ in poll.poll()):
            return
        poll.unregister(self._connection)
        deadline = time.monotonic() + PATIENCE
        main = threading.main_thread().ident
        while time.monotonic() < deadline:
            with contextlib.suppress(ProcessLookupError):
                signal.pthread_kill(main or 0, SIGNAL)
            if poll.poll(1000 * _REPEAT):
                return
        self._on_stuck()
