"""The report of one run: one file with everything inside, no script, no outside resource."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml
from markupsafe import Markup

from flowerbed.report import pictures
from flowerbed.report.elements import (
    NOTHING,
    bar,
    details,
    figure,
    join,
    legend,
    named,
    number,
    page,
    pair,
    section,
    share,
    table,
    text,
    tiles,
)
from flowerbed.report.findings import find, waiting
from flowerbed.report.record import CENTRAL, Record, busy_seconds, is_training
from flowerbed.report.usage import Usage, size
from flowerbed.results import DeviceRow

_MEBI = 2**20


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def app_of(record: Record) -> str:
    """Name and version of the app that was run; empty where run.yml has none."""
    app = record.description.get("app") or {}
    return " ".join(str(app[key]) for key in ("name", "version") if app.get(key))


def _header(record: Record) -> Markup:
    lab = record.description.get("lab") or {}
    facts = [
        _when(record.begin) if record.begin else "",
        app_of(record),
        f"{len(record.names)} devices" if record.names else "",
        f"commit {lab['commit'][:12]}" if lab.get("commit") else "",
    ]
    return Markup('<header><h1>{}</h1><span class="state {}">{}</span><p>{}</p></header>').format(
        record.name, record.state, record.state, " · ".join(filter(None, facts))
    )


def _measures(record: Record) -> Iterable[tuple[str, Any, str]]:
    """Tiles with the last accuracy or, where the app reports none, the last loss."""
    of = "accuracy" if record.curve("accuracy")[1] else "loss"
    source, points = record.curve(of)
    if not points:
        return
    yield (of.capitalize(), f"{points[-1][1]:.3f}", source)
    on_devices = [value for row in record.rounds if (value := getattr(row, of)) is not None]
    if source == CENTRAL and on_devices:
        yield ("On devices", f"{on_devices[-1]:.3f}", f"mean of their {of}")


def _summary(record: Record) -> Markup | None:
    if not record.rounds:
        return None
    rounds = len(record.rounds)
    completed = sum(row.outcome == "completed" for row in record.training)
    return tiles(
        [
            *_measures(record),
            (
                "Rounds",
                f"{rounds} of {record.planned}" if record.planned else rounds,
                f"{len(record.names)} devices",
            ),
            ("Time", f"{record.seconds:.0f} s", f"{record.seconds / rounds:.1f} s per round"),
            ("Waiting", share(waiting(record)), "of the devices' time"),
            ("Completed", f"{completed} of {len(record.training)}", "training messages"),
        ]
    )


def _findings(record: Record, usage: Mapping[str, Usage]) -> Markup:
    return Markup('<ul class="findings">\n{}\n</ul>').format(
        join(
            Markup('<li class="{}">{}{}</li>').format(
                "grave" if found.grave else "",
                found.text,
                Markup("<pre>{}</pre>").format(found.detail) if found.detail else "",
            )
            for found in find(record, usage)
        )
    )


def _keys(record: Record, colours: pictures.Colours) -> Markup:
    """The legend of the colours: devices, or their classes."""
    keys = {key: colours[name] for name, key in pictures.keys_of(record).items()}
    return legend(named(key, colour) for key, colour in sorted(keys.items()))


def _course(record: Record, colours: pictures.Colours) -> Markup | None:
    figures = [
        figure(
            pictures.course(record, colours, "accuracy"),
            "Accuracy of the global model after each round: by the app's central evaluation, on "
            "each device's own test data, and as the mean over the devices, as far as the app "
            "reports them.",
        ),
        figure(
            pictures.course(record, colours, "loss"),
            "Loss of the global model. Devices whose curves are far apart hold different data.",
        ),
    ]
    if not any(figures):
        return None
    return section("What the model learned", _keys(record, colours), pair(*figures))


_PARTS = (
    ("transit", "messages in transit: polling, network, starting a process"),
    ("queue", "waiting for the worker"),
    ("evaluate", "evaluating, or answering a query"),
    ("train", "training"),
    ("wait", "waiting for other devices"),
    ("none", "no usable reply"),
)


def _some(record: Record) -> str:
    """A remark where charts leave devices out."""
    drawn = len(pictures.drawn_devices(record))
    if drawn == len(record.names):
        return ""
    return (
        f" It shows {drawn} of {len(record.names)} devices: those with most failures, then those "
        "that were busy longest."
    )


def _timeline(record: Record, colours: pictures.Colours) -> Markup | None:
    drawn = len(pictures.drawn_devices(record))
    size = pictures.block_size(len(record.rounds), drawn)
    blocks = -(-len(record.rounds) // size)
    return section(
        "Who waited for whom",
        figure(
            pictures.timeline(record, colours),
            "One lane for each device. Thin lines are idle time, in which the device waited for "
            "others. The server's lane shows configuration, aggregation and central evaluation."
            + (
                f" {size} rounds are merged: bars show the seconds that each activity took in them."
                if size > 1
                else ""
            )
            + (" Triangles mark faults (down) and recoveries (up)." if record.faults else "")
            + _some(record),
            least=max(640, 64 * blocks),
        ),
        legend(
            Markup('<span class="swatch {}"></span>{}').format(part, what) for part, what in _PARTS
        ),
    )


def _other_messages(rows: Iterable[DeviceRow]) -> str:
    """Numbers of messages that asked for something other than training."""
    kinds = Counter(row.type for row in rows if not is_training(row))
    return ", ".join(f"{times} {kind}" for kind, times in sorted(kinds.items()))


def _work_of(record: Record, name: str, colour: str) -> dict[str, Any]:
    """The work of a device over all rounds, by the heading of its column, and what came of it."""
    mine = record.rows_of(name)
    training = [row for row in mine if is_training(row)]
    outcomes = Counter(row.outcome for row in training)
    failures = ", ".join(
        f"{times} {outcome.replace('_', ' ')}"
        for outcome, times in outcomes.most_common()
        if outcome != "completed"
    )
    waited = sum(row.wait_seconds for row in mine)
    whole = waited + sum(map(busy_seconds, mine))
    trained = sum(row.train_seconds for row in mine)
    examples = sum(row.examples for row in training)
    return {
        "device": named(name, colour),
        "completed": Markup('{} of {} <span class="bad">{}</span>').format(
            outcomes["completed"], len(training), failures
        ),
        "examples": number(examples) if examples else NOTHING,
        "per second": number(examples / trained if examples and trained else None, 1),
        "training": bar(trained / whole if whole else None, colour),
        "waiting": bar(waited / whole if whole else None, colour),
        "received": number(sum(row.bytes_received for row in mine) / _MEBI, 1, " MiB"),
        "sent": number(sum(row.bytes_sent for row in mine) / _MEBI, 1, " MiB"),
        "other messages": _other_messages(mine) or NOTHING,
        "accuracy": number(record.on_devices["accuracy"][1].get(name), 3),
        "loss": number(record.on_devices["loss"][1].get(name), 3),
    }


def _columns(rows: Sequence[dict[str, Any]], words: Iterable[str]) -> Markup:
    """A table of rows by heading."""
    head = list(rows[0])
    return table(
        head,
        [list(row.values()) for row in rows],
        words=[head.index(w) for w in words if w in head],
    )


def _work(record: Record, colours: pictures.Colours) -> Markup | None:
    rows = [_work_of(record, name, colours[name]) for name in record.names]
    for heading in ("other messages", "accuracy", "loss"):
        if all(row[heading] == NOTHING for row in rows):
            for row in rows:
                del row[heading]
    evaluated = max(number for number, _ in record.on_devices.values())
    return section(
        "What each device did",
        text(
            "Completed: training messages. Training and waiting: shares of the device's time. "
            "Received and sent: arrays."
            + (
                " Accuracy and loss: of the global model after "
                f"round {evaluated}, on the device's own test data."
                if evaluated
                else ""
            )
        ),
        _columns(rows, ("training", "waiting", "other messages")),
    )


def _usage_of(record: Record, name: str, used: Usage, colour: str) -> dict[str, Any]:
    """The usage of a device, by the heading of its column."""
    settings = record.settings.get(name, {})
    quota, limit = settings.get("cpus"), size(settings.get("memory"))
    peak = used.memory_peak
    return {
        "device": named(name, colour),
        "cores (mean)": number(used.cores, 2),
        "quota": number(quota, 2) if quota else "no limit",
        "used": bar(used.cores / quota if quota and used.cores else None, colour),
        "throttled": bar(used.throttled, colour),
        "memory (peak)": number(None if peak is None else peak / _MEBI, 0, " MiB"),
        "limit": number(limit / _MEBI, 0, " MiB") if limit else "no limit",
        "of the limit": bar(peak / limit if limit and peak else None, colour),
    }


def _usage(
    record: Record, usage: Mapping[str, Usage], why_not: str, colours: pictures.Colours
) -> Markup | None:
    heading = "What each device used of its limits"
    if why_not:
        return section(heading, text(f"No data: {why_not}"))
    if not usage:
        return None
    rows = [_usage_of(record, name, used, colours[name]) for name, used in usage.items()]
    return section(
        heading,
        text(
            "From the run's first message to the end of its last round. Throttled: share of the "
            "scheduler's periods (100 ms) in which the device had used up its quota."
        ),
        _columns(rows, ("used", "throttled", "of the limit")),
        pair(
            figure(
                pictures.cores(record, usage, colours),
                "Cores in use, mean over 30 s, relative to the quota (dashed line). Vertical lines "
                "mark the start of rounds." + _some(record),
            ),
            figure(
                pictures.memory(record, usage, colours),
                "Memory in use relative to the limit (dashed line), at which the kernel kills the "
                "worker." + _some(record),
            ),
        ),
    )


def _data(record: Record) -> Markup | None:
    if not any(name in record.labels for name in pictures.drawn_devices(record)):
        return None
    return section(
        "Data by device",
        figure(
            pictures.labels(record),
            "Training examples by device and label. Similar rows mean evenly distributed data."
            + _some(record),
            least=min(2000, 16 * max(map(len, record.labels.values()))),
        ),
    )


_DEVICE_HEADINGS = {
    "device_class": "class",
    "cpus": "cores",
    "batch_size": "batch",
    "examples": "training examples",
}
"""Headings of device settings that differ from their names."""
_UNLIMITED = ("cpus", "memory")
"""Device settings that are limits if they are set."""
_ELSEWHERE = ("labels", "shard", "environment", "origin", "partition_id", "num_partitions")
"""Device settings that are shown in other places, or in run.yml alone."""


def setting(value: Any) -> str:
    """A setting of run.yml as text; a missing one is shown as "-"."""
    if value is None or value == "":
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={each}" for key, each in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _device_setting(entry: Mapping[str, Any], column: str) -> str:
    value = entry.get(column)
    return "no limit" if column in _UNLIMITED and not value else setting(value)


def _devices(record: Record, colours: pictures.Colours) -> Markup | None:
    """The settings of each device, whatever their names."""
    columns = list(dict.fromkeys(key for entry in record.settings.values() for key in entry))
    columns = [column for column in columns if column not in _ELSEWHERE]
    if not columns:
        return None
    texts = [column for column in columns if _has_text(record, column)]
    return table(
        ("device", *(_DEVICE_HEADINGS.get(c, c.replace("_", " ")) for c in columns)),
        (
            (named(name, colours[name]), *(_device_setting(entry, c) for c in columns))
            for name, entry in sorted(record.settings.items())
        ),
        words=[1 + columns.index(column) for column in texts],
    )


def _has_text(record: Record, column: str) -> bool:
    return any(isinstance(entry.get(column), str) for entry in record.settings.values())


_ORIGIN = ("configuration", "revision", "partitioner", "parameters", "seed", "examples")


def _data_origin(record: Record) -> Iterable[tuple[str, str]]:
    """Where the data come from that the lab has placed."""
    if origin := record.origin:
        known = [f"{key} {setting(origin[key])}" for key in _ORIGIN if origin.get(key)]
        fingerprint = f"fingerprint {str(origin.get('fingerprint') or '-')[:16]}"
        yield "data", "; ".join((setting(origin.get("dataset")), *known, fingerprint))


def _configuration(record: Record, colours: pictures.Colours) -> Markup | None:
    description = record.description
    if not description:
        return section(
            "What was run", text("run.yml is missing: the run ended before it was described.")
        )
    app, run = description.get("app") or {}, description.get("run") or {}
    shown = [("app", app_of(record) or "-")]
    if app.get("sha256"):
        shown.append(("app's SHA-256", str(app["sha256"])[:16]))
    shown += _data_origin(record)
    if repeatable := description.get("repeatable"):
        no = f"no: {'; '.join(repeatable['because'])}"
        shown.append(("repeats bit for bit", "yes" if repeatable["bitwise"] else no))
    shown += [
        (str(key).replace("_", " "), setting(value))
        for key, value in run.items()
        if key not in ("run_name", "devices")
    ]
    return section(
        "What was run",
        table(("setting", "value"), shown, words=(1,)),
        _devices(record, colours),
        details(
            "All of run.yml", yaml.safe_dump(description, sort_keys=False, default_flow_style=None)
        ),
    )


def run_page(record: Record, usage: Mapping[str, Usage], why_not: str = "") -> str:
    """The report of one run.

    Args:
        usage: of each device; see `flowerbed.report.usage`.
        why_not: the reason why `usage` is empty.
    """
    colours = pictures.colours_of(record)
    body = [_header(record), _summary(record), section("Findings", _findings(record, usage))]
    if record.rounds:
        body += [_course(record, colours), _timeline(record, colours)]
    if record.messages:
        body += [_work(record, colours), _usage(record, usage, why_not, colours)]
    body += [_data(record), _configuration(record, colours)]
    return page(f"{record.name} - Flowerbed", body)
