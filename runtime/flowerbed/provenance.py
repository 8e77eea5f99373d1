"""Whether the data that lie on devices and server are one data set, and the one that was asked for.

Each shard carries its origin (`flowerbed.data.place`). Devices bring it with their introduction.
"""

from collections.abc import Mapping
from typing import Any

SERVER = "the server"
REMEDY = "`make lab` with the same variables places the data anew"

VARIABLES = {
    "dataset": "training_dataset",
    "configuration": "training_dataset_configuration",
    "revision": "training_dataset_revision",
    "splits": "training_dataset_splits",
    "label": "training_dataset_label",
    "examples": "training_examples",
    "partitioner": "training_partitioner",
    "partitioner_parameters": "training_partitioner_parameters",
    "seed": "training_seed",
}
"""What can be asked of the data, by the keys of an origin's `asked`, and the variables for it."""

_SAME_CONTENT = ("revision",)
"""Keys in which origins may differ: where their fingerprints agree, so does the content."""

Origin = Mapping[str, Any]


class DataMismatchError(RuntimeError):
    """The data that lie there are not those of the run; the message names them and the remedy."""


def _plain(value: Any) -> Any:
    """A value without types: some variables come as text from the command line."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value)


def _comparable(origin: Origin) -> dict[str, Any]:
    return {key: value for key, value in origin.items() if key not in _SAME_CONTENT}


def _shown(origin: Origin, other: Origin) -> str:
    """An origin by its data set and that in which it differs from another one."""
    if not origin:
        return "no data of the lab"
    differing = [key for key in origin if key == "dataset" or origin[key] != other.get(key)]
    return ", ".join(f"{key} {str(origin[key])[:60] or '-'}" for key in differing)


def common_origin(origins: Mapping[str, Origin]) -> Origin:
    """Return the origin of all data.

    Args:
        origins: by the name of the device that holds the data, or SERVER; empty for one on which
            the lab has placed none.

    Raises:
        DataMismatchError: they are not of one origin.
    """
    groups: list[tuple[Origin, list[str]]] = []
    for name, origin in sorted(origins.items()):
        alike = (names for known, names in groups if _comparable(known) == _comparable(origin))
        if (names := next(alike, None)) is None:
            groups.append((origin, [name]))
        else:
            names.append(name)
    if len(groups) > 1:
        told = "; ".join(
            f"{', '.join(names)}: {_shown(origin, groups[0 if index else 1][0])}"
            for index, (origin, names) in enumerate(groups)
        )
        raise DataMismatchError(
            f"the data are not of one origin ({told}). If a machine has used the fallback, see "
            f"that it reaches the hub; {REMEDY}"
        )
    return groups[0][0] if groups else {}


def check_asked(asked: Mapping[str, Any], origin: Origin) -> None:
    """Compare what a run asks of the data with what lies there.

    Args:
        asked: with keys of VARIABLES; empty if nothing is asked.
        origin: of the data; empty if the lab has placed none.

    Raises:
        DataMismatchError: they differ.
    """
    if not asked or not origin:
        return
    placed = origin["asked"]
    differing = [
        f"{variable} is {asked[key]!r} (the data were dealt with {placed.get(key)!r})"
        for key, variable in VARIABLES.items()
        if key in asked and _plain(asked[key]) != _plain(placed.get(key))
    ]
    if not differing:
        return
    text = f"the run asks for other data than lie on the devices: {'; '.join(differing)}. {REMEDY}"
    if any(part.startswith("training_seed ") for part in differing):
        text += "; training_config: {seed: NUMBER} changes the seed of the app alone"
    raise DataMismatchError(text)
