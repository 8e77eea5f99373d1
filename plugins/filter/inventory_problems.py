"""What is wrong with the groups, names and files of an inventory, and what its machines must bear.

A problem is a pair: the host or group it is about, and the rest of the sentence. Hosts with the
same problem become one line, see `problem_lines`.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.common.text.formatters import human_to_bytes

Problem = tuple[str, str]
Found = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Host to variable to what `read_variables` found: its `value`, or `raw` text and a `reason`."""
Groups = Mapping[str, Collection[str]]

# A device's name is used as it is: for its container, its directory, in lists with commas.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_EXTENSIONS = ("", ".yml", ".yaml", ".json")
_SHOWN_HOSTS = 3


def group_problems(
    groups: Groups, *, machines: str, coordinator: str, devices: str
) -> list[Problem]:
    """Groups that are empty or hold whom they should not; the arguments are their names."""
    problems: list[Problem] = []
    if not groups.get(machines):
        text = "is missing or empty: put at least one host with Docker into it"
        problems.append((f"group {machines}", text))
    if not groups.get(devices):
        text = "is missing or empty: put at least one device into one of its child groups"
        problems.append((f"group {devices}", text))
    chosen = sorted(groups.get(coordinator, ()))
    if len(chosen) != 1:
        found = f"has {len(chosen)} hosts ({', '.join(chosen)})" if chosen else "has no host"
        problems.append((f"group {coordinator}", f"{found}: put exactly one machine into it"))
    problems += [
        (host, f"is in the group {coordinator}, but is no machine: put it into {machines}, too")
        for host in chosen
        if host not in groups.get(machines, ())
    ]
    return problems


def device_problems(
    devices: Collection[str],
    found: Found,
    groups: Groups,
    *,
    machines: str,
    no_classes: Collection[str],
) -> list[Problem]:
    """Devices with a bad name, on no machine, or of no class.

    Args:
        devices: names of the devices.
        found: host to its variables.
        groups: the inventory's groups.
        machines: name of the group of the machines.
        no_classes: groups that are never a device's class.
    """
    problems = _name_problems(devices)
    known = sorted(groups.get(machines, ()))
    classes: dict[str, list[str]] = {device: [] for device in devices}
    for group, members in groups.items():
        if group not in no_classes:
            for device in members:
                classes.get(device, []).append(group)
    for device in sorted(devices):
        variables = found[device]
        for text in (
            _machine_problem(device, variables, known, machines),
            _class_problem(variables, classes[device]),
            _jitter_problem(variables),
        ):
            if text:
                problems.append((device, text))
    return problems


def _name_problems(devices: Iterable[str]) -> list[Problem]:
    problems: list[Problem] = []
    normalised: dict[str, str] = {}
    for device in sorted(devices):
        plain = re.sub(r"[^a-z0-9_.-]+", "-", device.lower()).strip("_.-") or "device"
        if not _NAME.fullmatch(device):
            text = (
                "the name cannot be that of a container and a directory: use letters, digits, "
                f"'_', '.' and '-', such as {plain}"
            )
            problems.append((device, text))
        if plain in normalised:
            text = (
                f"has the name of {normalised[plain]} once normalised for Docker ({plain}): "
                "rename one of them"
            )
            problems.append((device, text))
        normalised.setdefault(plain, device)
    return problems


def _machine_problem(
    device: str, variables: Mapping[str, Any], known: list[str], group: str
) -> str | None:
    given = variables.get("device_machine")
    machine = None if given is None else given.get("value")
    names = ", ".join(known[:_SHOWN_HOSTS]) + (", …" if len(known) > _SHOWN_HOSTS else "")
    if given is None and device not in known:
        return (
            f"has no device_machine and is no machine itself: set device_machine to one of {names}"
            f", or put the device into the group {group}"
        )
    if not isinstance(machine, str) or machine in known:  # a wrong value is told of elsewhere
        return None
    near = difflib.get_close_matches(machine, known, n=1)
    remedy = f"write {near[0]}" if near else f"write one of {names}"
    return (
        f"device_machine is '{machine}', which is no machine: {remedy}, "
        f"or put {machine} into the group {group}"
    )


def _jitter_problem(variables: Mapping[str, Any]) -> str | None:
    jitter, delay = (
        str(_value(variables, f"device_network_{limit}", "0ms")) for limit in ("jitter", "delay")
    )
    if re.search("[1-9]", jitter) and not re.search("[1-9]", delay):
        return (
            f"device_network_jitter is {jitter}, and there is no delay that could vary: give "
            "device_network_delay, too"
        )
    return None


def _class_problem(variables: Mapping[str, Any], own: list[str]) -> str | None:
    given = variables.get("device_class", {"value": None})
    if "reason" in given:  # the filter that looks for the class says it whole
        return str(given["reason"])
    chosen = given["value"]
    if chosen in own:
        return None
    shown = "empty" if chosen is None else f"'{chosen}'"
    remedy = f"write one of {', '.join(sorted(own))}" if own else "put it into the group it names"
    return f"device_class is {shown}, which is none of the device's groups: {remedy}"


def file_problems(sources: Iterable[str], groups: Groups) -> list[Problem]:
    """Files of variables that Ansible ignores: a link to nowhere, a slip of the pen in the name."""
    links = [
        (
            f"{kind}/{file.name}",
            f"links to {file.readlink()}, which is not there: copy with 'cp -rL'",
        )
        for folder in _folders(sources)
        for kind in ("group_vars", "host_vars")
        for file in sorted((folder / kind).glob("*"))
        if file.is_symlink() and not file.exists()
    ]
    return links + [
        (file, f"there is no such {noun}, and the file is ignored: name it after the {noun} {near}")
        for file, noun, near in _stray_files(sources, groups)
        if near
    ]


def file_warnings(sources: Iterable[str], groups: Groups) -> list[Problem]:
    """Other files of variables that Ansible ignores: those of a group or host that has gone."""
    return [
        (file, f"there is no such {noun}, and the file is ignored")
        for file, noun, near in _stray_files(sources, groups)
        if not near
    ]


def _stray_files(sources: Iterable[str], groups: Groups) -> list[tuple[str, str, str]]:
    """Files that belong to nobody: the file, group or host, and whose it was meant to be."""
    bearers = {"group_vars": set(groups), "host_vars": {*groups.get("all", ()), "localhost"}}
    stray: list[tuple[str, str, str]] = []
    for folder in _folders(sources):
        for kind, names in bearers.items():
            files = [file for file in sorted((folder / kind).glob("*")) if _is_read(file)]
            borne = {name for file in files for name in _names(file) & names}
            for file in files:
                if _names(file) & names:
                    continue
                stem = min(_names(file), key=len)
                # The second of a kind is no slip for the first.
                others = [n for n in names - borne if _numberless(n) != _numberless(stem)]
                near = difflib.get_close_matches(stem, others, n=1, cutoff=0.8)
                noun = kind.removesuffix("_vars")
                stray.append((f"{kind}/{file.name}", noun, near[0] if near else ""))
    return stray


def _folders(sources: Iterable[str]) -> list[Path]:
    return sorted({_base(source) for source in sources if Path(source).exists()})


def _base(source: str) -> Path:
    path = Path(source)
    return path if path.is_dir() else path.parent


def _is_read(file: Path) -> bool:
    """Whether Ansible would read it, if somebody bore its name."""
    hidden = file.name.startswith(".") or file.name.endswith("~")
    return not hidden and (file.is_dir() or file.suffix in _EXTENSIONS)


def _names(file: Path) -> set[str]:
    """Whose file it may be: a name may have a dot in it."""
    ends = ("",) if file.is_dir() else _EXTENSIONS
    return {file.name.removesuffix(end) for end in ends if file.name.endswith(end)}


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "", name)


def port_problems(
    found: Found,
    ports: Groups,
    groups: Groups,
    options: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[Problem]:
    """Ports that two services of one machine want.

    Args:
        found: host to its variables.
        ports: group to the variables of the ports that are published on its machines.
        groups: the inventory's groups.
        options: role to its variables and their entries in the argument specs, for the defaults.
    """
    problems: list[Problem] = []
    for machine in sorted({host for group in ports for host in groups.get(group, ())}):
        wanted = _ports(machine, found[machine], ports, groups, options)
        taken: dict[int, str] = {}
        for name, port in wanted.items():
            if port in taken:
                free = next(p for p in range(port + 1, 65536) if p not in wanted.values())
                text = (
                    f"{taken[port]} and {name} are both {port}: give each a port of its own, "
                    f"such as {name}: {free}"
                )
                problems.append((machine, text))
            taken.setdefault(port, name)
    return problems


def _ports(
    machine: str,
    variables: Mapping[str, Any],
    ports: Groups,
    groups: Groups,
    options: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> dict[str, int]:
    """The ports that a machine publishes, variable to number; no wrong one, that is told of."""
    wanted: dict[str, int] = {}
    for name in (n for g, names in ports.items() if machine in groups.get(g, ()) for n in names):
        default = next(role[name]["default"] for role in options.values() if name in role)
        try:
            wanted[name] = int(_value(variables, name, default))
        except (TypeError, ValueError):
            continue
    return wanted


def machine_plans(
    found: Found,
    ports: Groups,
    groups: Groups,
    options: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    quotas: Mapping[str, float],
    machines: str,
    devices: str,
) -> dict[str, dict[str, Any]]:
    """What each machine of a faultless inventory must bear.

    `quotas` are the devices' cores, 0 for all.

    Returns:
        Machine to `ports` (variable to number), `devices` (name to `cpus` and `memory` in bytes,
        None for no limit, and `network`, variable to value of its limits), `data`, the lab's
        directory, `dataset`, a directory that must be there, or "", and `source`, where its
        images are from.
    """
    plans: dict[str, dict[str, Any]] = {}
    for machine in groups[machines]:
        variables = found[machine]
        dataset = _value(variables, "training_dataset", "")
        plans[machine] = {
            "ports": _ports(machine, variables, ports, groups, options),
            "devices": {},
            "data": _value(variables, "lab_directory", options["lab"]["lab_directory"]["default"]),
            "dataset": dataset if dataset.startswith("/") else "",
            "source": _value(
                variables, "images_source", options["images"]["images_source"]["default"]
            ),
        }
    for device in groups[devices]:
        variables = found[device]
        memory = _value(variables, "device_memory")
        plans[_value(variables, "device_machine", device)]["devices"][device] = {
            "cpus": quotas[device] or None,
            # Where the quota is from.
            "limit": "device_cpus" if "device_cpus" in variables else "device_speed",
            "memory": None if memory is None else human_to_bytes(memory),
            "network": {
                name: variables[name]["value"]
                for name in sorted(variables)
                if name.startswith("device_network_")
            },
        }
    return plans


def _value(variables: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """The value of a variable that may not be there; None where it could not be resolved."""
    return variables.get(name, {"value": default}).get("value")


def values_of(found: Found, hosts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Hosts to their variables as they are; without those that could not be resolved."""
    return {
        host: {name: each["value"] for name, each in found[host].items() if "value" in each}
        for host in hosts
    }


def problem_lines(problems: Iterable[Problem], groups: Groups) -> list[str]:
    """A line a problem; hosts that share one are named together, and as a group where they are."""
    hosts: dict[str, list[str]] = {}
    for host, text in problems:
        hosts.setdefault(text, []).append(host)
    return [f"{_who(sorted(set(who)), groups)}: {text}." for text, who in hosts.items()]


def _who(hosts: list[str], groups: Groups) -> str:
    if len(hosts) == 1:
        return hosts[0]
    same = [group for group, members in groups.items() if set(members) == set(hosts)]
    if "all" in same:
        return "all hosts"
    named = ", ".join(hosts[:_SHOWN_HOSTS])
    if len(hosts) > _SHOWN_HOSTS:
        named += f" and {len(hosts) - _SHOWN_HOSTS} more"
    return f"{named} (group {same[0]})" if same else named


class FilterModule:
    """Ansible's way to find the filters."""

    def filters(self) -> dict[str, Any]:
        """The filters by name."""
        return {
            "device_problems": device_problems,
            "file_problems": file_problems,
            "file_warnings": file_warnings,
            "group_problems": group_problems,
            "machine_plans": machine_plans,
            "port_problems": port_problems,
            "problem_lines": problem_lines,
            "values_of": values_of,
        }
