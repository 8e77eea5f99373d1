"""What the numbers of a run say, in plain words: a pure function over its rows."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from flowerbed.report.record import Record
from flowerbed.report.usage import Usage, size
from flowerbed.results import DeviceRow, RoundRow

HELD_UP = 0.1
"""A round is held up by its last device when half of the others wait for it longer than this share
of the devices' part of the round."""
THROTTLED = 0.8
MEMORY = 0.9
SLOW_START = 1.3
LOPSIDED = 1.5
"""A device's share of the examples, over an equal share, from which it is worth a word."""

SEVERAL = 4
"""Devices that are named one by one with what is wrong with them; of more, only how many."""


@dataclass(frozen=True)
class Finding:
    """One sentence; `grave` where somebody should do something about it."""

    text: str
    grave: bool = False


def in_words(numbers: Iterable[int]) -> str:
    """Rounds in words: round 3; rounds 1 to 3; rounds 1, 3 and 4."""
    *others, last = sorted(set(numbers))
    if not others:
        return f"round {last}"
    if others[1:] and last - others[0] == len(others):
        return f"rounds {others[0]} to {last}"
    return f"rounds {', '.join(map(str, others))} and {last}"


def _limited(found: Iterable[Finding], what: str) -> Iterable[Finding]:
    """The first few, and how many devices more there are of which the same is to be said."""
    found = list(found)
    yield from found[:SEVERAL]
    if (more := len(found) - SEVERAL) > 0:
        devices = "more device" if more == 1 else "more devices"
        yield Finding(f"{more} {devices} {what}.", found[0].grave)


def percent(share: float) -> str:
    """A share of 1 as whole per cent."""
    return f"{100 * share:.0f} %"


def busy_seconds(row: DeviceRow) -> float:
    """From the message to the reply; 0 where no model came back."""
    return (
        row.receive_seconds
        + row.queue_seconds
        + row.evaluate_seconds
        + row.train_seconds
        + row.send_seconds
    )


def parts(record: Record) -> dict[str, float]:
    """Where the devices' time went, in seconds."""
    rows = record.devices
    return {
        "into training": sum(row.train_seconds for row in rows),
        "into evaluating": sum(row.evaluate_seconds for row in rows),
        "into messages on their way": sum(
            row.receive_seconds + row.queue_seconds + row.send_seconds for row in rows
        ),
        "by waiting for others": sum(row.wait_seconds for row in rows),
    }


def waiting(record: Record) -> float | None:
    """Share of the devices' time that went by waiting for others."""
    spent = parts(record)
    total = sum(spent.values())
    return spent["by waiting for others"] / total if total else None


def _waits(record: Record, row: RoundRow) -> list[float]:
    """How long each of the others waited for the last device of a round."""
    return [
        other.wait_seconds
        for other in record.devices
        if other.round == row.round
        and other.device != row.slowest_device
        and (other.wait_seconds or busy_seconds(other))
    ]


def held_up(record: Record) -> dict[str, list[RoundRow]]:
    """The devices that the others waited for, and the rounds in which they did."""
    found: defaultdict[str, list[RoundRow]] = defaultdict(list)
    for row in record.rounds:
        waits = _waits(record, row)
        if waits and median(waits) > HELD_UP * row.devices_seconds:
            found[row.slowest_device].append(row)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _learning(record: Record) -> Iterable[Finding]:
    last, first = record.rounds[-1], record.rounds[0]
    best = max(record.rounds, key=lambda row: row.central_accuracy)
    text = (
        f"The global model's accuracy on the test split is {last.central_accuracy:.3f} after "
        f"{last.round} {'rounds' if last.round > 1 else 'round'} and {record.seconds:.0f} s"
    )
    labels = max((len(held) for held in record.labels.values()), default=0)
    if labels and last.central_accuracy < 1.2 / labels:
        yield Finding(
            f"{text}: by chance it would be {1 / labels:.3f}. It has learned nothing yet."
        )
    elif best.central_accuracy > last.central_accuracy + 0.01:
        yield Finding(f"{text}; it was {best.central_accuracy:.3f} after round {best.round}.")
    else:
        yield Finding(f"{text}.")
    if last.central_loss > first.central_loss:
        yield Finding(
            f"Its loss rose from {first.central_loss:.2f} after round {first.round} to "
            f"{last.central_loss:.2f}.",
            grave=True,
        )


def _stragglers(record: Record, usage: Mapping[str, Usage]) -> Iterable[Finding]:
    return _limited(_each_straggler(record, usage), "held up rounds")


def _each_straggler(record: Record, usage: Mapping[str, Usage]) -> Iterable[Finding]:
    for device, rows in held_up(record).items():
        throttled = usage[device].throttled if device in usage else None
        waited = sum(sum(_waits(record, row)) for row in rows)
        cost = sum(row.throttled_seconds or 0 for row in record.rows_of(device))
        before = (
            f"was throttled {percent(throttled)} of the time, which cost it {cost:.0f} s, and "
            if throttled is not None and throttled >= THROTTLED
            else ""
        )
        yield Finding(
            f"{device} {before}held up {len(rows)} of {len(record.rounds)} rounds; the others "
            f"together waited {waited:.0f} s for it.",
            grave=True,
        )


_OUTCOMES = {
    "error": "failed",
    "late": "answered when its round was over",
    "offline": "was offline",
    "out_of_memory": "was out of memory",
    "partial": "returned what it had learned when its time was up",
    "timeout": "did not answer in time",
    "unavailable": "was not available",
}
_NOBODYS_FAULT = ("partial", "late", "unavailable")


def _outcomes(record: Record) -> Iterable[Finding]:
    missed: defaultdict[tuple[str, str], list[DeviceRow]] = defaultdict(list)
    for row in record.devices:
        if row.outcome != "completed":
            missed[row.device, row.outcome].append(row)
    if record.devices and not missed:
        rounds, devices = len(record.rounds), len(record.names)
        yield Finding(f"Every device completed every round ({devices} devices, {rounds} rounds).")
    for outcome, text in _OUTCOMES.items():
        # Most rounds first.
        found = sorted(
            (-len(rows), device, rows) for (device, what), rows in missed.items() if what == outcome
        )
        yield from _limited(
            (
                Finding(
                    f"{device} {text} in {in_words(row.round for row in rows)}"
                    f"{_more(record, device, rows)}.",
                    grave=outcome not in _NOBODYS_FAULT,
                )
                for _, device, rows in found
            ),
            f"{text} in some round".replace("was ", "were ").replace(" its ", " their "),
        )


def _more(record: Record, device: str, rows: list[DeviceRow]) -> str:
    """What helps to understand an outcome, and what it cost."""
    outcome, reason = rows[-1].outcome, rows[-1].reason
    spent = sum(row.seconds for row in rows)
    if outcome == "late":
        return f": {spent:.0f} s and {sum(row.examples for row in rows)} examples for nothing"
    if outcome == "out_of_memory":
        limit = record.settings.get(device, {}).get("memory")
        usual = [row.examples for row in record.rows_of(device) if row.aggregated is not None]
        return (f" (its limit is {limit})" if limit else "") + (
            f": {spent:.0f} s for nothing"
            + (f", and about {len(rows) * median(usual):.0f} examples less" if usual else "")
        )
    return f": {reason}" if outcome == "error" and reason else ""


def _halved(record: Record) -> Iterable[Finding]:
    """Devices whose memory was too small for their batches, and which went on with smaller ones."""
    for device in record.names:
        setting = record.settings.get(device, {})
        whole = min(setting.get("batch_size", 0), setting.get("examples", 0))
        rows = [row for row in record.rows_of(device) if (row.batch_size or whole) < whole]
        if rows:
            yield Finding(
                f"{device} had too little memory for batches of {whole}: in "
                f"{in_words(row.round for row in rows)} it trained with "
                f"{min(row.batch_size or whole for row in rows)}.",
                grave=True,
            )


def _faults(record: Record) -> Iterable[Finding]:
    struck = [row for row in record.faults if row.fault != "rejoin" and not row.problem]
    rounds: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for row in struck:
        rounds[row.fault.replace("_", " "), row.target].append(row.round)
    told = ", ".join(f"{fault} {on} in {in_words(of)}" for (fault, on), of in rounds.items())
    if struck:
        yield Finding(f"Struck on purpose ({len(struck)}): {told}.")
    for row in record.faults:
        if row.problem:
            yield Finding(
                f"{row.fault.replace('_', ' ')} {row.target} failed in round {row.round}: "
                f"{row.problem}",
                grave=True,
            )


def _limits(record: Record, usage: Mapping[str, Usage]) -> Iterable[Finding]:
    near, slowed = [], []
    stragglers = held_up(record)
    cost: defaultdict[str, float] = defaultdict(float)
    for row in record.devices:
        cost[row.device] += row.throttled_seconds or 0
    for device, used in usage.items():
        limit = size(record.settings.get(device, {}).get("memory"))
        if limit and used.memory_peak is not None and used.memory_peak >= MEMORY * limit:
            share = percent(used.memory_peak / limit)
            near.append(Finding(f"{device} came up to {share} of its memory.", grave=True))
        if used.throttled is not None and used.throttled >= THROTTLED and device not in stragglers:
            share = percent(used.throttled)
            text = (
                f"{device} was throttled {share} of the time, which cost it {cost[device]:.0f} s, "
                "and yet held nobody up."
            )
            slowed.append(Finding(text))
    yield from _limited(near, "came close to the limit of their memory")
    yield from _limited(slowed, "were throttled as much, and held nobody up")


def _time(record: Record) -> Iterable[Finding]:
    spent = parts(record)
    total = sum(spent.values())
    if total:
        *most, last = (f"{percent(spent[part] / total)} {part}" for part in spent)
        yield Finding(f"Of the devices' time went {', '.join(most)} and {last}.")
    later = [row.seconds for row in record.rounds[1:]]
    if later and record.rounds[0].seconds > SLOW_START * median(later):
        ratio = record.rounds[0].seconds / median(later)
        yield Finding(f"The first round took {ratio:.1f} times as long as a later one.")


def _shares(record: Record) -> Iterable[Finding]:
    seen: defaultdict[str, int] = defaultdict(int)
    for row in record.devices:
        seen[row.device] += row.examples
    total = sum(seen.values())
    if total and len(seen) > 1:
        most, least = max(seen, key=seen.__getitem__), min(seen, key=seen.__getitem__)
        if seen[most] / total > LOPSIDED / len(seen):
            yield Finding(
                f"{most} brought {percent(seen[most] / total)} of all examples trained on, "
                f"{least} {percent(seen[least] / total)}."
            )
    missing = {device: held.count(0) for device, held in record.labels.items()}
    yield from _limited(
        (
            Finding(
                f"{device} has no image of {number} of the {len(record.labels[device])} labels."
            )
            for device, number in sorted(missing.items(), key=lambda item: (-item[1], item[0]))
            if number
        ),
        "have no image of some labels",
    )


def find(record: Record, usage: Mapping[str, Usage]) -> list[Finding]:
    """All that can be said of a run: what has failed first, then the course of it."""
    findings = []
    if record.state == "failed":
        findings.append(Finding(f"The run failed: {record.message}", grave=True))
    elif record.state != "completed":
        findings.append(Finding(f"The run is not over: {record.state}.", grave=True))
    if record.rounds:
        findings += [
            *_learning(record),
            *_stragglers(record, usage),
            *_faults(record),
            *_outcomes(record),
            *_halved(record),
            *_limits(record, usage),
            *_time(record),
            *_shares(record),
        ]
    return findings
