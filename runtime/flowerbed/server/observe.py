"""Observes Flower's `Strategy.start`: when rounds begin and end, what is aggregated and evaluated.

The user's strategy is called unchanged. While it runs, the methods that `start` calls are wrapped
on the strategy object, so that a strategy of any class is observed, whichever of them it overrides.
"""

import functools
import inspect
import logging
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
from flowerbed.server.grid import LabGrid
from flowerbed.server.rounds import Rounds
from flowerbed.strategies.base import RoundPolicy

log = logging.getLogger("flwr")

EvaluateFunction = Callable[[int, ArrayRecord], MetricRecord | None]


class _Evaluation:
    """Calls an app's `evaluate_fn` and records its result, in place or beside the next round."""

    def __init__(self, function: EvaluateFunction, rounds: Rounds) -> None:
        self._function = function
        self._rounds = rounds
        self._thread: ThreadPoolExecutor | None = None
        self._running: dict[int, Future[MetricRecord | None]] = {}
        if isinstance(function, EvaluateBeside):
            self._thread = ThreadPoolExecutor(1, "evaluation")

    def _evaluate(self, number: int, arrays: ArrayRecord, *, beside: bool) -> MetricRecord | None:
        started = time.monotonic()
        metrics = self._function(number, arrays)
        waited = 0.0 if beside else time.monotonic() - started
        self._rounds.evaluated(number, metrics, waited)
        return metrics

    def __call__(self, number: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Called by `Strategy.start` after each round."""
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


@contextmanager
def _wrapped(strategy: Strategy, grid: LabGrid, *, ends_with_evaluation: bool) -> Iterator[None]:
    """Wrap the methods that `Strategy.start` calls, for the time of it."""
    configure_train, aggregate_train = strategy.configure_train, strategy.aggregate_train
    aggregate_evaluate = strategy.aggregate_evaluate

    @functools.wraps(configure_train)
    def begin(
        server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid_: Grid
    ) -> Iterable[Message]:
        grid.rounds.begin(server_round)
        messages: Iterable[Message] = configure_train(server_round, arrays, config, grid_)
        return messages

    @functools.wraps(aggregate_train)
    def aggregate(
        server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        if not any(reply.has_content() for reply in replies):
            return None, None  # Flower's strategies differ in what they make of nothing
        arrays, metrics = aggregate_train(server_round, replies)
        if arrays is not None and not _is_finite(arrays):
            log.error("round %d: the aggregated model is not finite: it is dropped", server_round)
            arrays = None
        if arrays is not None:
            grid.aggregated(replies)
        return arrays, metrics

    @functools.wraps(aggregate_evaluate)
    def end(server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        metrics = aggregate_evaluate(server_round, replies)
        if not ends_with_evaluation:
            grid.rounds.finish()
        return metrics

    wrappers = {"configure_train": begin, "aggregate_train": aggregate, "aggregate_evaluate": end}
    for name, wrapper in wrappers.items():
        setattr(strategy, name, wrapper)
    try:
        yield
    finally:
        for name in wrappers:
            delattr(strategy, name)


@contextmanager
def observed(grid: LabGrid) -> Iterator[None]:
    """Have every `Strategy.start` over `grid` observed; wait for evaluations in the end."""
    evaluations: list[_Evaluation] = []
    start = Strategy.start
    signature = inspect.signature(start)

    @functools.wraps(start)
    def observed_start(strategy: Strategy, *args: Any, **kwargs: Any) -> Result:
        call = signature.bind(strategy, *args, **kwargs)
        call.apply_defaults()
        if call.arguments["grid"] is not grid:
            return start(*call.args, **call.kwargs)
        evaluation = None
        if function := call.arguments["evaluate_fn"]:
            evaluation = call.arguments["evaluate_fn"] = _Evaluation(function, grid.rounds)
            evaluations.append(evaluation)
        grid.plan(call.arguments["num_rounds"], central=evaluation is not None)
        if isinstance(strategy, RoundPolicy):
            grid.policy = strategy
            if strategy.not_repeatable:
                grid.repeat.note(strategy.not_repeatable)
        grid.observed = True
        try:
            with _wrapped(strategy, grid, ends_with_evaluation=evaluation is not None):
                result: Result = start(*call.args, **call.kwargs)
            if evaluation:
                evaluation.fill(result)
            return result
        finally:
            grid.observed = False
            grid.rounds.finish()

    Strategy.start = observed_start
    try:
        yield
        for evaluation in evaluations:
            evaluation.wait()
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
