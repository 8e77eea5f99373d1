"""A run, read back from its files."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from flowerbed.faults import FaultRow, read_faults
from flowerbed.results import STATUS, DeviceRow, RoundRow, read_rows

CENTRAL, DEVICES = "central evaluation", "mean over the devices"
"""Where an accuracy or a loss of the global model comes from."""


class NoSuchRunError(ValueError):
    """A run has no results; the message names it and the runs that have some."""


def is_training(row: DeviceRow) -> bool:
    """Whether the message asked for training, be it `train` or `train.NAME`."""
    return row.type.partition(".")[0] == "train"


def busy_seconds(row: DeviceRow) -> float:
    """Seconds that the parts of a message and its reply account for; 0 where no model came back."""
    return (
        row.receive_seconds
        + row.queue_seconds
        + row.evaluate_seconds
        + row.train_seconds
        + row.send_seconds
    )


@dataclass(frozen=True)
class Record:
    """One run: the rows of its rounds and messages, and its description in run.yml.

    A run that failed early has neither rows nor a description.

    Attributes:
        message: why the run failed; the last line of an app's traceback comes first.
        planned: rounds that the run was to have; 0: unknown.
    """

    name: str
    state: str
    message: str
    rounds: list[RoundRow]
    messages: list[DeviceRow]
    description: dict[str, Any]
    faults: list[FaultRow] = field(default_factory=list)
    planned: int = 0

    @property
    def _rows(self) -> list[RoundRow | DeviceRow]:
        return [*self.rounds, *self.messages]

    @cached_property
    def begin(self) -> float:
        """Unix seconds of the first round's start, or of an earlier message; 0 without both."""
        return min((row.started for row in self._rows), default=0.0)

    @cached_property
    def seconds(self) -> float:
        """Seconds from `begin` to the end of the last round, or of a later message."""
        return max((row.started + row.seconds for row in self._rows), default=0.0) - self.begin

    @cached_property
    def names(self) -> list[str]:
        """Names of the devices that took part, sorted."""
        return sorted({row.device for row in self.messages} | set(self.settings))

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Limits, hyperparameters and data of each device."""
        found: dict[str, dict[str, Any]] = self.description.get("devices") or {}
        return found

    @cached_property
    def classes(self) -> dict[str, str]:
        """The class of each device."""
        known = {name: str(entry.get("device_class", "")) for name, entry in self.settings.items()}
        return known | {row.device: row.device_class for row in self.messages}

    @property
    def labels(self) -> dict[str, list[int]]:
        """Training examples of each label, by device; devices whose labels are unknown lack."""
        return {
            name: entry["labels"] for name, entry in self.settings.items() if entry.get("labels")
        }

    @property
    def origin(self) -> dict[str, Any]:
        """What the data were made from that the lab has placed; a run has data of one origin."""
        return dict(self.description.get("data") or {})

    @cached_property
    def training(self) -> list[DeviceRow]:
        """The rows of messages that asked for training."""
        return [row for row in self.messages if is_training(row)]

    @cached_property
    def _by_device(self) -> dict[str, list[DeviceRow]]:
        found: defaultdict[str, list[DeviceRow]] = defaultdict(list)
        for row in self.messages:
            found[row.device].append(row)
        return found

    def rows_of(self, device: str) -> list[DeviceRow]:
        """The rows of a device's messages."""
        return self._by_device.get(device, [])

    @cached_property
    def training_by_round(self) -> dict[int, list[DeviceRow]]:
        """The rows of training by the round in which the messages were sent."""
        found: defaultdict[int, list[DeviceRow]] = defaultdict(list)
        for row in self.training:
            found[row.round].append(row)
        return found

    def ended(self, row: RoundRow) -> float:
        """Seconds from `begin` to the end of a round."""
        return row.started + row.seconds - self.begin

    def measured(self, name: str, of: str) -> list[tuple[int, float]]:
        """Accuracy or loss of the global model on a device's test data, after each round.

        Args:
            name: of the device.
            of: accuracy or loss.
        """
        points = {}
        for row in self.rows_of(name):
            value = getattr(row, of)
            if value is not None and math.isfinite(value):
                # A message of training brings the model as it was after the round before.
                points[row.round - is_training(row)] = value
        return sorted(points.items())

    @cached_property
    def on_devices(self) -> dict[str, tuple[int, dict[str, float]]]:
        """The newest model that devices have evaluated, as it is on each of them.

        By accuracy and loss: the round after which it was that model (0: before the first, or
        nothing is known), and values by device.
        """
        found = {}
        for of in ("accuracy", "loss"):
            points = [(*each, name) for name in self.names for each in self.measured(name, of)]
            newest = max((number for number, *_ in points), default=0)
            values = {name: value for number, value, name in points if number == newest}
            found[of] = newest, values
        return found

    def curve(self, of: str) -> tuple[str, list[tuple[RoundRow, float]]]:
        """The global model's accuracy or loss after each round.

        Args:
            of: accuracy or loss.

        Returns:
            Where the values come from, and those that are known and finite: of the central
            evaluation if the app has one, else means over the devices.
        """
        for source, column in ((CENTRAL, f"central_{of}"), (DEVICES, of)):
            values = [(row, getattr(row, column)) for row in self.rounds]
            known = [(row, v) for row, v in values if v is not None and math.isfinite(v)]
            if known:
                return source, known
        return DEVICES, []


def _known(root: Path) -> Iterable[str]:
    return sorted(path.parent.name for path in root.glob(f"*/{STATUS}"))


def read_record(root: Path, run: str) -> Record:
    """Read a run's files.

    Raises:
        NoSuchRunError: there are none.
    """
    directory = root / run
    if not (directory / STATUS).is_file():
        others = ", ".join(_known(root)) or "none"
        raise NoSuchRunError(f"run {run!r} has no results; runs with results: {others}")
    status = json.loads((directory / STATUS).read_text())
    described = directory / "run.yml"
    return Record(
        name=run,
        state=status["state"],
        message=status["message"],
        rounds=read_rows(RoundRow, directory / "rounds.csv"),
        messages=read_rows(DeviceRow, directory / "devices.csv"),
        description=yaml.safe_load(described.read_text()) if described.exists() else {},
        faults=read_faults(directory),
        planned=int(status.get("rounds") or 0),
    )
