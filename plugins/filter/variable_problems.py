"""What is wrong with the variables of an inventory, judged by the roles' argument specs.

A problem is a pair: the host it is about, and the rest of the sentence, which names variable, value
and remedy.
"""

import difflib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

Problem = tuple[str, str]
Option = Mapping[str, Any]
Found = Mapping[str, Any]
"""A variable as `read_variables` found it: its `value`, or `raw` text and the `reason`."""

_SIZE = re.compile(r"\d+(\.\d+)?[kmgt]", re.IGNORECASE)
_ALMOST_A_SIZE = re.compile(r"\s*(\d+)(?:[.,](\d+))?\s*([kmgt])(i?b)?\s*", re.IGNORECASE)
_SECRET = re.compile(r"password|secret|token|key", re.IGNORECASE)
_SHOWN_CHARACTERS = 80
_TRUTH = ("true", "yes", "false", "no")


def role_options(roles: str) -> dict[str, dict[str, Option]]:
    """The public variables of the roles in a directory: role, variable, entry in its specs."""
    options: dict[str, dict[str, Option]] = {}
    for specs in sorted(Path(roles).glob("*/meta/argument_specs.yml")):
        entry_points = yaml.safe_load(specs.read_text())["argument_specs"].values()
        options[specs.parents[1].name] = {
            name: option
            for entry in entry_points
            for name, option in entry.get("options", {}).items()
        }
    return options


def passed_variables(playbooks: str) -> dict[str, str]:
    """The variables that playbooks set themselves, above any inventory, each with where and how."""
    return {
        name: f"playbooks/{playbook.name}: {value}"
        for playbook in sorted(Path(playbooks).glob("*.yml"))
        for variables in _set_by(yaml.safe_load(playbook.read_text()))
        for name, value in variables.items()
    }


def _set_by(node: object) -> Iterator[dict[str, Any]]:
    """The `vars` of plays and of roles in them. Those of an imported playbook are defaults."""
    if isinstance(node, dict):
        roles = {"role", "ansible.builtin.include_role", "ansible.builtin.import_role"}
        if "vars" in node and node.keys() & (roles | {"hosts"}):
            yield node["vars"]
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _set_by(item)


def variable_problems(
    found: Mapping[str, Mapping[str, Found]],
    *,
    devices: Collection[str],
    machines: Collection[str],
    options: Mapping[str, Mapping[str, Option]],
    rules: Mapping[str, Option],
    passed: Mapping[str, str],
    renamed: Mapping[str, str] = MappingProxyType({}),
    foreign: Collection[str] = (),
    given: Collection[str] = (),
) -> list[Problem]:
    """Variables that no role knows, that nobody reads where they are, or with a wrong value.

    Args:
        found: host to its variables.
        devices: hosts whose variables of the role `device` are read.
        machines: hosts whose other variables are read.
        options: see `role_options`.
        rules: variable to what its type does not say: `minimum`, `above`, `maximum`, `choices`,
            `size`, `pattern` with what to `write`, a word that stands for a value (`or`), or
            `elsewhere` for what others judge; `everywhere` if devices and machines read it.
        passed: see `passed_variables`.
        renamed: old names of variables to new ones.
        foreign: variables that are not the lab's, whatever their prefix.
        given: variables of the command line, whose numbers come as text.
    """
    # Copied, because each look into Ansible's own dictionaries costs what a template does.
    known = {name: dict(option) for role in options.values() for name, option in role.items()}
    rules = {name: dict(rule) for name, rule in rules.items()}
    passed, renamed, foreign, given = dict(passed), dict(renamed), set(foreign), set(given)
    devices, machines = set(devices), set(machines)
    device_names = {name for host in devices for name in found[host]}
    machine_names = {name for host in machines for name in found[host]}
    problems: list[Problem] = []
    for host, variables in found.items():
        for name, variable in variables.items():
            of_device = name.startswith("device_")
            readers, read = (devices, device_names) if of_device else (machines, machine_names)
            rule = rules.get(name, {})
            if rule.get("everywhere"):
                readers = devices | machines
            if name in foreign:
                text = None
            elif name in renamed:
                shown = _shown(name, variable.get("value", variable.get("raw")))
                text = f"{name} is {shown}, but has another name now: write {renamed[name]}"
            elif name in passed or name not in known:
                text = _stranger(name, variable, known, passed)
            elif host not in readers:
                misplaced = readers and name not in read
                text = _misplaced(name, variable, of_device=of_device) if misplaced else None
            elif rule.get("elsewhere"):
                text = None
            else:
                text = _wrong_value(name, variable, known[name], rule, given=name in given)
            if text:
                problems.append((host, text))
    return problems


def shared_problems(
    found: Mapping[str, Mapping[str, Found]],
    names: Collection[str],
    hosts: Collection[str],
    options: Mapping[str, Option],
) -> list[Problem]:
    """Variables that some hosts must have in common, but that have several values.

    Args:
        found: host to its variables.
        names: names of the variables.
        hosts: hosts that must have the same value.
        options: entries of the variables in the argument specs, for their defaults.
    """
    problems: list[Problem] = []
    for name in names:
        values: dict[str, list[str]] = {}
        for host in hosts:
            value = found[host].get(name, {}).get("value", options[name]["default"])
            values.setdefault(_shown(name, value), []).append(host)
        *others, (common, example) = sorted(values.items(), key=lambda item: len(item[1]))
        problems += [
            (
                host,
                f"{name} is {value}, but {common} for {example[0]}: all hosts of a lab have the "
                "same; write it into group_vars/all.yml",
            )
            for value, differing in others
            for host in differing
        ]
    return problems


def _stranger(
    name: str, variable: Found, known: Mapping[str, Option], passed: Mapping[str, str]
) -> str:
    """The sentence on a variable that cannot be set."""
    shown = _shown(name, variable.get("value", variable.get("raw")))
    if name in passed:
        return (
            f"{name} is {shown}, but is set by the lab itself ({passed[name]}), and this value "
            "would be ignored: remove it"
        )
    prefix, _, rest = name.partition("_")
    settable = {
        other.removeprefix(f"{prefix}_"): other
        for other in known
        if other.startswith(f"{prefix}_") and other not in passed
    }
    near = sorted(
        (other for other in settable if rest in other), key=len
    ) or difflib.get_close_matches(rest, settable, n=1, cutoff=0.75)
    if near:
        remedy = f"write {settable[near[0]]}"
    else:
        remedy = f"remove it, or write one of {', '.join(sorted(settable.values()))}"
    if prefix != "device":
        remedy += "; or name it in preflight_foreign_variables if it is not the lab's"
    return f"{name} is {shown}, but there is no such variable: {remedy}"


def _misplaced(name: str, variable: Found, *, of_device: bool) -> str:
    """The sentence on a variable that is set where nobody reads it."""
    who, where = ("devices", "a device") if of_device else ("machines", "a machine")
    return (
        f"{name} is {_shown(name, variable.get('value', variable.get('raw')))}, but it is read on "
        f"{who} and this is not {where}: move it to a file of group_vars that they have, such as "
        "all.yml"
    )


def _wrong_value(
    name: str, variable: Found, option: Option, rule: Option, *, given: bool
) -> str | None:
    """The sentence on a value that cannot be resolved or is not what the specs ask for."""
    if "reason" in variable:
        return (
            f"{name} is {_shown(name, variable['raw'])}, which cannot be resolved "
            f"({variable['reason']}): define what it uses, or write the value itself"
        )
    problem = value_problem(variable["value"], option, rule, given=given)
    if problem is None:
        return None
    what, remedy = problem
    description = option.get("description", "")
    first = description if isinstance(description, str) else description[0]
    about = f" ({first[0].lower()}{first[1:].rstrip('.')})" if first else ""
    return f"{name} is {_shown(name, variable['value'])}{what}: {remedy}{about}"


def _shown(name: str, value: object) -> str:
    """A value as a person would look for it in the inventory."""
    if value is None:
        return "empty"
    if _SECRET.search(name):
        return "set (not shown here)"
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, str):
        text = f"'{value}'"
    elif isinstance(value, float) and not math.isfinite(value):
        text = f".{value}".replace(".-", "-.")
    elif isinstance(value, int | float):
        text = _plain(value)
    else:
        text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 2] + " …"


def _plain(number: float) -> str:
    """A number as YAML reads it back: no exponent, which YAML takes for text without a dot."""
    return f"{Decimal(str(number)):f}"


def value_problem(
    value: Any, option: Option, rule: Option, *, given: bool = False
) -> tuple[str, str] | None:
    """What is wrong with a value, to be put after it, and how to mend it.

    Args:
        value: as YAML or a template gave it.
        option: the variable's entry in the argument specs.
        rule: see `variable_problems`.
        given: from the command line, where everything may be text.
    """
    kind = option.get("type", "str")
    if "or" in rule and value == rule["or"]:
        return None
    if value is None:
        return "", f"{_wanted(kind, option, rule)}, or remove the line"
    if kind in ("int", "float"):
        return _number_problem(value, kind, option, rule, given=given)
    if kind == "bool":
        return _truth_problem(value, given=given)
    if kind in ("list", "dict"):
        return _container_problem(value, kind, option)
    return _size_problem(value, rule) if rule.get("size") else _text_problem(value, option, rule)


def _wanted(kind: str, option: Option, rule: Option) -> str:
    """What to write for a variable, such as `write a whole number from 1 to 65535`."""
    if "write" in rule:
        return f"write {rule['write']}"
    if choices := _choices(option, rule):
        return f"write one of {', '.join(map(str, choices))}"
    things = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    things |= {"list": "a list", "dict": "a dictionary"}
    low, high = rule.get("minimum"), rule.get("maximum")
    if "above" in rule:
        range_ = f" above {rule['above']}" + ("" if high is None else f" and up to {high}")
    elif low is not None:
        range_ = f" of {low} or more" if high is None else f" from {low} to {high}"
    else:
        range_ = ""
    default = option.get("default")
    such = f", such as {default}" if kind in ("int", "float") and default else ""
    word = f", or {rule['or']}" if "or" in rule else ""
    return f"write {things.get(kind, 'text')}{range_}{such}{word}"


def _choices(option: Option, rule: Option) -> list[Any]:
    return list(option.get("choices") or rule.get("choices") or [])


def _number_problem(
    value: Any, kind: str, option: Option, rule: Option, *, given: bool
) -> tuple[str, str] | None:
    noun = "whole number" if kind == "int" else "number"
    wanted = _wanted(kind, option, rule)
    if isinstance(value, bool):
        return f", which is no {noun} (YAML reads yes and on as true, no and off as false)", wanted
    if isinstance(value, str):
        number = _parsed(value)
        fits = number is not None and not _out_of(number, kind, rule)
        if fits and given and "," not in value:
            return None
        if number is not None and fits:
            written = _plain(int(number) if kind == "int" else number)
            quoted = " without quotes" if written == value.strip() else ""
            return f", which is no {noun}", f"write {written}{quoted}"
        return f", which is no {noun}", wanted
    if not isinstance(value, int | float):
        return f", which is no {noun}", wanted
    reason = _out_of(value, kind, rule)
    return (f", which is {reason}", wanted) if reason else None


def _parsed(text: str) -> float | None:
    """The finite number that somebody meant, with a decimal comma perhaps."""
    try:
        number = float(text.strip().replace(",", "."))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _out_of(number: float, kind: str, rule: Option) -> str:
    """Why a number will not do."""
    if not math.isfinite(number):
        return "no finite number"
    if kind == "int" and number != int(number):
        return "no whole number"
    if number <= rule.get("above", -math.inf) or number < rule.get("minimum", -math.inf):
        return "too small"
    return "too large" if number > rule.get("maximum", math.inf) else ""


def _truth_problem(value: Any, *, given: bool) -> tuple[str, str] | None:
    if isinstance(value, bool) or (given and str(value).lower() in _TRUTH):
        return None
    return ", which is neither true nor false", "write true or false without quotes"


def _container_problem(value: Any, kind: str, option: Option) -> tuple[str, str] | None:
    if kind == "dict":
        return None if isinstance(value, Mapping) else (", which is no dictionary", "write one")
    element = {"type": option.get("elements", "str"), "choices": option.get("choices")}
    if not isinstance(value, list):
        return ", which is no list", f"write a list; for each element {_wanted('str', element, {})}"
    for item in value:
        if problem := value_problem(item, element, {}):
            return f", of which {_shown('', item)} is wrong", problem[1]
    return None


def _size_problem(value: Any, rule: Option) -> tuple[str, str] | None:
    wanted = f"write {rule['write']}"
    if isinstance(value, int) and not isinstance(value, bool):
        return ", which has no unit", wanted
    if not isinstance(value, str):
        return ", which is no size", wanted
    if not _SIZE.fullmatch(value):
        if almost := _ALMOST_A_SIZE.fullmatch(value):
            whole, fraction, unit, _ = almost.groups()
            wanted = f"write {whole}{'.' + fraction if fraction else ''}{unit.lower()}"
        return ", which is no size", wanted
    return None


def _text_problem(value: Any, option: Option, rule: Option) -> tuple[str, str] | None:
    wanted = _wanted("str", option, rule)
    choices = _choices(option, rule)
    if not isinstance(value, str):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and not choices and re.fullmatch(rule.get("pattern", ".*"), str(value)):
            wanted = f"write it in quotes, '{value}'"
        return ", which is no text", wanted
    if choices and value not in choices:
        near = difflib.get_close_matches(value, [str(choice) for choice in choices], n=1)
        remedy = f"write {near[0]} (of {', '.join(map(str, choices))})" if near else wanted
        return ", which is not known", remedy
    if "pattern" in rule and not re.fullmatch(rule["pattern"], value):
        return ", which will not do", wanted
    return None


class FilterModule:
    """Ansible's way to find the filters."""

    def filters(self) -> dict[str, Any]:
        """The filters by name."""
        return {
            "passed_variables": passed_variables,
            "role_options": role_options,
            "shared_problems": shared_problems,
            "variable_problems": variable_problems,
        }
