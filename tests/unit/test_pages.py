"""The pages: every link leads somewhere, and pages and code name the same things."""

import ast
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from metrics import flowerbed_metrics, outcomes
from repository import ROOT, files, page_commands, read_yaml

DOCS = sorted((ROOT / "docs").glob("*.md"))
REFERENCE = ROOT / "docs/reference.md"
PAGES = [path for path in files() if path.suffix == ".md"]
CURRENT = [path for path in PAGES if path.name != "CHANGELOG.md"]
"""Pages about the project as it is now: the changelog names things that are gone."""
RUNTIME = ROOT / "runtime/flowerbed"
LONGEST_README = 150
DIRECTORIES = "app benchmarks docs files inventory molecule playbooks plugins roles runtime tests"
OF_ONE_PLAYBOOK = {"runs", "teardown_purge"}
"""Variables that a playbook takes on the command line and no inventory sets."""

_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(params=PAGES, ids=_name)
def page(request: pytest.FixtureRequest) -> Path:
    """Each page in turn."""
    path: Path = request.param
    return path


@pytest.fixture(params=CURRENT, ids=_name)
def current(request: pytest.FixtureRequest) -> Path:
    """Each page but the changelog."""
    path: Path = request.param
    return path


# --- Markdown ------------------------------------------------------------------------------------


def _prose(path: Path) -> str:
    """A page without its code blocks."""
    return _FENCED.sub("", path.read_text())


def _code(path: Path) -> Iterator[str]:
    """The code of a page: blocks and spans."""
    text = path.read_text()
    yield from (found[3] for found in _FENCED.finditer(text))
    yield from _INLINE.findall(_FENCED.sub("", text))


def _anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = [heading.lower() for _, heading in _HEADING.findall(_prose(path))]
    slugs = [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings]
    earlier = [slugs[:index].count(slug) for index, slug in enumerate(slugs)]
    return {f"{slug}-{n}" if n else slug for slug, n in zip(slugs, earlier, strict=True)}


def _section(path: Path, heading: str) -> str:
    """The text below a heading, up to the next one of its level."""
    text = path.read_text()
    for found in _HEADING.finditer(text):
        if found[2] == heading:
            rest = text[found.end() :]
            end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
            return rest[: end.start()] if end else rest
    raise AssertionError(f"{_name(path)} has no heading {heading!r}")


def _rows(path: Path, heading: str) -> list[list[str]]:
    """The cells of all tables below a heading, without the tables' heads."""
    tables = re.findall(r"(?:^\|.*\n)+", _section(path, heading), re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()[2:]]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]


def _listed(path: Path, heading: str) -> list[str]:
    """The names in the first columns of the tables below a heading."""
    return [name for row in _rows(path, heading) for name in _INLINE.findall(row[0])]


# --- the code ------------------------------------------------------------------------------------


def _options() -> dict[str, dict[str, Any]]:
    """Every option of every role and of the playbooks, by name."""
    options: dict[str, dict[str, Any]] = {}
    for path in sorted((ROOT / "roles").glob("*/meta/argument_specs.yml")):
        for entry in read_yaml(path)["argument_specs"].values():
            options |= entry.get("options") or {}
    own = read_yaml(ROOT / "roles/preflight/vars/main.yml")["__preflight_of_playbooks"]
    for group in own.values():
        for name, option in group.items():
            options[name] = options.get(name, {}) | option
    return options


def _set_by(node: object) -> Iterator[str]:
    """The names in every `vars` of a YAML document."""
    if isinstance(node, dict):
        yield from node.get("vars") or ()
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _set_by(item)


def _settable() -> dict[str, dict[str, Any]]:
    """The options that an inventory may set: those that are not required and not set by the lab."""
    own = set(read_yaml(ROOT / "playbooks/group_vars/machines.yml"))
    for pattern in ("playbooks/**/*.yml", "roles/*/tasks/*.yml"):
        for path in ROOT.glob(pattern):
            if "group_vars" not in path.parts:
                own |= set(_set_by(read_yaml(path)))
    return {
        name: option
        for name, option in _options().items()
        if name not in own and (not option.get("required") or name == "device_class")
    }


def _fields(path: Path, name: str) -> list[str]:
    """The fields of a class."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return [
                field.target.id
                for field in node.body
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            ]
    raise AssertionError(f"{_name(path)} has no class {name}")


def _targets(*, documented: bool) -> set[str]:
    """The targets of the Makefile; with `documented`, those that `make` lists."""
    text = (ROOT / "Makefile").read_text()
    found = re.findall(r"^([a-z-]+):(?!=)(.*)$", text, re.MULTILINE)
    targets = {name for name, rest in found if "## " in rest or not documented}
    if not documented:
        benchmarks = re.search(r"^BENCHMARKS = (.*)$", text, re.MULTILINE)
        assert benchmarks
        targets |= {f"bench-{name}" for name in benchmarks[1].split()}
    return targets


def _rules() -> set[str]:
    """The recording rules of Prometheus."""
    groups = read_yaml(ROOT / "files/prometheus/recording.yml")["groups"]
    return {rule["record"] for group in groups for rule in group["rules"]}


def _recorded() -> set[str]:
    """The columns of results and the keys of run.json."""
    classes = {
        "results.py": ("RoundRow", "DeviceRow"),
        "faults.py": ("FaultRow",),
        "settings.py": ("LabSettings",),
    }
    return {
        field
        for file, names in classes.items()
        for name in names
        for field in _fields(RUNTIME / file, name)
    }


def _shown(value: object) -> str:
    """A default as the reference shows it."""
    if value == "":
        return '`""`'
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`"


# --- every page ----------------------------------------------------------------------------------


def test_there_are_pages() -> None:
    names = {path.name for path in DOCS}
    assert {"get-started.md", "your-own-app.md", "reference.md", "how-it-works.md"} <= names
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"} <= set(map(_name, PAGES))


def test_every_link_leads_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        if not there.exists() or (anchor and anchor not in _anchors(there)):
            dead.append(target)
    assert dead == []


def test_every_page_of_the_documentation_can_be_found() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [path.name for path in DOCS if f"](docs/{path.name})" not in readme] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README


def test_pages_use_plain_characters(page: Path) -> None:
    """Letters of names, and the lines and arrows of a picture, are what ASCII does not have."""
    pictures = "".join(found[3] for found in _FENCED.finditer(page.read_text()) if not found[2])
    strange = {
        character
        for character in page.read_text()
        if not character.isascii()
        and not unicodedata.category(character).startswith("L")
        and not (character in pictures and unicodedata.category(character) in ("So", "Sm"))
    }
    assert strange == set()


@pytest.mark.parametrize("path", DOCS, ids=_name)
def test_a_page_begins_with_a_command(path: Path) -> None:
    beginning = path.read_text().partition("\n## ")[0]
    assert _FENCED.search(beginning)


@pytest.mark.parametrize("name", ["get-started", "your-own-app"])
def test_the_commands_of_a_page_can_be_extracted(name: str) -> None:
    commands = page_commands(name)
    assert len(commands) > 1
    for command in commands:
        assert command.split()[0] in ("make", "cp"), command


# --- what pages name exists ----------------------------------------------------------------------


def test_every_make_target_exists(current: Path) -> None:
    known = _targets(documented=False)
    for code in _code(current):
        for line in code.splitlines():
            if line.startswith("make "):
                # Words before the first variable or option.
                words = re.match(r"make((?: [a-z][a-z-]*)*)", line)
                assert words
                assert set(words[1].split()) <= known, line


def test_every_path_exists(current: Path) -> None:
    pattern = re.compile(rf"(?<![\w./<-])(?:{DIRECTORIES.replace(' ', '|')})/[\w./<>*-]*")
    named = {path for code in _code(current) for path in pattern.findall(code)}
    # A name in <> stands for any name; the lines with inventory/home show how it is made.
    real = {path for path in named if not re.search(r"[<>*]|inventory/home", path)}
    assert {path for path in real if not (ROOT / path.rstrip(".")).exists()} == set()


def test_every_variable_exists(current: Path) -> None:
    prefixes = {path.parents[1].name for path in ROOT.glob("roles/*/meta/argument_specs.yml")}
    pattern = re.compile(
        rf"(?<![\w./])(?:{'|'.join(sorted(prefixes | {'lab'}))})_[a-z_]+\b(?!/|\()"
    )
    named = {name for code in _code(current) for name in pattern.findall(code)}
    labels = {label for labels in flowerbed_metrics().values() for label in labels}
    assert named - set(_settable()) - labels - _recorded() - OF_ONE_PLAYBOOK == set()


def test_every_metric_exists(current: Path) -> None:
    code = " ".join(_code(current))
    named = set(re.findall(r"(?<![\w./-])(?:flowerbed|model)_[a-z_]+\b(?![/(.])", code))
    known = set(flowerbed_metrics()) | _recorded()
    functions = {"model_alpha"}
    assert {name for name in named if name not in known | functions} == set()


def test_every_module_exists(current: Path) -> None:
    named = re.findall(r"(?<![\w/])flowerbed(?:\.\w+)+", " ".join(_code(current)))
    for name in named:
        path, rest = ROOT / "runtime/flowerbed", name.split(".")[1:]
        while rest and ((path / rest[0]).is_dir() or (path / f"{rest[0]}.py").is_file()):
            path /= rest.pop(0)
        source = (
            path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        )
        assert not rest or re.search(rf"\b{re.escape(rest[0])}\b", source.read_text()), name


# --- the reference: nothing missing, nothing that does not exist ---------------------------------


def _compared(listed: Iterable[str], known: Iterable[str]) -> None:
    listed = list(listed)
    assert sorted(listed) == sorted(set(listed)), "listed twice"
    missing, unknown = sorted(set(known) - set(listed)), sorted(set(listed) - set(known))
    assert (missing, unknown) == ([], []), "(missing, unknown)"


def test_the_reference_lists_every_variable() -> None:
    _compared(_listed(REFERENCE, "Inventory variables"), _settable())


def test_the_reference_shows_the_defaults() -> None:
    settable = _settable()
    wrong = {}
    for name, default, *_ in _rows(REFERENCE, "Inventory variables"):
        option = settable.get(name.strip("`"), {})
        if "default" not in option:
            continue
        value = option["default"]
        # A default that an expression gives is described in words.
        expression = isinstance(value, str) and ("{{" in value or "<" in value)
        if (default != _shown(value) and not expression) or not default:
            wrong[name] = (default, value)
    assert wrong == {}


@pytest.mark.parametrize(
    ("heading", "known"),
    [
        ("Metrics", set(flowerbed_metrics())),
        ("Recording rules", _rules()),
        ("rounds.csv", set(_fields(RUNTIME / "results.py", "RoundRow"))),
        ("devices.csv", set(_fields(RUNTIME / "results.py", "DeviceRow"))),
        ("faults.csv", set(_fields(RUNTIME / "faults.py", "FaultRow"))),
        ("run.json", {*_fields(RUNTIME / "settings.py", "LabSettings"), "config"}),
        ("Outcomes", outcomes()),
        ("Make targets", {f"make {target}" for target in _targets(documented=True)}),
        ("Playbooks", {_name(path) for path in (ROOT / "playbooks").glob("*.yml")}),
    ],
)
def test_the_reference_is_complete(heading: str, known: set[str]) -> None:
    assert known
    _compared(_listed(REFERENCE, heading), known)


def test_the_node_configuration_is_complete() -> None:
    fields = _fields(RUNTIME / "settings.py", "DeviceSettings")
    known = {name.replace("_", "-") for name in fields} - {"model-config"}
    _compared(_listed(ROOT / "docs/your-own-app.md", "Node configuration"), known)


# --- strategies ----------------------------------------------------------------------------------

RUNS = ROOT / "docs/runs-and-strategies.md"


def _parameters(name: str) -> dict[str, object]:
    """The arguments of the constructor of a strategy of the lab, with their defaults."""
    for node in ast.walk(ast.parse((RUNTIME / f"strategies/{name}.py").read_text())):
        if isinstance(node, ast.ClassDef) and node.name.lower() == name:
            (init,) = (
                function
                for function in node.body
                if isinstance(function, ast.FunctionDef) and function.name == "__init__"
            )
            arguments = init.args
            named = [each.arg for each in arguments.args[1:]] + [
                a.arg for a in arguments.kwonlyargs
            ]
            values = [*arguments.defaults, *filter(None, arguments.kw_defaults)]
            return dict(zip(named, map(ast.literal_eval, values), strict=True))
    raise AssertionError(f"strategies/{name}.py has no class of this name")


def test_every_strategy_is_on_the_page() -> None:
    listed = [name for row in _rows(RUNS, "Strategies") for name in _INLINE.findall(row[0])]
    _compared(listed, _options()["training_strategy"]["choices"])


@pytest.mark.parametrize("name", ["paced", "fedbuff", "tifl", "oort"])
def test_the_parameters_of_a_strategy_are_on_the_page(name: str) -> None:
    (cell,) = (row[2] for row in _rows(RUNS, "Strategies") if f"`{name}`" in row[0])
    known = {
        key: "empty" if value == () else _shown(value).strip("`")
        for key, value in _parameters(name).items()
    }
    assert dict(re.findall(r"`(\w+)` \(([^)]*)\)", cell)) == known
