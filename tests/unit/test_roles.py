"""Roles as interfaces: what each may be given is specified, and nothing else gets in."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2 import nodes
from repository import ROOT, read_yaml, texts

ROLES = sorted(path.parents[1] for path in (ROOT / "roles").glob("*/meta/argument_specs.yml"))
TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "dict": (dict,),
    "float": (int, float),
    "int": (int,),
    "list": (list,),
    "path": (str,),
    "str": (str,),
}
CONDITIONS = {"changed_when", "failed_when", "that", "until", "when"}
"""Keys whose values are expressions without braces."""
SHARED = "lab"
"""The role whose variables other roles share. It has no tasks."""
ABOUT_THE_INVENTORY = {"preflight"}
"""Roles whose subject is the inventory itself; they are told what its groups are called."""
BLOCKS = ("block", "rescue", "always")
INCLUDES = {f"ansible.builtin.{how}_role" for how in ("include", "import")}
MAGIC = {
    "ansible_check_mode",
    "ansible_diff_mode",
    "ansible_facts",
    "ansible_failed_result",
    "ansible_failed_task",
    "ansible_inventory_sources",
    "ansible_playbook_python",
    "ansible_version",
}
"""What Ansible itself defines. An injected fact (ansible_distribution) is not among it."""
# Ansible takes a backslash in an expression for itself; Jinja does not like it.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
PARSER = jinja2.Environment(autoescape=True, extensions=["jinja2.ext.do"])


@dataclass(frozen=True)
class Use:
    """A variable in an expression: `key` of it if it is a word, `excused` if it may be missing."""

    name: str
    key: str
    excused: bool


def _parse(template: str) -> Iterator[Use]:
    tree = PARSER.parse(template)
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    excused = {
        id(guard.node)
        for guard in tree.find_all((nodes.Filter, nodes.Test))
        if guard.name in ("default", "d", "defined", "undefined")
    }
    keys = {id(item.node): item.attr for item in tree.find_all(nodes.Getattr)}
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.arg, nodes.Const):
            keys[id(item.node)] = str(item.arg.value)
    for name in tree.find_all(nodes.Name):
        if name.name not in own:
            yield Use(name.name, keys.get(id(name), ""), id(name) in excused)


def _uses(node: Any, key: str = "") -> Iterator[Use]:
    """Variables in all expressions of a YAML document."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _uses(name)
            yield from _uses(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from _uses(value, key)
    elif isinstance(node, str):
        if "{{" in node or "{%" in node:
            yield from _parse(node)
        elif key in CONDITIONS:
            yield from _parse("{{ " + node + " }}")


def _tasks(listed: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Tasks and blocks, outer ones first."""
    for task in listed:
        yield task
        for part in BLOCKS:
            yield from _tasks(task.get(part) or [])


class Role:
    """One role as its files say it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.specs: dict[str, dict[str, Any]] = read_yaml(path / "meta/argument_specs.yml")[
            "argument_specs"
        ]
        self.defaults: dict[str, Any] = read_yaml(path / "defaults/main.yml") or {}
        self.vars: dict[str, Any] = read_yaml(path / "vars/main.yml") or {}

    def options(self, entry: str) -> dict[str, dict[str, Any]]:
        """What an entry point takes."""
        return self.specs[entry].get("options") or {}

    @property
    def all_options(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Entry point, name and specification of each option."""
        for entry in self.specs:
            for name, spec in self.options(entry).items():
                yield entry, name, spec

    @cached_property
    def tasks(self) -> dict[str, list[dict[str, Any]]]:
        """Name of a file in tasks/ or handlers/ to its tasks, those inside blocks too."""
        found = [*self.path.glob("tasks/*.yml"), *self.path.glob("handlers/*.yml")]
        return {path.stem: list(_tasks(read_yaml(path) or [])) for path in sorted(found)}

    @property
    def every_task(self) -> Iterator[dict[str, Any]]:
        """All tasks of the role."""
        for tasks in self.tasks.values():
            yield from tasks

    @property
    def dependencies(self) -> list[str]:
        """Names of the roles whose variables it may use."""
        meta = read_yaml(self.path / "meta/main.yml") or {}
        return [each["role"] for each in meta.get("dependencies", [])]

    @cached_property
    def facts(self) -> set[tuple[str, str]]:
        """File and name of each fact that the role sets."""
        return {
            (file, name)
            for file, tasks in self.tasks.items()
            for task in tasks
            for name in task.get("ansible.builtin.set_fact") or {}
            if name != "cacheable"
        }

    @cached_property
    def uses(self) -> list[Use]:
        """Every variable that the role looks at."""
        found = [*_uses(self.defaults), *_uses(self.vars)]
        for path in self.path.glob("tasks/*.yml"):
            found += _uses(read_yaml(path))
        for path in self.path.glob("templates/**/*.j2"):
            found += _parse(path.read_text())
        return found

    @cached_property
    def internal(self) -> set[str]:
        """Names that the role gives to what is nobody else's, or should be."""
        names = set(self.vars)
        for task in self.every_task:
            loop = task.get("loop_control") or {}
            names |= {loop[key] for key in ("loop_var", "index_var") if key in loop}
            names |= {task["register"]} if "register" in task else set()
            if not INCLUDES & set(task):
                names |= set(task.get("vars") or {})
        return names


BY_NAME = {path.name: Role(path) for path in ROLES}


@pytest.fixture(params=list(BY_NAME.values()), ids=list(BY_NAME))
def role(request: pytest.FixtureRequest) -> Role:
    """Each role in turn."""
    given: Role = request.param
    return given


def _said(description: str | list[str]) -> str:
    return description if isinstance(description, str) else " ".join(description)


def _is_outline(value: Any) -> bool:
    """Whether a specification's default describes in <> what an expression gives."""
    return isinstance(value, str) and "<" in value and ">" in value


def test_there_are_roles_and_each_has_specifications() -> None:
    directories = {path.name for path in (ROOT / "roles").iterdir() if path.is_dir()}
    assert directories
    assert directories == set(BY_NAME)


def test_every_entry_point_and_option_is_described(role: Role) -> None:
    assert role.specs
    assert set(role.specs) <= set(role.tasks) or not role.tasks
    for entry, spec in role.specs.items():
        assert spec.get("short_description"), entry
    for entry, name, spec in role.all_options:
        assert spec.get("description"), f"{entry}: {name}"
        assert spec.get("type") in TYPES, f"{entry}: {name}"


def test_no_task_registers_what_is_a_variable_already(role: Role) -> None:
    """The role's variable would go on being what is read."""
    registered = {task["register"] for task in role.every_task if "register" in task}
    assert not registered & {*role.vars, *role.defaults}


def test_every_part_that_is_played_alone_is_an_entry_point() -> None:
    played = [
        (str(arguments["name"]), str(arguments["tasks_from"]).removesuffix(".yml"))
        for name, _ in texts("playbooks", "roles", "molecule", "tests")
        if name.endswith(".yml")
        for arguments in _includes(read_yaml(ROOT / name))
        if "tasks_from" in arguments
    ]
    assert played
    entries = {(name, entry) for name, role in BY_NAME.items() for entry in role.specs}
    assert set(played) - entries == set()


def _includes(node: Any) -> Iterator[Any]:
    """The arguments of each include_role and import_role."""
    for child in node.values() if isinstance(node, dict) else node or []:
        if isinstance(child, dict | list):
            yield from _includes(child)
    if isinstance(node, dict):
        yield from (node[name] for name in INCLUDES & set(node))


def test_an_option_has_the_roles_prefix(role: Role) -> None:
    names = [name for _, name, _ in role.all_options]
    assert [name for name in names if not name.startswith(f"{role.name}_")] == []


def test_an_option_is_the_same_at_every_entry_point(role: Role) -> None:
    seen: dict[str, dict[str, Any]] = {}
    for entry, name, spec in role.all_options:
        assert seen.setdefault(name, spec) == spec, f"{entry}: {name}"


def test_every_default_is_specified(role: Role) -> None:
    assert set(role.defaults) <= {name for _, name, _ in role.all_options}


def test_defaults_and_specifications_agree(role: Role) -> None:
    for _, name, spec in role.all_options:
        if "default" not in spec:
            assert name not in role.defaults, f"{name}: its default is not in its specification"
            continue
        assert not spec.get("required"), f"{name}: what has a default is not required"
        assert name in role.defaults, f"{name}: its default is not in defaults/main.yml"
        told, value = spec["default"], role.defaults[name]
        if _is_outline(told):
            assert "{{" in str(value), f"{name}: an outline for what is no expression"
        else:
            assert (type(told), told) == (type(value), value), name


def test_a_default_is_of_its_type_and_among_the_choices(role: Role) -> None:
    for _, name, spec in role.all_options:
        if "default" not in spec or "{{" in str(spec["default"]) or _is_outline(spec["default"]):
            continue
        value, kind = spec["default"], spec["type"]
        assert isinstance(value, TYPES[kind]), name
        assert kind == "bool" or not isinstance(value, bool), name
        elements: list[Any] = value if isinstance(value, list) else [value]
        if "elements" in spec:
            assert all(isinstance(each, TYPES[spec["elements"]]) for each in elements), name
        if "choices" in spec:
            assert set(elements) <= set(spec["choices"]), name


def test_every_variable_with_the_roles_prefix_is_specified(role: Role) -> None:
    known = {name for _, name, _ in role.all_options} | {name for _, name in role.facts}
    known |= set(role.vars)
    used = {use.name for use in role.uses if use.name.startswith(f"{role.name}_")}
    assert used - known == set()


def test_what_is_required_or_has_a_default_is_used(role: Role) -> None:
    used = {use.name for use in role.uses}
    if role.name == SHARED:
        used |= {use.name for other in BY_NAME.values() for use in other.uses}
        used |= set(re.findall(rf"\b{SHARED}_\w+", "".join(text for _, text in texts("playbooks"))))
        used |= {"lab_core_speed", "lab_address"}  # read by plugins/filter/inventory.py
    assert {name for _, name, _ in role.all_options} - used == set()


def test_internal_names_say_so(role: Role) -> None:
    if role.name == SHARED:
        return
    assert {name for name in role.internal if not name.startswith(f"__{role.name}_")} == set()


def test_facts_for_others_are_documented_and_no_inputs(role: Role) -> None:
    for file, name in role.facts:
        if name.startswith(f"__{role.name}_"):
            continue
        entry = file if file in role.specs else "main"
        assert name.startswith(f"{role.name}_"), name
        assert name not in role.options(entry), f"{name}: an input is set"
        description = _said(role.specs[entry].get("description", ""))
        assert re.search(rf"\b{name}\b", description), f"{name}: description does not tell of it"


def test_another_roles_variables_may_be_missing(role: Role) -> None:
    for use in role.uses:
        for owner, other in BY_NAME.items():
            if other is role or not use.name.startswith((f"{owner}_", f"__{owner}_")):
                continue
            public = {name for _, name, _ in other.all_options} | {name for _, name in other.facts}
            if owner in role.dependencies:
                assert use.name in public | set(other.vars), f"{owner} has no {use.name}"
                continue
            assert use.name in public, f"{use.name} is {owner}'s own"
            assert use.excused, f"{use.name}: give a default, the role must work without {owner}"


def test_roles_know_no_groups(role: Role) -> None:
    used = {use.name for use in role.uses} & {"groups", "group_names"}
    assert used <= ({"groups"} if role.name in ABOUT_THE_INVENTORY else set())
    assert {use.key for use in role.uses if use.name == "groups"} <= {""}
    for path in role.path.glob("*_plugins/*.py"):
        assert not re.search(r"[\"'](?:groups|group_names)[\"']", path.read_text()), path


def test_facts_are_not_injected(role: Role) -> None:
    used = {use.name for use in role.uses if use.name.startswith("ansible_")}
    assert used - MAGIC == set()


def test_nothing_goes_through_a_shell_or_ignores_errors(role: Role) -> None:
    for task in role.every_task:
        words = set(task) | {str(module).rsplit(".", 1)[-1] for module in task}
        assert not words & {"shell", "raw", "ignore_errors"}, task.get("name")
