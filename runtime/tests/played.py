"""Runs of the lab in memory: a ServerApp, the lab's Grid over `link.Link`, and results on disk."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from link import Link, Node

from flowerbed.server.app import Hosting
from flowerbed.server.checkpoint import read_checkpoint
from flowerbed.server.recorder import Recorder
from flowerbed.settings import LabSettings

_RESULTS: list[Result] = []


def start(
    strategy: Any, initial: dict[str, np.ndarray] | None = None, **options: Any
) -> Callable[[Grid, Context], None]:
    """A ServerApp's main function that runs a strategy from some arrays."""
    arrays = initial or {"w": np.zeros((2, 3), np.float32)}

    def main(grid: Grid, context: Context) -> None:
        record = ArrayRecord({key: Array(array) for key, array in arrays.items()})
        given = {"num_rounds": 2, **options}
        _RESULTS.append(strategy.start(grid=grid, initial_arrays=record, **given))

    return main


class Played:
    """A run that was played, and its results."""

    def __init__(
        self,
        root: Path,
        nodes: dict[int, Node],
        main: Callable[[Grid, Context], None],
        monkeypatch: pytest.MonkeyPatch,
        **settings: Any,
    ) -> None:
        self.link = link = Link(nodes)
        names = [link.config(number)["device"] for number in link.nodes]
        given = {"run_name": "run", "devices": names, "device_wait": 5.0, "round_timeout": 5.0}
        self.settings = LabSettings.parse(given | settings)
        checkpoint = read_checkpoint(root / "run") if self.settings.resume else None
        books = checkpoint.books if checkpoint else None
        self.recorder = Recorder("run", self.settings.round_timeout, root, books)
        self.directory = self.recorder.directory
        context = Context(1, 1, {}, RecordDict(), {"num-server-rounds": 2})
        project: dict[str, Any] = {"project": {"name": "app", "version": "1"}}
        project |= {"tool": {"flowerbed": {"serverapp": "m:app", "run": "run"}}}
        self.hosting = Hosting(
            link, context, self.settings, self.recorder, project, checkpoint=checkpoint
        )
        self.hosting.fleet._readers._max_workers = 2
        monkeypatch.setattr("flowerbed.server.app.load", lambda *_: main)
        self._root = root
        self._results: list[Result] = []

    def play(self) -> None:
        """Play the run."""
        _RESULTS.clear()
        self.hosting.play(self._root)
        self._results = list(_RESULTS)

    @property
    def result(self) -> Result:
        """Of the strategy."""
        return self._results[-1]

    def rows(self, file: str) -> list[dict[str, str]]:
        """Rows of a file of results."""
        with (self.directory / file).open() as lines:
            return list(csv.DictReader(lines))

    @property
    def status(self) -> dict[str, Any]:
        """The status file."""
        status: dict[str, Any] = json.loads((self.directory / "status.json").read_text())
        return status


def fedavg(**options: Any) -> FedAvg:
    """Flower's own, for as many devices as there are."""
    return FedAvg(**{"min_train_nodes": 1, "min_available_nodes": 1, **options})
