"""Writes the results of one run while it goes on."""

import copy
import json
import math
import os
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from flowerbed.results import (
    CURRENT,
    FINAL_STATES,
    LAB,
    RESULTS,
    STATUS,
    DeviceRow,
    RoundRow,
    to_csv,
    write,
)

_PAUSE = 0.5
"""Least seconds between two writings of the status file: it holds every device, and a change comes
with every reply."""

_EVALUATED = ("accuracy", "loss", "evaluate_seconds")
"""Columns of devices.csv that a message which only evaluates adds to a device's last training."""


def _finite(value: Any) -> Any:
    """A value as JSON can hold it: JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Recorder:
    """Writes one run's results.

    All methods may be called from several threads.

    Args:
        books: of the run that is resumed, see `books`.

    Raises:
        FileExistsError: the run has results already; nothing is overwritten.
    """

    def __init__(
        self,
        run: str,
        round_timeout: float,
        root: Path = RESULTS,
        books: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = root / run
        self.directory.mkdir(exist_ok=True)  # the control node has written run.json there
        if books is None and (self.directory / STATUS).exists():
            raise FileExistsError(f"run {run!r} has results already: choose another name")
        self.rounds: list[RoundRow] = []
        self._lock = threading.RLock()
        self._written = -math.inf
        self._changed = False
        self._central_expected = False
        self._evaluations: dict[int, dict[str, float | None]] = {}
        """What is known of the model after each round, whether the round has ended or not."""
        self._status: dict[str, Any] = {
            "run": run,
            "state": "waiting",
            "message": "",
            "started": time.time(),
            "round": 0,
            "settled": 0,
            "begun": 0,
            "rounds": 0,
            "round_started": None,
            "round_timeout": round_timeout,
            "accuracy": None,
            "loss": None,
            "central_accuracy": None,
            "central_loss": None,
            "data": {"dataset": "", "partitioner": ""},
            "devices": {},
            "history": [],
        }
        self.resumed: list[int] = []
        """Rounds after which the run was resumed."""
        if books is None:
            write(self.directory / "devices.csv", to_csv(DeviceRow, ()))
        else:
            self._open(books)
        self._save(now=True)
        write(root / CURRENT, run + "\n")

    def books(self) -> dict[str, Any]:
        """Return what is needed to go on with the results as they are now."""
        with self._lock:
            return copy.deepcopy(
                {
                    "rounds": self.rounds,
                    "evaluations": self._evaluations,
                    "status": self._status,
                    "resumed": self.resumed,
                    "devices_size": (self.directory / "devices.csv").stat().st_size,
                }
            )

    def _open(self, books: Mapping[str, Any]) -> None:
        """Go on with the results as they were; what has been added since is dropped."""
        self.rounds = list(books["rounds"])
        self._evaluations = dict(books["evaluations"])
        self._status |= books["status"] | {
            "state": "waiting",
            "message": "",
            "round_timeout": self._status["round_timeout"],
        }
        for entry in self._status["devices"].values():
            entry |= {"online": False, "doing": "waiting"}
        self.resumed = [*books["resumed"], len(self.rounds)]
        os.truncate(self.directory / "devices.csv", books["devices_size"])
        write(self.directory / "rounds.csv", to_csv(RoundRow, self.rounds))

    def _save(self, *, now: bool = False) -> None:
        """Write the status, unless it was written just before; `flush` then writes it."""
        self._changed = True
        if now or time.monotonic() >= self._written + _PAUSE:
            write(self.directory / STATUS, json.dumps(self._status, allow_nan=False))
            self._written, self._changed = time.monotonic(), False

    @property
    def lab(self) -> dict[str, Any]:
        """What the control node has written of the lab, and of the data that the run asks for."""
        file = self.directory / LAB
        return yaml.safe_load(file.read_text()) or {} if file.exists() else {}

    def flush(self) -> None:
        """Write what has changed if it is due."""
        with self._lock:
            if self._changed:
                self._save()

    def state(self, state: str, message: str = "") -> None:
        """Set the state of the run: waiting, running, completed or failed."""
        with self._lock:
            self._status |= {"state": state, "message": message}
            if state in FINAL_STATES:
                self._status["settled"] = len(self.rounds)
            self._save(now=True)

    def data(self, origin: Mapping[str, Any]) -> None:
        """Set the origin of the data that the run uses; empty where the lab has placed none."""
        with self._lock:
            shown = {key: str(origin.get(key, "")) for key in ("dataset", "partitioner")}
            self._status["data"] = shown
            self._save()

    def plan(self, rounds: int, *, central: bool) -> None:
        """Set how many rounds the run will have, and whether each has a central evaluation."""
        with self._lock:
            self._status["rounds"] = rounds
            self._central_expected = central
            self._save()

    def meet(self, name: str, device_class: str, info: Mapping[str, Any]) -> None:
        """Add a device that takes part."""
        with self._lock:
            entry = self._status["devices"].setdefault(name, {"last": None, "outcomes": {}})
            entry |= {
                "device_class": device_class,
                "info": dict(info),
                "online": True,
                "doing": "waiting",
            }
            self._save()

    def online(self, names: Collection[str]) -> None:
        """Set which devices are online."""
        with self._lock:
            for name, entry in self._status["devices"].items():
                entry["online"] = name in names
            self._save()

    def begin_round(self, number: int, started: float) -> None:
        """Note that a round begins; `started` in Unix seconds."""
        with self._lock:
            self._status |= {"round_started": started, "begun": number}
            self._save(now=True)

    def doing(self, names: Iterable[str], what: str) -> None:
        """Set what devices do: working, waiting, or the outcome with which they failed."""
        with self._lock:
            for name in names:
                self._status["devices"][name]["doing"] = what
            self._save()

    def _evaluation(self, number: int, values: dict[str, float | None]) -> None:
        """Set results of evaluating the model after a round; 0: the initial model."""
        with self._lock:
            self._status |= {key: _finite(value) for key, value in values.items()}
            self._evaluations.setdefault(number, {}).update(values)
            if any(row.round == number for row in self.rounds):
                self._complete_rows()
                write(self.directory / "rounds.csv", to_csv(RoundRow, self.rounds))
            self._save()

    def _complete_rows(self) -> None:
        """Put evaluations into the rows of their rounds, and count the rows that can be shown.

        A central evaluation may run beside the next round: its round is shown when it is there.
        """
        for row, shown in zip(self.rounds, self._status["history"], strict=True):
            values = self._evaluations.get(row.round, {})
            for key, value in values.items():
                setattr(row, key, value)
            shown.update({key: _finite(value) for key, value in values.items()})
        settled = len(self.rounds)
        if settled and self._central_expected:
            settled -= "central_loss" not in self._evaluations.get(self.rounds[-1].round, {})
        self._status["settled"] = max(settled, self._status["settled"])

    def central(self, number: int, accuracy: float | None, loss: float | None) -> None:
        """Set the result of the app's central evaluation after a round; 0: before the first."""
        self._evaluation(number, {"central_accuracy": accuracy, "central_loss": loss})

    def on_devices(self, number: int, accuracy: float | None, loss: float | None) -> None:
        """Set the mean result of the devices' evaluation of the model after a round."""
        self._evaluation(number, {"accuracy": accuracy, "loss": loss})

    def add(self, device_rows: Iterable[DeviceRow]) -> None:
        """Append what became of messages."""
        rows = list(device_rows)
        with self._lock:
            for row in rows:
                entry = self._status["devices"][row.device]
                last = {key: _finite(value) for key, value in asdict(row).items()}
                last.pop("metrics")
                if row.type.startswith("train") or entry["last"] is None:
                    entry["last"] = last
                else:
                    # What a device has trained stays in sight when it only evaluates.
                    found = {key: last[key] for key in _EVALUATED if last[key]}
                    entry["last"] |= found
                if row.type.startswith("train"):
                    entry["outcomes"][row.outcome] = entry["outcomes"].get(row.outcome, 0) + 1
            with (self.directory / "devices.csv").open("a") as file:
                file.write(to_csv(DeviceRow, rows, header=False))
            self._save()

    def finish_round(self, row: RoundRow, device_rows: Iterable[DeviceRow]) -> None:
        """Add a finished round, and what became of the messages in the course of it."""
        with self._lock:
            self.rounds.append(row)
            shown = {key: _finite(value) for key, value in asdict(row).items()}
            self._status["history"].append(shown)
            self._status["round"] = row.round
            self._complete_rows()
            write(self.directory / "rounds.csv", to_csv(RoundRow, self.rounds))
            self.add(device_rows)
            self._save(now=True)

    def describe(self, description: Mapping[str, Any]) -> None:
        """Write run.yml: `description`, and under `lab` what the control node wrote of the lab."""
        more: dict[str, Any] = {"resumed_after_rounds": self.resumed} if self.resumed else {}
        if lab := self.lab:
            more["lab"] = lab
        text = yaml.safe_dump({**description, **more}, sort_keys=False)
        write(self.directory / "run.yml", text)
