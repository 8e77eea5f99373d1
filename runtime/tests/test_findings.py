"""The findings on worked examples."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from rows import evaluation_row, message_row, round_row

from flowerbed.faults import FaultRow
from flowerbed.report import findings
from flowerbed.report.findings import find, held_up, in_words, waiting
from flowerbed.report.record import Record
from flowerbed.report.usage import Usage, size
from flowerbed.results import OUTCOMES, DeviceRow, RoundRow

MEBI = 2**20
DEVICES = ("budget-1", "laptop-1", "pi4-1")


def _record(
    rounds: list[RoundRow], rows: list[DeviceRow], state: str = "completed", message: str = ""
) -> Record:
    described: dict[str, dict[str, Any]] = {
        name: {"device_class": "phone", "memory": "1000m", "labels": [30, 30, 40]}
        for name in DEVICES
    }
    return Record("run-1", state, message, rounds, rows, {"devices": described})


def _rounds(*slowest: str, **changes: Any) -> list[RoundRow]:
    return [round_row(n, slowest_device=s, **changes) for n, s in enumerate(slowest, 1)]


@pytest.fixture
def held_up_twice() -> Record:
    """Three rounds: budget-1 holds two up by 12 and 10 s, the third is even."""
    rows = [
        *(message_row(1, "budget-1", 0), message_row(1, "laptop-1", 12)),
        *(message_row(1, "pi4-1", 12), message_row(2, "budget-1", 0)),
        *(message_row(2, "laptop-1", 10), message_row(2, "pi4-1", 10)),
        *(message_row(3, "budget-1", 1), message_row(3, "laptop-1", 1)),
        message_row(3, "pi4-1", 0),
    ]
    rounds = [
        replace(row, central_accuracy=accuracy, central_loss=3 - accuracy)
        for row, accuracy in zip(
            _rounds("budget-1", "budget-1", "pi4-1"), (0.34, 0.5, 0.7), strict=True
        )
    ]
    return _record(rounds, rows)


def _texts(record: Record, usage: dict[str, Usage] | None = None) -> list[str]:
    return [found.text for found in find(record, usage or {})]


def _grave(record: Record) -> list[str]:
    return [found.text for found in find(record, {}) if found.grave]


def test_the_rounds_that_a_device_held_up(held_up_twice: Record) -> None:
    found = held_up(held_up_twice)
    assert {name: [row.round for row in rows] for name, rows in found.items()} == {
        "budget-1": [1, 2]
    }


def test_the_share_of_waiting(held_up_twice: Record) -> None:
    # 46 of 9 times 20 s.
    assert waiting(held_up_twice) == pytest.approx(46 / 180)
    assert waiting(_record([], [])) is None
    assert (
        "Devices spent 37% of their time training, 7% evaluating, 30% on messages in transit and "
        "26% waiting for others."
    ) in _texts(held_up_twice)


def test_time_that_nobody_spent_is_not_mentioned() -> None:
    trained: dict[str, Any] = {"evaluate_seconds": 0.0, "train_seconds": 12.0}
    rows = [message_row(1, device, **trained) for device in ("pi4-1", "laptop-1")]
    rows.append(evaluation_row(1, "pi4-1", type="query.statistics"))
    (text,) = [text for text in _texts(_record([round_row(1)], rows)) if text.startswith("Devices")]
    assert text == (
        "Devices spent 57% of their time training, 4% answering queries and 39% on messages in "
        "transit."
    )


def test_a_straggler_is_named_with_the_cause(held_up_twice: Record) -> None:
    said = (
        "budget-1 held up 2 of 3 rounds: its training took 10.0 s (median of the others: 4.5 s). "
        "The other devices waited 44 s for it in total."
    )
    assert said in _grave(held_up_twice)
    throttled = {"budget-1": Usage(throttled=0.96), "pi4-1": Usage(throttled=0.5)}
    assert f"{said} It was throttled 96% of the time, which cost it 18 s." in _texts(
        held_up_twice, throttled
    )


def test_one_round_that_was_held_up_is_not_grave() -> None:
    """A message may have come late by chance, as by Flower's polling."""
    rows = [
        message_row(1, "budget-1", 0, receive_seconds=11.0, train_seconds=5.0),
        *(message_row(1, "laptop-1", 6), message_row(1, "pi4-1", 6)),
    ]
    record = _record(_rounds("budget-1"), rows)
    assert _grave(record) == []
    assert (
        "budget-1 held up round 1: its message took 11.0 s to arrive (median of the others: 2.8 s)."
        " The other devices waited 12 s for it in total."
    ) in _texts(record)


def test_devices_that_each_held_up_one_round_are_one_finding() -> None:
    """Whoever is last by chance, when training is short."""
    rows = [
        message_row(n, device, 0 if DEVICES[n - 1] == device else 8)
        for n in (1, 2, 3)
        for device in DEVICES
    ]
    record = _record(_rounds(*DEVICES), rows)
    assert [text for text in _texts(record) if "held up" in text] == [
        "3 devices held up one round each: budget-1, laptop-1, pi4-1."
    ]


def test_who_is_asked_again_at_once_waits_for_nobody() -> None:
    """As with FedBuff, where fast devices train several times in a round."""
    rows = [
        message_row(1, "budget-1", 0),
        *(message_row(1, "laptop-1", 15, wait_seconds=0.2) for _ in range(3)),
        *(message_row(1, "pi4-1", 15, wait_seconds=0.2) for _ in range(3)),
    ]
    assert held_up(_record(_rounds("budget-1"), rows)) == {}


def test_a_paused_device_is_named() -> None:
    """Its reply does not come, and the others wait until the round's time is up."""
    rows = [
        *(message_row(1, "budget-1", 1), message_row(1, "laptop-1"), message_row(1, "pi4-1", 1)),
        message_row(2, "budget-1", 0, "timeout", reason="no reply in 20 s"),
        *(message_row(2, "laptop-1", 15), message_row(2, "pi4-1", 15)),
        message_row(3, "budget-1", 0, "offline"),
        *(message_row(3, "laptop-1"), message_row(3, "pi4-1", 1)),
    ]
    record = _record(_rounds("laptop-1", "budget-1", "laptop-1"), rows)
    assert _grave(record) == [
        "budget-1 did not reply in time in round 2.",
        "budget-1 was offline in round 3.",
    ]
    assert (
        "budget-1 held up round 2: it did not reply in time. The other devices waited 30 s for it "
        "in total."
    ) in _texts(record)


def test_outcomes_are_reported_with_their_rounds() -> None:
    rows = [
        message_row(1, "budget-1", 0, "out_of_memory"),
        message_row(2, "budget-1", 0, "out_of_memory"),
        message_row(3, "budget-1", 0, "error", reason="ValueError: no such layer"),
        message_row(1, "pi4-1", 0, "partial"),
    ]
    texts = _texts(_record(_rounds("laptop-1", "laptop-1", "laptop-1"), rows))
    assert (
        "budget-1 ran out of memory in rounds 1 and 2 (its limit is 1000m): 24 s were lost."
    ) in texts
    assert "budget-1 failed in round 3: ValueError: no such layer." in texts
    assert "pi4-1 stopped at the time limit in round 1 and returned what it had learned." in texts


def test_time_boxed_rounds_are_one_finding() -> None:
    rows = [message_row(n, device, 0, "partial") for n in (1, 2) for device in DEVICES]
    rows[-1] = message_row(2, "pi4-1")
    record = _record(_rounds("pi4-1", "pi4-1"), rows)
    found = [text for text in _texts(record) if "time limit" in text]
    assert found == [
        "Training was time-boxed: 3 of 3 devices stopped at the time limit and returned what they "
        "had learned (5 of 6 training messages)."
    ]
    assert _grave(record) == []


def test_devices_with_the_same_outcome_are_counted() -> None:
    rows = [message_row(1, f"d{n}", 0, "offline") for n in range(9)]
    rows.append(message_row(2, "d8", 0, "offline"))
    texts = _texts(_record(_rounds("pi4-1", "pi4-1"), rows))
    assert [text for text in texts if "offline" in text] == [
        "d8 was offline in rounds 1 and 2.",
        "d0 was offline in round 1.",
        "d1 was offline in round 1.",
        "d2 was offline in round 1.",
        "5 more devices were offline in at least one round.",
    ]


def test_a_run_without_failures_is_reported_as_one(held_up_twice: Record) -> None:
    assert "Every device completed every round (3 devices, 3 rounds)." in _texts(held_up_twice)


@pytest.mark.parametrize(
    ("accuracies", "said"),
    [
        ([0.4, 0.7], "is 0.700 after 2 rounds (50 s)."),
        ([0.7, 0.5], "is 0.500 after 2 rounds (50 s); it was 0.700 after round 1."),
        (
            [0.34],
            "is 0.340 after 1 round (25 s). Chance is 0.333: the model has learned nothing yet.",
        ),
    ],
)
def test_the_accuracy(accuracies: list[float], said: str) -> None:
    rounds = [
        round_row(n, central_accuracy=accuracy, central_loss=3 - accuracy)
        for n, accuracy in enumerate(accuracies, 1)
    ]
    texts = _texts(_record(rounds, [message_row(1, "pi4-1")]))
    assert texts[0] == f"The global model's accuracy (central evaluation) {said}"
    rose = "The loss (central evaluation) rose from 2.30 after round 1 to 2.50 after round 2."
    assert (rose in texts) == (accuracies[-1] == 0.5)


def test_the_accuracy_on_devices_of_an_app_without_central_evaluation() -> None:
    """The model after the last round is often not evaluated any more."""
    nothing = {"central_accuracy": None, "central_loss": None}
    rounds = [
        round_row(1, accuracy=0.6, loss=1.0, **nothing),
        round_row(2, accuracy=0.8, loss=0.5, **nothing),
        round_row(3, **nothing),
    ]
    texts = _texts(_record(rounds, [message_row(1, "pi4-1")]))
    assert texts[0] == (
        "The global model's accuracy (mean over the devices) is 0.800 after 2 rounds (50 s)."
    )


def test_fairness_is_that_of_the_newest_model() -> None:
    """Messages of training bring the model of the round before; the last one is evaluated apart."""
    accuracies = {"budget-1": 0.4, "laptop-1": 0.7, "pi4-1": 0.7}
    rows = [message_row(2, name, accuracy=0.1, loss=2.3) for name in DEVICES]
    rounds = _rounds("budget-1", "budget-1")
    (said,) = [text for text in _texts(_record(rounds, rows)) if text.startswith("On the devices'")]
    assert "the model after round 1 has accuracy 0.100 (mean of 3 devices)" in said
    assert "the standard deviation is 0.000." in said
    rows += [evaluation_row(2, name, accuracy=value) for name, value in accuracies.items()]
    (said,) = [text for text in _texts(_record(rounds, rows)) if text.startswith("On the devices'")]
    assert said == (
        "On the devices' own test data, the model after round 2 has accuracy 0.600 (mean of 3 "
        "devices); the worst is budget-1 with 0.400, the best pi4-1 with 0.700; the standard "
        "deviation is 0.141."
    )


def test_chance_on_devices_is_the_share_of_the_most_frequent_label() -> None:
    nothing = {"central_accuracy": None, "central_loss": None}
    record = _record([round_row(1, accuracy=0.8, **nothing)], [message_row(1, "pi4-1")])
    for device in record.settings.values():
        device["labels"] = [80, 10, 10]
    assert "Chance is 0.800" in _texts(record)[0]


def test_an_app_with_a_loss_alone() -> None:
    rounds = [round_row(n, central_accuracy=None, central_loss=3.0 / n) for n in (1, 2, 3)]
    texts = _texts(_record(rounds, [message_row(1, "pi4-1")]))
    assert texts[0] == (
        "The global model's loss (central evaluation) is 1.000 after 3 rounds (75 s); it was "
        "3.000 after round 1."
    )
    assert not [text for text in texts if "accuracy" in text]


def test_an_app_that_reports_neither() -> None:
    rounds = [round_row(1, central_accuracy=None, central_loss=None)]
    texts = _texts(_record(rounds, [message_row(1, "pi4-1")]))
    assert texts[0] == "The app reports neither accuracy nor loss of the global model."


def test_losses_that_are_not_finite_are_grave() -> None:
    rounds = [
        round_row(1),
        round_row(2, central_loss=math.nan),
        round_row(3, central_loss=math.inf, loss=math.nan),
    ]
    rows = [
        evaluation_row(2, "laptop-1", loss=None, metrics=json.dumps({"eval_loss": None})),
        message_row(3, "pi4-1", 0, "diverged", reason="its train_loss is nan", metrics="null"),
    ]
    assert _grave(_record(rounds, rows)) == [
        "The global model's loss (central evaluation) is not finite after rounds 2 and 3.",
        "The global model's loss (devices) is not finite after round 3.",
        "laptop-1 reported a loss that is not finite in round 2.",
        "pi4-1 diverged in round 3: its train_loss is nan.",
    ]


def test_a_run_whose_devices_all_fail() -> None:
    rounds = [round_row(n, devices=0, central_accuracy=None, central_loss=None) for n in (1, 2)]
    rows = [
        message_row(n, device, 0, "error", reason="RuntimeError: oops")
        for n in (1, 2)
        for device in DEVICES
    ]
    record = _record(rounds, rows, "failed", "round 2: no device returned a model\nTraceback\n x")
    found = find(record, {})
    assert found[0] == findings.Finding(
        "The run failed: round 2: no device returned a model", grave=True, detail="Traceback\n x"
    )
    texts = [each.text for each in found]
    assert "No model was aggregated in rounds 1 and 2: the global model did not change." in texts
    assert "pi4-1 failed in rounds 1 and 2: RuntimeError: oops." in texts


def test_messages_other_than_training_are_named() -> None:
    rows = [
        message_row(1, "pi4-1"),
        evaluation_row(1, "pi4-1", outcome="error", reason="KeyError: 'x'."),
        evaluation_row(0, "laptop-1", type="query.hello", outcome="timeout"),
    ]
    texts = _texts(_record([round_row(1)], rows))
    assert "pi4-1 failed in round 1 (evaluate): KeyError: 'x'." in texts
    assert "laptop-1 did not reply in time before the first round (query.hello)." in texts


def test_devices_close_to_their_limits(held_up_twice: Record) -> None:
    usage = {
        "laptop-1": Usage(throttled=0.85, memory_peak=950 * MEBI),
        "pi4-1": Usage(throttled=0.2, memory_peak=500 * MEBI),
    }
    texts = _texts(held_up_twice, usage)
    assert "laptop-1 used up to 95% of its memory limit." in texts
    assert (
        "laptop-1 was throttled 85% of the time, which cost it 11 s; no other device had to wait "
        "for it."
    ) in texts
    assert not [text for text in texts if "pi4-1" in text]


def test_a_slow_first_round() -> None:
    rounds = [round_row(1, seconds=60), round_row(2), round_row(3)]
    texts = _texts(_record(rounds, [message_row(1, "pi4-1")]))
    assert "The first round took 2.4 times as long as later rounds (median)." in texts


def test_uneven_shares_and_missing_labels(held_up_twice: Record) -> None:
    rows = [
        replace(row, examples=500) if row.device == "laptop-1" else row
        for row in held_up_twice.messages
    ]
    record = replace(held_up_twice, messages=rows)
    record.settings["pi4-1"]["labels"] = [100, 0, 0]
    texts = _texts(record)
    assert "laptop-1 trained on 71% of all examples, budget-1 on 14%." in texts
    assert "pi4-1 has no examples of 2 of 3 labels." in texts


def test_the_origin_of_the_data(held_up_twice: Record) -> None:
    asked = {"dataset": "uoft-cs/cifar10"}
    held_up_twice.description["data"] = {"asked": asked, "dataset": "uoft-cs/cifar10"}
    assert not any("data set" in text for text in _texts(held_up_twice))
    held_up_twice.description["data"] = {"asked": asked, "dataset": "digits"}
    failed = replace(held_up_twice, state="failed", message="no device returned a model")
    for record in (held_up_twice, failed):
        first = find(record, {})[0]
        assert first.text.startswith("The run used the data set digits, not uoft-cs/cifar10: ")
        assert first.grave


def test_a_run_that_was_resumed(held_up_twice: Record) -> None:
    held_up_twice.description["resumed_after_rounds"] = [1, 2]
    assert "The run was interrupted, and resumed after rounds 1 and 2." in _texts(held_up_twice)


def test_a_run_that_failed_at_once() -> None:
    (found,) = find(_record([], [], "failed", "not ready after 300 s: pi4-1."), {})
    assert found == findings.Finding("The run failed: not ready after 300 s: pi4-1.", grave=True)


def test_a_run_that_has_not_ended() -> None:
    (found,) = find(_record([], [], "running"), {})
    assert found == findings.Finding("The run has not ended: its state is running.", grave=True)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([3], "round 3"),
        ([2, 1], "rounds 1 and 2"),
        ([1, 2, 3], "rounds 1 to 3"),
        ([1, 3, 4], "rounds 1, 3 and 4"),
        ([1, 2, 3, 5, 7, 8, 9], "rounds 1 to 3, 5 and 7 to 9"),
        (list(range(1, 40, 2)), "20 rounds from 1 to 39"),
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


def test_every_outcome_has_its_verb() -> None:
    assert set(findings._OUTCOMES) == set(OUTCOMES) - {"completed"}
    rows = [message_row(1, "pi4-1", 0, outcome) for outcome in OUTCOMES]
    texts = _texts(_record(_rounds("laptop-1"), rows))
    assert "pi4-1 was not available in round 1." in texts


def test_outcomes_are_reported_with_their_cost() -> None:
    rows = [
        message_row(1, "budget-1", 4),
        message_row(2, "budget-1", 0, "out_of_memory"),
        message_row(1, "pi4-1", 0, "late", examples=64, seconds=30.2),
        message_row(2, "pi4-1", 0, "late", examples=32, seconds=20.2),
    ]
    texts = _texts(_record(_rounds("budget-1", "budget-1"), rows))
    assert (
        "budget-1 ran out of memory in round 2 (its limit is 1000m): 12 s and about 100 examples "
        "were lost."
    ) in texts
    assert (
        "pi4-1 had not replied when the round was closed in rounds 1 and 2: 50 s and 96 examples "
        "were lost."
    ) in texts


def test_batches_that_were_halved_for_memory() -> None:
    record = _record(
        _rounds("pi4-1"),
        [message_row(1, "budget-1", 4, batch_size=8), message_row(1, "laptop-1", 4, batch_size=16)],
    )
    for device in record.settings.values():
        device |= {"batch_size": 32, "examples": 100, "out_of_memory_policy": "halve_batch"}
    record.settings["laptop-1"]["examples"] = 16  # its whole shard
    said = "budget-1 had too little memory for batches of 32: it trained with batches of 8"
    assert [text for text in _texts(record) if "memory" in text] == [f"{said} in round 1."]
    # Without this policy an app has chosen the batch size itself.
    record.settings["budget-1"]["out_of_memory_policy"] = "fail"
    assert not [text for text in _texts(record) if "memory" in text]


def test_faults_are_reported() -> None:
    faults = [
        FaultRow(1000.0, 2, "fill_memory", "budget-1", "local", 20.0, ""),
        FaultRow(1010.0, 3, "fill_memory", "budget-1", "local", 20.0, ""),
        FaultRow(1020.0, 3, "kill", "pi4-1", "local", 5.0, ""),
        FaultRow(1025.0, 3, "rejoin", "pi4-1", "local", None, ""),
        FaultRow(1030.0, 4, "pause", "pi4-1", "local", 5.0, "no such container"),
    ]
    record = replace(_record(_rounds("pi4-1"), [message_row(1, "pi4-1", 4)]), faults=faults)
    texts = _texts(record)
    assert (
        "Faults injected (3): fill memory budget-1 in rounds 2 and 3, kill pi4-1 in round 3."
    ) in texts
    assert ("The fault pause pi4-1 could not be injected in round 4: no such container") in _grave(
        record
    )
