"""The format of a run's results: a directory of plain files, each complete at every moment.

status.json    the state of the run now; the metrics endpoint serves it
rounds.csv     a row a round             devices.csv    a row a message to a device
faults.csv     a row a fault that was injected (`flowerbed.server.faults`)
run.yml        configuration, versions, devices, data            and what the app itself has saved
"""

import csv
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

RESULTS = Path(os.environ.get("FLOWERBED_RESULTS", "/results"))
STATUS = "status.json"
CHECKPOINT = ".checkpoint"
"""All that a run needs to go on after its last round (`flowerbed.server.checkpoint`); hidden, so
that it is not collected with the results."""
LAB = "lab.yml"
"""What the control node has recorded of the lab, and of the data that the run asks for."""
CURRENT = "current"
"""A file beside the runs that holds the name of the newest one."""
FINAL_STATES = ("completed", "failed")

MODEL_OUTCOMES = ("completed", "partial")
"""Outcomes of a message whose reply was usable."""
OUTCOMES = (
    *MODEL_OUTCOMES,
    "late",
    "out_of_memory",
    "diverged",
    "timeout",
    "offline",
    "error",
    "unavailable",
)
"""What may become of a message. `partial`: the time limit ended the training; `late`: the reply
came when the round was closed; `diverged`: the reply holds numbers that are not finite;
`unavailable`: the device was online, but not available in the round by its availability."""


@dataclass
class RoundRow:
    """One round. Accuracy and loss are those of the model as it is after the round."""

    round: int
    started: float
    """Seconds of the wall clock (Unix) at which the round began."""
    accuracy: float | None
    """Mean over the devices' own test data, weighted by examples. Where devices evaluate the model
    when they receive it for training, this is known in the next round. None: not measured."""
    loss: float | None
    central_accuracy: float | None
    """As the app's `evaluate_fn` reports it. None: the app reports none, or it is not known yet."""
    central_loss: float | None
    seconds: float
    configure_seconds: float
    devices_seconds: float
    """From the first message sent to the last reply read."""
    aggregate_seconds: float
    evaluate_seconds: float
    """Central evaluation, as far as the devices had to wait for it."""
    examples: int
    """Training examples behind the models that were aggregated in this round."""
    devices: int
    """Models that were aggregated in this round."""
    failed: int
    """Devices that were offline, or were asked and had returned no model when the round closed."""
    slowest_device: str
    slowest_seconds: float


@dataclass
class DeviceRow:
    """One message to a device and its reply; see `flowerbed.server.fleet.ReplyTimes` for its parts.

    For a device that has replied in time, these parts and the round's other parts add up to the
    round. The examples of a round in rounds.csv are the sum over rows whose `aggregated` is that
    round.
    """

    round: int
    """Round in which the message was sent."""
    type: str
    """Type of the message: train, evaluate, query, or with a name such as train.personalise."""
    started: float
    """Seconds of the wall clock (Unix) at which it was sent."""
    device: str
    device_class: str
    outcome: str
    reason: str
    aggregated: int | None
    """Round in which the model was aggregated; a later one with an asynchronous strategy. None:
    in none."""
    examples: int
    seconds: float
    """From sending the message until its reply was read, or until the server gave it up."""
    receive_seconds: float
    queue_seconds: float
    evaluate_seconds: float
    train_seconds: float
    send_seconds: float
    wait_seconds: float
    """Idle time from the reply until the next message to the device, or until the round closed."""
    bytes_received: int
    """Size of the message's arrays."""
    bytes_sent: int
    examples_per_second: float
    batch_size: int | None
    """Batch size of the training: below the device's setting if memory was too small for that."""
    throttled_share: float | None
    """Share of the scheduler's periods during the work in which the quota was used up."""
    throttled_seconds: float | None
    """Seconds for which the quota held the device's threads back during the work."""
    loss: float | None
    """Of the received model on the device's test data."""
    accuracy: float | None
    train_loss: float | None
    """Of the device's own model during training."""
    train_accuracy: float | None
    metrics: str
    """All metrics of the reply as a JSON object."""


def write(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old one or the new one, never a part."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)


def to_csv(row_type: type, rows: Iterable[Any], *, header: bool = True) -> str:
    """Rows of a data class as the text of a file, or of a part to append to one."""
    buffer = io.StringIO()
    names = [field.name for field in fields(row_type)]
    writer = csv.writer(buffer, lineterminator="\n")
    if header:
        writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    return buffer.getvalue()


def read_rows(kind: type, path: Path) -> list[Any]:
    """The rows of a file as `kind`; none where there is no such file."""
    if not path.exists():
        return []
    from pydantic import TypeAdapter  # programs that only watch a run need no pydantic

    with path.open(newline="") as lines:
        # An empty cell means a value that was not measured, or an empty text.
        texts = [field.name for field in fields(kind) if field.type is str]
        rows = [
            {key: None if value == "" and key not in texts else value for key, value in row.items()}
            for row in csv.DictReader(lines)
        ]
    return list(TypeAdapter(list[kind]).validate_python(rows))  # type: ignore[valid-type]


def read_status(root: Path = RESULTS, run: str | None = None) -> dict[str, Any] | None:
    """The status of a run, of the newest one by default; None where there is none."""
    try:
        name = run or (root / CURRENT).read_text().strip()
        status: dict[str, Any] = json.loads((root / name / STATUS).read_text())
    except FileNotFoundError:
        return None
    return status
