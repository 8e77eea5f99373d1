"""A run as its files tell of it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from flowerbed.faults import FaultRow, read_faults
from flowerbed.results import STATUS, DeviceRow, RoundRow, read_rows

Labels = dict[str, list[int]]
"""Training images per label, by device."""


class NoSuchRunError(ValueError):
    """There are no results of a run; the message names it and the runs that there are."""


@dataclass(frozen=True)
class Record:
    """One run: rows of its rounds and devices, and what run.yml says of it.

    A run that failed early has neither rows nor a description.
    """

    name: str
    state: str
    message: str
    rounds: list[RoundRow]
    devices: list[DeviceRow]
    description: dict[str, Any]
    faults: list[FaultRow] = field(default_factory=list)

    @property
    def begin(self) -> float:
        """When the first round began, in Unix seconds; 0 where there was none."""
        return self.rounds[0].started if self.rounds else 0.0

    @property
    def seconds(self) -> float:
        """From the begin of the first round to the end of the last one."""
        if not self.rounds:
            return 0.0
        return self.rounds[-1].started + self.rounds[-1].seconds - self.begin

    @cached_property
    def names(self) -> list[str]:
        """The devices that took part, sorted."""
        return sorted({row.device for row in self.devices} | set(self.settings))

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Limits, hyperparameters and data of each device."""
        found: dict[str, dict[str, Any]] = self.description.get("devices") or {}
        return found

    @property
    def classes(self) -> dict[str, str]:
        """The class of each device."""
        told = {name: str(entry.get("device_class", "")) for name, entry in self.settings.items()}
        return told | {row.device: row.device_class for row in self.devices}

    @property
    def labels(self) -> Labels:
        """What each device has of each label."""
        return {
            name: entry["labels"] for name, entry in self.settings.items() if entry.get("labels")
        }

    def rows_of(self, device: str) -> list[DeviceRow]:
        """A device's rows, one a round."""
        return [row for row in self.devices if row.device == device]


def _known(root: Path) -> Iterable[str]:
    return sorted(path.parent.name for path in root.glob(f"*/{STATUS}"))


def read_record(root: Path, run: str) -> Record:
    """Read a run's files.

    Raises:
        NoSuchRunError: there are none.
    """
    directory = root / run
    if not (directory / STATUS).is_file():
        there = ", ".join(_known(root)) or "none"
        raise NoSuchRunError(f"there is no run {run!r} in the results; there are: {there}")
    status = json.loads((directory / STATUS).read_text())
    described = directory / "run.yml"
    return Record(
        name=run,
        state=status["state"],
        message=status["message"],
        rounds=read_rows(RoundRow, directory / "rounds.csv"),
        devices=read_rows(DeviceRow, directory / "devices.csv"),
        description=yaml.safe_load(described.read_text()) if described.exists() else {},
        faults=read_faults(directory),
    )
