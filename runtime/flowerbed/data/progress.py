"""Lines of progress for work that may take long."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

REPORT_SECONDS = 10.0
"""Pause between two lines."""


@contextmanager
def reporting(doing: str, state: Callable[[], str]) -> Iterator[None]:
    """Print what is begun and, while it lasts, how long it has taken and its state."""
    started, over = time.monotonic(), threading.Event()

    def report() -> None:
        while not over.wait(REPORT_SECONDS):
            print(f"{doing}: {time.monotonic() - started:.0f} s, {state()}", flush=True)

    print(doing, flush=True)
    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
