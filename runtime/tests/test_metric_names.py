"""Metrics of any app by their names."""

import math

import pytest

from flowerbed.server.metric_names import MetricReader
from flowerbed.settings import MetricNames


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"accuracy": 0.5, "loss": 1.0}, (0.5, 1.0)),
        ({"acc": 0.5}, (0.5, None)),
        ({"eval_acc": 0.5, "eval_loss": 1.0, "loss": 9.0}, (0.5, 1.0)),
        ({"Test-Accuracy": 0.5, "val_loss": 1.0}, (0.5, 1.0)),
        ({"evaluateres.loss": 1.0, "accuracy": 1}, (1.0, 1.0)),
        ({"accuracy": 0.5, "loss": math.inf}, (0.5, math.inf)),
        ({"accuracy": [0.1, 0.2]}, (None, None)),
        ({"f1": 0.5}, (None, None)),
    ],
)
def test_evaluation(metrics: dict[str, float], expected: tuple[float | None, float | None]) -> None:
    assert MetricReader().evaluated(metrics, trains=False) == expected


def test_bare_names_in_a_training_reply_are_those_of_training() -> None:
    names = MetricReader()
    metrics = {"accuracy": 0.5, "loss": 1.0, "eval-accuracy": 0.25, "eval-loss": 2.0}
    assert names.trained(metrics) == (0.5, 1.0)
    assert names.evaluated(metrics, trains=True) == (0.25, 2.0)
    assert names.evaluated({"accuracy": 0.5}, trains=True) == (None, None)
    assert names.trained({"train_acc": 0.75, "acc": 0.5}) == (0.75, None)


def test_names_that_the_user_gives_come_first() -> None:
    names = MetricReader(MetricNames(accuracy="f1-score", loss="nll"))
    assert names.evaluated({"f1_score": 0.5, "accuracy": 0.1, "nll": 2.0}, trains=False) == (0.5, 2)
    assert names.evaluated({"eval-f1-score": 0.5}, trains=True) == (0.5, None)


def test_where_the_work_of_a_message_went() -> None:
    names = MetricReader()
    assert names.work_seconds({}, 5.0, trains=True) == (5.0, 0.0)
    assert names.work_seconds({}, 5.0, trains=False) == (0.0, 5.0)
    told = {"train-seconds": 3.0, "evaluate-seconds": 1.0}
    assert names.work_seconds(told, 5.0, trains=True) == (3.0, 1.0)
    assert names.work_seconds({"evaluate_seconds": 1.0}, 5.0, trains=True) == (4.0, 1.0)
    assert names.work_seconds({"train_seconds": 9.0}, 5.0, trains=True) == (5.0, 0.0)


def test_a_training_loss_that_is_not_finite_is_a_problem() -> None:
    names = MetricReader()
    assert names.problem({"train_loss": 1.0, "eval_loss": math.nan}) is None
    assert names.problem({"Train-Loss": math.inf}) == ("diverged", "its Train-Loss is inf")
    assert MetricReader(MetricNames(loss="nll")).problem({"nll": math.nan})


def test_examples_are_found_under_the_usual_names() -> None:
    names = MetricReader()
    assert names.examples({"num-examples": 3}) == names.examples({"num_examples": 3.0}) == 3
    assert names.examples({}) == names.examples({"num-examples": math.nan}) == 0
    assert names.evaluation_examples({"num-examples": 3, "eval-examples": 7}) == 7
