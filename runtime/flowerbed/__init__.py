"""Flowerbed: a lab for federated learning on unequal devices, built on Flower.

This package runs in the lab's containers, around a Flower App. An app needs nothing of it. What
stands here are helpers for apps that want to use what the lab offers; all of them also work where
there is no lab, such as in Flower's simulation.
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flowerbed.data.placed import PlacedData, placed_data

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message, MetricRecord

__all__ = [
    "EvaluateBeside",
    "PlacedData",
    "TimeLimit",
    "evaluate_beside",
    "placed_data",
    "results_directory",
]

RESULTS_DIRECTORY = "FLOWERBED_RUN_DIRECTORY"
"""Environment variable by which the lab names the run's directory to the app."""
_MARGIN = 10.0
_SEND_SHARE, _SEND_LEAST = 0.05, 3.0
"""Of the time that a message has, what is kept for sending the reply: a share, and seconds."""


class TimeLimit:
    """How long a client may train for a message.

    The lab's strategies say it in the message's configuration (`time-limit`, in seconds, and
    `fill-time`). Beside that a reply must be sent before its message expires. The lab has taken off
    the time that replies of this device take on their way, as far as it has measured it.

    Example::

        limit = TimeLimit(message)
        for batch in batches:
            if limit.reached:
                break
            ...

    Args:
        message: the message that asks for the training.
    """

    def __init__(self, message: "Message") -> None:
        config = message.content.config_records.get("config") or {}
        wanted = float(config.get("time-limit", 0.0) or math.inf)
        life = message.metadata.ttl - _MARGIN
        left = message.metadata.created_at + life - time.time()
        left -= max(_SEND_LEAST, _SEND_SHARE * life)
        self.seconds = max(0.0, min(wanted, left))
        """Seconds of training from now on."""
        self.fill = bool(config.get("fill-time", False)) and math.isfinite(wanted)
        """Whether training is to go on after the local epochs until the limit."""
        self._end = time.monotonic() + self.seconds

    @property
    def reached(self) -> bool:
        """Whether the time is up."""
        return bool(time.monotonic() >= self._end)


class EvaluateBeside:
    """An `evaluate_fn` for `Strategy.start` that may run while the next round is under way.

    The lab calls it in a thread, so that no device waits for it. Elsewhere it is called in place.

    Args:
        function: takes the number of the round and the arrays of the model after it.
    """

    def __init__(self, function: "Callable[[int, ArrayRecord], MetricRecord | None]") -> None:
        self._function = function

    def __call__(self, server_round: int, arrays: "ArrayRecord") -> "MetricRecord | None":
        """Evaluate."""
        return self._function(server_round, arrays)


def evaluate_beside(
    function: "Callable[[int, ArrayRecord], MetricRecord | None]",
) -> EvaluateBeside:
    """Mark an `evaluate_fn` as one that may run beside the next round; see `EvaluateBeside`."""
    return EvaluateBeside(function)


def results_directory() -> Path:
    """Where a ServerApp saves its files: with the run's results, or in the working directory."""
    return Path(os.environ.get(RESULTS_DIRECTORY, "."))
