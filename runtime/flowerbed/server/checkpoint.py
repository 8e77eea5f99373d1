"""Checkpoints of a run: all that is needed to go on after a round, in one file that is whole.

A checkpoint is written after each round of `Strategy.start`: the model, the strategy's state, the
generators, and the books. Only the lab's server reads it, from the directory that it has written.
"""

import contextlib
import logging
import os
import pickle
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Result, Strategy

from flowerbed.results import CHECKPOINT

log = logging.getLogger("flwr")


class ResumeError(RuntimeError):
    """A run cannot be resumed; the message says why."""


@dataclass
class Checkpoint:
    """A run after a round.

    Attributes:
        number: of the last round.
        arrays: the global model.
        strategy: state of the strategy, see `state_of`. Its classes may be the app's, which is
            not loaded yet when the checkpoint is read.
        train_config, evaluate_config: as `Strategy.start` hands them from round to round.
        result: metrics of all rounds, as `Strategy.start` returns them.
        generators: Python's, numpy's, and that with which Flower's strategies sample.
        books: of the recorder, see `Recorder.books`.
        models: that were aggregated in all rounds.
        reasons: why the run does not repeat, see `Repeatability`.
    """

    number: int
    arrays: ArrayRecord
    strategy: bytes
    train_config: ConfigRecord
    evaluate_config: ConfigRecord
    result: Result = field(default_factory=Result)
    generators: tuple[Any, ...] = ()
    books: dict[str, Any] = field(default_factory=dict)
    models: int = 0
    reasons: dict[str, set[str]] = field(default_factory=dict)


# --- the file ------------------------------------------------------------------------------------


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint: whoever reads it sees this one or the one before, never a part."""
    draft = directory / f"{CHECKPOINT}.draft"
    with draft.open("wb") as file:
        pickle.dump(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(directory / CHECKPOINT)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new name, too, is on disk
    finally:
        os.close(descriptor)


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read the checkpoint of a run.

    Raises:
        ResumeError: there is none, or it is of another version of the lab.
    """
    file = directory / CHECKPOINT
    if not file.exists():
        raise ResumeError(
            f"run {directory.name} has no checkpoint. One is written after each round of "
            "Strategy.start, and removed when a run has completed"
        )
    try:
        # Written by this server; the directory is writable for nobody else.
        checkpoint = pickle.loads(file.read_bytes())  # noqa: S301
    except Exception as error:
        raise ResumeError(
            f"the checkpoint of run {directory.name} cannot be read by this version of app and "
            f"lab ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(checkpoint, Checkpoint):
        raise ResumeError(f"the checkpoint of run {directory.name} is none of the lab's")
    return checkpoint


def remove_checkpoint(directory: Path) -> None:
    """Remove the checkpoint of a run, if there is one."""
    for name in (CHECKPOINT, f"{CHECKPOINT}.draft"):
        (directory / name).unlink(missing_ok=True)


# --- a strategy's state --------------------------------------------------------------------------


def state_of(strategy: Strategy, left_out: Collection[str]) -> bytes:
    """Return the state of a strategy, pickled.

    A strategy that has `state_dict` says itself what that is. Of any other, it is every attribute
    that can be pickled, which includes strategies that it wraps.

    Args:
        left_out: attributes that are not its own.
    """
    if hasattr(strategy, "state_dict"):
        return pickle.dumps(strategy.state_dict())
    own = {key: value for key, value in vars(strategy).items() if key not in left_out}
    with contextlib.suppress(Exception):
        return pickle.dumps(own)
    kept = {}
    for key, value in own.items():
        try:
            pickle.dumps(value)
        except Exception as error:  # noqa: BLE001 - whatever a user's class raises
            log.debug("%s.%s is not kept: %s", type(strategy).__name__, key, error)
        else:
            kept[key] = value
    return pickle.dumps(kept)


def restore(strategy: Strategy, pickled: bytes) -> None:
    """Give a strategy the state that `state_of` has returned.

    Raises:
        ResumeError: the app or the lab has changed, so that it cannot be read.
    """
    try:
        state = pickle.loads(pickled)  # noqa: S301 - see read_checkpoint
    except Exception as error:
        raise ResumeError(
            f"the state of {type(strategy).__name__} cannot be read ({error}): resume a run with "
            "the version of the lab that has begun it"
        ) from error
    if hasattr(strategy, "load_state_dict"):
        strategy.load_state_dict(state)
    else:
        vars(strategy).update(state)


# --- generators ----------------------------------------------------------------------------------


def generators_of(sampling: random.Random) -> tuple[Any, ...]:
    """Return the state of all generators that a ServerApp may draw from without its own."""
    return random.getstate(), np.random.get_state(), sampling.getstate()


def restore_generators(sampling: random.Random, states: tuple[Any, ...]) -> None:
    """Set the generators to what `generators_of` has returned."""
    python, numpy, sampled = states
    random.setstate(python)
    np.random.set_state(numpy)
    sampling.setstate(sampled)


def shifted(result: Result, number: int) -> None:
    """Count the rounds of a result from `number` on, in place."""
    for name in _METRICS:
        found: dict[int, MetricRecord] = getattr(result, name)
        setattr(result, name, {key + number: value for key, value in found.items()})


def merged(result: Result, before: Result) -> None:
    """Put the metrics of earlier rounds into a result, in place."""
    for name in _METRICS:
        setattr(result, name, getattr(before, name) | getattr(result, name))


_METRICS = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)
