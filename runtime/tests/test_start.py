"""How a run begins: the app is checked where it will run, composed, and given to Flower."""

import json
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.common.config import validate_config

from flowerbed.server import check, layer, start
from flowerbed.server.cli import FlowerError

PROJECT = """
[project]
name = "my-app"
version = "1.0.0"
description = "An app"
license = "Apache-2.0"
dependencies = ["flwr[simulation]>=1.42", "numpy"]

[tool.other]
kept = true

[tool.flwr.app]
publisher = "me"
fab-include = ["pack/**"]

[tool.flwr.app.components]
serverapp = "pack.server:app"
clientapp = "pack.client:apps.app"

[tool.flwr.app.config]
num-server-rounds = 3
optimizer.name = "sgd"
optimizer.rate = 0.1

[tool.flowerbed]
reuse-worker = true
"""
SERVER = "from flwr.serverapp import ServerApp\napp = ServerApp()\n"
CLIENT = """
from types import SimpleNamespace
from flwr.clientapp import ClientApp
print("this must not be taken for an answer")
apps = SimpleNamespace(app=ClientApp())
"""
FILES = {"pyproject.toml": PROJECT, "pack/server.py": SERVER, "pack/client.py": CLIENT}
SETTINGS = {"run_name": "first", "app": "a" * 64, "config": {"optimizer.rate": 0.5}}
Check = Callable[..., dict[str, Any]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Place an app with other files as run `first` and check it; results are in tmp_path."""
    monkeypatch.setattr(check, "CHECKED", tmp_path / "checked")
    monkeypatch.setattr(check, "LAYERS", tmp_path / "apps")

    def checked(
        files: dict[str, str] | None = None, lab: str = "machines: [one]\n", **settings: Any
    ) -> dict[str, Any]:
        placed = {
            "settings": SETTINGS | settings,
            "lab": lab,
            "files": FILES | (files or {}),
        }
        answer: dict[str, Any] = check.check("first", placed, tmp_path)
        return answer

    return checked


def needing(*requirements: str) -> dict[str, str]:
    text = PROJECT.replace('"numpy"', ", ".join(f'"{each}"' for each in requirements))
    return {"pyproject.toml": text}


# --- the check --------------------------------------------------------------------------------


def test_a_good_app_is_placed_and_loaded(tmp_path: Path, place: Check) -> None:
    assert place() == {"problems": [], "missing": [], "layer": "", "newest": None}
    told = json.loads((tmp_path / "first/run.json").read_text())
    assert told == SETTINGS | {"layer": ""}
    assert (tmp_path / "first/app/pack/client.py").read_text() == CLIENT
    assert (tmp_path / "first/lab.yml").read_text() == "machines: [one]\n"


@pytest.mark.parametrize(
    ("client", "first", "rest"),
    [
        (
            "def load():\n    raise RuntimeError('no data here')\nload()\n",
            "clientapp pack.client:apps.app cannot be loaded: RuntimeError: no data here",
            ('app/pack/client.py", line 3, in <module>', "line 2, in load", "RuntimeError"),
        ),
        (
            "import no_such_module\n",
            "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'",
            ('app/pack/client.py", line 1',),
        ),
        ("import sys\nsys.exit('give up')\n", "cannot be loaded: SystemExit: give up", ()),
        ("def (:\n", "cannot be loaded: SyntaxError: ", ("def (:",)),
        ("", "cannot be loaded: AttributeError: module 'pack.client' has no attribute 'apps'", ()),
        (
            "from types import SimpleNamespace\napps = SimpleNamespace(app=3)\n",
            "clientapp pack.client:apps.app is no ClientApp, but int",
            (),
        ),
        (
            "import os\nprint('last words', flush=True)\nos._exit(3)\n",
            "Python ended with 3 while the app was loaded",
            ("last words",),
        ),
    ],
)
def test_an_app_that_cannot_be_loaded_is_refused_with_its_traceback(
    tmp_path: Path, place: Check, client: str, first: str, rest: tuple[str, ...]
) -> None:
    (problem,) = place({"pack/client.py": client})["problems"]
    assert first in problem.splitlines()[0]
    assert all(words in problem for words in rest), problem
    assert "importlib" not in problem
    assert not (tmp_path / "first").exists()
    # A refusal is not remembered.
    assert place()["problems"] == []


def test_a_run_that_asks_for_other_data_is_refused(
    tmp_path: Path, place: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"dataset": "digits", "seed": 42}
    placed = SimpleNamespace(origin={"dataset": "digits", "asked": asked})
    monkeypatch.setattr(check, "placed_data", lambda: placed)
    assert place(lab="asked_data: {dataset: digits, seed: 42}\n")["problems"] == []
    answer = place(lab="asked_data: {dataset: digits, seed: 43}\n")
    (problem,) = answer["problems"]
    assert "training_seed is 43 (the data were dealt with 42). `make lab`" in problem
    assert not (tmp_path / "first").exists()


def test_a_run_is_resumed_with_what_it_was_begun_with(tmp_path: Path, place: Check) -> None:
    place()
    directory = tmp_path / "first"
    said = check.resume("first", tmp_path)["problems"]
    assert said == ["there is no run named first. Runs that can be resumed: none"]
    (directory / "status.json").write_text(
        json.dumps({"run": "first", "state": "failed", "round": 3})
    )
    assert "run first has no checkpoint" in check.resume("first", tmp_path)["problems"][0]
    (directory / ".checkpoint").touch()
    assert "resumed: first" in check.resume("other", tmp_path)["problems"][0]
    assert check.resume("first", tmp_path)["problems"] == []
    assert json.loads((directory / "run.json").read_text())["resume"] is True
    status = json.loads((directory / "status.json").read_text())
    # Whoever follows the run would take the old state for its end.
    assert (status["state"], status["message"]) == ("waiting", "goes on after round 3")
    # What cannot be resumed keeps its results.
    (directory / "app/pack/server.py").write_text("raise ValueError\n")
    for file in (tmp_path / "checked").iterdir():
        file.unlink()
    assert "ValueError" in check.resume("first", tmp_path)["problems"][0]
    assert (directory / ".checkpoint").exists()
    (directory / "status.json").write_text(json.dumps({"run": "first", "state": "completed"}))
    assert "run first has completed" in check.resume("first", tmp_path)["problems"][0]


def test_both_components_are_told_of(place: Check) -> None:
    assert len(place({"pack/client.py": "1 / 0", "pack/server.py": "1 / 0"})["problems"]) == 2


def test_an_app_is_loaded_once(
    place: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place()
    monkeypatch.setattr(check, "_load_apart", lambda *_: ["loaded again"])
    assert place()["problems"] == []
    assert place(app="b" * 64)["problems"] == ["loaded again"]


def test_a_run_that_has_results_keeps_them(tmp_path: Path, place: Check) -> None:
    place()
    (tmp_path / "first/status.json").write_text("{}")
    answer = place({"pack/client.py": "another"})
    assert answer["problems"] == ["there is a run named first already: write another training_run"]
    assert (tmp_path / "first/app/pack/client.py").read_text() == CLIENT


def test_what_was_placed_and_never_started_is_replaced(tmp_path: Path, place: Check) -> None:
    place({"pack/old.py": ""})
    place()
    assert not (tmp_path / "first/app/pack/old.py").exists()


def test_the_newest_run_is_told_of(tmp_path: Path, place: Check) -> None:
    (tmp_path / "before").mkdir()
    (tmp_path / "before/status.json").write_text('{"run": "before", "state": "running"}')
    (tmp_path / "current").write_text("before\n")
    assert place()["newest"] == {"run": "before", "state": "running"}


def test_an_app_that_needs_more_waits_for_its_layer(tmp_path: Path, place: Check) -> None:
    files = needing("numpy", "nothing-of-this-name>=2") | {"pack/client.py": "import nothing\n"}
    answer = place(files)
    assert answer["missing"] == ["nothing-of-this-name>=2"]
    assert answer["problems"] == []
    assert json.loads((tmp_path / "first/run.json").read_text())["layer"] == answer["layer"]
    (tmp_path / "apps" / answer["layer"]).mkdir(parents=True)
    (problem,) = check.check("first", None, tmp_path)["problems"]
    assert "No module named 'nothing'" in problem


def test_modules_of_the_layer_are_found(tmp_path: Path, place: Check) -> None:
    files = needing("nothing-of-this-name>=2") | {"pack/client.py": f"import nothing\n{CLIENT}"}
    directory = tmp_path / "apps" / place(files)["layer"]
    directory.mkdir(parents=True)
    (directory / "nothing.py").write_text("")
    assert check.check("first", None, tmp_path)["problems"] == []


# --- what an app needs beyond the image ---------------------------------------------------------


def test_what_the_image_has_counts_as_present() -> None:
    has = layer.versions()
    present = [
        *("flwr[simulation]>=1.42", "flowerbed", "Flwr==99", "numpy>=2", "NumPy"),
        *("flwr-datasets[vision]>=0.5", "tensorflow>=2.11.1,!=2.18.0", "sqlalchemy[asyncio]"),
        *(f"numpy=={has['numpy']}", "nothing-of-this-name; python_version < '3'"),
    ]
    assert layer.missing(present) == []


def test_another_version_extra_or_source_does_not() -> None:
    wanted = ["numpy>=99", "flwr-datasets[audio]", "numpy @ https://localhost/numpy.whl", "nothing"]
    assert layer.missing(wanted) == sorted(wanted)


def test_a_layer_is_named_after_what_it_holds_and_fits_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert layer.name_of([]) == ""
    names = {layer.name_of(["a"]), layer.name_of(["a"]), layer.name_of(["a", "b"])}
    monkeypatch.setattr(layer, "versions", lambda: {"numpy": "1"})
    names.add(layer.name_of(["a"]))
    assert len(names) == 3


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of packages, and no other index.

    lab-pea needs lab-pod and numpy, lab-old an old numpy, and lab-seed has no wheel.
    """
    directory = tmp_path / "index"
    directory.mkdir()
    for name, version, needs in (
        ("lab-pea", "1.0", ["lab-pod>=1", "numpy"]),
        ("lab-pod", "1.0", []),
        ("lab-old", "1.0", ["numpy<1"]),
        ("numpy", layer.versions()["numpy"], []),
    ):
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        about += "".join(f"Requires-Dist: {need}\n" for need in needs)
        wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        module = name.replace("-", "_")
        with zipfile.ZipFile(directory / f"{module}-{version}-py3-none-any.whl", "w") as file:
            file.writestr(f"{module}.py", f"name = '{name}'\n")
            for what, text in (("METADATA", about), ("WHEEL", wheel), ("RECORD", "")):
                file.writestr(f"{module}-{version}.dist-info/{what}", text)
    with tarfile.open(directory / "lab_seed-1.0.tar.gz", "w:gz") as archive:
        (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: lab-seed\nVersion: 1.0\n")
        archive.add(tmp_path / "PKG-INFO", "lab_seed-1.0/PKG-INFO")
    monkeypatch.setenv("UV_FIND_LINKS", str(directory))
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_NO_CACHE", "1")
    return directory


def test_a_layer_holds_what_the_image_does_not_have(index: Path, tmp_path: Path) -> None:
    target = tmp_path / "layer"
    assert layer.install(["lab-pea"], target) == ["lab-pea==1.0", "lab-pod==1.0"]
    found = {path.name for path in target.iterdir()}
    assert {"lab_pea.py", "lab_pod.py", "__pycache__"} <= found
    assert not [name for name in found if "numpy" in name or name.startswith(".")]


@pytest.mark.parametrize(
    ("requirement", "reason"),
    [
        ("lab-old", "no versions fit together"),
        ("numpy>=99", "no versions fit together"),
        ("lab-seed", "there is no wheel for this Python"),
    ],
)
def test_what_cannot_be_installed_is_named(
    index: Path, tmp_path: Path, requirement: str, reason: str
) -> None:
    with pytest.raises(layer.LayerError) as failure:
        layer.install(["lab-pea", requirement], tmp_path / "layer")
    said = str(failure.value)
    assert said.startswith(f"{requirement} cannot be installed: {reason}"), said
    assert "\n" not in said


def test_an_index_out_of_reach_is_said_to_be(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UV_OFFLINE")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(layer.LayerError, match="lab-lentil cannot be installed: the package index"):
        layer.install(["lab-lentil"], tmp_path / "layer")


# --- the start --------------------------------------------------------------------------------


def test_an_app_is_composed_of_the_users_and_the_labs(tmp_path: Path) -> None:
    project = tomllib.loads(PROJECT)
    composed = start.compose(project, SETTINGS | {"layer": "l"})
    tool = composed["tool"]
    assert tool["flwr"]["app"] == {
        "publisher": "me",
        "components": {
            "serverapp": "flowerbed.server.app:app",
            "clientapp": "flowerbed.device.client:app",
        },
        "config": {"num-server-rounds": 3, "optimizer.name": "sgd", "optimizer.rate": 0.5},
    }
    assert tool["flowerbed"] == {
        "reuse-worker": True,
        "run": "first",
        "serverapp": "pack.server:app",
        "clientapp": "pack.client:apps.app",
        "app": "a" * 64,
        "layer": "l",
    }
    assert composed["project"] == project["project"]
    assert tool["other"] == {"kept": True}
    assert tomllib.loads(PROJECT) == project, "the user's own is as it was"
    # Flower itself finds the lab's components.
    assert validate_config(composed, True, tmp_path) == (True, [], [])


class Flower:
    """Stands in for `flwr`: answers, and remembers what it was given."""

    def __init__(self, *statuses: str) -> None:
        self.runs = [{"run-id": str(n), "status": status} for n, status in enumerate(statuses)]
        self.started: list[dict[str, Any]] = []

    def __call__(self, *arguments: str) -> dict[str, Any]:
        if arguments[0] == "list":
            return {"runs": self.runs}
        _, directory, superlink = arguments
        assert superlink == "lab"
        self.started.append(tomllib.loads(Path(directory, "pyproject.toml").read_text()))
        self.files = sorted(str(p.relative_to(directory)) for p in Path(directory).rglob("*.py"))
        return {"run-id": "77"}


def test_a_run_is_started(tmp_path: Path, place: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    place()
    flower = Flower("finished:completed")
    monkeypatch.setattr(start, "flwr", flower)
    assert start.start("first", tmp_path) == {"run": "77"}
    (project,) = flower.started
    assert project == start.compose(tomllib.loads(PROJECT), SETTINGS | {"layer": ""})
    assert flower.files == ["pack/client.py", "pack/server.py"]


def test_a_run_is_not_resumed_while_one_is_under_way(
    tmp_path: Path, place: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the one under way would be followed, and what was placed for this one removed."""
    place(resume=True)
    (tmp_path / "first/status.json").write_text('{"run": "first", "state": "running"}')
    (tmp_path / "current").write_text("first\n")
    monkeypatch.setattr(start, "flwr", Flower("running"))
    with pytest.raises(FlowerError, match="run 0 of Flower is under way, and may be the one"):
        start.start("first", tmp_path)
    monkeypatch.setattr(start, "flwr", Flower("finished:failed"))
    assert start.start("first", tmp_path) == {"run": "77"}


def test_a_run_of_the_lab_that_is_under_way_is_named(
    tmp_path: Path, place: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    place()
    monkeypatch.setattr(start, "flwr", Flower("finished:failed", "running"))
    with pytest.raises(FlowerError, match=r"not started by the lab.*flwr stop 1 lab"):
        start.start("first", tmp_path)
    (tmp_path / "before").mkdir()
    (tmp_path / "before/status.json").write_text('{"run": "before", "state": "running"}')
    (tmp_path / "current").write_text("before\n")
    assert start.start("first", tmp_path) == {"under_way": "before"}
