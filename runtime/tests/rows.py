"""Rows of results for tests: complete, and changed where a test needs it."""

from dataclasses import replace
from typing import Any

from flowerbed.results import MODEL_OUTCOMES, DeviceRow, RoundRow

STARTED = 1.79e9
LENGTH = 25.0
"""Seconds from the start of one round to that of the next."""


def started(number: int) -> float:
    """When a round begins, in Unix seconds."""
    return STARTED + LENGTH * (number - 1)


def round_row(number: int, **changes: Any) -> RoundRow:
    """A round of 25 s, 20 of them with the devices, with a central evaluation."""
    row = RoundRow(
        round=number,
        started=started(number),
        accuracy=None,
        loss=None,
        central_accuracy=0.1 * number,
        central_loss=3.0 - 0.1 * number,
        seconds=LENGTH,
        configure_seconds=1.0,
        devices_seconds=20.0,
        aggregate_seconds=1.0,
        evaluate_seconds=3.0,
        examples=300,
        devices=3,
        failed=0,
        slowest_device="budget-1",
        slowest_seconds=20.0,
    )
    return replace(row, **changes)


def message_row(
    number: int, device: str, wait: float = 0.0, outcome: str = "completed", **changes: Any
) -> DeviceRow:
    """A message of training: the device is busy for 20 s less the time that it waits.

    Without a model in the reply, no part of the time is known.
    """
    busy = 20.0 - wait if outcome in MODEL_OUTCOMES else 0.0
    row = DeviceRow(
        round=number,
        type="train",
        started=started(number) + 1.0,
        device=device,
        device_class="phone",
        outcome=outcome,
        reason="",
        aggregated=number if busy else None,
        examples=100 if busy else 0,
        seconds=busy or 12.0,
        receive_seconds=0.2 * busy,
        queue_seconds=0.1 * busy,
        evaluate_seconds=0.1 * busy,
        train_seconds=0.5 * busy,
        send_seconds=0.1 * busy,
        wait_seconds=wait,
        bytes_received=1000 if busy else 0,
        bytes_sent=1000 if busy else 0,
        examples_per_second=10.0 if busy else 0.0,
        batch_size=16 if busy else None,
        throttled_share=0.8 if busy else None,
        throttled_seconds=0.3 * busy if busy else None,
        loss=None,
        accuracy=None,
        train_loss=None,
        train_accuracy=None,
        metrics="{}",
    )
    return replace(row, **changes)


def evaluation_row(number: int, device: str, **changes: Any) -> DeviceRow:
    """A message of evaluation that takes 2 s after the training of its round."""
    row = message_row(
        number,
        device,
        type="evaluate",
        started=started(number) + 22.0,
        aggregated=None,
        examples=0,
        seconds=2.0,
        receive_seconds=0.2,
        queue_seconds=0.1,
        evaluate_seconds=1.5,
        train_seconds=0.0,
        send_seconds=0.2,
        examples_per_second=0.0,
        batch_size=None,
        accuracy=0.2,
        loss=2.0,
        metrics='{"accuracy": 0.2, "loss": 2.0}',
    )
    return replace(row, **changes)
