"""The page itself: one file with everything inside, no script, nothing fetched from anywhere."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import yaml
from markupsafe import Markup

from flowerbed.report import compare, pictures
from flowerbed.report.findings import busy_seconds, find, percent, waiting
from flowerbed.report.record import Record
from flowerbed.report.usage import Usage, size

_MEBI = 2**20
NOTHING = "-"

PAGE = Markup("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
""")


def _join(parts: Iterable[Markup | None]) -> Markup:
    return Markup("\n").join(part for part in parts if part)


def _page(title: str, body: Iterable[Markup | None]) -> str:
    style = Markup(resources.files(__package__).joinpath("page.css").read_text())  # noqa: S704
    return str(PAGE.format(title=title, style=style, body=_join(body)))


def _section(heading: str, *content: Markup | None) -> Markup | None:
    """A heading and what is below it; nothing where there is nothing."""
    if not any(content):
        return None
    return Markup("<section>\n<h2>{}</h2>\n{}\n</section>").format(heading, _join(content))


def _text(text: str) -> Markup:
    return Markup("<p>{}</p>").format(text)


def _figure(svg: Markup | None, caption: str, least: int = 0) -> Markup | None:
    """A picture; one that would be unreadable below `least` pixels scrolls in its box instead."""
    if svg is None:
        return None
    return Markup(
        '<figure><div class="scroll" style="--least: {}px">{}</div>'
        "<figcaption>{}</figcaption></figure>"
    ).format(least, svg, caption)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], words: Iterable[int] = ()) -> Markup:
    """A table that scrolls in its box.

    Args:
        words: columns of text, beside the first.
    """
    kinds = [Markup(' class="words"') if n in set(words) else "" for n in range(len(head))]

    def line(cell: Markup, cells: Sequence[Any]) -> Markup:
        filled = (cell.format(*pair) for pair in zip(kinds, cells, strict=True))
        return Markup("<tr>{}</tr>").format(_join(filled))

    return Markup(
        '<div class="scroll"><table>\n<thead>{}</thead>\n<tbody>\n{}\n</tbody></table></div>'
    ).format(
        line(Markup("<th{}>{}</th>"), head),
        _join(line(Markup("<td{}>{}</td>"), row) for row in rows),
    )


def _tiles(tiles: Iterable[tuple[str, Any, Any]]) -> Markup:
    return Markup('<dl class="figures">\n{}\n</dl>').format(
        _join(
            Markup("<div><dt>{}</dt><dd>{} <small>{}</small></dd></div>").format(*tile)
            for tile in tiles
        )
    )


def _number(value: float | None, digits: int = 0, unit: str = "") -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}{unit}".replace(",", "\u202f")


def _share(value: float | None) -> str:
    return NOTHING if value is None else percent(value)


def _colour(colour: str) -> Markup:
    return Markup('style="--colour: var(--{})"').format(pictures.THEME[colour])


def _named(name: str, colour: str) -> Markup:
    return Markup('<span class="dot" {}></span>{}').format(_colour(colour), name)


def _bar(share: float | None, colour: str) -> Markup:
    """A share as a number, and as a bar up to the whole."""
    if share is None:
        return Markup("-")
    return Markup('{}<span class="bar" {}><i style="width: {:.1f}%"></i></span>').format(
        percent(share), _colour(colour), 100 * min(share, 1)
    )


def _legend(entries: Iterable[Markup]) -> Markup:
    return Markup('<ul class="legend">{}</ul>').format(
        _join(Markup("<li>{}</li>").format(entry) for entry in entries)
    )


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
    return _tiles(
        [
            ("Accuracy", f"{last.central_accuracy:.3f}", "global model, test split"),
            ("On devices", _number(last.accuracy, 3), "mean of the accuracy there"),
            ("Rounds", f"{len(record.rounds)} of {wanted}", f"{len(record.names)} devices"),
            (
                "Time",
                f"{record.seconds:.0f} s",
                f"{record.seconds / len(record.rounds):.1f} s a round",
            ),
            ("Waiting", _share(waiting(record)), "of the devices' time"),
            ("Completed", f"{completed} of {len(record.devices)}", "devices' rounds"),
        ]
    )


def _findings(record: Record, usage: Mapping[str, Usage]) -> Markup:
    return Markup('<ul class="findings">\n{}\n</ul>').format(
        _join(
            Markup('<li class="{}">{}</li>').format("grave" if found.grave else "", found.text)
            for found in find(record, usage)
        )
    )


def _course(record: Record, colours: pictures.Colours) -> Markup | None:
    legend = {key: colours[name] for name, key in pictures.keys_of(record).items()}
    return _section(
        "How well it learned",
        _legend(_named(key, colour) for key, colour in sorted(legend.items())),
        Markup('<div class="pair">{}</div>').format(
            _join(
                [
                    _figure(
                        pictures.course(record, colours, "accuracy"),
                        "Accuracy of the global model after each round: on the test split, and "
                        "as each device measures it on test images of its own.",
                    ),
                    _figure(
                        pictures.course(record, colours, "loss"),
                        "Its loss (cross-entropy). Devices far apart have data that differ.",
                    ),
                ]
            )
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
    return _section(
        "Who waited for whom",
        _figure(
            pictures.timeline(record, colours),
            "A lane for each device. The thin line is idle time: the longer it is, the more that "
            "device waited. The lane of the server is configuring, aggregating and evaluating.",
            least=max(640, 64 * len(record.rounds)),
        ),
        _legend(
            Markup('<span class="swatch {}"></span>{}').format(part, text) for part, text in _PARTS
        ),
    )


def _work(record: Record, colours: pictures.Colours) -> Markup:
    """What each device did in all rounds, and what became of them."""
    rows = []
    for name in record.names:
        mine = record.rows_of(name)
        outcomes = Counter(row.outcome for row in mine)
        others = ", ".join(
            f"{number} {outcome.replace('_', ' ')}"
            for outcome, number in outcomes.most_common()
            if outcome != "completed"
        )
        busy = sum(map(busy_seconds, mine))
        waited = sum(row.wait_seconds for row in mine)
        trained = sum(row.train_seconds for row in mine)
        examples = sum(row.examples for row in mine)
        whole = busy + waited
        rows.append(
            (
                _named(name, colours[name]),
                Markup('{} of {} <span class="bad">{}</span>').format(
                    outcomes["completed"], len(mine), others
                ),
                _number(examples),
                _number(examples / trained if trained else None, 1),
                _bar(trained / whole if whole else None, colours[name]),
                _bar(waited / whole if whole else None, colours[name]),
                _number(sum(row.bytes_received for row in mine) / _MEBI, 1, " MiB"),
                _number(sum(row.bytes_sent for row in mine) / _MEBI, 1, " MiB"),
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
    return _table(head, rows, words=(4, 5))


def _usage(
    record: Record, usage: Mapping[str, Usage], why_not: str, colours: pictures.Colours
) -> Markup | None:
    heading = "What each device used of its limits"
    if why_not:
        return _section(heading, _text(f"Nothing to show. {why_not}"))
    rows = []
    for name, used in usage.items():
        settings = record.settings.get(name, {})
        quota, limit = settings.get("cpus"), size(settings.get("memory"))
        peak = used.memory_peak
        rows.append(
            (
                _named(name, colours[name]),
                _number(used.cores, 2),
                _number(quota, 2) if quota else "no limit",
                _bar(used.cores / quota if quota and used.cores else None, colours[name]),
                _bar(used.throttled, colours[name]),
                _number(None if peak is None else peak / _MEBI, 0, " MiB"),
                _number(limit / _MEBI, 0, " MiB") if limit else "no limit",
                _bar(peak / limit if limit and peak else None, colours[name]),
            )
        )
    head = ("device", "cores, mean", "quota", "used", "throttled", "memory, peak", "limit", "used")
    return _section(
        heading,
        _text(
            "From the first round's begin to the last one's end. Throttled: the share of the "
            "scheduler's periods (100 ms) in which the device wanted more than its quota."
        ),
        _table(head, rows, words=(3, 4, 7)),
        Markup('<div class="pair">{}</div>').format(
            _join(
                [
                    _figure(
                        pictures.cores(record, usage, colours),
                        "Cores in use, mean over 30 s, against the quota (dashed). Upright lines: "
                        "begins of rounds.",
                    ),
                    _figure(
                        pictures.memory(record, usage, colours),
                        "Memory in use against the limit (dashed), at which the kernel kills.",
                    ),
                ]
            )
        ),
    )


def _data(record: Record) -> Markup | None:
    if not record.labels:
        return None
    return _section(
        "Who holds which data",
        _figure(
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


def _setting(value: Any) -> str:
    if value is None or value == "":
        return "no limit"
    if isinstance(value, dict):
        return ", ".join(f"{key}={each}" for key, each in value.items()) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _configuration(record: Record, colours: pictures.Colours) -> Markup | None:
    run = record.description.get("run", {})
    devices = (
        (
            _named(name, colours[name]),
            *(_setting(entry.get(column)) for column in _DEVICE_COLUMNS),
        )
        for name, entry in sorted(record.settings.items())
    )
    return _section(
        "What was run",
        _table(
            tuple(_RUN_COLUMNS.values()),
            [[_setting(run.get(column)) for column in _RUN_COLUMNS]],
            words=(1, 2, 4),
        )
        if run
        else None,
        _table(("device", *_DEVICE_COLUMNS.values()), devices, words=(1, 2)) if run else None,
        Markup("<details><summary>All of run.yml</summary><pre>{}</pre></details>").format(
            yaml.safe_dump(record.description, sort_keys=False, default_flow_style=None)
        )
        if run
        else _text("The run failed before it was described."),
    )


def run_page(record: Record, usage: Mapping[str, Usage], why_not: str = "") -> str:
    """The report of one run.

    Args:
        usage: of each device; see `flowerbed.report.usage`.
        why_not: the reason where there is none.
    """
    colours = pictures.colours_of(record)
    body = [_header(record), _summary(record), _section("Findings", _findings(record, usage))]
    if record.rounds:
        body += [
            _course(record, colours),
            _timeline(record, colours),
            _section("What each device did", _work(record, colours)),
            _usage(record, usage, why_not, colours),
        ]
    body += [_data(record), _configuration(record, colours)]
    return _page(f"{record.name} - Flowerbed", body)


def comparison_page(records: Sequence[Record]) -> str:
    """Several runs side by side."""
    names = [record.name for record in records]
    colours = [pictures.PALETTE[n % len(pictures.PALETTE)] for n in range(len(records))]
    named = [_named(*pair) for pair in zip(names, colours, strict=True)]
    summary = (
        (
            name,
            record.state,
            len(record.rounds),
            _number(record.rounds[-1].central_accuracy if record.rounds else None, 3),
            _number(max((r.central_accuracy for r in record.rounds), default=None), 3),
            _number(record.seconds, 0, " s"),
            _number(record.seconds / len(record.rounds) if record.rounds else None, 1, " s"),
            _share(waiting(record)),
            sum(row.outcome != "completed" for row in record.devices),
        )
        for name, record in zip(named, records, strict=True)
    )
    head = ("run", "", "rounds", "accuracy", "best", "time", "a round", "waiting", "not completed")
    times = compare.times_to_accuracy(records)
    differences = compare.differences(records)
    body = [
        Markup("<header><h1>{}</h1><p>{} runs compared</p></header>").format(
            " · ".join(names), len(records)
        ),
        _section("In numbers", _table(head, summary, words=(1,))),
        _section(
            "How well they learned",
            _legend(named),
            Markup('<div class="pair">{}</div>').format(
                _join(
                    [
                        _figure(
                            pictures.compared(records, "seconds"),
                            "Accuracy of the global model on the test split, over time: what a "
                            "user gets.",
                        ),
                        _figure(
                            pictures.compared(records, "rounds"),
                            "The same, over rounds: what a round is worth.",
                        ),
                    ]
                )
            ),
        ),
        _section(
            "Time to an accuracy",
            _table(
                ("accuracy", *names),
                (
                    (f"{accuracy:.2f}", *(_number(seconds, 0, " s") for seconds in reached))
                    for accuracy, reached in times
                ),
            )
            if times
            else _text("None of the runs has come to an accuracy worth comparing."),
        ),
        _section(
            "What differs in their configuration",
            _table(("setting", *names), ((key, *map(_setting, v)) for key, v in differences))
            if differences
            else _text("Nothing: the runs were configured alike."),
        ),
    ]
    return _page(f"{', '.join(names)} - Flowerbed", body)
