"""What a report says of a run, on worked examples."""

from dataclasses import replace

import pytest

from flowerbed.faults import FaultRow
from flowerbed.report import findings
from flowerbed.report.findings import find, held_up, in_words, waiting
from flowerbed.report.record import Record
from flowerbed.report.usage import Usage, size
from flowerbed.results import OUTCOMES, DeviceRow, RoundRow

MEBI = 2**20


def _round(
    number: int, slowest: str, accuracy: float = 0.3, devices_seconds: float = 20
) -> RoundRow:
    return RoundRow(
        round=number,
        started=1000.0 + 25 * number,
        accuracy=None,
        loss=None,
        central_accuracy=accuracy,
        central_loss=3.0 - accuracy,
        seconds=devices_seconds + 5,
        configure_seconds=1,
        devices_seconds=devices_seconds,
        aggregate_seconds=1,
        evaluate_seconds=3,
        examples=300,
        devices=3,
        failed=0,
        slowest_device=slowest,
        slowest_seconds=devices_seconds,
    )


def _row(
    number: int, device: str, wait: float, outcome: str = "completed", reason: str = ""
) -> DeviceRow:
    """A device that is busy for what it does not wait of 20 s; no model came of a failure."""
    busy = 20 - wait if outcome in ("completed", "partial") else 0
    return DeviceRow(
        round=number,
        device=device,
        device_class="phone",
        outcome=outcome,
        reason=reason,
        started=1001.0 + 25 * number,
        aggregated=number if busy else None,
        examples=100 if busy else 0,
        seconds=busy or 12,
        receive_seconds=0.2 * busy,
        queue_seconds=0.1 * busy,
        evaluate_seconds=0.1 * busy,
        train_seconds=0.5 * busy,
        send_seconds=0.1 * busy,
        wait_seconds=wait,
        bytes_received=1000 if busy else 0,
        bytes_sent=1000 if busy else 0,
        examples_per_second=10 if busy else 0,
        batch_size=16 if busy else None,
        throttled_share=0.8 if busy else None,
        throttled_seconds=0.3 * busy if busy else None,
        loss=None,
        accuracy=None,
        train_loss=None,
        train_accuracy=None,
    )


def _record(
    rounds: list[RoundRow], rows: list[DeviceRow], state: str = "completed", message: str = ""
) -> Record:
    described = {
        name: {"device_class": "phone", "memory": "1000m", "labels": [30, 30, 40]}
        for name in ("budget-1", "laptop-1", "pi4-1")
    }
    return Record("run-1", state, message, rounds, rows, {"devices": described})


@pytest.fixture
def held_up_twice() -> Record:
    """Three rounds: budget-1 holds two up by 12 and 10 s, the third is even."""
    rows = [
        *(_row(1, "budget-1", 0), _row(1, "laptop-1", 12), _row(1, "pi4-1", 12)),
        *(_row(2, "budget-1", 0), _row(2, "laptop-1", 10), _row(2, "pi4-1", 10)),
        *(_row(3, "budget-1", 1), _row(3, "laptop-1", 1), _row(3, "pi4-1", 0)),
    ]
    rounds = [_round(1, "budget-1", 0.34), _round(2, "budget-1", 0.5), _round(3, "pi4-1", 0.7)]
    return _record(rounds, rows)


def _texts(record: Record, usage: dict[str, Usage] | None = None) -> list[str]:
    return [found.text for found in find(record, usage or {})]


def test_who_held_up_which_rounds(held_up_twice: Record) -> None:
    found = held_up(held_up_twice)
    assert {name: [row.round for row in rows] for name, rows in found.items()} == {
        "budget-1": [1, 2]
    }


def test_the_share_of_waiting(held_up_twice: Record) -> None:
    # 46 of 9 times 20 s.
    assert waiting(held_up_twice) == pytest.approx(46 / 180)
    assert waiting(_record([], [])) is None
    said = (
        "Of the devices' time went 37 % into training, 7 % into evaluating, 30 % into messages on "
        "their way and 26 % by waiting for others."
    )
    assert said in _texts(held_up_twice)


def test_a_straggler_is_named_with_the_reason(held_up_twice: Record) -> None:
    said = "held up 2 of 3 rounds; the others together waited 44 s for it."
    assert f"budget-1 {said}" in _texts(held_up_twice)
    throttled = {"budget-1": Usage(throttled=0.96), "pi4-1": Usage(throttled=0.5)}
    assert f"budget-1 was throttled 96 % of the time, which cost it 18 s, and {said}" in _texts(
        held_up_twice, throttled
    )


def test_a_paused_device_is_named() -> None:
    """Its answer does not come, and the others wait until the round's time is up."""
    rows = [
        *(_row(1, "budget-1", 1), _row(1, "laptop-1", 0), _row(1, "pi4-1", 1)),
        *(
            _row(2, "budget-1", 0, "timeout", "no answer in 20 s"),
            _row(2, "laptop-1", 15),
            _row(2, "pi4-1", 15),
        ),
        *(_row(3, "budget-1", 0, "offline"), _row(3, "laptop-1", 0), _row(3, "pi4-1", 1)),
    ]
    record = _record([_round(1, "laptop-1"), _round(2, "budget-1"), _round(3, "laptop-1")], rows)
    grave = [found.text for found in find(record, {}) if found.grave]
    assert grave == [
        "budget-1 held up 1 of 3 rounds; the others together waited 30 s for it.",
        "budget-1 was offline in round 3.",
        "budget-1 did not answer in time in round 2.",
    ]


def test_outcomes_are_told_with_their_rounds() -> None:
    rows = [
        _row(1, "budget-1", 0, "out_of_memory"),
        _row(2, "budget-1", 0, "out_of_memory"),
        _row(3, "budget-1", 0, "error", "the trainer died of: signal 9"),
        _row(1, "pi4-1", 0, "partial"),
    ]
    texts = _texts(_record([_round(n, "laptop-1") for n in (1, 2, 3)], rows))
    assert (
        "budget-1 was out of memory in rounds 1 and 2 (its limit is 1000m): 24 s for nothing."
        in texts
    )
    assert "budget-1 failed in round 3: the trainer died of: signal 9." in texts
    assert "pi4-1 returned what it had learned when its time was up in round 1." in texts
    assert not [text for text in texts if "Every device" in text]


def test_of_many_devices_only_some_are_named() -> None:
    rows = [_row(1, f"d{n}", 0, "offline") for n in range(9)] + [_row(2, "d8", 0, "offline")]
    texts = _texts(_record([_round(1, "pi4-1"), _round(2, "pi4-1")], rows))
    assert [text for text in texts if "offline" in text] == [
        "d8 was offline in rounds 1 and 2.",
        "d0 was offline in round 1.",
        "d1 was offline in round 1.",
        "d2 was offline in round 1.",
        "5 more devices were offline in some round.",
    ]


def test_nothing_wrong_is_said_too(held_up_twice: Record) -> None:
    assert "Every device completed every round (3 devices, 3 rounds)." in _texts(held_up_twice)


@pytest.mark.parametrize(
    ("accuracies", "said"),
    [
        ([0.4, 0.7], "is 0.700 after 2 rounds and 50 s."),
        ([0.7, 0.5], "is 0.500 after 2 rounds and 50 s; it was 0.700 after round 1."),
        ([0.34], "is 0.340 after 1 round and 25 s: by chance it would be 0.333. It has learned"),
    ],
)
def test_what_came_of_it(accuracies: list[float], said: str) -> None:
    rounds = [_round(n, "pi4-1", accuracy) for n, accuracy in enumerate(accuracies, 1)]
    texts = _texts(_record(rounds, [_row(1, "pi4-1", 0)]))
    assert texts[0].startswith(f"The global model's accuracy on the test split {said}")
    assert ("Its loss rose from 2.30 after round 1 to 2.50." in texts) == (said[3:8] == "0.500")


def test_limits_that_were_come_near(held_up_twice: Record) -> None:
    usage = {
        "laptop-1": Usage(throttled=0.85, memory_peak=950 * MEBI),
        "pi4-1": Usage(throttled=0.2, memory_peak=500 * MEBI),
    }
    texts = _texts(held_up_twice, usage)
    assert "laptop-1 came up to 95 % of its memory." in texts
    slowed = "laptop-1 was throttled 85 % of the time, which cost it 11 s, and yet held nobody up."
    assert slowed in texts
    assert not [text for text in texts if "pi4-1" in text]


def test_a_slow_first_round() -> None:
    rounds = [_round(1, "pi4-1", devices_seconds=55), _round(2, "pi4-1"), _round(3, "pi4-1")]
    texts = _texts(_record(rounds, [_row(1, "pi4-1", 0)]))
    assert "The first round took 2.4 times as long as a later one." in texts


def test_who_brought_most_and_who_lacks_labels(held_up_twice: Record) -> None:
    rows = [
        replace(row, examples=500) if row.device == "laptop-1" else row
        for row in held_up_twice.devices
    ]
    record = replace(held_up_twice, devices=rows)
    record.settings["pi4-1"]["labels"] = [100, 0, 0]
    texts = _texts(record)
    assert "laptop-1 brought 71 % of all examples trained on, budget-1 14 %." in texts
    assert "pi4-1 has no image of 2 of the 3 labels." in texts


def test_a_run_that_failed_at_once() -> None:
    (found,) = find(_record([], [], "failed", "not ready after 300 s: pi4-1."), {})
    assert found == findings.Finding("The run failed: not ready after 300 s: pi4-1.", grave=True)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([3], "round 3"),
        ([2, 1], "rounds 1 and 2"),
        ([1, 2, 3], "rounds 1 to 3"),
        ([1, 3, 4], "rounds 1, 3 and 4"),
    ],
)
def test_rounds_in_words(numbers: list[int], words: str) -> None:
    assert in_words(numbers) == words


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("1000m", 1000 * MEBI), ("1.5g", 1536 * MEBI), ("4096", 4096), ("", None), (None, None)],
)
def test_sizes(text: str | None, wanted: float | None) -> None:
    assert size(text) == wanted


def test_every_outcome_has_its_words() -> None:
    assert set(findings._OUTCOMES) == set(OUTCOMES) - {"completed"}
    rows = [_row(1, "pi4-1", 0, outcome) for outcome in OUTCOMES]
    texts = _texts(_record([_round(1, "laptop-1")], rows))
    assert "pi4-1 was not available in round 1." in texts


def test_outcomes_are_told_with_what_they_cost() -> None:
    rows = [
        _row(1, "budget-1", 4),
        _row(2, "budget-1", 0, "out_of_memory"),
        replace(_row(1, "pi4-1", 0, "late"), examples=64, seconds=30.2),
        replace(_row(2, "pi4-1", 0, "late"), examples=32, seconds=20.2),
    ]
    texts = _texts(_record([_round(n, "budget-1") for n in (1, 2)], rows))
    died = "budget-1 was out of memory in round 2 (its limit is 1000m): 12 s for nothing, and about"
    assert f"{died} 100 examples less." in texts
    late = "pi4-1 answered when its round was over in rounds 1 and 2"
    assert f"{late}: 50 s and 96 examples for nothing." in texts


def test_a_smaller_batch_is_told_of() -> None:
    record = _record(
        [_round(1, "pi4-1")],
        [replace(_row(1, "budget-1", 4), batch_size=8), _row(1, "laptop-1", 4)],
    )
    for device in record.settings.values():
        device |= {"batch_size": 32, "examples": 100}
    record.settings["laptop-1"]["examples"] = 16  # its whole shard
    told = [text for text in _texts(record) if "too little memory" in text]
    assert told == [
        "budget-1 had too little memory for batches of 32: in round 1 it trained with 8."
    ]


def test_faults_are_told_of() -> None:
    faults = [
        FaultRow(1000.0, 2, "fill_memory", "budget-1", "local", 20.0, ""),
        FaultRow(1010.0, 3, "fill_memory", "budget-1", "local", 20.0, ""),
        FaultRow(1020.0, 3, "kill", "pi4-1", "local", 5.0, ""),
        FaultRow(1025.0, 3, "rejoin", "pi4-1", "local", None, ""),
        FaultRow(1030.0, 4, "pause", "pi4-1", "local", 5.0, "no such container"),
    ]
    record = replace(_record([_round(1, "pi4-1")], [_row(1, "pi4-1", 4)]), faults=faults)
    texts = _texts(record)
    assert (
        "Struck on purpose (3): fill memory budget-1 in rounds 2 and 3, kill pi4-1 in round 3."
    ) in texts
    assert "pause pi4-1 failed in round 4: no such container" in texts
