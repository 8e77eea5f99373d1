"""What a trainer needs of a device's memory, and what a device whose values are `auto` makes of it.

The table beside this file says, for each network and the widths that were measured, the MiB that a
device takes with all its processes, and the MiB that each example of a batch adds. It is written
by benchmarks/memory.py, together with the figures it is made of and with how far off it is.

Another width is taken from its neighbours in the table: weights grow with the square of the width
and activations with the width, so a straight line between two is never too little, and neither is
the square beyond the widest. One below the narrowest counts as that.
"""

import csv
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ansible.errors import AnsibleFilterError
from ansible.module_utils.common.text.formatters import human_to_bytes

TABLE = Path(__file__).with_suffix(".csv")
MARGIN = 0.1
"""Of what was measured with one thread: 2 to 8 took up to 8 % more. The rest is for what differs
between two runs of the same."""
SPARE = 16
"""MiB that stay for file pages, of which the kernel drops and reads again what it must."""
DEFAULT_BATCH = 32
"""Where nothing is said, and where `auto` has no limit to go by."""
BATCHES = (512, 256, 128, 64, 32, 16, 8)
"""What `auto` chooses from."""
DEFAULT_FRACTION = 1.0
AUTO = "auto"
_IMAGE = 32 * 32 * 3 + 8
"""Bytes of an image and its label in a shard."""
_MEBIBYTE = 2**20

Problem = tuple[str, str]


class Need(NamedTuple):
    """MiB that a device takes: for everything but the batch, and for each example of it."""

    fixed: float
    example: float


class Model(NamedTuple):
    """Which network is trained."""

    name: str
    alpha: float
    recipe: str

    def __str__(self) -> str:
        """As people call it."""
        return self.name if self.name == "linear" else f"{self.name} {self.alpha:g} ({self.recipe})"


def read_table(path: Path = TABLE) -> dict[tuple[str, str], list[tuple[float, Need]]]:
    """Network and recipe to its widths, smallest first, each with what it needs."""
    table: dict[tuple[str, str], list[tuple[float, Need]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            need = Need(float(row["fixed_mib"]), float(row["example_mib"]))
            table.setdefault((row["model"], row["recipe"]), []).append((float(row["alpha"]), need))
    return {key: sorted(widths) for key, widths in table.items()}


_table = read_table()


def model_of(variables: Mapping[str, Any]) -> Model:
    """The network that the variables of a coordinator ask for."""
    return Model(
        str(variables.get("training_model", "mobilenet")),
        float(variables.get("training_model_alpha", 0.25)),
        str(variables.get("training_recipe", "small-images")),
    )


def need_of(model: Model) -> Need:
    """What a device takes with a network, without margin.

    Raises:
        AnsibleFilterError: it is in none of the table's rows.
    """
    recipe = "" if model.name == "linear" else model.recipe
    widths = _table.get((model.name, recipe))
    if not widths:
        raise AnsibleFilterError(f"{model} is not in {TABLE.name}: measure it (make bench-memory)")
    at = bisect_left(widths, model.alpha, key=lambda width: width[0])
    if len(widths) == 1 or at == 0:
        return widths[0][1]
    (narrow, less), (wide, more) = widths[at - 1 : at + 1] if at < len(widths) else widths[-2:]
    line = (model.alpha - narrow) / (wide - narrow)
    square = (model.alpha**2 - narrow**2) / (wide**2 - narrow**2)
    return Need(
        less.fixed + max(line, square) * (more.fixed - less.fixed),
        less.example + line * (more.example - less.example),
    )


def needed(model: Model, batch: int) -> int:
    """Bytes that a device's limit must be at least."""
    need = need_of(model)
    return int(((need.fixed + need.example * batch) * (1 + MARGIN) + SPARE) * _MEBIBYTE)


def largest_batch(model: Model, memory: int) -> int:
    """The largest batch for which so many bytes are enough; 0 where not even 1 fits."""
    need = need_of(model)
    room = (memory / _MEBIBYTE - SPARE) / (1 + MARGIN) - need.fixed
    return max(0, int(room / need.example))


def chosen_batch(model: Model, memory: int | None) -> int:
    """What `auto` makes of a limit in bytes; the smallest where nothing fits."""
    if memory is None:
        return DEFAULT_BATCH
    return next((batch for batch in BATCHES if needed(model, batch) <= memory), BATCHES[-1])


def _limit(variables: Mapping[str, Any]) -> int | None:
    """A device's memory in bytes; None where it has the whole machine's.

    Raises:
        TypeError, ValueError: it is no size.
    """
    memory = variables.get("device_memory")
    if memory is None:
        return None
    if not isinstance(memory, str):
        raise TypeError(f"device_memory is {memory}, which has no unit")
    return int(human_to_bytes(memory))


def batch_of(device: str, hostvars: Mapping[str, Any], coordinator: str) -> int:
    """Examples a training step of a device: `device_batch_size`, chosen where it is `auto`."""
    variables = hostvars[device]
    batch = variables.get("device_batch_size", DEFAULT_BATCH)
    if batch != AUTO:
        return int(batch)
    return chosen_batch(model_of(hostvars[coordinator]), _limit(variables))


def shares(
    devices: Iterable[Mapping[str, Any]], hostvars: Mapping[str, Any], coordinator: str
) -> list[dict[str, Any]]:
    """Devices with how much of its partition each holds: a `fraction`, and `images` at most.

    Images are read from disk as they are needed, and need no memory of their own. Where
    `device_data_fraction` is `auto`, a device holds as many as fit into what its limit leaves
    beside the trainer, so that the kernel keeps them there and no epoch reads them again. 0: all.
    """
    return [{**each, **_share(str(each["device"]), hostvars, coordinator)} for each in devices]


def _share(device: str, hostvars: Mapping[str, Any], coordinator: str) -> dict[str, Any]:
    variables = hostvars[device]
    fraction = variables.get("device_data_fraction", DEFAULT_FRACTION)
    if fraction != AUTO:
        return {"fraction": float(fraction), "images": 0}
    memory = _limit(variables)
    if memory is None:
        return {"fraction": DEFAULT_FRACTION, "images": 0}
    batch = batch_of(device, hostvars, coordinator)
    left = max(0, memory - needed(model_of(hostvars[coordinator]), batch))
    return {"fraction": DEFAULT_FRACTION, "images": (left + SPARE * _MEBIBYTE) // _IMAGE}


def as_deployed(labels: Iterable[Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """What the labels of devices' containers say of memory, as variables; see `memory_problems`."""
    return {
        each["flowerbed.device"]: {
            "device_memory": each.get("flowerbed.memory") or None,
            "device_batch_size": each.get("flowerbed.batch_size"),
        }
        for each in labels
    }


def memory_problems(
    devices: Mapping[str, Mapping[str, Any]], coordinator: Mapping[str, Any]
) -> list[Problem]:
    """Devices whose memory is too small for their batch, with what would do.

    Args:
        devices: device to its variables; one with a wrong value is told of elsewhere.
        coordinator: the variables of the coordinator, which say what is trained.
    """
    problems: list[Problem] = []
    try:
        model = model_of(coordinator)
        need_of(model)
    except (AnsibleFilterError, TypeError, ValueError):
        return problems
    for device in sorted(devices):
        try:
            memory = _limit(devices[device])
            batch = devices[device].get("device_batch_size", DEFAULT_BATCH)
            text = memory and _too_small(memory, batch, model, devices[device]["device_memory"])
        except (TypeError, ValueError):
            continue
        if text:
            problems.append((device, text))
    return problems


def _too_small(memory: int, given: Any, model: Model, shown: str) -> str | None:
    """The sentence on a limit that is too small for a batch."""
    batch = BATCHES[-1] if given == AUTO else int(given)
    if needed(model, batch) <= memory:
        return None
    largest, least = largest_batch(model, memory), _megabytes(needed(model, batch))
    smaller = (
        f"device_batch_size of {largest} or less" if largest else "train a smaller training_model"
    )
    shown_batch = f"auto, which is {batch} or more" if given == AUTO else str(batch)
    return (
        f"device_memory is '{shown}', less than the {least} that {model} takes with "
        f"device_batch_size {shown_batch}: write {least} or more, or {smaller}"
    )


def _megabytes(size: int) -> str:
    """Bytes as an inventory has them, rounded up."""
    return f"{math.ceil(size / _MEBIBYTE / 10) * 10}m"


class FilterModule:
    """Ansible's way to find the filters."""

    def filters(self) -> dict[str, Any]:
        """The filters by name."""
        return {
            "as_deployed": as_deployed,
            "batch_of": batch_of,
            "memory_problems": memory_problems,
            "shares": shares,
        }
