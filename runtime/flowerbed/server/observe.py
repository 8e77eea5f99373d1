"""Observes Flower's `Strategy.start`: when rounds begin and end, what is aggregated and evaluated.

The user's strategy is called unchanged. While it runs, the methods that `start` calls are wrapped
on the strategy object, so that a strategy of any class is observed, whichever of them it overrides.
"""

import functools
import inspect
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flowerbed import EvaluateBeside
from flowerbed.server.checkpoint import (
    Checkpoint,
    generators_of,
    merged,
    remove_checkpoint,
    restore,
    restore_generators,
    shifted,
    state_of,
    write_checkpoint,
)
from flowerbed.server.grid import LabGrid
from flowerbed.server.rounds import Rounds
from flowerbed.strategies.base import RoundPolicy

log = logging.getLogger("flwr")

EvaluateFunction = Callable[[int, ArrayRecord], MetricRecord | None]


class _Evaluation:
    """Calls an app's `evaluate_fn` and records its result, in place or beside the next round."""

    def __init__(self, function: EvaluateFunction, rounds: Rounds, offset: int = 0) -> None:
        self._function = function
        self._rounds = rounds
        self._offset = offset
        self.known: dict[int, MetricRecord] = {}
        """Results by round."""
        self._thread: ThreadPoolExecutor | None = None
        self._running: dict[int, Future[MetricRecord | None]] = {}
        if isinstance(function, EvaluateBeside):
            self._thread = ThreadPoolExecutor(1, "evaluation")

    def _evaluate(self, number: int, arrays: ArrayRecord, *, beside: bool) -> MetricRecord | None:
        started = time.monotonic()
        metrics = self._function(number, arrays)
        waited = 0.0 if beside else time.monotonic() - started
        if metrics is not None:
            self.known[number] = metrics
        self._rounds.evaluated(number, metrics, waited)
        return metrics

    def __call__(self, number: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Called by `Strategy.start` after each round.

        A run that is resumed evaluates the model that it goes on from: perhaps nobody has.
        """
        number += self._offset
        if not self._thread:
            metrics = self._evaluate(number, arrays, beside=False)
            self._rounds.finish()
            return metrics
        # Only one runs beside a round: the values of round 3 come before those of round 4.
        for running in self._running.values():
            running.result()
        self._running[number] = self._thread.submit(self._evaluate, number, arrays, beside=True)
        self._rounds.finish()
        return None

    def fill(self, result: Result) -> None:
        """Put all evaluations into the result, the last one when it is there."""

        def put(number: int, done: Future[MetricRecord | None]) -> None:
            if not done.exception() and (metrics := done.result()) is not None:
                result.evaluate_metrics_serverapp[number] = metrics

        for number, running in self._running.items():
            running.add_done_callback(functools.partial(put, number))

    def wait(self) -> None:
        """Wait for the last evaluation.

        Raises:
            Exception: whatever the app's function has raised.
        """
        for running in self._running.values():
            running.result()
        if self._thread:
            self._thread.shutdown()


def _is_finite(arrays: ArrayRecord) -> bool:
    values = (array.numpy() for array in arrays.values())
    return all(np.isfinite(v).all() for v in values if np.issubdtype(v.dtype, np.inexact))


_METHODS = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")
"""What `Strategy.start` calls of a strategy in a round, in this order."""


class _Course:  # its public methods are those of Flower's strategies
    """The course of one `Strategy.start`: observes it, and keeps a checkpoint after each round.

    Args:
        strategy: that is started.
        arguments: of `Strategy.start`; they are changed where a run is resumed.
        sampling: the generator with which Flower's strategies sample.
        resumed: the checkpoint after which the run goes on.
    """

    def __init__(
        self,
        strategy: Strategy,
        arguments: dict[str, Any],
        grid: LabGrid,
        sampling: random.Random,
        resumed: Checkpoint | None,
    ) -> None:
        self.keeps = True
        """Whether checkpoints are written."""
        self._strategy, self._grid, self._sampling = strategy, grid, sampling
        self._before = resumed
        self._offset = resumed.number if resumed else 0
        """Rounds before the one that Flower counts as the first."""
        self._original = {name: getattr(strategy, name) for name in _METHODS}
        self._complete = 0
        self._state = state_of(strategy, _METHODS)
        """Of the strategy, before the round under way."""
        for name in ("train_config", "evaluate_config"):
            arguments[name] = ConfigRecord() if arguments[name] is None else arguments[name]
        grid.plan(arguments["num_rounds"], central=arguments["evaluate_fn"] is not None)
        if resumed:
            self._resume(arguments, resumed)
        self._arrays: ArrayRecord = arguments["initial_arrays"]
        self._configs = arguments["train_config"], arguments["evaluate_config"]
        self._result = resumed.result if resumed else Result()
        self.evaluation: _Evaluation | None = None
        if function := arguments["evaluate_fn"]:
            self.evaluation = _Evaluation(function, grid.rounds, self._offset)
            arguments["evaluate_fn"] = self.evaluation

    def _resume(self, arguments: dict[str, Any], checkpoint: Checkpoint) -> None:
        log.info("the run goes on after round %d", checkpoint.number)
        arguments["num_rounds"] = max(0, arguments["num_rounds"] - checkpoint.number)
        arguments["initial_arrays"] = checkpoint.arrays
        for name in ("train_config", "evaluate_config"):
            arguments[name].clear()
            arguments[name].update(getattr(checkpoint, name))
        restore(self._strategy, checkpoint.strategy)
        restore_generators(self._sampling, checkpoint.generators)
        self._grid.rounds.resume(checkpoint.number, checkpoint.models)
        for reason, devices in checkpoint.reasons.items():
            for device in devices or {""}:
                self._grid.repeat.note(reason, device)

    # --- the methods of the strategy, in the order in which they are called ----------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        number = server_round + self._offset
        self._grid.rounds.begin(number)
        configure: Any = self._original["configure_train"]
        messages: Iterable[Message] = configure(number, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        number = server_round + self._offset
        replies = list(replies)
        if not any(reply.has_content() for reply in replies):
            return None, None  # Flower's strategies differ in what they make of nothing
        arrays, metrics = self._original["aggregate_train"](number, replies)
        if arrays is not None and not _is_finite(arrays):
            log.error("round %d: the aggregated model is not finite: it is dropped", number)
            arrays = None
            # Momentum and the like are not finite, either: with them, no later model would be.
            restore(self._strategy, self._state)
        if arrays is not None:
            self._arrays = arrays
            self._grid.aggregated(replies)
        if metrics is not None:
            self._result.train_metrics_clientapp[number] = metrics
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        configure: Any = self._original["configure_evaluate"]
        messages: Iterable[Message] = configure(server_round + self._offset, arrays, config, grid)
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        number = server_round + self._offset
        metrics: MetricRecord | None = self._original["aggregate_evaluate"](number, replies)
        if metrics is not None:
            self._result.evaluate_metrics_clientapp[number] = metrics
        self._complete = number
        if not self.evaluation:
            self._grid.rounds.finish()
        return metrics

    # ---------------------------------------------------------------------------------------------

    @contextmanager
    def wrapped(self) -> Iterator[None]:
        """Have this object called in place of the strategy's methods."""
        for name in _METHODS:
            setattr(self._strategy, name, getattr(self, name))
        self._grid.rounds.on_end = self._keep
        try:
            yield
        finally:
            self._grid.rounds.on_end = lambda _: None
            for name in _METHODS:
                delattr(self._strategy, name)

    def _keep(self, number: int) -> None:
        """Write a checkpoint after a round that has come to its end."""
        if number != self._complete:
            return
        self._state = state_of(self._strategy, _METHODS)
        if not self.keeps:
            return
        rounds = self._grid.rounds
        if self.evaluation:
            self._result.evaluate_metrics_serverapp |= self.evaluation.known
        checkpoint = Checkpoint(
            number=number,
            arrays=self._arrays,
            strategy=self._state,
            train_config=self._configs[0],
            evaluate_config=self._configs[1],
            result=self._result,
            generators=generators_of(self._sampling),
            books=rounds.recorder.books(),
            models=rounds.models,
            reasons=self._grid.repeat.reasons,
        )
        write_checkpoint(rounds.recorder.directory, checkpoint)

    def complete(self, result: Result) -> None:
        """Put what happened before the run was resumed into the result of `Strategy.start`."""
        if self._before:
            shifted(result, self._offset)
            merged(result, self._before.result)
            result.arrays = result.arrays or self._before.arrays
        if self.evaluation:
            self.evaluation.fill(result)


@contextmanager
def observed(
    grid: LabGrid, sampling: random.Random | None = None, resumed: Checkpoint | None = None
) -> Iterator[None]:
    """Have every `Strategy.start` over `grid` observed; wait for evaluations in the end.

    Args:
        sampling: the generator with which Flower's strategies sample; checkpoints keep its state.
        resumed: the checkpoint after which the first `Strategy.start` goes on.
    """
    generator = sampling or random.Random()  # noqa: S311 - not for secrets
    courses: list[_Course] = []
    start = Strategy.start
    signature = inspect.signature(start)

    @functools.wraps(start)
    def observed_start(strategy: Strategy, *args: Any, **kwargs: Any) -> Result:
        call = signature.bind(strategy, *args, **kwargs)
        call.apply_defaults()
        if call.arguments["grid"] is not grid:
            return start(*call.args, **call.kwargs)
        course = _Course(strategy, call.arguments, grid, generator, None if courses else resumed)
        if courses:
            # Rounds are counted from 1 again: a checkpoint would not say in which start it is.
            course.keeps = False
            remove_checkpoint(grid.rounds.recorder.directory)
        courses.append(course)
        if isinstance(strategy, RoundPolicy):
            grid.policy = strategy
        if why := getattr(strategy, "not_repeatable", ""):
            grid.repeat.note(why)
        grid.observed = True
        try:
            with course.wrapped():
                result: Result = start(*call.args, **call.kwargs)
            course.complete(result)
            return result
        finally:
            grid.observed = False
            grid.rounds.finish()

    Strategy.start = observed_start
    try:
        yield
        for course in courses:
            if course.evaluation:
                course.evaluation.wait()
    finally:
        Strategy.start = start


class CompatibilityLog(logging.Handler):
    """Reads central values of Flower's older `Server` from its log, where alone they are told."""

    def __init__(self, rounds: Rounds) -> None:
        super().__init__()
        self._rounds = rounds

    def emit(self, record: logging.LogRecord) -> None:
        """Read one line: `fit progress: (round, loss, metrics, seconds)`."""
        if str(record.msg).startswith("fit progress:") and isinstance(record.args, tuple):
            number, loss, metrics, _ = record.args
            self._rounds.evaluated(int(str(number)), {"loss": loss, **dict(metrics)}, 0.0)  # type: ignore[call-overload]
