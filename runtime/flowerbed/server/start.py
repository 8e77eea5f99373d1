"""Start a run: put the app of a run into the lab's frame and give it to Flower.

    python -m flowerbed.server.start RUN

The composed app is the user's, with another pyproject.toml: the lab's components, the run's
configuration, and the table [tool.flowerbed], which tells the lab's components what to load. Prints
JSON: `run`, Flower's number of the run; or `under_way`, the name of the lab's run that is under way
instead; or `problem`, why there is none.
"""

import json
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from flowerbed.results import FINAL_STATES, RESULTS, read_status
from flowerbed.server.check import APP, RUN_FILE
from flowerbed.server.cli import FlowerError, flwr

COMPONENTS = {
    "serverapp": "flowerbed.server.app:app",
    "clientapp": "flowerbed.device.client:app",
}
_SUPERLINK = "lab"
"""The connection in Flower's configuration of the container."""


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A run's configuration without nested tables, as Flower's apps see it."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def compose(project: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The pyproject.toml of a composed app.

    Args:
        project: the user's.
        settings: the content of run.json.
    """
    tool = dict(project["tool"])
    app = dict(tool["flwr"]["app"])
    # They have done their part on the control node, and Flower refuses patterns that meet nothing.
    for pattern in ("fab-include", "fab-exclude"):
        app.pop(pattern, None)
    own = {name: app["components"][name] for name in COMPONENTS}
    app["components"] = COMPONENTS
    app["config"] = flat(app.get("config", {})) | settings.get("config", {})
    tool["flwr"] = tool["flwr"] | {"app": app}
    tool["flowerbed"] = (
        tool.get("flowerbed", {})
        | own
        | {"run": settings["run_name"], "app": settings["app"], "layer": settings["layer"]}
    )
    return dict(project) | {"tool": tool}


def start(run: str, root: Path = RESULTS) -> dict[str, str]:
    """Compose the app of a run and start it, unless a run is under way.

    Returns:
        Flower's number of the `run`, or the name of the run of the lab that is `under_way`.

    Raises:
        FlowerError: Flower does not start it, or has one under way that is not the lab's.
    """
    directory = root / run
    settings = json.loads((directory / RUN_FILE).read_text())
    project = tomllib.loads((directory / APP / "pyproject.toml").read_text())
    others = [
        other["run-id"]
        for other in flwr("list", _SUPERLINK)["runs"]
        if not other["status"].startswith("finished")
    ]
    resume = settings.get("resume")
    if others:
        status = read_status(root)
        if not resume and status and status["state"] not in FINAL_STATES:
            return {"under_way": str(status["run"])}
        whose = "and may be the one to resume" if resume else "which was not started by the lab"
        raise FlowerError(
            f"run {', '.join(others)} of Flower is under way, {whose}: "
            "wait for its end, or stop it on the coordinator with 'docker exec flowerbed-superlink "
            f"flwr stop {others[0]} {_SUPERLINK}'"
        )
    with tempfile.TemporaryDirectory() as scratch:
        composed = Path(scratch, run)
        shutil.copytree(directory / APP, composed, copy_function=shutil.copyfile)
        text = tomli_w.dumps(compose(project, settings))
        (composed / "pyproject.toml").write_text(text)
        return {"run": str(flwr("run", str(composed), _SUPERLINK)["run-id"])}


def main(run: str) -> None:
    """The command line."""
    try:
        print(json.dumps(start(run)))
    except FlowerError as error:
        print(json.dumps({"problem": str(error)}))


if __name__ == "__main__":
    main(sys.argv[1])
