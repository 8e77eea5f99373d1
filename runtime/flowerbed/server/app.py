"""The lab's ServerApp: loads the user's, and hands it the lab as a Grid.

Flower starts this one; the user's stands in the table [tool.flowerbed] of the app's pyproject.toml
(`flowerbed.server.start`).
"""

import contextlib
import logging
import os
import sys
import tomllib
import traceback
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flowerbed import RESULTS_DIRECTORY, placed_data
from flowerbed.environment import describe_environment
from flowerbed.flower import seed_sampling
from flowerbed.provenance import SERVER, DataMismatchError, check_asked, common_origin
from flowerbed.results import RESULTS
from flowerbed.server.checkpoint import (
    Checkpoint,
    ResumeError,
    read_checkpoint,
    remove_checkpoint,
)
from flowerbed.server.fleet import AppError, Device, Fleet, MissingDevicesError
from flowerbed.server.grid import LabGrid, RoundError
from flowerbed.server.metric_names import MetricReader
from flowerbed.server.observe import CompatibilityLog, observed
from flowerbed.server.recorder import Recorder
from flowerbed.server.rounds import Rounds
from flowerbed.settings import LabSettings

log = logging.getLogger("flwr")

LAYERS = Path("/apps")
_CONTAINER_LOG = Path("/proc/1/fd/1")
_TRACE_LINES = 20
_CLEAR = (AppError, DataMismatchError, MissingDevicesError, ResumeError, RoundError)
"""Errors whose message is all that needs to be said."""


def find_app() -> tuple[Path, dict[str, Any]]:
    """The directory of the app that is running, and its pyproject.toml.

    Raises:
        FileNotFoundError: no entry of sys.path holds an app of the lab.
    """
    for entry in sys.path:
        project = Path(entry, "pyproject.toml")
        if project.is_file():
            told = tomllib.loads(project.read_text())
            if "run" in told.get("tool", {}).get("flowerbed", {}):
                return project.parent, told
    raise FileNotFoundError("no app of the lab was found: start runs with `make train`")


def load(reference: str, directory: Path, layer: str) -> Any:
    """Load an object of an app by `module:attribute`."""
    if layer:
        sys.path.insert(1, str(LAYERS / layer))
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _snake(values: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in values.items()}


class HostedServerApp(ServerApp):
    """Stands in for the user's ServerApp."""

    def __call__(self, grid: Grid, context: Context) -> None:
        """Run the user's ServerApp over the lab; a failure is written to the results."""
        _log_to_container()
        directory, project = find_app()
        told = project["tool"]["flowerbed"]
        settings = LabSettings.read(RESULTS / told["run"])
        checkpoint = read_checkpoint(RESULTS / told["run"]) if settings.resume else None
        books = checkpoint.books if checkpoint else None
        recorder = Recorder(settings.run_name, settings.round_timeout, books=books)
        os.environ[RESULTS_DIRECTORY] = str(recorder.directory)
        # Numerical libraries of the app may use all cores of the coordinator.
        os.environ.setdefault("OMP_NUM_THREADS", str(_cores()))
        try:
            hosting = Hosting(grid, context, settings, recorder, project, checkpoint=checkpoint)
            hosting.play(directory)
        except BaseException as error:
            log.exception("the run has failed")
            recorder.state("failed", reason(error, directory))
            raise


def reason(error: BaseException, directory: Path) -> str:
    """Why a run failed: the last line first, and the traceback where the app has raised."""
    last = str(error) if isinstance(error, _CLEAR) else ""
    if last:
        return last
    last = "".join(traceback.format_exception_only(error)).strip()
    trace = traceback.format_exception(error)
    if any(str(directory) in line for line in trace):
        lines = "".join(trace).rstrip().splitlines()
        return "\n".join([last, *lines[-_TRACE_LINES:]])
    return last


class Hosting:
    """One run of an app in the lab."""

    def __init__(
        self,
        grid: Grid,
        context: Context,
        settings: LabSettings,
        recorder: Recorder,
        project: dict[str, Any],
        *,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.settings, self.recorder, self.context = settings, recorder, context
        self.project, self.checkpoint = project, checkpoint
        self.sampling = seed_sampling(settings.seed)
        names = MetricReader(settings.metrics)
        self.fleet = Fleet(grid, names, settings.device_wait, recorder.online)
        self.rounds = Rounds(recorder, names)
        self.grid = LabGrid(grid, settings, self.fleet, self.rounds)
        self.origin: Mapping[str, Any] = {}
        """Of the data on all devices; empty where the lab has placed none."""

    def _wait_for_devices(self) -> None:
        def progress(message: str) -> None:
            log.info(message)
            self.recorder.state("waiting", message)

        self.fleet.wait_for(self.settings.devices, self.settings.device_wait, progress)
        self.grid.devices()
        self._compare_data()

    def _compare_data(self) -> None:
        """Refuse data that are not of one origin, or not those that were asked for."""
        names = self.settings.devices or tuple(self.grid.met)
        origins = {name: self.grid.met[name].origin for name in names}
        if test := placed_data():
            origins[SERVER] = test.origin
        self.origin = common_origin(origins)
        check_asked(self.recorder.lab.get("asked_data") or {}, self.origin)
        self.fleet.origin = self.origin
        self.recorder.data(self.origin)

    def play(self, directory: Path) -> None:
        """The run from the first device online to the end of the user's ServerApp."""
        told = self.project["tool"]["flowerbed"]
        # Devices load the app while this process does.
        self.fleet.refresh()
        server_app = load(told["serverapp"], directory, self.settings.layer)
        self._wait_for_devices()
        self.describe()
        self.recorder.state("running")
        self.recorder.plan(_planned(self.context.run_config), central=False)
        try:
            with observed(self.grid, self.sampling, self.checkpoint), _legacy_log(self.rounds):
                server_app(self.grid, self.context)
            self.rounds.finish()
            self.grid.check_models()
        finally:
            self.rounds.finish()
            self.grid.settle()
            self.describe()
            self.fleet.say_goodbye()
        self.recorder.state("completed")
        remove_checkpoint(self.recorder.directory)

    def describe(self) -> None:
        """Write run.yml with what is known now."""
        threads = int(os.environ.get("OMP_NUM_THREADS") or _cores())
        project = self.project["project"]
        test = placed_data()
        self.recorder.describe(
            {
                "run": {
                    "run_name": self.settings.run_name,
                    "devices": list(self.settings.devices),
                    "round_timeout": self.settings.round_timeout,
                    "device_wait": self.settings.device_wait,
                    **_snake(dict(self.context.run_config)),
                },
                "app": {
                    "name": project["name"],
                    "version": str(project.get("version", "")),
                    "sha256": self.settings.app,
                },
                "data": dict(self.origin),
                "devices": {name: _described(d) for name, d in self.grid.met.items()},
                "test": {"shard": test.fingerprint} if test else {},
                "repeatable": self.grid.repeat.describe(),
                "server": describe_environment(_cores(), threads),
            }
        )


def _described(device: Device) -> dict[str, Any]:
    return {
        **_snake(device.settings.model_dump(exclude={"device"})),
        "examples": device.examples,
        "shard": device.shard.get("fingerprint", ""),
        "labels": list(device.shard.get("labels", ())),
        "environment": dict(device.environment),
    }


def _planned(config: Any) -> int:
    """Rounds that an app's configuration names, until `Strategy.start` says it; 0: none does."""
    for key, value in config.items():
        if key.replace("_", "-") in ("num-server-rounds", "num-rounds", "rounds"):
            return int(value)
    return 0


@contextlib.contextmanager
def _legacy_log(rounds: Rounds) -> Iterator[None]:
    handler = CompatibilityLog(rounds)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _log_to_container() -> None:
    """Flower keeps what an app prints to itself; the container's log is where people look."""
    with contextlib.suppress(OSError):  # without a container the first process is another user's
        handler = logging.StreamHandler(_CONTAINER_LOG.open("a"))
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        log.addHandler(handler)


app = HostedServerApp()
