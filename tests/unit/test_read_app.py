"""An app is read on the control node: what is wrong is refused with file, value and remedy."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT, load, program

app = load(ROOT / "plugins/action/read_app.py")

FLOWER = "1.42.0"
PROJECT = """
[project]
name = "my-app"
version = "1.0.0"
dependencies = ["flwr>=1.42,<2", "numpy"]

[tool.flwr.app]
publisher = "me"

[tool.flwr.app.components]
serverapp = "pack.server:app"
clientapp = "pack.client:wrapper.app"

[tool.flwr.app.config]
num-server-rounds = 3
learning-rate = 0.1
verbose = false
strategy = "fedavg"
strategy-parameters = "{}"
optimizer.name = "sgd"
"""
FILES = {
    "pyproject.toml": PROJECT,
    "pack/__init__.py": "",
    "pack/server.py": "from flwr.serverapp import ServerApp\napp = ServerApp()\n",
    "pack/client.py": "from elsewhere import wrapper\n",
    "README.md": "An app.",
    "data.csv": "1,2",
    "pack/test_client.py": "",
    "lib/old.py": "",
    ".venv/site.py": "",
    "notes/secret.md": "",
    ".gitignore": "# comment\nnotes/\n",
}
Files = dict[str, str]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Make an app with other files; None leaves one out."""

    def make(changes: dict[str, str | None] | None = None) -> Path:
        directory = tmp_path / "my app"
        for name, text in (FILES | (changes or {})).items():
            if text is not None:
                path = directory / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        return directory

    return make


def problems(directory: Path) -> list[str]:
    project, found = app.read_project(directory)
    if not found:
        files = app.bundle_files(directory, project)
        found = list(app.project_problems(directory, project, files, FLOWER))
    return [f"{what}: {text}" for what, text in found]


def changed(old: str, new: str) -> dict[str, str | None]:
    assert old in PROJECT
    return {"pyproject.toml": PROJECT.replace(old, new)}


def test_a_good_app_has_no_problems(write: Callable[..., Path]) -> None:
    assert problems(write()) == []


@pytest.mark.parametrize(
    "name",
    ["app", *(f"tests/apps/{path.name}" for path in sorted((ROOT / "tests/apps").iterdir()))],
)
def test_the_apps_of_this_repository_have_no_problems(name: str) -> None:
    assert problems(ROOT / name) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"pyproject.toml": None},
            ("my app: has no pyproject.toml", "training_app", "another directory"),
        ),
        (
            changed('name = "my-app"', "name = "),
            ("pyproject.toml: is no valid TOML", "line 3", "correct it"),
        ),
        (changed('publisher = "me"', ""), ("[tool.flwr.app] has no publisher", 'publisher = "…"')),
        (changed('version = "1.0.0"', ""), ("[project] has no version",)),
        (changed("my-app", "my_app"), ("name is 'my_app'", "letters, digits, hyphens")),
        (
            changed('serverapp = "pack.server:app"', ""),
            ("has no serverapp", 'serverapp = "package.module:app"', "the ServerApp is defined"),
        ),
        (
            changed("pack.server:app", "pack.server"),
            ("serverapp is 'pack.server'", "package.module:name"),
        ),
        (
            changed("pack.server:app", "pack.srever:app"),
            ("serverapp is 'pack.srever:app'", "no pack/srever.py", "defines the ServerApp"),
        ),
        (
            changed("pack.server:app", "pack.server:ap"),
            ("pack/server.py does not define 'ap'", "the name of the ServerApp"),
        ),
        (
            changed("pack.client:wrapper.app", "pack.test_client:app"),
            ("Flower leaves pack/test_client.py out", "rename"),
        ),
        (
            changed("flwr>=1.42,<2", "flwr>=1.50"),
            ("dependencies has 'flwr>=1.50'", "runs Flower 1.42.0", "allows 1.42.0"),
        ),
        (changed('"numpy"', '"numpy>"'), ("dependencies has 'numpy>', which is no requirement",)),
        (changed('["flwr>=1.42,<2", "numpy"]', '"numpy"'), ("dependencies is no list",)),
        (
            {f"{'a/' * 11}b.py": ""},
            ("a/b.py: is more than 10 folders deep",),
        ),
    ],
)
def test_what_is_wrong_is_named(
    write: Callable[..., Path], changes: dict[str, str | None], says: tuple[str, ...]
) -> None:
    directory = write(changes)
    (line,) = problems(directory)
    assert line.startswith(str(directory)), line
    assert all(words in line for words in says), line


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    (line,) = problems(tmp_path / "nowhere")
    assert line.startswith(f"{tmp_path}/nowhere: there is no such directory (training_app)")


def test_several_problems_are_all_told_of(write: Callable[..., Path]) -> None:
    text = PROJECT.replace("pack.", "no.").replace("1.42", "1.43").replace("<2", "<3")
    assert len(problems(write({"pyproject.toml": text}))) == 3


def test_a_bundle_has_what_flower_takes(write: Callable[..., Path]) -> None:
    directory = write()
    project, _ = app.read_project(directory)
    files = app.bundle_files(directory, project)
    whole = ["README.md", "pack/__init__.py", "pack/client.py", "pack/server.py", "pyproject.toml"]
    assert list(files) == whole
    patterns: dict[str, Any] = {"fab-include": ["pack/**"], "fab-exclude": ["pack/server.py"]}
    project["tool"]["flwr"]["app"] |= patterns
    less = app.bundle_files(directory, project)
    assert list(less) == ["pack/__init__.py", "pack/client.py", "pyproject.toml"]
    assert app.digest(less) != app.digest(files)


def test_links_are_left_out(write: Callable[..., Path]) -> None:
    directory = write()
    (directory / "pack/link.py").symlink_to(directory / "pack/client.py")
    (directory / "linked").symlink_to(ROOT / "playbooks")
    project, _ = app.read_project(directory)
    found = app.bundle_files(directory, project)
    assert not [name for name in found if "link" in name]


def test_the_hash_is_of_paths_and_contents(write: Callable[..., Path]) -> None:
    directory = write()

    def digest() -> str:
        project, _ = app.read_project(directory)
        told: str = app.digest(app.bundle_files(directory, project))
        return told

    before = digest()
    (directory / "data.csv").write_text("is no part of it")
    assert digest() == before
    (directory / "pack/client.py").write_text("wrapper = 1\n")
    assert digest() != before
    shutil.move(directory / "README.md", directory / "ABOUT.md")
    assert len({before, digest()}) == 2


def test_files_are_placed_with_their_directories(write: Callable[..., Path]) -> None:
    directory = write()
    files = {"pack/client.py": directory / "pack/client.py"}
    assert app.entries(files, "app") == [
        {"path": "app", "mode": "0755"},
        {"path": "app/pack", "mode": "0755"},
        {"path": "app/pack/client.py", "src": f"{directory}/pack/client.py", "mode": "0644"},
    ]


def test_a_bundle_may_be_large_only_while_it_is_packed_small(write: Callable[..., Path]) -> None:
    directory = write({"large.json": "0" * 11 * 2**20})
    assert problems(directory) == []
    noise = "".join(f"{(number * 2654435761) % 2**32:08x}" for number in range(3 * 2**20))
    (directory / "large.json").write_text(noise)
    (line,) = problems(directory)
    assert "MiB as a Flower App Bundle, which may have 10 MiB" in line
    assert "largest file is large.json" in line


def test_bytes_that_are_no_text_are_refused(write: Callable[..., Path]) -> None:
    directory = write()
    (directory / "README.md").write_bytes(b"caf\xe9")
    (line,) = problems(directory)
    assert line.startswith(f"{directory}/README.md: is no UTF-8 text")


def test_a_module_that_only_a_newer_python_can_read_is_not_refused(
    write: Callable[..., Path],
) -> None:
    assert problems(write({"pack/client.py": "type Name = int\nwrapper = 1\n"})) == []


# --- the configuration ------------------------------------------------------------------------

OWN: dict[str, Any] = {
    "num-server-rounds": 3,
    "learning-rate": 0.1,
    "verbose": False,
    "strategy": "fedavg",
    "strategy-parameters": "{}",
    "optimizer.name": "sgd",
}
FILE = Path("/a/pyproject.toml")


def config(
    variables: dict[str, Any], *given: str, own: dict[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    told, found = app.config_of(own or OWN, variables, given, FILE)
    return told, [f"{what}: {text}" for what, text in found]


def test_a_configuration_is_flat(write: Callable[..., Path]) -> None:
    project, _ = app.read_project(write())
    assert app.flat(app.table(project, "tool", "flwr", "app", "config")) == OWN


def test_training_config_is_the_apps() -> None:
    wanted = {"learning-rate": 1, "verbose": True, "optimizer": {"name": "adam"}}
    told, found = config({"training_config": wanted})
    assert found == []
    assert told == {"learning-rate": 1.0, "verbose": True, "optimizer.name": "adam"}
    assert isinstance(told["learning-rate"], float)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"learning_rate": 0.5}, ("learning_rate is 0.5", "no such key", "write learning-rate")),
        ({"zzz": 1}, ("zzz is 1", "write one of num-server-rounds, learning-rate")),
        ({"learning-rate": True}, ("learning-rate is true", "has 0.1", "write a number")),
        ({"learning-rate": "0.5"}, ("learning-rate is '0.5'", "write a number")),
        ({"num-server-rounds": 1.0}, ("num-server-rounds is 1.0", "write a whole number")),
        ({"num-server-rounds": True}, ("write a whole number",)),
        ({"verbose": 1}, ("verbose is 1", "write true or false")),
        ({"strategy": ["a"]}, ('strategy is ["a"]', "write text")),
        ({"strategy": None}, ("strategy is null", "write text")),
        ({"optimizer": {"nam": "x"}}, ("optimizer.nam is 'x'", "write optimizer.name")),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(
    wrong: dict[str, Any], says: tuple[str, ...]
) -> None:
    told, (line,) = config({"training_config": wrong})
    assert told == {}
    assert line.startswith("training_config: ")
    assert str(FILE) in line
    assert all(words in line for words in says), line


def test_what_is_no_dictionary_is_refused() -> None:
    _, (line,) = config({"training_config": "learning-rate=1"})
    assert "training_config: is 'learning-rate=1': write a dictionary" in line


def test_a_type_that_flower_does_not_know_is_refused() -> None:
    _, (line,) = config({}, own=OWN | {"layers": [1, 2]})
    assert line.startswith(f"{FILE}: layers in [tool.flwr.app.config] is [1, 2]")


def test_variables_of_the_inventory_are_names_for_keys_that_the_app_has() -> None:
    variables = {
        "training_rounds": 7,
        "training_strategy": "fedadam",
        "training_strategy_parameters": {"eta": 0.1},
        "training_seed": 5,
    }
    told, found = config(variables)
    assert found == []
    assert told == {
        "num-server-rounds": 7,
        "strategy": "fedadam",
        "strategy-parameters": '{"eta": 0.1}',
    }


def test_on_the_command_line_they_are_text_and_the_key_must_be_there() -> None:
    told, found = config({"training_rounds": "7"}, "training_rounds")
    assert (told, found) == ({"num-server-rounds": 7}, [])
    _, (line,) = config({"training_model": "linear"}, "training_model")
    assert line.startswith("training_model: is 'linear', but the app has no key 'model'")
    assert str(FILE) in line
    assert "training_config" in line
    _, (line,) = config({"training_rounds": "many"}, "training_rounds")
    assert "training_rounds: is 'many': the app's key 'num-server-rounds' wants a whole" in line


def test_the_command_line_outweighs_the_inventory_and_keys_outweigh_names() -> None:
    both = {"training_rounds": 7, "training_config": {"num-server-rounds": 9}}
    assert config(both)[0] == {"num-server-rounds": 9}
    assert config(both, "training_rounds")[0] == {"num-server-rounds": 7}
    assert config(both, "training_rounds", "training_config")[0] == {"num-server-rounds": 9}


def test_the_inventorys_model_is_not_for_an_app_that_means_something_else() -> None:
    variables = {"training_model_alpha": 0.25}
    assert config(variables, own={"alpha": 0.001})[0] == {}
    assert config(variables, "training_model_alpha", own={"alpha": 0.001})[0] == {"alpha": 0.25}
    own = {"alpha": 1.0, "model": "mobilenet", "recipe": "original"}
    assert config(variables, own=own)[0] == {"alpha": 0.25}


# --- in a playbook ----------------------------------------------------------------------------


def preflight(*arguments: str, **variables: Any) -> str:
    """What preflight prints, in one line, of a lab that would be refused for its app."""
    command = [program("ansible-playbook"), "playbooks/preflight.yml", "-i", "inventory/local"]
    command += ["-e", json.dumps(variables), *arguments]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode, done.stdout
    assert "changed=1" not in done.stdout
    return done.stdout + done.stderr


def test_a_relative_path_with_spaces_starts_where_ansible_was_called(
    write: Callable[..., Path],
) -> None:
    directory = write(changed("pack.server:app", "pack.server:ap"))
    said = preflight(training_app=os.path.relpath(directory, ROOT))
    assert "Wrong with the app (1; nothing has been changed)" in said
    assert f"{directory}/pyproject.toml: serverapp is 'pack.server:ap'" in said


@pytest.mark.parametrize(
    ("given", "directory"),
    [
        ("my app", "/from/here/my app"),
        ("/my/app", "/my/app"),
        ("~/app", "~/app"),
        ("it's", "/from/here/it's"),
        ('a "b" \\ c', '/from/here/a "b" \\ c'),
    ],
)
def test_make_passes_the_directory_on_as_it_is(given: str, directory: str) -> None:
    command = ["make", "--dry-run", "--directory", str(ROOT), "train", f"APP={given}"]
    command += [f"VENV={Path(sys.prefix)}"]
    done = subprocess.run(
        command, env=os.environ | {"PWD": "/from/here"}, check=True, capture_output=True, text=True
    )
    (line,) = (line for line in done.stdout.splitlines() if "playbooks/train.yml" in line)
    words = shlex.split(line)
    assert json.loads(words[words.index("-e") + 1]) == {"training_app": directory}
    assert words[-1] == "playbooks/train.yml"


def test_without_an_app_make_says_nothing_of_it() -> None:
    command = ["make", "--dry-run", "train", f"VENV={Path(sys.prefix)}"]
    environment = os.environ | {"APP": "of-the-environment"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert "training_app" not in done.stdout


# --- strategies and data -----------------------------------------------------------------------

OFFERED = json.loads(app.PARAMETERS.read_text())
PRIVATE = "differentialprivacyserversidefixedclipping"
NEEDED = {"noise_multiplier": 1.0, "clipping_norm": 1.0, "num_sampled_clients": 4}


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("fedavg", {"min_available_nodes": 3}, "has min_available_nodes, but fedavg offers no"),
        ("fedavg", {"train_metrics_aggr_fn": "f"}, "has train_metrics_aggr_fn, but fedavg offers"),
        ("fedavg", {"fraction_trian": 0.5}, "no such parameter: write fraction_train"),
        ("paced", {"speed": 1}, "but paced offers no such parameter: it has box, share, "),
        ("qfedavg", {}, "lacks client_learning_rate, which qfedavg needs: write a number above 0"),
        ("fedadam", {"eta": "much"}, "has eta = 'much': write a number above 0"),
        ("fedadam", {"beta_1": 1}, "has beta_1 = 1: write a number of at least 0 and below 1"),
        ("paced", {"share": 0}, "has share = 0: write a number above 0 and of at most 1"),
        ("paced", {"normalise": 1}, "has normalise = 1: write true or false"),
        ("fedbuff", {"buffer_size": 2.5}, "has buffer_size = 2.5: write a whole number of at le"),
        ("tifl", {"probabilities": 1}, "has probabilities = 1: write a list of numbers"),
        ("fedavg", "{no json", "is '{no json': write a dictionary of fedavg's parameters"),
        ("bulyan", {"num_malicious_nodes": 1}, "num_malicious_nodes + 3 = 7 replies, and the lab"),
        (PRIVATE, NEEDED | {"strategy_parameters": {"eta": 1}}, "has eta, but fedavg offers no"),
        (PRIVATE, {}, "lacks noise_multiplier"),
    ],
)
def test_strategies_that_cannot_work_are_refused(name: str, parameters: Any, said: str) -> None:
    given = parameters if isinstance(parameters, str) else json.dumps(parameters)
    found = [
        f"{what} {text}"
        for what, text in app.strategy_problems(name, given, OFFERED["strategies"], 4)
    ]
    assert any(said in line for line in found), found


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *((name, {}) for name in ("fedavg", "paced", "fedbuff", "oort", "tifl", "fedadam")),
        ("qfedavg", {"client_learning_rate": 0.1}),
        ("bulyan", {}),
        ("paced", {"box": 20, "share": 1, "normalise": True}),
        ("tifl", {"tiers": 2, "probabilities": [0.5, 0.5]}),
        (PRIVATE, NEEDED | {"strategy": "fedadam", "strategy_parameters": {"eta": 0.1}}),
        ("my-own", {"anything": 1}),  # an app may have strategies of its own
    ],
)
def test_strategies_that_work_are_not_refused(name: str, parameters: dict[str, Any]) -> None:
    strategies = OFFERED["strategies"]
    assert list(app.strategy_problems(name, json.dumps(parameters), strategies, 4)) == []


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"training_partitioner": "dirichlet"}, "lacks alpha, which dirichlet needs"),
        (
            {"training_partitioner_parameters": {"alpha": 1}},
            "has alpha, but iid has no such parameter: it has none",
        ),
        ({"training_examples": 8}, "is 8, which is too few for 4 devices: each needs at least 5"),
        ({"training_examples": "19"}, "Write 20 or more, or 0 for all"),
    ],
)
def test_data_that_cannot_be_dealt_are_refused(variables: dict[str, Any], said: str) -> None:
    ((_, text),) = app.data_problems(variables, OFFERED, 4)
    assert said in text


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"training_partitioner": "dirichlet", "training_partitioner_parameters": {"alpha": 0.3}},
        {"training_examples": 20},
        {"training_examples": 0},
        {"training_partitioner": "no such"},  # preflight says so
    ],
)
def test_data_that_can_be_dealt_are_not_refused(variables: dict[str, Any]) -> None:
    assert list(app.data_problems(variables, OFFERED, 4)) == []
