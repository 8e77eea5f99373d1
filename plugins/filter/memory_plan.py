"""What an app needs of a device's memory, and what a device whose values are `auto` makes of it.

The table `memory.csv` beside an app says, in MiB, what a device takes with all its processes while
the app trains (`fixed_mib`), and what each example of a batch adds (`example_mib`). Columns before
these two are keys of the app's run configuration on which that depends; most apps have none. Text
must be that of the run, and an empty cell stands for any value. A number that is not in the table
is taken from its neighbours there: weights grow with the square of a network's width and
activations with the width, so a straight line between two is never too little, and neither is the
square beyond the widest. One below the smallest counts as that.

`make measure APP=directory` writes the table of an app, and benchmarks/memory.py the one of the
default app, together with the figures that it is fitted to and with how far off it is.
"""

import csv
import importlib.util
import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ansible.module_utils.common.text.formatters import human_to_bytes
from ansible.parsing.dataloader import DataLoader
from ansible.utils.display import Display
from ansible.utils.vars import load_extra_vars

display = Display()

_ROOT = Path(__file__).resolve().parents[2]
DEFAULT_APP = _ROOT / "app"
TABLE = "memory.csv"
_NEED = ("fixed_mib", "example_mib")
MARGIN = 0.1
"""Of what was measured with one thread: 2 to 8 took up to 8 % more. The rest is for what differs
between two runs of the same."""
SPARE = 16
"""MiB that stay for file pages, of which the kernel drops and reads again what it must."""
_NOISE = 0.01
"""Of the greatest peak: two measurements of the same app differ by so much, and a rise of less says
nothing about the batch size."""
DEFAULT_BATCH = 32
"""If nothing is said, and where `auto` has no limit or no measurement to go by."""
BATCHES = (512, 256, 128, 64, 32, 16, 8)
"""What `auto` chooses from."""
DEFAULT_FRACTION = 1.0
AUTO = "auto"
_MEBIBYTE = 2**20

Problem = tuple[str, str]


def _load_plugin(path: Path) -> ModuleType:
    """Load another plugin; Ansible finds plugins by directory, not by import."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_read_app = _load_plugin(_ROOT / "plugins/action/read_app.py")


class Need(NamedTuple):
    """MiB that a device takes: for everything but the batch, and for each example of it."""

    fixed: float
    example: float


class App(NamedTuple):
    """What is trained: the directory of an app, and its run configuration."""

    directory: Path
    config: dict[str, Any]

    def __str__(self) -> str:
        """Return its name with the values on which its memory depends."""
        values = ", ".join(f"{key} {self.config.get(key)}" for key in keys_of(self.directory))
        return f"{self.directory.name} ({values})" if values else self.directory.name


def app_of(variables: Mapping[str, Any]) -> App | None:
    """The app that the variables of a coordinator ask for; None where it cannot be read."""
    names = ("training_app", "training_config", *_read_app.VARIABLES)
    # Plain values: without Ansible's tags.
    plain = json.dumps({name: variables[name] for name in names if name in variables}, default=str)
    wanted = json.loads(plain)
    directory = _read_app.directory_of(str(wanted.get("training_app") or ""), str(DEFAULT_APP))
    project, problems = _read_app.read_project(directory)
    if problems:
        return None
    own = _read_app.flat(_read_app.table(project, "tool", "flwr", "app", "config"))
    given = load_extra_vars(DataLoader())
    config, _ = _read_app.config_of(own, wanted, given, directory / _read_app.PROJECT)
    return App(directory, own | config)


# --- the table ---------------------------------------------------------------------------------


def _read_table(directory: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of the table of an app; none where there is no table."""
    try:
        with (directory / TABLE).open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            return list(reader.fieldnames or ()), rows
    except FileNotFoundError:
        return [], []


def keys_of(directory: Path) -> list[str]:
    """The keys of the run configuration that the table of an app has as columns."""
    columns, _ = _read_table(directory)
    return [column for column in columns if column not in _NEED]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_text(value: Any) -> str:
    """A value of a run configuration as the table has it."""
    return json.dumps(value) if isinstance(value, bool) else str(value)


def need_of(app: App) -> Need | None:
    """What a device takes with an app, without margin; None where that has not been measured."""
    keys = keys_of(app.directory)
    _, rows = _read_table(app.directory)
    scale = next((key for key in keys if _is_number(app.config.get(key))), None)
    points: list[tuple[float, Need]] = []
    for row in rows:
        need = Need(*(float(row[column]) for column in _NEED))
        exact = [key for key in keys if key != scale and row[key]]
        if any(row[key] != _as_text(app.config.get(key)) for key in exact):
            continue
        if scale is None or not row[scale]:
            return need
        points.append((float(row[scale]), need))
    return _interpolated(sorted(points), float(app.config[scale])) if points and scale else None


def _interpolated(points: list[tuple[float, Need]], at: float) -> Need:
    """What a value needs by its neighbours; `points` are sorted, and there is at least one."""
    above = next((i for i, (value, _) in enumerate(points) if value >= at), len(points) - 1)
    if above == 0:
        return points[0][1]
    (low, less), (high, more) = points[above - 1 : above + 1]
    line = (at - low) / (high - low)
    square = (at**2 - low**2) / (high**2 - low**2)
    return Need(
        less.fixed + max(line, square) * (more.fixed - less.fixed),
        less.example + line * (more.example - less.example),
    )


def fit(peaks: Mapping[int, float]) -> Need:
    """A straight line by batch size that no measured peak is above.

    Its slope is the greatest one from any measured batch size to the largest of them, and 0 where
    peaks differ by no more than two measurements of the same.

    Args:
        peaks: batch size to MiB.
    """
    largest = max(peaks)
    slopes = [
        (peaks[largest] - peak) / (largest - batch)
        for batch, peak in peaks.items()
        if batch < largest
    ]
    rises = peaks[largest] - min(peaks.values()) > _NOISE * peaks[largest]
    slope = max(0.0, *slopes) if slopes and rises else 0.0
    return Need(max(peak - slope * batch for batch, peak in peaks.items()), slope)


def with_measurement(
    directory: str, config: Mapping[str, Any], peaks: Mapping[Any, Any], keys: list[str]
) -> str:
    """The text of an app's table with a measurement in it, which replaces an earlier one.

    Args:
        directory: of the app.
        config: run configuration of the app when it was measured.
        peaks: batch size to the MiB that a device took.
        keys: keys of the configuration on which the need depends. Rows that were measured with
            other keys are dropped.
    """
    need = fit({int(batch): float(peak) for batch, peak in peaks.items()})
    values = {key: _as_text(config.get(key, "")) for key in keys}
    row = values | row_of(need)
    columns, rows = _read_table(Path(directory))
    if columns != list(row):
        rows = []
    kept = [other for other in rows if any(other[key] != value for key, value in values.items())]
    return table_text([*kept, row] if keys else [row])


def measured_need(directory: str, config: Mapping[str, Any], peaks: Mapping[Any, Any]) -> list[str]:
    """Lines on what has been measured, and on what follows from it for a device."""
    app = App(Path(directory), dict(config))
    need = need_of(app) or fit({int(batch): float(peak) for batch, peak in peaks.items()})
    told = ", ".join(f"{float(peak):.0f} MiB with batches of {b}" for b, peak in peaks.items())
    if len(peaks) > 1 and not need.example:
        told = f"{need.fixed:.0f} MiB, whatever the batch size"
    asked = f"a device needs device_memory: {_megabytes(needed(need, DEFAULT_BATCH))}"
    if need.example:
        asked += f" for batches of {DEFAULT_BATCH}"
    return [f"{app} takes {told}.", f"With a margin, {asked}. Written to {Path(directory, TABLE)}."]


def row_of(need: Need) -> dict[str, str]:
    """The last two cells of a row of the table."""
    return dict(zip(_NEED, (f"{math.ceil(need.fixed)}", f"{need.example:.3f}"), strict=True))


def table_text(rows: list[dict[str, str]]) -> str:
    """A table as its file has it, sorted."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: list(row.values())))
    return text.getvalue()


# --- what devices need -------------------------------------------------------------------------


def needed(need: Need, batch: int) -> int:
    """Bytes that a device's limit must be at least."""
    return int(((need.fixed + need.example * batch) * (1 + MARGIN) + SPARE) * _MEBIBYTE)


def largest_batch(need: Need, memory: int) -> int | None:
    """The largest batch for which so many bytes are enough.

    Returns:
        0 where not even 1 fits; None where the batch size does not matter.
    """
    if not need.example:
        return None
    room = (memory / _MEBIBYTE - SPARE) / (1 + MARGIN) - need.fixed
    return max(0, int(room / need.example))


def chosen_batch(need: Need | None, memory: int | None) -> int:
    """What `auto` makes of a limit in bytes; the smallest where nothing fits."""
    if memory is None or need is None or not need.example:
        return DEFAULT_BATCH
    return next((batch for batch in BATCHES if needed(need, batch) <= memory), BATCHES[-1])


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


def _trained(hostvars: Mapping[str, Any], coordinator: str) -> Need | None:
    """What the app that is trained needs, as far as that is known."""
    app = app_of(hostvars[coordinator])
    return app and need_of(app)


def batch_of(device: str, hostvars: Mapping[str, Any], coordinator: str) -> int:
    """Examples a training step of a device: `device_batch_size`, chosen where it is `auto`."""
    variables = hostvars[device]
    batch = variables.get("device_batch_size", DEFAULT_BATCH)
    if batch != AUTO:
        return int(batch)
    memory = _limit(variables)
    need = _trained(hostvars, coordinator) if memory else None
    return chosen_batch(need, memory)


def shares(
    devices: Iterable[Mapping[str, Any]], hostvars: Mapping[str, Any], coordinator: str
) -> list[dict[str, Any]]:
    """Devices with how much of its partition each holds: a `fraction`, and `bytes` at most.

    Arrays are read from disk as they are needed, and need no memory of their own. If
    `device_data_fraction` is `auto`, a device holds as much as fits into what its limit leaves
    beside the worker: the kernel keeps it there, and no epoch reads it again. 0: all.
    """
    return [{**each, **_share(str(each["device"]), hostvars, coordinator)} for each in devices]


def _share(device: str, hostvars: Mapping[str, Any], coordinator: str) -> dict[str, Any]:
    variables = hostvars[device]
    fraction = variables.get("device_data_fraction", DEFAULT_FRACTION)
    if fraction != AUTO:
        return {"fraction": float(fraction), "bytes": 0}
    memory = _limit(variables)
    need = _trained(hostvars, coordinator) if memory else None
    if memory is None or need is None:
        return {"fraction": DEFAULT_FRACTION, "bytes": 0}
    left = max(0, memory - needed(need, batch_of(device, hostvars, coordinator)))
    return {"fraction": DEFAULT_FRACTION, "bytes": left + SPARE * _MEBIBYTE}


def as_deployed(labels: Iterable[Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """What the labels of containers say of devices' memory, as variables; see `memory_problems`."""
    return {
        each["flowerbed.device"]: {
            "device_memory": each.get("flowerbed.memory") or None,
            "device_batch_size": each.get("flowerbed.batch_size"),
        }
        for each in labels
        if "flowerbed.device" in each
    }


# --- what is refused ---------------------------------------------------------------------------


def memory_problems(
    devices: Mapping[str, Mapping[str, Any]], coordinator: Mapping[str, Any]
) -> list[Problem]:
    """Devices whose memory is too small for their batch, with what would do.

    Warns where devices have limits and the app has not been measured.

    Args:
        devices: device to its variables; those with a wrong value are judged elsewhere.
        coordinator: the variables of the coordinator, which say what is trained.
    """
    limited = [device for device in sorted(devices) if devices[device].get("device_memory")]
    app = app_of(coordinator) if limited else None
    if not app:
        return []
    need = need_of(app)
    if not need:
        display.warning(unmeasured(app))
        return []
    problems: list[Problem] = []
    for device in limited:
        try:
            memory = _limit(devices[device])
            batch = devices[device].get("device_batch_size", DEFAULT_BATCH)
            shown = devices[device]["device_memory"]
            text = memory and _too_small(memory, batch, need, f"'{shown}'", str(app))
        except (TypeError, ValueError):
            continue
        if text:
            problems.append((device, text))
    return problems


def unmeasured(app: App) -> str:
    """The sentence on an app whose need of memory is not known."""
    command = (
        "make measure" if app.directory == DEFAULT_APP else f"make measure APP={app.directory}"
    )
    return (
        f"nobody has measured how much memory {app} takes, so the lab does not know whether "
        f"device_memory is enough: run '{command}'"
    )


def _too_small(memory: int, given: Any, need: Need, shown: str, app: str) -> str | None:
    """The sentence on a limit that is too small for a batch."""
    least = BATCHES[-1] if need.example else DEFAULT_BATCH
    batch = least if given == AUTO else int(given)
    if needed(need, batch) <= memory:
        return None
    largest, wanted = largest_batch(need, memory), _megabytes(needed(need, batch))
    too_small = f"device_memory is {shown}, less than the {wanted} that {app} takes"
    if largest is None:
        return f"{too_small}: write {wanted} or more"
    smaller = f"device_batch_size of {largest} or less" if largest else "train a smaller model"
    shown_batch = f"auto, which is {batch} or more" if given == AUTO else str(batch)
    return f"{too_small} with device_batch_size {shown_batch}: write {wanted} or more, or {smaller}"


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
            "measured_need": measured_need,
            "memory_keys": lambda directory: keys_of(Path(directory)),
            "memory_problems": memory_problems,
            "shares": shares,
            "with_measurement": with_measurement,
        }
