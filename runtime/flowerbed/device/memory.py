"""When a worker must start anew because its app keeps more memory with every message.

Flower starts a process for every message, so an app that leaks is no problem there: one that builds
a Keras model in each message keeps 2.5 MiB of TensorFlow for each. A worker stays. It therefore
looks at its memory between messages, and starts anew before the kernel would kill it.
"""

import contextlib
import gc
from pathlib import Path

from flowerbed.device.quota import CGROUP_ROOT, memory_in_use

_SHARE = 0.95
"""Of the container's limit, which the next message must not be expected to exceed."""
_GAIN = 0.01
"""Of the container's limit, which starting anew must be expected to set free."""
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"
"""See proc(5), clear_refs."""
_BUILDING = 2
"""Messages in which an app builds what it keeps: one loads it, the next may compile."""


def _status() -> dict[str, int]:
    """Lines of /proc/self/status that count memory, in bytes."""
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def own_memory() -> int:
    """Bytes of this process that the kernel cannot take back: not those of mapped files."""
    status = _status()
    return status["RssAnon"] + status["RssShmem"]


class MemoryGuard:
    """Follows the worker's memory from message to message.

    Args:
        limit: bytes of the container; None: the worker need not start anew.
    """

    def __init__(self, limit: int | None, root: Path = CGROUP_ROOT) -> None:
        self._limit = limit
        self._root = root
        self._messages = 0
        self._peak = 0
        self._growth = 0
        self._first_rest = 0
        self._last_rest = 0

    def begin(self) -> None:
        """A message begins: forget earlier peaks."""
        with contextlib.suppress(OSError):  # else the peak is that of all messages
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK)

    def end(self) -> int:
        """The work on a message has ended: return the most memory that it took, in bytes."""
        status = _status()
        peak = max(status["VmHWM"] - status["RssFile"], status["RssAnon"] + status["RssShmem"])
        self._messages += 1
        if self._messages > 1:  # what loading the app took is not taken again
            self._peak = max(self._peak, peak)
        return peak

    def reason_to_renew(self) -> str:
        """The reply has been sent: why the worker must start anew; empty if it need not."""
        if self._limit is None:
            return ""
        rest = own_memory()
        if self._messages <= _BUILDING:
            self._first_rest = self._last_rest = rest
            return ""
        reason = self._reason(rest, self._limit)
        if reason:  # only now is it worth the time to collect garbage
            gc.collect()
            rest = own_memory()
            reason = self._reason(rest, self._limit)
        self._growth = max(self._growth, rest - self._last_rest)
        self._last_rest = rest
        return reason

    def _reason(self, rest: int, limit: int) -> str:
        grown = rest - self._first_rest
        expected = self._peak + max(self._growth, rest - self._last_rest)
        others = max(0, memory_in_use(self._root) - rest)
        if grown < _GAIN * limit or expected <= _SHARE * limit - others:
            return ""
        return (
            f"the worker started anew: its memory had grown by {_mebibytes(grown)} to "
            f"{_mebibytes(rest)}, and with {_mebibytes(others)} of other processes the next "
            f"message might have exceeded the limit of {_mebibytes(limit)}"
        )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
