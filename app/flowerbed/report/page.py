"""The report of one run: one file with everything inside, no script, nothing fetched."""

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import yaml
from markupsafe import Markup

from flowerbed.report import pictures
from flowerbed.report.elements import (
    bar,
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
from flowerbed.report.findings import busy_seconds, find, waiting
from flowerbed.report.record import Record
from flowerbed.report.usage import Usage, size

_MEBI = 2**20


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _header(record: Record) -> Markup:
    run = record.description.get("run", {})
    lab = record.description.get("lab") or {}
    facts = [
        _when(record.begin) if record.rounds else "",
        run.get("strategy", ""),
        f"{run['model']} of width {run['alpha']:g}" if run else "",
        f"{len(record.names)} devices" if record.names else "",
        f"commit {lab['commit'][:12]}" if lab.get("commit") else "",
    ]
    return Markup('<header><h1>{}</h1><span class="state {}">{}</span><p>{}</p></header>').format(
        record.name, record.state, record.state, " · ".join(filter(None, facts))
    )


def _summary(record: Record) -> Markup | None:
    if not record.rounds:
        return None
    last = record.rounds[-1]
    wanted = record.description.get("run", {}).get("num_server_rounds", len(record.rounds))
    completed = sum(row.outcome == "completed" for row in record.devices)
    return tiles(
        [
            ("Accuracy", f"{last.central_accuracy:.3f}", "global model, test split"),
            ("On devices", number(last.accuracy, 3), "mean of the accuracy there"),
            ("Rounds", f"{len(record.rounds)} of {wanted}", f"{len(record.names)} devices"),
            (
                "Time",
                f"{record.seconds:.0f} s",
                f"{record.seconds / len(record.rounds):.1f} s a round",
            ),
            ("Waiting", share(waiting(record)), "of the devices' time"),
            ("Completed", f"{completed} of {len(record.devices)}", "devices' rounds"),
        ]
    )


def _findings(record: Record, usage: Mapping[str, Usage]) -> Markup:
    return Markup('<ul class="findings">\n{}\n</ul>').format(
        join(
            Markup('<li class="{}">{}</li>').format("grave" if found.grave else "", found.text)
            for found in find(record, usage)
        )
    )


def _course(record: Record, colours: pictures.Colours) -> Markup | None:
    keys = {key: colours[name] for name, key in pictures.keys_of(record).items()}
    return section(
        "How well it learned",
        legend(named(key, colour) for key, colour in sorted(keys.items())),
        pair(
            figure(
                pictures.course(record, colours, "accuracy"),
                "Accuracy of the global model after each round: on the test split, and "
                "as each device measures it on test images of its own.",
            ),
            figure(
                pictures.course(record, colours, "loss"),
                "Its loss (cross-entropy). Devices far apart have data that differ.",
            ),
        ),
    )


_PARTS = (
    ("transport", "on its way: SuperNode's poll, network, start of a process"),
    ("queue", "waiting for the trainer"),
    ("evaluate", "evaluating"),
    ("train", "training"),
    ("wait", "waiting for the round's last device"),
    ("none", "no model came back"),
)


def _timeline(record: Record, colours: pictures.Colours) -> Markup | None:
    return section(
        "Who waited for whom",
        figure(
            pictures.timeline(record, colours),
            "A lane for each device. The thin line is idle time: the longer it is, the more that "
            "device waited. The lane of the server is configuring, aggregating and evaluating."
            + (" Triangles: it was struck on purpose, and brought back." if record.faults else ""),
            least=max(640, 64 * len(record.rounds)),
        ),
        legend(
            Markup('<span class="swatch {}"></span>{}').format(part, what) for part, what in _PARTS
        ),
    )


def _work(record: Record, colours: pictures.Colours) -> Markup:
    """What each device did in all rounds, and what became of them."""
    rows = []
    for name in record.names:
        mine = record.rows_of(name)
        outcomes = Counter(row.outcome for row in mine)
        others = ", ".join(
            f"{times} {outcome.replace('_', ' ')}"
            for outcome, times in outcomes.most_common()
            if outcome != "completed"
        )
        busy = sum(map(busy_seconds, mine))
        waited = sum(row.wait_seconds for row in mine)
        trained = sum(row.train_seconds for row in mine)
        examples = sum(row.examples for row in mine)
        whole = busy + waited
        rows.append(
            (
                named(name, colours[name]),
                Markup('{} of {} <span class="bad">{}</span>').format(
                    outcomes["completed"], len(mine), others
                ),
                number(examples),
                number(examples / trained if trained else None, 1),
                bar(trained / whole if whole else None, colours[name]),
                bar(waited / whole if whole else None, colours[name]),
                number(sum(row.bytes_received for row in mine) / _MEBI, 1, " MiB"),
                number(sum(row.bytes_sent for row in mine) / _MEBI, 1, " MiB"),
            )
        )
    head = (
        "device",
        "completed",
        "examples",
        "per second",
        "training",
        "waiting",
        "received",
        "sent",
    )
    return table(head, rows, words=(4, 5))


def _usage(
    record: Record, usage: Mapping[str, Usage], why_not: str, colours: pictures.Colours
) -> Markup | None:
    heading = "What each device used of its limits"
    if why_not:
        return section(heading, text(f"Nothing to show. {why_not}"))
    rows = []
    for name, used in usage.items():
        settings = record.settings.get(name, {})
        quota, limit = settings.get("cpus"), size(settings.get("memory"))
        peak = used.memory_peak
        rows.append(
            (
                named(name, colours[name]),
                number(used.cores, 2),
                number(quota, 2) if quota else "no limit",
                bar(used.cores / quota if quota and used.cores else None, colours[name]),
                bar(used.throttled, colours[name]),
                number(None if peak is None else peak / _MEBI, 0, " MiB"),
                number(limit / _MEBI, 0, " MiB") if limit else "no limit",
                bar(peak / limit if limit and peak else None, colours[name]),
            )
        )
    head = ("device", "cores, mean", "quota", "used", "throttled", "memory, peak", "limit", "used")
    return section(
        heading,
        text(
            "From the first round's begin to the last one's end. Throttled: the share of the "
            "scheduler's periods (100 ms) in which the device wanted more than its quota."
        ),
        table(head, rows, words=(3, 4, 7)),
        pair(
            figure(
                pictures.cores(record, usage, colours),
                "Cores in use, mean over 30 s, against the quota (dashed). Upright lines: "
                "begins of rounds.",
            ),
            figure(
                pictures.memory(record, usage, colours),
                "Memory in use against the limit (dashed), at which the kernel kills.",
            ),
        ),
    )


def _data(record: Record) -> Markup | None:
    if not record.labels:
        return None
    return section(
        "Who holds which data",
        figure(
            pictures.labels(record),
            "Training images by device and label. Rows alike: the data are dealt out evenly.",
            least=16 * max(map(len, record.labels.values())),
        ),
    )


_RUN_COLUMNS = {
    "strategy": "strategy",
    "strategy_parameters": "parameters",
    "model": "model",
    "alpha": "width",
    "recipe": "recipe",
    "num_server_rounds": "rounds",
    "round_timeout": "round timeout, s",
    "seed": "seed",
}
_DEVICE_COLUMNS = {
    "device_class": "class",
    "machine": "machine",
    "cpus": "cores",
    "memory": "memory",
    "batch_size": "batch",
    "learning_rate": "learning rate",
    "optimizer": "optimizer",
    "local_epochs": "local epochs",
    "data_fraction": "data fraction",
    "examples": "training images",
}


def setting(value: Any) -> str:
    """A setting of run.yml in words."""
    if value is None or value == "":
        return "no limit"
    if isinstance(value, dict):
        return ", ".join(f"{key}={each}" for key, each in value.items()) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _configuration(record: Record, colours: pictures.Colours) -> Markup | None:
    run = record.description.get("run", {})
    devices = (
        (
            named(name, colours[name]),
            *(setting(entry.get(column)) for column in _DEVICE_COLUMNS),
        )
        for name, entry in sorted(record.settings.items())
    )
    return section(
        "What was run",
        table(
            tuple(_RUN_COLUMNS.values()),
            [[setting(run.get(column)) for column in _RUN_COLUMNS]],
            words=(1, 2, 4),
        )
        if run
        else None,
        table(("device", *_DEVICE_COLUMNS.values()), devices, words=(1, 2)) if run else None,
        Markup("<details><summary>All of run.yml</summary><pre>{}</pre></details>").format(
            yaml.safe_dump(record.description, sort_keys=False, default_flow_style=None)
        )
        if run
        else text("The run failed before it was described."),
    )


def run_page(record: Record, usage: Mapping[str, Usage], why_not: str = "") -> str:
    """The report of one run.

    Args:
        usage: of each device; see `flowerbed.report.usage`.
        why_not: the reason where there is none.
    """
    colours = pictures.colours_of(record)
    body = [_header(record), _summary(record), section("Findings", _findings(record, usage))]
    if record.rounds:
        body += [
            _course(record, colours),
            _timeline(record, colours),
            section("What each device did", _work(record, colours)),
            _usage(record, usage, why_not, colours),
        ]
    body += [_data(record), _configuration(record, colours)]
    return page(f"{record.name} - Flowerbed", body)
