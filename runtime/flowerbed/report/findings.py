"""What the rows of a run mean, as sentences: a pure function over the record."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev

from flowerbed.report.record import CENTRAL, Record, busy_seconds
from flowerbed.report.usage import Usage, size
from flowerbed.results import MODEL_OUTCOMES, DeviceRow, RoundRow

HELD_UP = 0.1
"""A device has held a round up when half of the others waited for it for more than this share of
the round's training."""
SEVERAL_ROUNDS = 2
"""Rounds that a device must hold up before its finding is grave: one may be chance."""
FEW = 2
"""Devices up to which the cause is given for each that has held up a single round."""
THROTTLED = 0.8
MEMORY = 0.9
SLOW_START = 1.3
LOPSIDED = 1.5
"""A device's examples relative to an equal share, from which the imbalance is a finding."""
CHANCE = 0.2, 0.02
"""An accuracy within this share of chance, or this far from it, is called chance."""
LISTED = 8
"""Rounds, or ranges of them, up to which a finding lists them."""
NAMED = 4
"""Devices of which a finding is repeated; the others with the same finding are only counted."""


@dataclass(frozen=True)
class Finding:
    """One or two sentences.

    Attributes:
        grave: whether a user should act on it.
        detail: further lines, such as a traceback.
    """

    text: str
    grave: bool = False
    detail: str = ""


def in_words(numbers: Iterable[int]) -> str:
    """Name rounds: round 3; rounds 1 to 3; rounds 1, 3 and 5 to 7; many by the first and last."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    words = []
    for part in parts:
        if len(part) > 2:  # noqa: PLR2004 - "1 and 2" is shorter than "1 to 2"
            words.append(f"{part[0]} to {part[-1]}")
        else:
            words += map(str, part)
    if len(words) > LISTED:
        return f"{sum(map(len, parts))} rounds from {parts[0][0]} to {parts[-1][-1]}"
    *others, last = words
    if others:
        return f"rounds {', '.join(others)} and {last}"
    return f"{'rounds' if ' ' in last else 'round'} {last}"


def _when(rows: Iterable[DeviceRow]) -> str:
    """In which rounds messages were sent."""
    numbers = [row.round for row in rows]
    return f"in {in_words(numbers)}" if any(numbers) else "before the first round"


def _limited(found: Iterable[Finding], what: str) -> Iterable[Finding]:
    """The first few findings, and the number of further devices to which the same applies."""
    found = list(found)
    yield from found[:NAMED]
    if (more := len(found) - NAMED) > 0:
        devices = "more device" if more == 1 else "more devices"
        yield Finding(f"{more} {devices} {what}.", found[0].grave)


def percent(share: float) -> str:
    """A share of 1 as a whole percentage."""
    return f"{100 * share:.0f}%"


# --- where time went ---------------------------------------------------------------------------

_PARTS = ("training", "evaluating", "answering queries", "on messages in transit")
_WAITING = "waiting for others"


def parts(record: Record) -> dict[str, float]:
    """Seconds that devices spent, by activity."""
    spent = dict.fromkeys((*_PARTS, _WAITING), 0.0)
    for row in record.messages:
        query = row.type.partition(".")[0] == "query"
        spent["training"] += row.train_seconds
        spent["answering queries" if query else "evaluating"] += row.evaluate_seconds
        spent["on messages in transit"] += (
            row.receive_seconds + row.queue_seconds + row.send_seconds
        )
        spent[_WAITING] += row.wait_seconds
    return spent


def waiting(record: Record) -> float | None:
    """Share of the devices' time that they spent waiting for others; None: nothing is known."""
    spent = parts(record)
    total = sum(spent.values())
    return spent[_WAITING] / total if total else None


def _waits(record: Record, row: RoundRow) -> list[float]:
    """Seconds that each of the others waited for the last device of a round."""
    return [
        # Where devices are asked again at once, as by FedBuff, they wait for nobody.
        max(0.0, min(other.wait_seconds, row.slowest_seconds - other.seconds))
        for other in record.training_by_round.get(row.round, ())
        if other.device != row.slowest_device and (other.wait_seconds or busy_seconds(other))
    ]


def held_up(record: Record) -> dict[str, list[RoundRow]]:
    """The devices for which others waited, and the rounds in which they did; most rounds first."""
    found: defaultdict[str, list[RoundRow]] = defaultdict(list)
    for row in record.rounds:
        waits = _waits(record, row)
        if waits and median(waits) > HELD_UP * row.devices_seconds:
            found[row.slowest_device].append(row)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


_CAUSES = {
    "train_seconds": "its training took {0} s (median of the others: {1} s)",
    "evaluate_seconds": "its evaluation took {0} s (median of the others: {1} s)",
    "receive_seconds": "its message took {0} s to arrive (median of the others: {1} s)",
    "queue_seconds": "its message waited {0} s for the worker (median of the others: {1} s)",
    "send_seconds": "its reply took {0} s to arrive (median of the others: {1} s)",
}
"""Parts of a message's time as the cause of a delay."""


def _cause(record: Record, device: str, rounds: Sequence[RoundRow]) -> str:
    """Why a device was the last one in rounds: the part in which it exceeds the others most."""
    numbers = {row.round for row in rounds}
    rows = [row for n in sorted(numbers) for row in record.training_by_round.get(n, ())]
    mine = [row for row in rows if row.device == device and busy_seconds(row)]
    others = [row for row in rows if row.device != device and busy_seconds(row)]
    if not mine or not others:
        outcomes = {row.outcome for row in rows if row.device == device}
        return f"it {_OUTCOMES[outcomes.pop()]}" if len(outcomes) == 1 else "it did not reply"

    def compared(part: str) -> tuple[float, float]:
        own, usual = ([getattr(row, part) for row in group] for group in (mine, others))
        return sum(own) / len(own), median(usual)

    part = max(_CAUSES, key=lambda name: compared(name)[0] - compared(name)[1])
    return _CAUSES[part].format(*(f"{seconds:.1f}" for seconds in compared(part)))


def _stragglers(record: Record, usage: Mapping[str, Usage]) -> Iterable[Finding]:
    grave: list[Finding] = []
    once: list[Finding] = []
    for device, rows in held_up(record).items():
        several = len(rows) >= SEVERAL_ROUNDS
        waited = sum(sum(_waits(record, row)) for row in rows)
        which = in_words([rows[0].round])
        if several:
            which = f"{len(rows)} of {len(record.rounds)} rounds"
        text = (
            f"{device} held up {which}: {_cause(record, device, rows)}. "
            f"The other devices waited {waited:.0f} s for it in total."
        )
        throttled = usage[device].throttled if device in usage else None
        if throttled is not None and throttled >= THROTTLED:
            text += f" {_throttling(record, device, throttled, 'It')}."
        (grave if several else once).append(Finding(text, grave=several))
    yield from _limited(grave, "held up several rounds")
    if len(once) > FEW:
        names = [device for device, rows in held_up(record).items() if len(rows) < SEVERAL_ROUNDS]
        listed = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
        yield Finding(f"{len(names)} devices held up one round each: {listed}.")
    else:
        yield from once


def _throttling(record: Record, device: str, share: float, subject: str) -> str:
    cost = sum(row.throttled_seconds or 0 for row in record.rows_of(device))
    return f"{subject} was throttled {percent(share)} of the time, which cost it {cost:.0f} s"


def _time(record: Record) -> Iterable[Finding]:
    spent = {part: seconds for part, seconds in parts(record).items() if seconds > 0}
    if total := sum(spent.values()):
        shares = [f"{percent(seconds / total)} {part}" for part, seconds in spent.items()]
        shares[0] = shares[0].replace(" ", " of their time ", 1)
        *most, last = shares
        listed = f"{', '.join(most)} and {last}" if most else last
        yield Finding(f"Devices spent {listed}.")
    later = [row.seconds for row in record.rounds[1:]]
    if later and record.rounds[0].seconds > SLOW_START * median(later):
        ratio = record.rounds[0].seconds / median(later)
        yield Finding(f"The first round took {ratio:.1f} times as long as later rounds (median).")


# --- what the model learned --------------------------------------------------------------------


def _after(record: Record, row: RoundRow) -> str:
    rounds = "round" if row.round == 1 else "rounds"
    return f"after {row.round} {rounds} ({record.ended(row):.0f} s)"


def _learning(record: Record) -> Iterable[Finding]:
    source, accuracies = record.curve("accuracy")
    origin, losses = record.curve("loss")
    if accuracies:
        yield _accuracy(record, source, accuracies)
    elif losses:
        row, loss = losses[-1]
        text = f"The global model's loss ({origin}) is {loss:.3f} {_after(record, row)}"
        first_row, first = losses[0]
        yield Finding(
            f"{text}; it was {first:.3f} after round {first_row.round}."
            if first_row is not row
            else f"{text}."
        )
    elif any(row.devices for row in record.rounds):
        yield Finding("The app reports neither accuracy nor loss of the global model.")
    if len(losses) > 1 and losses[-1][1] > losses[0][1]:
        (first_row, first), (row, loss) = losses[0], losses[-1]
        yield Finding(
            f"The loss ({origin}) rose from {first:.2f} after round {first_row.round} to "
            f"{loss:.2f} after round {row.round}.",
            grave=True,
        )


def _accuracy(record: Record, source: str, points: Sequence[tuple[RoundRow, float]]) -> Finding:
    row, last = points[-1]
    best_row, best = max(points, key=lambda point: point[1])
    text = f"The global model's accuracy ({source}) is {last:.3f} {_after(record, row)}"
    chance = _chance(record, source)
    if chance and last < chance + min(CHANCE[0] * chance, CHANCE[1]):
        return Finding(f"{text}. Chance is {chance:.3f}: the model has learned nothing yet.")
    if best > last + 0.01:
        return Finding(f"{text}; it was {best:.3f} after round {best_row.round}.")
    return Finding(f"{text}.")


def _fairness(record: Record) -> Iterable[Finding]:
    """How unequal the model is on the devices' own test data."""
    number, values = record.on_devices["accuracy"]
    if number and len(values) > 1:
        worst = min(values, key=lambda name: (values[name], name))
        best = max(values, key=lambda name: (values[name], name))
        yield Finding(
            f"On the devices' own test data, the model after round {number} has accuracy "
            f"{fmean(values.values()):.3f} (mean of {len(values)} devices); the worst is {worst} "
            f"with {values[worst]:.3f}, the best {best} with {values[best]:.3f}; the standard "
            f"deviation is {pstdev(values.values()):.3f}."
        )


def _chance(record: Record, source: str) -> float | None:
    """Accuracy of a model that gives all examples the same label; None: labels are unknown."""
    held = [counts for counts in record.labels.values() if sum(counts)]
    labels = max(map(len, held), default=0)
    if labels < 2:  # noqa: PLR2004 - a single label says nothing
        return None
    if source == CENTRAL:  # the labels of the server's test data are not known
        return 1 / labels
    totals = [sum(counts[n] for counts in held if n < len(counts)) for n in range(labels)]
    return max(totals) / sum(totals)


def _not_finite(record: Record) -> Iterable[Finding]:
    """Losses that are not finite, of the global model and in replies."""
    for name, column in (("central evaluation", "central_loss"), ("devices", "loss")):
        wrong = [
            row.round
            for row in record.rounds
            if (value := getattr(row, column)) is not None and not math.isfinite(value)
        ]
        if wrong:
            yield Finding(
                f"The global model's loss ({name}) is not finite after {in_words(wrong)}.",
                grave=True,
            )
    found: defaultdict[str, list[DeviceRow]] = defaultdict(list)
    for row in record.messages:
        # A diverged outcome is a finding of its own.
        if row.outcome in MODEL_OUTCOMES and _has_infinite_loss(row.metrics):
            found[row.device].append(row)
    yield from _limited(
        (
            Finding(f"{device} reported a loss that is not finite {_when(rows)}.", grave=True)
            for device, rows in sorted(found.items())
        ),
        "reported a loss that is not finite",
    )


def _has_infinite_loss(metrics: str) -> bool:
    """Whether a loss among a reply's metrics was not finite: JSON has null for such a number."""
    if "null" not in metrics:  # spares parsing thousands of rows
        return False
    return any(
        value is None and "loss" in name.lower() for name, value in json.loads(metrics).items()
    )


def _unchanged(record: Record) -> Iterable[Finding]:
    """Rounds in which no model was aggregated."""
    empty = [row.round for row in record.rounds if not row.devices]
    if empty:
        yield Finding(
            f"No model was aggregated in {in_words(empty)}: the global model did not change.",
            grave=True,
        )


# --- what became of messages -------------------------------------------------------------------

_OUTCOMES = {
    "diverged": "diverged",
    "error": "failed",
    "out_of_memory": "ran out of memory",
    "timeout": "did not reply in time",
    "offline": "was offline",
    "late": "had not replied when the round was closed",
    "partial": "stopped at the time limit",
    "unavailable": "was not available",
}
"""Verbs for outcomes, in the order of the findings."""
_HARMLESS = ("partial", "late", "unavailable")


def _outcomes(record: Record) -> Iterable[Finding]:
    missed: defaultdict[tuple[str, str, str], list[DeviceRow]] = defaultdict(list)
    for row in record.messages:
        if row.outcome != "completed":
            missed[row.outcome, row.device, row.type].append(row)
    if record.training and not missed:
        rounds, devices = len(record.rounds), len(record.names)
        yield Finding(f"Every device completed every round ({devices} devices, {rounds} rounds).")
    for outcome, verb in _OUTCOMES.items():
        # Most messages first.
        found = sorted(
            (-len(rows), device, kind, rows)
            for (what, device, kind), rows in missed.items()
            if what == outcome
        )
        if outcome == "partial" and len(found) > 1:
            yield _time_boxed(record, [row for *_, rows in found for row in rows])
            continue
        yield from _limited(
            (
                Finding(
                    f"{device} {verb} {_when(rows)}{'' if kind == 'train' else f' ({kind})'}"
                    f"{_more(record, device, rows)}.",
                    grave=outcome not in _HARMLESS,
                )
                for _, device, kind, rows in found
            ),
            f"{verb.replace('was ', 'were ')} in at least one round",
        )


def _time_boxed(record: Record, rows: Sequence[DeviceRow]) -> Finding:
    """The finding on partial rounds of several devices: a property of the run."""
    devices = len({row.device for row in rows})
    return Finding(
        f"Training was time-boxed: {devices} of {len(record.names)} devices stopped at the time "
        f"limit and returned what they had learned ({len(rows)} of {len(record.training)} "
        "training messages)."
    )


def _more(record: Record, device: str, rows: Sequence[DeviceRow]) -> str:
    """What explains an outcome, and what it cost."""
    outcome, reason = rows[-1].outcome, rows[-1].reason.rstrip(".")
    spent = sum(row.seconds for row in rows)
    if outcome == "partial":
        return " and returned what it had learned"
    if outcome == "late":
        examples = sum(row.examples for row in rows)
        lost = f" and {examples} examples" if examples else ""
        return f": {spent:.0f} s{lost} were lost"
    if outcome == "out_of_memory":
        limit = record.settings.get(device, {}).get("memory")
        usual = [row.examples for row in record.rows_of(device) if row.aggregated is not None]
        examples = round(len(rows) * median(usual)) if usual else 0
        lost = f" and about {examples} examples" if examples else ""
        return (f" (its limit is {limit})" if limit else "") + f": {spent:.0f} s{lost} were lost"
    return f": {reason}" if outcome in ("error", "diverged") and reason else ""


def _halved(record: Record) -> Iterable[Finding]:
    """Devices that went on with smaller batches after they had run out of memory."""
    for device in record.names:
        setting = record.settings.get(device, {})
        if setting.get("out_of_memory_policy") != "halve_batch":
            continue
        whole = min(setting.get("batch_size") or 0, setting.get("examples") or math.inf)
        rows = [row for row in record.rows_of(device) if (row.batch_size or whole) < whole]
        if rows:
            smallest = min(row.batch_size or whole for row in rows)
            yield Finding(
                f"{device} had too little memory for batches of {whole}: it trained with batches "
                f"of {smallest} in {in_words(row.round for row in rows)}.",
                grave=True,
            )


def _faults(record: Record) -> Iterable[Finding]:
    injected = [row for row in record.faults if row.fault != "rejoin" and not row.problem]
    rounds: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for row in injected:
        rounds[row.fault.replace("_", " "), row.target].append(row.round)
    listed = ", ".join(f"{fault} {on} in {in_words(of)}" for (fault, on), of in rounds.items())
    if injected:
        yield Finding(f"Faults injected ({len(injected)}): {listed}.")
    for row in record.faults:
        if row.problem:
            yield Finding(
                f"The fault {row.fault.replace('_', ' ')} {row.target} could not be injected in "
                f"round {row.round}: {row.problem}",
                grave=True,
            )


# --- limits and data ---------------------------------------------------------------------------


def _limits(record: Record, usage: Mapping[str, Usage]) -> Iterable[Finding]:
    near, slowed = [], []
    stragglers = held_up(record)
    for device, used in usage.items():
        limit = size(record.settings.get(device, {}).get("memory"))
        if limit and used.memory_peak is not None and used.memory_peak >= MEMORY * limit:
            share = percent(used.memory_peak / limit)
            near.append(Finding(f"{device} used up to {share} of its memory limit.", grave=True))
        if used.throttled is not None and used.throttled >= THROTTLED and device not in stragglers:
            text = _throttling(record, device, used.throttled, device)
            slowed.append(Finding(f"{text}; no other device had to wait for it."))
    yield from _limited(near, "came close to their memory limit")
    yield from _limited(slowed, "were throttled as much without holding up a round")


def _shares(record: Record) -> Iterable[Finding]:
    trained: defaultdict[str, int] = defaultdict(int)
    for row in record.training:
        trained[row.device] += row.examples
    total = sum(trained.values())
    if total and len(trained) > 1:
        most, least = max(trained, key=trained.__getitem__), min(trained, key=trained.__getitem__)
        if trained[most] / total > LOPSIDED / len(trained):
            yield Finding(
                f"{most} trained on {percent(trained[most] / total)} of all examples, "
                f"{least} on {percent(trained[least] / total)}."
            )
    missing = {device: held.count(0) for device, held in record.labels.items()}
    yield from _limited(
        (
            Finding(f"{device} has no examples of {number} of {len(record.labels[device])} labels.")
            for device, number in sorted(missing.items(), key=lambda item: (-item[1], item[0]))
            if number
        ),
        "have no examples of some labels",
    )


def _origin(record: Record) -> Iterable[Finding]:
    """Data other than those that were asked for."""
    wanted = (record.origin.get("asked") or {}).get("dataset")
    used = record.origin.get("dataset")
    if wanted and used != wanted:
        yield Finding(
            f"The run used the data set {used}, not {wanted}: the hub could not be reached when "
            "the data were placed. Its results say nothing about the data set that was asked for.",
            grave=True,
        )


def _resumed(record: Record) -> Iterable[Finding]:
    rounds = record.description.get("resumed_after_rounds") or []
    if rounds:
        yield Finding(f"The run was interrupted, and resumed after {in_words(rounds)}.")


def find(record: Record, usage: Mapping[str, Usage]) -> list[Finding]:
    """All findings on a run: other data than asked for, its failure, what it learned, the rest."""
    findings = [*_origin(record)]
    if record.state == "failed":
        first, _, rest = record.message.partition("\n")
        findings.append(Finding(f"The run failed: {first}", grave=True, detail=rest))
    elif record.state != "completed":
        findings.append(Finding(f"The run has not ended: its state is {record.state}.", True))
    findings += _resumed(record)
    if record.rounds:
        findings += [
            *_not_finite(record),
            *_learning(record),
            *_fairness(record),
            *_unchanged(record),
            *_stragglers(record, usage),
            *_faults(record),
            *_outcomes(record),
            *_halved(record),
            *_limits(record, usage),
            *_time(record),
            *_shares(record),
        ]
    elif record.messages:
        findings += [*_faults(record), *_outcomes(record), *_time(record)]
    return findings
