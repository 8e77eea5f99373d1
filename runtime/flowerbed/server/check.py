"""Check the app of a run where it will run, before it does.

    python -m flowerbed.server.check RUN [< PLACED]

lays what comes by standard input into the run's directory of results: `settings` for run.json,
`lab`, the text of lab.yml, and `files`, those of the app with their texts. Then loads both
components of the app in a process of their own and prints what was found as JSON:

    problems   why the app cannot run, each a text whose first line says it
    missing    requirements that the image does not satisfy
    layer      name of the layer that has them; empty: none is needed
    newest     name and state of the run that was started last, or null

An app with problems is removed from the results. Components are not loaded before their layer is
there, nor again where they have been loaded since this container started.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flowerbed import placed_data
from flowerbed.provenance import DataMismatchError, check_asked
from flowerbed.results import (
    CHECKPOINT,
    FINAL_STATES,
    LAB,
    RESULTS,
    STATUS,
    read_status,
    write,
)
from flowerbed.server.layer import LAYERS, missing, name_of

RUN_FILE = "run.json"
"""See `flowerbed.settings`, which would take longer to import than all else here."""
APP = "app"
"""The directory of the app's files in that of a run's results."""
CHECKED = Path("/tmp/flowerbed/checked")  # noqa: S108 - the container's own
"""Has a file for each app that was loaded; gone when the container starts anew."""
_PATIENCE = 300.0
"""Seconds in which an app must be loaded."""


def place(directory: Path, placed: Mapping[str, Any]) -> None:
    """Make the directory of a run's results and what it begins with.

    Raises:
        FileExistsError: it has results of a run.
    """
    if (directory / STATUS).exists():
        raise FileExistsError
    shutil.rmtree(directory, ignore_errors=True)
    texts = {
        RUN_FILE: json.dumps(placed["settings"]),
        LAB: placed["lab"],
        **{f"{APP}/{name}": text for name, text in placed["files"].items()},
    }
    for name, text in texts.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def resume(run: str, root: Path = RESULTS) -> dict[str, Any]:
    """Prepare a run that was interrupted to go on after its last checkpoint, and check its app.

    What it is resumed with is what it was begun with: the app and its configuration.
    """
    directory = root / run
    status = read_status(root, run)
    if status is None:
        others = ", ".join(sorted(each.parent.name for each in root.glob(f"*/{CHECKPOINT}")))
        text = f"there is no run named {run}. Runs that can be resumed: {others or 'none'}"
    elif status["state"] == "completed":
        text = f"run {run} has completed: there is nothing to resume"
    elif not (directory / CHECKPOINT).exists():
        text = (
            f"run {run} has no checkpoint: it was interrupted before the end of its first round, "
            "or its app does not train by Strategy.start. Start a new run"
        )
    else:
        settings = json.loads((directory / RUN_FILE).read_text())
        write(directory / RUN_FILE, json.dumps(settings | {"resume": True}))
        answer = check(run, None, root)
        if not answer["problems"] and status["state"] in FINAL_STATES:
            # Whoever follows the run must not take its old state for its end.
            waiting = {"state": "waiting", "message": f"goes on after round {status['round']}"}
            write(directory / STATUS, json.dumps(status | waiting))
        return answer
    return {"problems": [text], "missing": [], "layer": "", "newest": None}


def check(run: str, placed: Mapping[str, Any] | None, root: Path = RESULTS) -> dict[str, Any]:
    """Place the app of a run and check it; see the head of this module."""
    directory = root / run
    if placed:
        try:
            place(directory, placed)
        except FileExistsError:
            text = f"there is a run named {run} already: write another training_run"
            return {"problems": [text], "missing": [], "layer": "", "newest": None}
    settings = json.loads((directory / RUN_FILE).read_text())
    project = tomllib.loads((directory / APP / "pyproject.toml").read_text())
    beyond = missing(project["project"].get("dependencies", ()))
    layer = name_of(beyond)
    if settings.get("layer") != layer:
        write(directory / RUN_FILE, json.dumps(settings | {"layer": layer}))
    problems = _data_problems(directory)
    if not problems and (not layer or (LAYERS / layer).is_dir()):
        checked = CHECKED / f"{settings['app']}-{layer}"
        if not checked.exists():
            places = [directory / APP, *([LAYERS / layer] if layer else [])]
            problems = _load_apart(places)
        if not problems:
            checked.parent.mkdir(parents=True, exist_ok=True)
            checked.touch()
    if problems and not settings.get("resume"):
        shutil.rmtree(directory)
    status = read_status(root)
    newest = status and {"run": status["run"], "state": status["state"]}
    return {"problems": problems, "missing": beyond, "layer": layer, "newest": newest}


def _data_problems(directory: Path) -> list[str]:
    """What is wrong with the data for a run; the server holds data of the devices' origin."""
    lab = yaml.safe_load((directory / LAB).read_text()) or {}
    placed = placed_data()
    try:
        check_asked(lab.get("asked_data") or {}, placed.origin if placed else {})
    except DataMismatchError as error:
        return [str(error)]
    return []


def _load_apart(places: list[Path]) -> list[str]:
    """Load the components in a fresh process; return its problems.

    Args:
        places: directories of modules, the app's first.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch, "problems.json")
        command = [sys.executable, "-c", "from flowerbed.server.check import load; load()"]
        environment = os.environ | {"FLOWERBED_CHECK": json.dumps([str(answer), *map(str, places)])}
        try:
            done = subprocess.run(
                command,
                cwd=scratch,
                env=environment,
                check=False,
                text=True,
                errors="replace",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired:
            return [f"the app is not loaded after {_PATIENCE:.0f} s"]
        if answer.exists():
            return list(json.loads(answer.read_text()))
    said = "\n".join(done.stdout.splitlines()[-20:])
    return [f"Python ended with {done.returncode} while the app was loaded\n{said}".rstrip()]


def load() -> None:
    """Load both components in this process and write the problems where the environment says."""
    answer, *places = json.loads(os.environ["FLOWERBED_CHECK"])
    sys.path[:0] = places
    app = Path(places[0])
    project = tomllib.loads((app / "pyproject.toml").read_text())
    components = project["tool"]["flwr"]["app"]["components"]
    problems = [
        text
        for component, module, kind in (
            ("serverapp", "flwr.serverapp", "ServerApp"),
            ("clientapp", "flwr.clientapp", "ClientApp"),
        )
        if (text := _problem_of(app, component, components[component], module, kind))
    ]
    Path(answer).write_text(json.dumps(problems))
    sys.stdout.flush()
    # Threads and exit handlers of the app must not keep this process.
    os._exit(0)


def _problem_of(app: Path, component: str, reference: str, module: str, kind: str) -> str | None:
    """Why a component cannot be loaded: the last line of the traceback first, then all of it."""
    from importlib import import_module

    name, _, attribute = reference.partition(":")
    try:
        loaded = import_module(name)
        for part in attribute.split("."):
            loaded = getattr(loaded, part)
    except BaseException as error:  # noqa: BLE001 - SystemExit, too, is the app's
        last = traceback.format_exception_only(error)[-1].strip()
        frames = traceback.extract_tb(error.__traceback__)
        own = [i for i, frame in enumerate(frames) if Path(frame.filename).is_relative_to(app)]
        shown = frames[own[0] :] if own else []
        lines = [*traceback.format_list(shown), *traceback.format_exception_only(error)]
        return f"{component} {reference} cannot be loaded: {last}\n{''.join(lines)}".rstrip()
    if not isinstance(loaded, getattr(import_module(module), kind)):
        return f"{component} {reference} is no {kind}, but {type(loaded).__name__}"
    return None


if __name__ == "__main__":
    if sys.argv[2:] == ["--resume"]:
        print(json.dumps(resume(sys.argv[1])))
    else:
        print(json.dumps(check(sys.argv[1], json.loads(sys.stdin.read() or "null"))))
