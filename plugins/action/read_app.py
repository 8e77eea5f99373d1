"""Read a Flower App on the control node: what is wrong with it, and what the lab needs of it.

Flower makes the same checks when a run starts, and others when the app is loaded. These are made
before anything is changed, and each message says which file, which value and what to do. The rules
are those of Flower 1.42 (`flwr.cli.build`, `flwr.common.config`).
"""

import ast
import difflib
import hashlib
import io
import json
import os
import re
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.vars import load_extra_vars
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from pathspec import PathSpec

PROJECT = "pyproject.toml"
COMPONENTS = {"serverapp": "ServerApp", "clientapp": "ClientApp"}
VARIABLES = {
    "training_rounds": "num-server-rounds",
    "training_strategy": "strategy",
    "training_strategy_parameters": "strategy-parameters",
    "training_seed": "seed",
    "training_model": "model",
    "training_model_alpha": "alpha",
    "training_recipe": "recipe",
}
"""Variables that are names for keys of an app's configuration, where the app has the key."""
_OF_THE_DEFAULT_APP = {"model", "alpha", "recipe"}
"""Keys that mean something else in an app that has not all of them: there the inventory's variables
are not for it."""
PARAMETERS = Path(__file__).parents[2] / "runtime/flowerbed/parameters.json"
"""Strategies and partitioners with their parameters, written by `flowerbed.parameters`."""
_DATA = ("training_partitioner", "training_partitioner_parameters", "training_examples")
_MAKES_STRATEGIES = "make_strategy"
"""What an app calls to build one of the lab's strategies by its name."""
_TYPES = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "text",
    "dict": "a dictionary",
    "list": "a list of numbers",
}

# What a Flower App Bundle may hold, as patterns of a .gitignore file.
_INCLUDED = (
    *("**/*.py", "**/*.toml", "**/*.md", "**/*.yaml", "**/*.yml", "**/*.json", "**/*.jsonl"),
    "/LICENSE",
)
_EXCLUDED = (
    *(".flwr/**", "**/__pycache__/**", "**/*_test.py", "**/test_*.py"),
    *("build/**", "eggs/**", ".eggs/**", "lib/**", "lib64/**", "parts/**", "*.egg"),
    *(".venv/**", "env/**", "venv/**", "ENV/**", "env.bak/**", "venv.bak/**"),
)
_LARGEST_BUNDLE = 10 * 2**20
_DEEPEST = 10
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_SHOWN_CHARACTERS = 80

Problem = tuple[Path | str, str]
"""What is wrong: the file, directory or variable, and the rest of the sentence."""
Config = dict[str, bool | int | float | str]


def directory_of(given: str, default: str) -> Path:
    """The directory of the app; a relative path starts where ansible-playbook was called."""
    return Path(os.path.normpath(Path(given or default).expanduser().absolute()))


def read_project(directory: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The content of an app's pyproject.toml, or why there is none."""
    if not directory.is_dir():
        text = "there is no such directory (training_app): write the directory of a Flower App"
        return {}, [(directory, text)]
    file = directory / PROJECT
    if not file.is_file():
        text = f"has no {PROJECT}, so it is no Flower App (training_app): write another directory"
        return {}, [(directory, text)]
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")), []
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return {}, [(file, f"is no valid TOML ({error}): correct it")]


def table(project: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A table of pyproject.toml; empty where there is none."""
    found: Any = project
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def bundle_files(directory: Path, project: Mapping[str, Any]) -> dict[str, Path]:
    """The files that Flower puts into the app's bundle, by their paths in it."""
    app = table(project, "tool", "flwr", "app")
    files: dict[str, Path] = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                files[path.relative_to(directory).as_posix()] = path
    ignored = files[".gitignore"].read_text(errors="ignore") if ".gitignore" in files else ""
    found: Iterable[str] = _spec(_INCLUDED).match_files(files)
    for excluded in (_EXCLUDED, ignored.splitlines(), app.get("fab-exclude", ())):
        found = _spec(excluded).match_files(found, negate=True)
    if included := app.get("fab-include"):
        found = _spec(included).match_files(found)
    return {name: files[name] for name in sorted({*found, PROJECT})}


def _spec(patterns: Iterable[Any]) -> PathSpec[Any]:
    return PathSpec.from_lines("gitignore", map(str, patterns))


def digest(files: Mapping[str, Path]) -> str:
    """A hash of an app: of the paths and contents of its files."""
    told = [[name, hashlib.sha256(path.read_bytes()).hexdigest()] for name, path in files.items()]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def entries(files: Mapping[str, Path], root: str) -> list[dict[str, str]]:
    """Files and their directories as `place_files` takes them, below `root`."""
    parents = {parent for name in files for parent in Path(root, name).parents}
    folders = sorted(str(parent) for parent in parents if str(parent) != ".")
    return [{"path": folder, "mode": "0755"} for folder in folders] + [
        {"path": f"{root}/{name}", "src": str(path), "mode": "0644"} for name, path in files.items()
    ]


def project_problems(
    directory: Path, project: Mapping[str, Any], files: Mapping[str, Path], flower: str
) -> Iterator[Problem]:
    """What is wrong with an app.

    Args:
        directory: of the app.
        project: its pyproject.toml.
        files: see `bundle_files`.
        flower: version of Flower that the lab runs.
    """
    file = directory / PROJECT
    app = table(project, "tool", "flwr", "app")
    about = table(project, "project")
    for where, keys in (("project", ("name", "version")), ("tool.flwr.app", ("publisher",))):
        for key in keys:
            if not isinstance((about if where == "project" else app).get(key), str):
                yield file, f'[{where}] has no {key}: write {key} = "…"'
    name = about.get("name")
    if isinstance(name, str) and not _NAME.fullmatch(name):
        yield (
            file,
            f"[project] name is '{name}': write a letter, then up to 31 letters, digits, hyphens",
        )
    for component, kind in COMPONENTS.items():
        reference = table(app, "components").get(component)
        if text := _component_problem(directory, component, kind, reference, files):
            yield file, text
    yield from _requirement_problems(file, about.get("dependencies", []), flower)
    yield from _bundle_problems(directory, files)


def _component_problem(
    directory: Path, component: str, kind: str, reference: Any, files: Mapping[str, Path]
) -> str | None:
    """The sentence on a component that cannot be found."""
    if reference is None:
        return (
            f"[tool.flwr.app.components] has no {component}: write {component} = "
            f'"package.module:app", where the {kind} is defined'
        )
    if not isinstance(reference, str) or not re.fullmatch(r"[\w.]+:[\w.]+", reference):
        return f"{component} is {_shown(reference)}: write package.module:name of the {kind}"
    module, _, attribute = reference.partition(":")
    path = module.replace(".", "/")
    names = [f"{path}.py", f"{path}/__init__.py"]
    found = next((name for name in names if name in files), None)
    if found is None:
        there = next((name for name in names if (directory / name).is_file()), None)
        if there:
            return (
                f"{component} is '{reference}', but Flower leaves {there} out of the app (its name "
                "or folder, .gitignore, or fab-include and fab-exclude): move or rename the file"
            )
        return (
            f"{component} is '{reference}', but there is no {names[0]}: write the module that "
            f"defines the {kind}"
        )
    if _defines(files[found], attribute.split(".")[0]):
        return None
    return (
        f"{component} is '{reference}', but {found} does not define "
        f"'{attribute}': write the name of the {kind}"
    )


def _defines(file: Path, name: str) -> bool:
    """Whether a module binds a name.

    A module that this Python cannot parse may be fine for the newer one of the image; whether it
    is, is seen when the app is loaded there.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return True
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=bound, ctx=ast.Store()) | ast.ClassDef(name=bound):
                names = [bound]
            case ast.FunctionDef(name=bound) | ast.AsyncFunctionDef(name=bound):
                names = [bound]
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names = [alias.asname or alias.name.partition(".")[0] for alias in aliases]
            case _:
                continue
        if name in names or "*" in names:
            return True
    return False


def _requirement_problems(file: Path, dependencies: Any, flower: str) -> Iterator[Problem]:
    if not isinstance(dependencies, list):
        yield file, "[project] dependencies is no list: write a list of requirements"
        return
    for text in dependencies:
        try:
            requirement = Requirement(text)
        except (InvalidRequirement, TypeError) as error:
            reason = str(error).splitlines()[0]
            yield file, f"dependencies has {_shown(text)}, which is no requirement ({reason})"
            continue
        if canonicalize_name(requirement.name) == "flwr" and not requirement.specifier.contains(
            flower, prereleases=True
        ):
            yield (
                file,
                f"dependencies has '{text}', but the lab runs Flower {flower}: change the "
                f"requirement so that it allows {flower}",
            )


def _bundle_problems(directory: Path, files: Mapping[str, Path]) -> Iterator[Problem]:
    """What Flower's limits and the way to the coordinator do not allow."""
    for name, path in files.items():
        if name.count("/") > _DEEPEST:
            yield path, f"is more than {_DEEPEST} folders deep, which Flower refuses: move it up"
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            yield path, "is no UTF-8 text: convert it, or exclude it with fab-exclude"
    if sum(path.stat().st_size for path in files.values()) <= _LARGEST_BUNDLE:
        return
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, path in files.items():
            bundle.write(path, name)
    if len(buffer.getvalue()) > _LARGEST_BUNDLE:
        largest = max(files, key=lambda name: files[name].stat().st_size)
        yield (
            directory,
            f"is {len(buffer.getvalue()) / 2**20:.1f} MiB as a Flower App Bundle, which may have "
            f"{_LARGEST_BUNDLE // 2**20} MiB: exclude data with fab-exclude or .gitignore (the "
            f"largest file is {largest})",
        )


def flat(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration without nested tables, whose keys are joined with dots."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def config_of(
    own: Mapping[str, Any], variables: Mapping[str, Any], given: Iterable[str], file: Path
) -> tuple[Config, list[Problem]]:
    """What a run changes of the app's own configuration, and what is wrong with that.

    Args:
        own: the app's configuration, flat.
        variables: `training_config` and those of `VARIABLES` that are set.
        given: names of the variables that are from the command line. These outweigh the
            inventory's, and the app must have a key for each of them.
        file: the app's pyproject.toml, for messages.
    """
    problems: list[Problem] = [
        (file, f"{key} in [tool.flwr.app.config] is {_shown(value)}, which Flower does not take")
        for key, value in own.items()
        if type(value) not in _KINDS
    ]
    config: Config = {}
    foreign = set() if own.keys() >= _OF_THE_DEFAULT_APP else _OF_THE_DEFAULT_APP
    for from_command_line in (False, True):
        for variable, key in VARIABLES.items():
            if variable not in variables or (variable in given) != from_command_line:
                continue
            if key in foreign and not from_command_line:
                continue
            if key in own:
                config[key] = _named_value(variable, key, variables[variable], own[key], problems)
            elif from_command_line:
                text = (
                    f"is {_shown(variables[variable])}, but the app has no key '{key}' ({file}): "
                    "remove it, or set a key of the app with training_config"
                )
                problems.append((variable, text))
        if ("training_config" in given) == from_command_line:
            config |= _checked(variables.get("training_config", {}), own, file, problems)
    return config, problems


def _named_value(variable: str, key: str, value: Any, own: Any, problems: list[Problem]) -> Any:
    """The value of one of `VARIABLES` with the type of its key in the app."""
    if isinstance(own, str) and not isinstance(value, str):
        return json.dumps(value)
    try:
        number = float(value) if type(own) in (int, float) else None
    except (TypeError, ValueError):
        number = None
    if isinstance(own, float) and number is not None:
        return number
    if type(own) is int and number is not None and number.is_integer():
        return int(value)
    if isinstance(value, type(own)):
        return value
    wanted = _KINDS.get(type(own), "another value")
    problems.append((variable, f"is {_shown(value)}: the app's key '{key}' wants {wanted}"))
    return own


def _checked(
    config: Any, own: Mapping[str, Any], file: Path, problems: list[Problem]
) -> dict[str, Any]:
    """The keys of `training_config` that are right, flat; the others become problems."""
    if not isinstance(config, Mapping):
        text = f"is {_shown(config)}: write a dictionary of the app's keys, such as {{key: value}}"
        problems.append(("training_config", text))
        return {}
    checked: dict[str, Any] = {}
    for key, value in flat(config).items():
        what = f"{key} is {_shown(value)}"
        if key not in own:
            near = difflib.get_close_matches(key, own, n=1)
            remedy = f"write {near[0]}" if near else f"write one of {', '.join(own) or 'none'}"
            text = f"{what}, but the app has no such key in [tool.flwr.app.config] of {file}"
            problems.append(("training_config", f"{text}: {remedy}"))
        elif type(value) is type(own[key]):
            checked[key] = value
        elif type(own[key]) is float and type(value) is int:
            checked[key] = float(value)
        else:
            text = f"{what}, but {file} has {_shown(own[key])}: "
            text += f"write {_KINDS.get(type(own[key]), 'another value')}"
            problems.append(("training_config", text))
    return checked


# --- strategies and partitioners ---------------------------------------------------------------


def strategy_problems(
    name: str, parameters: Any, strategies: Mapping[str, Any], devices: int
) -> Iterator[Problem]:
    """What is wrong with the parameters of one of the lab's strategies.

    Args:
        name: of the strategy; what is no strategy of the lab is the app's own affair.
        parameters: as the app's configuration has them: JSON, or a dictionary.
        strategies: the lab's, see PARAMETERS.
        devices: number of devices of the lab.
    """
    if name not in strategies:
        return
    try:
        given = json.loads(parameters) if isinstance(parameters, str) else parameters
    except ValueError:
        given = None
    variable = "training_strategy_parameters"
    if not isinstance(given, Mapping):
        yield variable, f"is {_shown(parameters)}: write a dictionary of {name}'s parameters"
        return
    yield from _parameter_problems(name, given, strategies[name])
    malicious = given.get("num_malicious_nodes", 0)
    if name == "bulyan" and isinstance(malicious, int) and devices < 4 * malicious + 3:
        yield (
            "training_strategy",
            f"is 'bulyan', which aggregates nothing from fewer than 4 * num_malicious_nodes + 3 = "
            f"{4 * malicious + 3} replies, and the lab has {devices} devices: add devices, or "
            "write multikrum",
        )
    if isinstance(inner := given.get("strategy_parameters"), Mapping):
        wrapped = str(given.get("strategy", "fedavg"))
        yield from strategy_problems(wrapped, inner, strategies, devices)


def _parameter_problems(
    name: str, given: Mapping[str, Any], known: Mapping[str, Any]
) -> Iterator[Problem]:
    variable = "training_strategy_parameters"
    for key in given.keys() - known.keys():
        near = difflib.get_close_matches(key, known, n=1)
        remedy = f"write {near[0]}" if near else f"it has {', '.join(known) or 'none'}"
        yield variable, f"has {key}, but {name} offers no such parameter: {remedy}"
    for key, wanted in known.items():
        if key not in given:
            if wanted.get("needed"):
                yield variable, f"lacks {key}, which {name} needs: write {_wanted(wanted)}"
        elif not (given[key] is None and wanted.get("optional")) and not _fits(given[key], wanted):
            yield variable, f"has {key} = {_shown(given[key])}: write {_wanted(wanted)}"


def _fits(value: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether a value has the type and is in the range of a parameter."""
    kind = wanted["type"]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in ("float", "int"):
        return (
            number
            and (kind == "float" or isinstance(value, int))
            and value >= wanted.get("minimum", value)
            and value <= wanted.get("maximum", value)
            and not value <= wanted.get("above", value - 1)
            and not value >= wanted.get("below", value + 1)
        )
    kinds = {"bool": bool, "str": str, "dict": Mapping, "list": list}
    return isinstance(value, kinds[kind])


def _wanted(wanted: Mapping[str, Any]) -> str:
    limits = {
        "above": "above {}",
        "minimum": "of at least {}",
        "maximum": "of at most {}",
        "below": "below {}",
    }
    words = [text.format(wanted[limit]) for limit, text in limits.items() if limit in wanted]
    return " ".join([_TYPES[wanted["type"]], " and ".join(words)]).strip()


def data_problems(
    variables: Mapping[str, Any], table: Mapping[str, Any], devices: int
) -> Iterator[Problem]:
    """What is wrong with how the examples are dealt, as far as it shows without the data.

    Args:
        variables: those of `_DATA` that are set.
        table: see PARAMETERS.
        devices: number of devices of the lab.
    """
    name = str(variables.get("training_partitioner") or "iid")
    given = variables.get("training_partitioner_parameters") or {}
    known = table["partitioners"].get(name)
    if known is not None and isinstance(given, Mapping):  # otherwise preflight has said so
        for key in given.keys() - known.keys():
            yield (
                "training_partitioner_parameters",
                f"has {key}, but {name} has no such parameter: it has {', '.join(known) or 'none'}",
            )
        for key, wanted in known.items():
            if wanted.get("needed") and key not in given:
                yield "training_partitioner_parameters", f"lacks {key}, which {name} needs"
    try:
        examples = int(variables.get("training_examples") or 0)
    except (TypeError, ValueError):
        return
    least = table["fewest_examples"] * devices
    if 0 < examples < least:
        yield (
            "training_examples",
            f"is {examples}, which is too few for {devices} devices: each needs at least "
            f"{table['fewest_examples']} to train and to test. Write {least} or more, or 0 for all",
        )


def _known_problems(
    variables: Mapping[str, Any],
    config: Mapping[str, Any],
    files: Mapping[str, Path],
    groups: Mapping[str, Any],
) -> Iterator[Problem]:
    """What is wrong with strategy and data, as the lab knows them without running anything.

    Args:
        variables: of the coordinator.
        config: the app's whole configuration.
        files: of the app.
        groups: of the inventory.
    """
    offered, devices = json.loads(PARAMETERS.read_text()), len(groups.get("devices", ()))
    yield from data_problems(variables, offered, devices)
    code = (file for name, file in files.items() if name.endswith(".py"))
    if {"strategy", "strategy-parameters"} <= config.keys() and any(
        _MAKES_STRATEGIES in file.read_text(errors="ignore") for file in code
    ):
        yield from strategy_problems(
            str(config["strategy"]), config["strategy-parameters"], offered["strategies"], devices
        )


def _shown(value: Any) -> str:
    """A value as a person would look for it."""
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 2] + " …"


class ActionModule(ActionBase):
    """`read_app: host=COORDINATOR default=DIRECTORY flower=VERSION`: never fails.

    Reads `training_app`, `training_config` and `VARIABLES` of the host.

    Returns:
        The app's `directory`, and `problems`, a line each. Where it has a pyproject.toml, too, its
        `files` (path in the app to path here), `entries` (the same for `place_files`, below app/),
        their `hash`, `config` (what the run changes of its configuration), `own` (its whole
        configuration as the run has it), and `flowerbed`, its own table of that name.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(("host", "default", "flower"))

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        """Read and judge."""
        super().run(tmp, task_vars)
        wanted = self._task.args
        hostvars = task_vars["hostvars"][wanted["host"]]
        names = ("training_app", "training_config", *VARIABLES, *_DATA)
        # Plain values: without Ansible's tags.
        variables = json.loads(
            json.dumps({name: hostvars[name] for name in names if name in hostvars}, default=str)
        )
        directory = directory_of(str(variables.get("training_app") or ""), wanted["default"])
        project, problems = read_project(directory)
        answer: dict[str, Any] = {"changed": False, "directory": str(directory)}
        if not problems:
            files = bundle_files(directory, project)
            own = flat(table(project, "tool", "flwr", "app", "config"))
            given = load_extra_vars(self._loader)
            config, problems = config_of(own, variables, given, directory / PROJECT)
            problems += project_problems(directory, project, files, wanted["flower"])
            problems += _known_problems(variables, own | config, files, task_vars["groups"])
            answer |= {
                "hash": digest(files),
                "files": {name: str(path) for name, path in files.items()},
                "entries": entries(files, "app"),
                "config": config,
                "own": own | config,
                "flowerbed": table(project, "tool", "flowerbed"),
            }
        return answer | {"problems": [f"{what}: {text}" for what, text in problems]}
