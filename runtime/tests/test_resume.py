"""A run that was interrupted goes on after its last round, as if nothing had happened."""

import pickle
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from line import described, learn, weights
from link import Node
from played import Played, fedavg, start

from flowerbed.results import CHECKPOINT
from flowerbed.server.checkpoint import Checkpoint, ResumeError, read_checkpoint, write_checkpoint
from flowerbed.strategies import make_strategy

ROUNDS = 5
INTERRUPTED = 3
"""Round in the middle of which the server dies."""


class Momentum(FedAvg):
    """A user's strategy: its state is an array, and it holds what cannot be kept."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        self.velocity = np.zeros(3, np.float32)
        self.lock = threading.Lock()
        self.started: dict[int, np.ndarray] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: Any, grid: Grid
    ) -> Iterable[Message]:
        self.started = {server_round: arrays["w"].numpy()}
        config["rate"] = 0.9 * float(config.get("rate", 1.0))  # kept from round to round by Flower
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        before = self.started[server_round]
        self.velocity = np.float32(0.7) * self.velocity + arrays["w"].numpy() - before
        return ArrayRecord({"w": Array(before + self.velocity)}), metrics


class Own(Momentum):
    """One that says itself what its state is."""

    def state_dict(self) -> dict[str, Any]:
        return {"v": self.velocity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.velocity = state["v"]


STRATEGIES: dict[str, Callable[[], Any]] = {
    "flower's fedavg": lambda: fedavg(fraction_train=0.5, fraction_evaluate=0.5),
    "fedavg": lambda: make_strategy("fedavg", {"fraction_train": 0.5}, seed=7),
    "fedavgm": lambda: make_strategy("fedavgm", {"server_momentum": 0.9}),
    "fedadam": lambda: make_strategy("fedadam", {"eta": 0.05}),
    "fedyogi": lambda: make_strategy("fedyogi", {}),
    "paced": lambda: make_strategy("paced", {"proximal_mu": 0.1}),
    # Without the penalty, its selection does not depend on measured times.
    "oort": lambda: make_strategy("oort", {"fraction": 0.5, "penalty": 0.0}, seed=7),
    "a user's": Momentum,
    "a user's with a state of its own": Own,
}


def nodes(*, dies: int) -> dict[int, Node]:
    """Four devices, one of which is not always available; the server dies in a round, unless 0."""

    def work(message: Message, config: Mapping[str, Any]) -> RecordDict:
        if message.metadata.group_id == str(dies):
            raise KeyboardInterrupt
        if message.metadata.message_type == "evaluate":
            return RecordDict({"metrics": MetricRecord({"num-examples": 5, "eval-loss": 0.5})})
        return learn(message, config)

    found = {number: Node(work) for number in (1, 2, 3, 4)}
    found[4].availability = 0.6
    return found


class Plays:
    """Plays runs, whole and in two parts."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root, self._monkeypatch = root, monkeypatch
        self.evaluated: list[int] = []

    def _evaluate(self, number: int, arrays: ArrayRecord) -> MetricRecord:
        self.evaluated.append(number)
        return MetricRecord({"accuracy": float(np.tanh(arrays["w"].numpy()).mean())})

    def run(self, name: str, strategy: Any, *, dies: int = 0, resume: bool = False) -> Played:
        """A run that is not played yet."""
        (self._root / name).mkdir(exist_ok=True)
        initial = {"w": np.full(3, 0.1, np.float32)}
        main = start(strategy, initial=initial, num_rounds=ROUNDS, evaluate_fn=self._evaluate)
        devices = nodes(dies=dies)
        return Played(self._root / name, devices, main, self._monkeypatch, resume=resume)


@pytest.fixture
def plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plays:
    return Plays(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_interruption_does_not_change_the_result(plays: Plays, name: str) -> None:
    whole = plays.run("whole", STRATEGIES[name]())
    whole.play()
    assert plays.evaluated == [0, 1, 2, 3, 4, 5]
    plays.evaluated.clear()

    broken = plays.run("broken", STRATEGIES[name](), dies=INTERRUPTED)
    with pytest.raises(KeyboardInterrupt):
        broken.play()
    resumed = plays.run("broken", STRATEGIES[name](), resume=True)
    resumed.play()

    assert weights(resumed) == weights(whole)
    assert plays.evaluated == [0, 1, 2, 2, 3, 4, 5]  # the model that the run goes on from, again
    for metrics in ("train_metrics_clientapp", "evaluate_metrics_serverapp"):
        assert getattr(resumed.result, metrics) == getattr(whole.result, metrics)

    def books(played: Played) -> tuple[Any, ...]:
        rounds = [
            (row["round"], row["central_accuracy"], row["examples"])
            for row in played.rows("rounds.csv")
        ]
        rows = [
            (r["round"], r["device"], r["type"], r["outcome"]) for r in played.rows("devices.csv")
        ]
        return rounds, sorted(rows)

    assert books(resumed) == books(whole)
    assert len(resumed.rows("rounds.csv")) == ROUNDS
    status = resumed.status
    assert (status["state"], status["round"], status["rounds"]) == ("completed", ROUNDS, ROUNDS)
    assert described(resumed)["resumed_after_rounds"] == [INTERRUPTED - 1]
    assert described(resumed)["repeatable"] == described(whole)["repeatable"]
    assert "resumed_after_rounds" not in described(whole)
    assert not list(resumed.directory.glob(".checkpoint*"))


def test_a_run_can_be_interrupted_twice(plays: Plays) -> None:
    whole = plays.run("whole", STRATEGIES["fedadam"]())
    whole.play()
    with pytest.raises(KeyboardInterrupt):
        plays.run("run", STRATEGIES["fedadam"](), dies=INTERRUPTED).play()
    with pytest.raises(KeyboardInterrupt):
        plays.run("run", STRATEGIES["fedadam"](), dies=INTERRUPTED + 1, resume=True).play()
    resumed = plays.run("run", STRATEGIES["fedadam"](), resume=True)
    resumed.play()
    assert weights(resumed) == weights(whole)
    assert described(resumed)["resumed_after_rounds"] == [2, 3]


def test_without_the_state_of_the_strategy_the_result_would_be_another(
    plays: Plays, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plays.run("whole", STRATEGIES["fedadam"]())
    whole.play()
    monkeypatch.setattr("flowerbed.server.observe.restore", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        plays.run("run", STRATEGIES["fedadam"](), dies=INTERRUPTED).play()
    resumed = plays.run("run", STRATEGIES["fedadam"](), resume=True)
    resumed.play()
    assert weights(resumed) != weights(whole)


def test_an_asynchronous_run_goes_on(plays: Plays) -> None:
    def strategy() -> Any:
        return make_strategy("fedbuff", {"buffer_size": 2})

    with pytest.raises(KeyboardInterrupt):
        plays.run("run", strategy(), dies=INTERRUPTED).play()
    resumed = plays.run("run", strategy(), resume=True)
    resumed.play()
    assert [row["round"] for row in resumed.rows("rounds.csv")] == ["1", "2", "3", "4", "5"]
    assert np.isfinite(resumed.result.arrays["w"].numpy()).all()


def test_a_run_of_two_starts_keeps_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = start(fedavg(fraction_evaluate=0.0)), start(fedavg(fraction_evaluate=0.0))
    seen = []

    def main(grid: Grid, context: Context) -> None:
        first(grid, context)
        seen.append(list(tmp_path.glob("run/.checkpoint")))
        second(grid, context)
        seen.append(list(tmp_path.glob("run/.checkpoint")))
        raise KeyboardInterrupt

    found = {number: Node(learn_flat) for number in (1, 2)}
    with pytest.raises(KeyboardInterrupt):
        Played(tmp_path, found, main, monkeypatch).play()
    assert [len(each) for each in seen] == [1, 0]


def learn_flat(message: Message, config: Mapping[str, Any]) -> RecordDict:
    """Return the model as it came."""
    arrays = message.content.array_records["arrays"]
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 3})})


# --- the file ------------------------------------------------------------------------------------


class Bomb:
    """Dies while it is written."""

    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


def _checkpoint(number: int, **books: Any) -> Checkpoint:
    state = pickle.dumps({})
    return Checkpoint(number, ArrayRecord(), state, ConfigRecord(), ConfigRecord(), books=books)


def test_a_checkpoint_is_whole_at_every_moment(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, _checkpoint(1, filler=b"x" * 100_000))
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, _checkpoint(2, filler=b"x" * 100_000, bomb=Bomb()))
    assert (tmp_path / f"{CHECKPOINT}.draft").exists()
    assert read_checkpoint(tmp_path).number == 1
    write_checkpoint(tmp_path, _checkpoint(3))
    assert read_checkpoint(tmp_path).number == 3
    assert not (tmp_path / f"{CHECKPOINT}.draft").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no checkpoint. One is written after each round of Strategy.start"),
        (b"no pickle", "cannot be read by this version"),
        (pickle.dumps({"number": 1}), "is none of the lab's"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(ResumeError, match=said):
        read_checkpoint(tmp_path)
