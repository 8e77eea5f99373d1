"""Which of an app's metrics is what: accuracy, loss, number of examples, times.

Flower prescribes no names. Those in use are found whatever their case and whether they are written
with `-` or `_`; an app with other names gives them (`training_metrics` of the inventory).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from flowerbed.settings import MetricNames

_ACCURACY = ("accuracy", "acc", "categorical_accuracy", "sparse_categorical_accuracy")
_LOSS = ("loss",)
_EVALUATED = ("eval", "evaluation", "test", "val", "validation")
_TRAINED = ("train", "training")


def plain(name: str) -> str:
    """A metric's name without the differences of spelling."""
    return name.rpartition(".")[2].lower().replace("-", "_")


def _find(metrics: Mapping[str, Any], names: Iterable[str]) -> float | None:
    """The first number of these plain names; None where there is none. It may be not finite."""
    known = {plain(name): value for name, value in reversed(list(metrics.items()))}
    for name in names:
        value = known.get(name)
        if isinstance(value, int | float):
            return float(value)
    return None


def _whole(value: float | None) -> int:
    """A number as a whole one; 0 where there is none, or none that is finite."""
    return int(value) if value is not None and math.isfinite(value) else 0


def _with(prefixes: Iterable[str], names: Iterable[str]) -> list[str]:
    return [f"{prefix}_{name}" for name in names for prefix in prefixes]


class MetricReader:
    """Finds metrics of an app's replies.

    Args:
        names: those that the user has given.
    """

    def __init__(self, names: MetricNames | None = None) -> None:
        given = names or MetricNames()
        self._accuracy = ([plain(given.accuracy)] if given.accuracy else [], _ACCURACY)
        self._loss = ([plain(given.loss)] if given.loss else [], _LOSS)

    def _both(
        self, metrics: Mapping[str, Any], prefixes: tuple[str, ...], *, bare: bool
    ) -> tuple[float | None, float | None]:
        """Accuracy and loss under the prefixes; with `bare`, also without any."""
        found = []
        for given, usual in (self._accuracy, self._loss):
            wanted = [*given, *_with(prefixes, (*given, *usual)), *(usual if bare else ())]
            found.append(_find(metrics, wanted))
        return found[0], found[1]

    def evaluated(
        self, metrics: Mapping[str, Any], *, trains: bool
    ) -> tuple[float | None, float | None]:
        """Accuracy and loss of the received model.

        In a reply to training, bare names are those of training itself.
        """
        if trains:
            found = []
            for given, usual in (self._accuracy, self._loss):
                found.append(_find(metrics, _with(_EVALUATED, (*given, *usual))))
            return found[0], found[1]
        return self._both(metrics, _EVALUATED, bare=True)

    def trained(self, metrics: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """Accuracy and loss of training."""
        return self._both(metrics, _TRAINED, bare=True)

    @staticmethod
    def examples(metrics: Mapping[str, Any]) -> int:
        """Examples behind a reply; 0 where the app does not say."""
        return _whole(_find(metrics, ("num_examples", "examples")))

    def evaluation_examples(self, metrics: Mapping[str, Any]) -> int:
        """Examples behind the evaluation in a reply."""
        return _whole(_find(metrics, ("eval_examples",))) or self.examples(metrics)

    @staticmethod
    def partial(metrics: Mapping[str, Any]) -> bool:
        """Whether the time limit ended the training."""
        return bool(_find(metrics, ("partial",)))

    @staticmethod
    def batch_size(metrics: Mapping[str, Any]) -> int | None:
        """The batch size of the training, if the app says it."""
        return _whole(_find(metrics, ("batch_size",))) or None

    @staticmethod
    def work_seconds(
        metrics: Mapping[str, Any], work: float, *, trains: bool
    ) -> tuple[float, float]:
        """Seconds of training and of evaluation; their sum is at most `work`.

        An app that does not tell them apart has done what its message asked for all the time.
        """
        evaluate = _find(metrics, ("evaluate_seconds",))
        train = _find(metrics, ("train_seconds",))
        if not trains:
            return 0.0, work
        if evaluate is None and train is None:
            return work, 0.0
        evaluate = min(max(evaluate or 0.0, 0.0), work)
        return (work - evaluate if train is None else min(train, work - evaluate)), evaluate

    def problem(self, metrics: Mapping[str, Any]) -> tuple[str, str] | None:
        """Why a reply of training must not be used, by its loss: its outcome and the reason."""
        given, usual = self._loss
        wanted = {*given, *_with(_TRAINED, (*given, *usual)), *usual}
        for name, value in metrics.items():
            if plain(name) in wanted and isinstance(value, float) and not math.isfinite(value):
                return "diverged", f"its {name} is {value}"
        return None
