"""Strategies played through Flower's `Strategy.start`, and worked examples from their papers.

`MemoryGrid` stands in for the lab's Grid: devices of unequal speed on a clock of its own, and the
policy of the strategy decides when a round ends.
"""

import heapq
import itertools
import logging
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from flowerbed.strategies import (
    PRIVACY,
    STRATEGIES,
    FedBuff,
    Oort,
    Paced,
    RoundPolicy,
    Selective,
    StrategyError,
    TiFL,
    is_statistic,
    make_strategy,
    parameters_of,
)
from flowerbed.strategies.base import combine
from flowerbed.strategies.oort import normalised, utility
from flowerbed.strategies.paced import fednova_factors
from flowerbed.strategies.profiles import Profiles, metric_of
from flowerbed.strategies.tifl import tiers_of

PARAMETERS: dict[str, dict[str, Any]] = {
    "fedavgm": {"server_learning_rate": 0.5, "server_momentum": 0.9},
    "fedprox": {"proximal_mu": 0.1},
    "multikrum": {"num_nodes_to_select": 3},
    "qfedavg": {"client_learning_rate": 0.1},
}
"""What a strategy needs so that two rounds differ from FedAvg's."""
ALL_ASKED: dict[str, dict[str, Any]] = {"tifl": {"tiers": 1}, "oort": {"fraction": 1.0}}

VARIANCE = "block/bn/moving_variance"
COUNT = "bn.num_batches_tracked"


@pytest.fixture(autouse=True)
def _in_a_run() -> None:
    """Messages carry the run and node that they come from, which Flower's executor sets."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


# --- a lab in memory -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """Looks like `flowerbed.server.fleet.Device`."""

    node_id: int
    name: str
    examples: int = 100
    examples_per_second: float = 0.0
    receive_seconds: float = 0.0
    settings: Any = field(
        default_factory=lambda: SimpleNamespace(local_epochs=1, learning_rate=0.1, optimizer="sgd")
    )


@dataclass
class Reply:
    """Looks like `flowerbed.server.fleet.Reply`."""

    device: Device
    server_round: int
    outcome: str
    seconds: float
    metrics: dict[str, float]
    times: Any
    message: Message | None = None
    message_type: str = "train"
    reason: str = ""


def device(node: int, **attributes: Any) -> Any:
    """A device d1, d2, ...; keyword arguments beside those of Device are settings."""
    settings = {"local_epochs": 1, "learning_rate": 0.1, "optimizer": "sgd"}
    settings |= {key: attributes.pop(key) for key in list(attributes) if key in settings}
    return Device(node, f"d{node}", settings=SimpleNamespace(**settings), **attributes)


def reply(
    to: Any,
    train: float,
    overhead: float = 0.0,
    *,
    outcome: str = "completed",
    server_round: int = 1,
    **metrics: float,
) -> Any:
    """A reply to a training message that came after both times together."""
    names = {key.replace("_", "-"): value for key, value in metrics.items()}
    times = SimpleNamespace(train_seconds=train)
    found = {"num-examples": to.examples, "train-loss-rms": 1.0} | names
    return Reply(to, server_round, outcome, train + overhead, found, times)


def initial() -> ArrayRecord:
    """Arrays of several shapes and types, with statistics of a normalisation layer."""
    arrays = {
        "block/dense/kernel": np.zeros((2, 3), np.float32),
        "block/dense/bias": np.zeros(3, np.float64),
        VARIANCE: np.ones(3, np.float32),
        COUNT: np.array(0, np.int64),
    }
    return ArrayRecord({key: Array(value) for key, value in arrays.items()})


def values(arrays: ArrayRecord) -> dict[str, np.ndarray]:
    """The arrays as numpy has them."""
    return {key: array.numpy() for key, array in arrays.items()}


App = Callable[[Device, Message], RecordDict | Error]


def content(arrays: dict[str, np.ndarray], **metrics: float) -> RecordDict:
    """A reply's content; metrics with `_` for `-`."""
    return RecordDict(
        {
            "arrays": ArrayRecord({key: Array(np.asarray(v)) for key, v in arrays.items()}),
            "metrics": MetricRecord({k.replace("_", "-"): v for k, v in metrics.items()}),
        }
    )


def app(to: Device, message: Message) -> RecordDict | Error:
    """Go a step towards a target of the device, with noise that is seeded as an app should.

    All devices measure a variance of 0.05. Arrays come back in another order than they were sent.
    """
    config = message.content.config_records["config"]
    draw = [to.node_id, config["server-round"], config.get("attempt", 0)]
    noise = float(np.random.default_rng(draw).normal(scale=0.01))
    if message.metadata.message_type == "evaluate":
        return RecordDict({"metrics": MetricRecord({"num-examples": 5, "accuracy": to.node_id})})
    result = {}
    for key, array in reversed(values(message.content.array_records["arrays"]).items()):
        step = (0.1 * (to.node_id - array) + noise).astype(array.dtype)
        result[key] = array + step
    result |= {VARIANCE: np.full(3, 0.05, np.float32), COUNT: np.array(10 * to.node_id)}
    return content(
        result,
        num_examples=to.examples,
        train_loss=1.0 / to.node_id,
        train_loss_rms=1.0 / to.node_id,
        effective_steps=float(to.node_id),
    )


def failing(node: int) -> App:
    """The app, with an error from one device."""
    return lambda to, message: (
        Error(2, "ZeroDivisionError") if to.node_id == node else app(to, message)
    )


class MemoryGrid:
    """The lab's Grid as strategies see it.

    Args:
        devices: their training takes `seconds` each.
        policy: of the strategy that is started.
        available: whether a device may be asked in a round.
    """

    def __init__(
        self,
        devices: Sequence[Any],
        policy: Any = None,
        app: App = app,
        seconds: dict[int, float] | None = None,
        available: Callable[[Device, int], bool] = lambda _device, _server_round: True,
    ) -> None:
        self._all = {device.node_id: device for device in devices}
        self._policy = policy if isinstance(policy, RoundPolicy) else RoundPolicy()
        self._app = app
        self._seconds = seconds or {}
        self._available = available
        self._work: list[tuple[float, int, int, Message]] = []
        self._counter = itertools.count()
        self._exchange = 0
        self.clock = 0.0
        self.sent: list[tuple[int, str, dict[str, Any]]] = []
        """Round, device and configuration of each training message."""
        self.ends: list[float] = []
        """When the rounds ended."""

    @property
    def _round(self) -> int:
        return self._exchange // 2 + 1

    def devices(self) -> list[Any]:
        """Those that are free and available, by name."""
        busy = {message.metadata.dst_node_id for *_, message in self._work}
        free = [device for node, device in self._all.items() if node not in busy]
        return sorted(
            (device for device in free if self._available(device, self._round)),
            key=lambda device: device.name,
        )

    def get_node_ids(self) -> list[int]:
        """Their nodes."""
        return [device.node_id for device in self.devices()]

    def _duration(self, node: int) -> float:
        return self._seconds.get(node, float(node))

    def _send(self, messages: Iterable[Message]) -> None:
        for message in messages:
            node = message.metadata.dst_node_id
            assert message.metadata.group_id in ("", str(self._round))
            message.metadata.group_id = str(self._round)
            due = self.clock + self._duration(node)
            heapq.heappush(self._work, (due, next(self._counter), self._round, message))
            if message.metadata.message_type == "train":
                config = dict(message.content.config_records["config"])
                self.sent.append((self._round, self._all[node].name, config))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages, and return those replies that count."""
        training, policy = self._exchange % 2 == 0, self._policy
        messages = list(messages)
        assert all((m.metadata.message_type == "train") == training for m in messages)
        self._send(messages)
        deadline = self.clock + min(policy.round_seconds() if training else math.inf, timeout or 60)
        replies: list[Message] = []

        def counts(server_round: int, message: Message) -> bool:
            same = (message.metadata.message_type == "train") == training
            return same and (policy.asynchronous or server_round == self._round)

        usable, failed = 0, set()
        while True:
            pending = sum(counts(server_round, m) for *_, server_round, m in self._work)
            if policy.is_over(usable, pending) if training else not pending:
                break
            if training:
                self._send(policy.more([d for d in self.devices() if d.node_id not in failed]))
            if not self._work or self._work[0][0] > deadline:
                self.clock = deadline
                break
            self.clock, _, server_round, message = heapq.heappop(self._work)
            result = self.answer(message)
            if message.metadata.message_type == "train":
                self._observe(message, result, server_round)
            if result.has_error():
                failed.add(message.metadata.dst_node_id)
            if counts(server_round, message):
                replies.append(result)
                usable += not result.has_error()
        if training:
            self.ends.append(self.clock)
        self._exchange += 1
        return replies

    def answer(self, message: Message) -> Message:
        """What the app replies."""
        result = self._app(self._all[message.metadata.dst_node_id], message)
        return Message(result, reply_to=message)

    def _observe(self, message: Message, result: Message, sent: int) -> None:
        seconds = self._duration(message.metadata.dst_node_id)
        metrics: dict[str, float] = {}
        outcome = "error"
        if not result.has_error():
            metrics = dict(result.content.metric_records["metrics"])
            on_time = self._policy.asynchronous or sent == self._round
            outcome = "completed" if on_time else "late"
        to = self._all[message.metadata.dst_node_id]
        times = SimpleNamespace(train_seconds=0.0 if outcome == "error" else seconds)
        seen: Any = Reply(to, sent, outcome, seconds, metrics, times, result)
        self._policy.observe(seen)


FOUR = [device(node, examples=100 * node) for node in (1, 2, 3, 4)]


def play(
    name: str,
    devices: Sequence[Any] = FOUR,
    app: App = app,
    *,
    rounds: int = 2,
    seed: int = 1,
    parameters: dict[str, Any] | None = None,
    **grid: Any,
) -> tuple[dict[str, np.ndarray], MemoryGrid]:
    """The final arrays of a run, and the grid that it was played on."""
    chosen = PARAMETERS.get(name, {}) if parameters is None else parameters
    strategy = make_strategy(name, chosen, seed=seed)
    memory = MemoryGrid(devices, strategy, app, **grid)
    result = strategy.start(memory, initial(), num_rounds=rounds, timeout=60)
    return values(result.arrays), memory


# --- all strategies ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_each_strategy_trains_arrays_of_any_shape_and_type(name: str) -> None:
    """Two rounds with unequal devices, of which d4 returns an error."""
    result, grid = play(name, app=failing(4))
    before = values(initial())
    assert list(result) == list(before)
    for key, array in result.items():
        assert array.dtype == before[key].dtype
        assert array.shape == before[key].shape
        assert np.isfinite(array).all()
    # d1 to d3 go towards 1 to 3, d4 would go to 4 and count most.
    assert (result["block/dense/kernel"] > 0).all()
    assert (result["block/dense/kernel"] < 1.5).all()
    assert {server_round for server_round, *_ in grid.sent} == {1, 2}
    assert all(config["server-round"] == sent for sent, _, config in grid.sent)


PRIVATE: dict[str, dict[str, Any]] = {
    "differentialprivacyserversidefixedclipping": {"noise_multiplier": 0.0, "clipping_norm": 0.5},
    "differentialprivacyclientsidefixedclipping": {"noise_multiplier": 0.0, "clipping_norm": 0.5},
    "differentialprivacyserversideadaptiveclipping": {"noise_multiplier": 0.0},
    "differentialprivacyclientsideadaptiveclipping": {"noise_multiplier": 0.0},
}


def private(name: str, app: App = app, **parameters: Any) -> dict[str, np.ndarray]:
    """The final arrays of two rounds with differential privacy."""
    given = PRIVATE[name] | {"num_sampled_clients": 4} | parameters
    return play(name, app=app, parameters=given)[0]


def clipping(to: Device, message: Message) -> RecordDict | Error:
    """An app with the clipping of Flower's mods on the client, which reports whether it clipped."""
    reply = app(to, message)
    assert isinstance(reply, RecordDict)
    assert float(message.content.config_records["config"]["clipping_norm"]) > 0
    reply["metrics"]["norm_bit"] = 1
    return reply


@pytest.mark.parametrize("name", sorted(PRIVACY))
@pytest.mark.parametrize("wrapped", ["fedavg", "fedadam"])
def test_differential_privacy_trains_a_network_with_normalisation(name: str, wrapped: str) -> None:
    client = clipping if "clientside" in name else app
    result = private(name, client, noise_multiplier=0.3, strategy=wrapped)
    before = values(initial())
    assert list(result) == list(before)
    for key, array in result.items():
        assert array.dtype == before[key].dtype
        assert np.isfinite(array).all()
    # Statistics have no noise; they are means by examples.
    np.testing.assert_allclose(result[VARIANCE], 0.05, rtol=1e-6)
    assert result[COUNT] == 30
    assert not np.array_equal(result["block/dense/kernel"], before["block/dense/kernel"])


def test_updates_are_clipped_to_the_norm_and_averaged() -> None:
    """By McMahan et al. 2018: w + sum_k n_k / n min(1, C / |u_k|) u_k; here in one round."""

    def far(to: Device, message: Message) -> RecordDict | Error:
        sent = values(message.content.array_records["arrays"])
        moved = {key: sent[key] + 3.0 * to.node_id for key in sent if not is_statistic(key)}
        moved |= {VARIANCE: sent[VARIANCE], COUNT: sent[COUNT]}
        return content(dict(reversed(moved.items())), num_examples=to.examples)

    name = "differentialprivacyserversidefixedclipping"
    strategy = make_strategy(name, PRIVATE[name] | {"num_sampled_clients": 4})
    result = values(
        strategy.start(MemoryGrid(FOUR, strategy, far), initial(), num_rounds=1, timeout=60).arrays
    )
    # 9 numbers move by the same step: each device's is clipped to 0.5 / sqrt(9).
    for key in ("block/dense/kernel", "block/dense/bias"):
        np.testing.assert_allclose(result[key], 0.5 / 3, rtol=1e-6)


def test_the_noise_has_the_deviation_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its standard deviation is z C / n = 2 * 0.5 / 4 (McMahan et al. 2018)."""
    drawn: list[float] = []

    def normal(mean: float, deviation: float, shape: Any = None) -> Any:
        drawn.append(deviation)
        return np.zeros(shape)

    monkeypatch.setattr("numpy.random.normal", normal)
    private("differentialprivacyserversidefixedclipping", noise_multiplier=2.0)
    assert set(drawn) == {0.25}
    assert len(drawn) == 2 * 2  # two rounds, two arrays that are no statistics


def test_differential_privacy_keeps_the_model_when_a_device_fails() -> None:
    """With fewer devices than planned, the noise would be too small."""
    name = "differentialprivacyserversidefixedclipping"
    strategy = make_strategy(name, PRIVATE[name] | {"num_sampled_clients": 4})
    result = strategy.start(
        MemoryGrid(FOUR, strategy, failing(4)), initial(), num_rounds=1, timeout=60
    )
    assert not result.arrays


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({}, "needs the parameter noise_multiplier"),
        ({"noise_multiplier": -1.0}, "noise_multiplier = -1.0: write 0 or more"),
        ({"clipping_norm": 0}, "clipping_norm = 0: write a number above 0"),
        ({"strategy": "paced"}, "strategy = 'paced': differential privacy wraps a strategy of F"),
        ({"strategy": 3}, "strategy = 3: write a text"),
        ({"strategy_parameters": [1]}, r"strategy_parameters = \[1\]: write a dictionary"),
        ({"strategy_parameters": {"speed": 1}}, "strategy fedavg has no parameter speed"),
        ({"accountant": None}, "has no parameter accountant"),
    ],
)
def test_wrong_parameters_of_differential_privacy_are_refused(
    parameters: dict[str, Any], text: str
) -> None:
    name = "differentialprivacyserversidefixedclipping"
    right = PRIVATE[name] | {"num_sampled_clients": 4} if parameters else {}
    with pytest.raises(StrategyError, match=text):
        make_strategy(name, right | parameters)


OPTIMISERS = ["fedadagrad", "fedadam", "fedavgm", "fedyogi", "qfedavg"]


@pytest.mark.parametrize("name", [*OPTIMISERS, "fedavg", "fedprox", "paced", "fedbuff"])
def test_statistics_are_averaged_by_examples(name: str) -> None:
    """A variance of 0.05 on all devices is 0.05 at once; counts of 10 to 40 become their mean.

    The mean by 100 to 400 examples is 30. FedBuff, which waits for all four here, takes no
    examples into account: 25.
    """
    parameters = {"buffer_size": 4} if name == "fedbuff" else None
    seconds = dict.fromkeys((1, 2, 3, 4), 1.0)
    result, _ = play(name, rounds=1, parameters=parameters, seconds=seconds)
    np.testing.assert_allclose(result[VARIANCE], 0.05)
    assert result[COUNT] == (25 if name == "fedbuff" else 30)


def test_flowers_own_fedadam_would_spoil_a_variance() -> None:
    """So the test above can fail: after one round of Flower's the variance is still 0.8."""
    from flwr.serverapp import strategy as flower

    strategy = flower.FedAdam(fraction_evaluate=0.0)
    result = strategy.start(MemoryGrid(FOUR), initial(), num_rounds=1)
    assert (values(result.arrays)[VARIANCE] > 0.8).all()


def test_optimisers_take_flowers_step_on_everything_else() -> None:
    """The kernel is what Flower's class makes of the same replies."""
    from flwr.serverapp import strategy as flower

    ours, _ = play("fedadam")
    theirs = flower.FedAdam(fraction_evaluate=0.0)
    result = theirs.start(MemoryGrid(FOUR), initial(), num_rounds=2)
    for key in ("block/dense/kernel", "block/dense/bias"):
        np.testing.assert_allclose(ours[key], values(result.arrays)[key], rtol=1e-5)


def _adaptive(name: str, steps: Sequence[float]) -> float:
    """The weight after steps of the mean of the replies, by Reddi et al. 2021, Algorithm 2.

    As Flower does, FedAdam has Adam's bias correction (Kingma & Ba 2015), one round ahead.
    """
    eta, beta_1, beta_2, tau = 0.1, 0.9, 0.99, 1e-9
    if name == "fedadagrad":
        beta_1 = 0.0
    x = m = v = 0.0
    for number, step in enumerate(steps, 1):
        delta = step - x
        m = beta_1 * m + (1 - beta_1) * delta
        rate = eta
        if name == "fedadagrad":
            v += delta**2
        elif name == "fedyogi":
            v -= (1 - beta_2) * delta**2 * (1 if v > delta**2 else -1)
        else:
            v = beta_2 * v + (1 - beta_2) * delta**2
            rate *= math.sqrt(1 - beta_2 ** (number + 1)) / (1 - beta_1 ** (number + 1))
        x += rate * m / (math.sqrt(v) + tau)
    return x


UNEQUAL = {1: 30, 2: 500, 3: 70}
"""Examples of three devices."""


def _returned(node: int, number: int) -> float:
    """The weight that a device returns in a round, whatever it was sent."""
    return 0.3 * node**2 - 0.7 * number * (node - 2)


def _unequal(to: Device, message: Message) -> RecordDict | Error:
    sent = values(message.content.array_records["arrays"])
    number = int(message.content.config_records["config"]["server-round"])
    weight = _returned(to.node_id, number)
    new = {key: np.full_like(array, weight) for key, array in sent.items()}
    return content(new, num_examples=to.examples, train_loss=0.5 * to.node_id)


def _played(name: str, parameters: dict[str, Any], rounds: int = 3) -> float:
    devices = [device(node, examples=count) for node, count in UNEQUAL.items()]
    result, _ = play(name, devices, _unequal, rounds=rounds, parameters=parameters)
    (weight,) = set(result["block/dense/bias"])
    return float(weight)


def _mean(number: int) -> float:
    total = sum(UNEQUAL.values())
    return sum(count * _returned(node, number) for node, count in UNEQUAL.items()) / total


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_server_optimisers_are_as_published(name: str) -> None:
    expected = _adaptive(name, [_mean(number) for number in (1, 2, 3)])
    parameters: dict[str, Any] = {"eta": 0.1, "tau": 1e-9}
    if name != "fedadagrad":
        parameters |= {"beta_1": 0.9, "beta_2": 0.99}
    assert _played(name, parameters) == pytest.approx(expected, rel=1e-5)


def test_server_momentum_is_as_published() -> None:
    """Hsu et al. 2019: v = beta v + (x - mean), x = x - eta v."""
    x = v = 0.0
    for number in (1, 2, 3):
        v = 0.6 * v + x - _mean(number)
        x -= 0.5 * v
    parameters = {"server_learning_rate": 0.5, "server_momentum": 0.6}
    assert _played("fedavgm", parameters) == pytest.approx(x, rel=1e-6)


def test_qfedavg_is_as_published() -> None:
    """Li et al. 2020, Algorithm 2.

    With L = 1 / rate, u_k = L (x - x_k) and the device's loss F_k, the step is
    x - sum_k F_k^q u_k / sum_k (q F_k^(q-1) |u_k|^2 + L F_k^q). All 9 numbers are alike.
    """
    q, rate, x = 2.0, 0.1, 0.0
    for number in (1, 2, 3):
        top = bottom = 0.0
        for node in UNEQUAL:
            u, loss = (x - _returned(node, number)) / rate, 0.5 * node
            top += loss**q * u
            bottom += q * loss ** (q - 1) * 9 * u**2 + loss**q / rate
        x -= top / bottom
    parameters = {"q": q, "client_learning_rate": rate}
    assert _played("qfedavg", parameters) == pytest.approx(x, rel=1e-5)


@pytest.mark.parametrize("name", ["fedmedian", "krum", "fedtrimmedavg", "bulyan"])
def test_robust_strategies_see_the_statistics(name: str) -> None:
    """One device with an absurd variance cannot spoil the model through its statistics."""

    def poisoned(to: Device, message: Message) -> RecordDict | Error:
        result = app(to, message)
        if to.node_id == 5:
            arrays = values(result.array_records["arrays"]) | {VARIANCE: np.full(3, 1e6, "f4")}
            return content(arrays, **{"num-examples": 1e6, "train-loss": 1.0})
        metrics = {"num-examples": 100, "train-loss": 1.0}
        return content(values(result.array_records["arrays"]), **metrics)

    eight = [device(node) for node in range(1, 9)]
    parameters = {} if name in ("fedmedian", "fedtrimmedavg") else {"num_malicious_nodes": 1}
    result, _ = play(name, eight, poisoned, rounds=1, parameters=parameters)
    np.testing.assert_allclose(result[VARIANCE], 0.05, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_one_seed_gives_one_result_in_whatever_order_replies_come(name: str) -> None:
    """Of synchronous strategies: with FedBuff, the order of arrival decides about the buffer."""
    backwards = {1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}
    known = [device(n, examples=100 * n, examples_per_second=10.0 * n) for n in (1, 2, 3, 4)]
    parameters = PARAMETERS.get(name, {})
    if "fraction_train" in parameters_of(name):
        parameters = parameters | {"fraction_train": 0.8 if name == "bulyan" else 0.5}
    first, sent = play(name, known, parameters=parameters)
    random.seed(99)
    again, sent_again = play(name, known, parameters=parameters)
    assert sent.sent == sent_again.sent
    for key, array in first.items():
        np.testing.assert_array_equal(array, again[key])
    if name not in ("fedbuff", "oort", "tifl"):  # the last two choose by measured speed
        other, _ = play(name, known, parameters=parameters, seconds=backwards)
        for key, array in first.items():
            np.testing.assert_array_equal(array, other[key])


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_no_sum_depends_on_the_order_of_arrival(name: str) -> None:
    """1e16 + 1 - 1e16 is 0 or 1, as the order has it."""

    def huge(to: Device, message: Message) -> RecordDict | Error:
        arrays = values(message.content.array_records["arrays"])
        arrays["block/dense/bias"] = np.full(3, [1e16, 1.0, -1e16, 3.0][to.node_id - 1])
        return content(arrays, num_examples=1, train_loss=1.0)

    results = []
    for order in [(0, 1, 2, 3), (0, 2, 1, 3)]:
        strategy = make_strategy(name, PARAMETERS.get(name, {}) | ALL_ASKED.get(name, {}))
        grid = MemoryGrid(FOUR, strategy, huge)
        messages = list(strategy.configure_train(1, initial(), ConfigRecord(), grid))
        replies = [grid.answer(message) for message in messages]
        arrays, _ = strategy.aggregate_train(1, [replies[i] for i in order if i < len(replies)])
        results.append(values(arrays)["block/dense/bias"].tobytes())
    assert len(set(results)) == 1


def test_another_seed_samples_others() -> None:
    asked = {
        tuple(name for _, name, _ in play("fedavg", parameters=half, seed=seed)[1].sent)
        for half in [{"fraction_train": 0.5}]
        for seed in range(8)
    }
    assert len(asked) > 1
    assert all(len(names) == 4 for names in asked)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_no_strategy_waits_for_devices_that_are_not_there(name: str) -> None:
    """Nobody may be asked in round 1, and one device in round 2."""
    result, grid = play(
        name,
        rounds=2,
        available=lambda device, server_round: server_round == 2 and device.node_id == 3,
    )
    assert [(sent, asked) for sent, asked, _ in grid.sent if sent == 2][:1] == [(2, "d3")]
    assert {asked for _, asked, _ in grid.sent} == {"d3"}
    # Bulyan needs three replies even if nobody is malicious.
    moved = result and result["block/dense/kernel"].any()
    assert moved != (name == "bulyan")


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_round_without_usable_replies_keeps_the_model(name: str) -> None:
    strategy = make_strategy(name, PARAMETERS.get(name, {}))
    grid = MemoryGrid(FOUR, strategy, lambda _to, _message: Error(2, "no"))
    replies = grid.send_and_receive(strategy.configure_train(1, initial(), ConfigRecord(), grid))
    assert replies
    assert strategy.aggregate_train(1, replies)[0] is None
    assert strategy.aggregate_train(2, [])[0] is None


def test_bulyan_with_too_few_replies_keeps_the_model_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("flwr").propagate = True
    strategy = make_strategy("bulyan", {"num_malicious_nodes": 1})
    grid = MemoryGrid(FOUR, strategy)
    replies = grid.send_and_receive(strategy.configure_train(1, initial(), ConfigRecord(), grid))
    with caplog.at_level(logging.WARNING, "flwr"):
        assert strategy.aggregate_train(1, replies)[0] is None
    assert "round 1: Bulyan has aggregated none of 4 replies; the model stays" in caplog.text


@pytest.mark.parametrize("name", ["fedavg", "paced", "tifl"])
def test_devices_evaluate_if_asked(name: str) -> None:
    strategy = make_strategy(name, {"fraction_evaluate": 1.0})
    grid = MemoryGrid(FOUR, strategy)
    result = strategy.start(grid, initial(), num_rounds=1)
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(2.5)


def test_metrics_are_means_by_examples_of_what_all_replies_have() -> None:
    def mixed(to: Device, message: Message) -> RecordDict | Error:
        result = app(to, message)
        if to.node_id == 1:
            result.metric_records["metrics"]["extra"] = 1.0
        result.metric_records["metrics"]["accuracy"] = to.node_id
        return result

    strategy = make_strategy("paced", {})
    result = strategy.start(MemoryGrid(FOUR, strategy, mixed), initial(), num_rounds=1)
    metrics = result.train_metrics_clientapp[1]
    assert metrics["accuracy"] == pytest.approx((1 * 1 + 2 * 2 + 3 * 3 + 4 * 4) / 10)
    assert {"extra", "num-examples"}.isdisjoint(metrics)


def test_a_users_own_strategy_may_be_a_policy() -> None:
    """Half of the devices are enough: d1 and d2 reply first."""

    class Half(RoundPolicy, FedAvg):
        def is_over(self, replies: int, pending: int) -> bool:
            return replies >= pending

    strategy = Half(fraction_evaluate=0.0)
    grid = MemoryGrid(FOUR, strategy)
    result = strategy.start(grid, initial(), num_rounds=1)
    assert grid.ends == [2.0]
    assert values(result.arrays)[COUNT] == pytest.approx((10 + 2 * 20) / 3)


def test_a_users_own_fedavg_needs_no_policy() -> None:
    grid = MemoryGrid(FOUR)
    result = FedAvg(fraction_evaluate=0.0).start(grid, initial(), num_rounds=2)
    assert values(result.arrays)[COUNT] == 30


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "text"),
    [
        ("fedbest", {}, r"strategy 'fedbest': choose one of bulyan, .*tifl"),
        ("fedavg", {"speed": 1}, "strategy fedavg has no parameter speed; it has fraction_train, "),
        ("fedavg", {"min_train_nodes": 3}, "fedavg has no parameter min_train_nodes"),
        ("fedavg", {"weighted_by_key": "n"}, "fedavg has no parameter weighted_by_key"),
        ("bulyan", {"selection_rule": "x"}, "bulyan has no parameter selection_rule"),
        ("fedavg", {"fraction_train": 2}, "fraction_train = 2: write a number above 0 and up to 1"),
        ("fedavg", {"fraction_train": 0}, "fraction_train = 0: write a number above 0 and up to 1"),
        ("fedavg", {"fraction_evaluate": 2}, "fraction_evaluate = 2: write a number from 0 to 1"),
        ("paced", {"fraction_evaluate": -1}, "fraction_evaluate = -1: write a number from 0 to 1"),
        ("fedadam", {"eta": "much"}, "strategy fedadam: eta = 'much': write a number"),
        ("fedadam", {"eta": math.nan}, "eta = nan: write a number"),
        ("fedadam", {"tau": 0}, "tau = 0: write a number above 0"),
        ("fedadam", {"beta_1": 1.0}, "beta_1 = 1.0: write a number from 0 to below 1"),
        ("fedtrimmedavg", {"beta": 0.5}, "strategy fedtrimmedavg: .*beta"),
        ("krum", {"num_malicious_nodes": -1}, "num_malicious_nodes = -1: write 0 or more"),
        ("multikrum", {"num_nodes_to_select": 0}, "num_nodes_to_select = 0: write a number above"),
        ("qfedavg", {}, "strategy qfedavg needs the parameter client_learning_rate"),
        ("paced", {"share": 2}, "strategy paced: share = 2: write a number above 0 and up to 1"),
        ("paced", {"box": -1}, "box = -1: write 0 or more"),
        ("paced", {"normalise": 1}, "normalise = 1: write true or false"),
        ("fedbuff", {"buffer_size": 0}, "buffer_size = 0: write 1 or more"),
        ("fedbuff", {"buffer_size": 2.0}, "buffer_size = 2.0: write a whole number"),
        ("fedbuff", {"server_learning_rate": 0}, "server_learning_rate = 0: write a number above"),
        ("tifl", {"tiers": 2, "probabilities": [1]}, "write 2 numbers above 0, one a tier"),
        ("tifl", {"probabilities": 1}, "probabilities = 1: write a list of numbers"),
        ("oort", {"quantile": 0}, "quantile = 0: write a number above 0 and up to 1"),
        ("oort", {"pacer_rounds": 0}, "pacer_rounds = 0: write 1 or more"),
    ],
)
def test_wrong_names_and_parameters_are_refused(
    name: str, parameters: dict[str, Any], text: str
) -> None:
    with pytest.raises(StrategyError, match=text):
        make_strategy(name, parameters)


def test_what_would_hang_or_break_is_not_offered() -> None:
    for name in STRATEGIES:
        for parameter in parameters_of(name):
            assert not parameter.startswith("min_")
            assert not parameter.endswith(("_fn", "_rule", "record_key", "by_key"))


def test_qfedavg_finds_the_loss_of_the_default_app() -> None:
    assert make_strategy("qfedavg", {"client_learning_rate": 0.1}).train_loss_key == "train-loss"


@pytest.mark.parametrize("name", ["paced", "fedbuff", "tifl", "oort"])
def test_outside_of_the_lab_its_strategies_name_flowers_fedavg(name: str) -> None:
    strategy = make_strategy(name, {})
    plain = SimpleNamespace(get_node_ids=lambda: [1])
    with pytest.raises(StrategyError, match=r"needs the lab: .*flwr.serverapp.strategy.FedAvg"):
        strategy.configure_train(1, initial(), ConfigRecord(), plain)


def test_flowers_strategies_do_not_need_the_lab() -> None:
    strategy = make_strategy("fedadam", {})
    plain = SimpleNamespace(get_node_ids=lambda: [7, 2**63 + 1])
    messages = list(strategy.configure_train(1, initial(), ConfigRecord(), plain))
    assert [message.metadata.dst_node_id for message in messages] == [7, 2**63 + 1]
    assert list(messages[0].content.array_records["arrays"]) == list(initial())


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_messages_of_one_configuration_share_their_content(name: str) -> None:
    """The Grid packs a content once, however many devices get it."""
    strategy = make_strategy(name, PARAMETERS.get(name, {}))
    messages = strategy.configure_train(1, initial(), ConfigRecord(), MemoryGrid(FOUR))
    assert len({id(message.content) for message in messages}) == 1


@pytest.mark.parametrize("name", ["paced", "fedbuff", "tifl"])
def test_replies_with_other_arrays_are_refused(name: str) -> None:
    def partial(to: Device, message: Message) -> RecordDict | Error:
        return content({"block/dense/bias": np.zeros(3)}, num_examples=1)

    strategy = make_strategy(name, {})
    with pytest.raises(StrategyError, match=r"d\d returned other arrays than it received: 3 are"):
        strategy.start(MemoryGrid(FOUR, strategy, partial), initial(), num_rounds=1)


def test_replies_without_examples_are_refused() -> None:
    def silent(to: Device, message: Message) -> RecordDict | Error:
        return content(values(message.content.array_records["arrays"]), loss=1.0)

    strategy = make_strategy("paced", {})
    with pytest.raises(StrategyError, match=r"reply of d1 has no metric 'num-examples'.*has loss"):
        strategy.start(MemoryGrid(FOUR, strategy, silent), initial(), num_rounds=1)


# --- shared parts --------------------------------------------------------------------------------


def test_statistics_are_known_by_the_last_part_of_their_key() -> None:
    for key in (
        "statistics",
        "a/bn/moving_mean",
        "layer1.0.bn.running_var",
        "bn.running_mean",
        COUNT,
    ):
        assert is_statistic(key)
    for key in ("weights", "statistics/kernel", "moving_mean_kernel", "0", "bn.weight"):
        assert not is_statistic(key)


def test_a_sum_of_models_reads_one_at_a_time() -> None:
    """It is exact in double precision, and holds no more than one model."""
    alive = 0

    class Model(dict[str, Any]):
        def __init__(self, value: float) -> None:
            nonlocal alive
            alive += 1
            super().__init__(w=SimpleNamespace(numpy=lambda: np.full(2, value, np.float32)))

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def terms() -> Iterable[tuple[float, Any]]:
        for value in (1.0, 3.0, -2.0):
            assert alive <= 1  # the one before is still the loop's
            yield 0.1, Model(value)

    result = combine(terms(), ["w"])
    assert result["w"].dtype == np.float64
    np.testing.assert_allclose(result["w"], 0.2, rtol=1e-15)


def test_metrics_are_found_however_they_are_spelled() -> None:
    assert metric_of({"Num_Examples": 3}, "num-examples") == 3
    assert metric_of({"loss": [1.0]}, "loss") is None
    assert metric_of({"loss": 2, "train_loss": 1}, "train-loss", "loss") == 1


def test_profiles_say_what_is_not_known() -> None:
    profiles, unknown = Profiles(), device(1, examples=0)
    assert profiles.epoch_seconds(unknown) is None
    assert profiles.round_seconds(unknown) is None
    profiles.observe(reply(unknown, 10, 3, outcome="error", num_examples=0))
    assert profiles.epoch_seconds(unknown) is None
    # The first complete round, 50 examples, is taken for an epoch.
    profiles.observe(reply(unknown, 10, 3, num_examples=50))
    assert profiles.epoch_seconds(unknown) == pytest.approx(13)
    profiles.observe(reply(unknown, 10, 3, num_examples=100))
    assert profiles.epoch_seconds(unknown) == pytest.approx(3 + 50 / 7.5)
    assert profiles.round_seconds(unknown) == pytest.approx(13)


@pytest.mark.parametrize("slow", [1, 2, 3])
def test_a_slow_poll_costs_a_device_at_most_one_round(slow: int) -> None:
    """Training takes 10 s, messages 2 s, in one round 8 s. The box is 20 s."""
    strategy = Paced(box=20)
    one = device(1)
    limits = []
    for number in range(1, 7):
        strategy.observe(reply(one, 10, 8 if number == slow else 2, server_round=number))
        limits.append(strategy.device_config(one) if strategy.select(number, [one]) else {})
    short = [config["time-limit"] for config in limits if config["time-limit"] < 18]
    assert short == ([12] if slow == 1 else [])


def test_a_device_whose_messages_always_take_long_gets_less_time() -> None:
    strategy = Paced(box=20)
    one = device(1)
    strategy.select(1, [one])
    for overhead in (2, 8, 8):
        strategy.observe(reply(one, 10, overhead))
    assert strategy.device_config(one)["time-limit"] == 12


def test_a_pause_does_not_change_what_a_device_is_known_for() -> None:
    profiles, one = Profiles(), device(1)
    for seconds in (10, 10, 40, 10):
        profiles.observe(reply(one, seconds, 2))
        assert profiles.round_seconds(one) == 12
        assert profiles.epoch_seconds(one) == 12


def test_profiles_start_from_what_an_app_reports() -> None:
    profiles = Profiles()
    warm = device(1, examples=100, examples_per_second=10.0, receive_seconds=1.0, local_epochs=3)
    assert profiles.epoch_seconds(warm) == pytest.approx(1 + 2 + 10)
    assert profiles.round_seconds(warm) == pytest.approx(1 + 2 + 30)


# --- paced ---------------------------------------------------------------------------------------


def test_fednova_is_as_published() -> None:
    """Unequal data, steps and learning rates; the numbers follow the paper's formulas.

    x = 10. The devices hold 100, 300 and 600 examples: p = 0.1, 0.3, 0.6. With gradients of 1, 2
    and -1 at each step, eta = 0.1, 0.2, 0.1 and ||a|| = 5, 2, 10 steps, the local changes are
    Delta = -0.5, -0.8, 1. The normalised gradients d = -Delta / (eta ||a||) are the gradients 1,
    2, -1 again, and sum p d = 0.1. tau_eff with eta is 0.1 * 0.5 + 0.3 * 0.4 + 0.6 * 1 = 0.77, so
    x' = 10 - 0.77 * 0.1 = 9.923. The mean by data held would be 10.31.
    """
    p, eta, norm = [0.1, 0.3, 0.6], [0.1, 0.2, 0.1], [5.0, 2.0, 10.0]
    delta = [-0.5, -0.8, 1.0]
    normalised_gradients = [-d / (e * a) for d, e, a in zip(delta, eta, norm, strict=True)]
    assert normalised_gradients == pytest.approx([1, 2, -1])
    tau_eff = sum(w * e * a for w, e, a in zip(p, eta, norm, strict=True))
    published = 10 - tau_eff * sum(w * d for w, d in zip(p, normalised_gradients, strict=True))
    assert published == pytest.approx(9.923)
    factors = fednova_factors([100, 300, 600], norm, eta)
    assert 10 + np.dot(factors, delta) == pytest.approx(published)


def test_fednova_with_one_rate_is_the_authors_code() -> None:
    """`FedNova.average`: the sum of ratio * tau_eff / ||a|| * change; the rate does not matter."""
    ratio, norm = np.array([0.2, 0.8]), np.array([3.0, 7.0])
    expected = ratio * (ratio @ norm) / norm
    for rate in (0.01, 1.0):
        np.testing.assert_allclose(fednova_factors([20, 80], [3, 7], [rate, rate]), expected)


def test_equal_distances_make_fedavg_of_fednova() -> None:
    np.testing.assert_allclose(fednova_factors([1, 3], [4, 2], [0.1, 0.2]), [0.25, 0.75])


NOVA = [
    device(1, examples=100, learning_rate=0.1),
    device(2, examples=300, learning_rate=0.2),
    device(3, examples=600, learning_rate=0.1),
]


def nova_app(to: Device, message: Message) -> RecordDict | Error:
    """The worked example above; devices have *seen* other numbers of examples than they hold."""
    arrays = values(message.content.array_records["arrays"])
    delta = {1: -0.5, 2: -0.8, 3: 1.0}[to.node_id]
    result = {key: array + np.asarray(delta, array.dtype) for key, array in arrays.items()}
    result |= {VARIANCE: np.full(3, {1: 0.1, 2: 0.2, 3: 0.4}[to.node_id]), COUNT: np.array(6)}
    steps = {1: 5.0, 2: 2.0, 3: 10.0}[to.node_id]
    seen = {1: 500, 2: 300, 3: 200}[to.node_id]
    return content(result, num_examples=seen, effective_steps=steps)


def test_a_run_with_fednova_weighs_by_data_held_and_statistics_by_examples_seen() -> None:
    result, _ = play("paced", NOVA, nova_app, rounds=1, parameters={"normalise": True})
    np.testing.assert_allclose(result["block/dense/kernel"], -0.077, rtol=1e-6)
    np.testing.assert_allclose(result["block/dense/bias"], -0.077)
    np.testing.assert_allclose(result[VARIANCE], 0.5 * 0.1 + 0.3 * 0.2 + 0.2 * 0.4, rtol=1e-6)
    plain, _ = play("paced", NOVA, nova_app, rounds=1, parameters={})
    np.testing.assert_allclose(plain["block/dense/bias"], 0.5 * -0.5 + 0.3 * -0.8 + 0.2 * 1)


def test_fednova_takes_the_rate_that_an_app_reports() -> None:
    def reporting(to: Device, message: Message) -> RecordDict | Error:
        result = nova_app(to, message)
        result.metric_records["metrics"]["learning-rate"] = {1: 0.1, 2: 0.2, 3: 0.1}[to.node_id]
        return result

    same = [device(d.node_id, examples=d.examples, learning_rate=9.0) for d in NOVA]
    result, _ = play("paced", same, reporting, rounds=1, parameters={"normalise": True})
    np.testing.assert_allclose(result["block/dense/bias"], -0.077)


def test_fednova_leaves_out_a_device_without_steps() -> None:
    def late(to: Device, message: Message) -> RecordDict | Error:
        result = nova_app(to, message)
        if to.node_id == 3:
            result.metric_records["metrics"]["effective-steps"] = 0.0
        return result

    result, _ = play("paced", NOVA, late, rounds=1, parameters={"normalise": True})
    # p = 1/4 and 3/4; tau_eff = 0.25 * 0.5 + 0.75 * 0.4 = 0.425; the mean gradient is 1.75.
    np.testing.assert_allclose(result["block/dense/bias"], -0.425 * 1.75)


@pytest.mark.parametrize(
    ("devices", "text"),
    [
        ([device(1), device(2, examples=0)], "d2 did not report how many examples they hold"),
        ([device(1), device(2, optimizer="adam")], "d1 has sgd, d2 has adam"),
    ],
)
def test_fednova_refuses_devices_that_it_cannot_compare(devices: list[Any], text: str) -> None:
    with pytest.raises(StrategyError, match=text):
        play("paced", devices, parameters={"normalise": True})
    play("paced", devices, parameters={})


def test_fednova_refuses_an_app_without_effective_steps() -> None:
    def plain(to: Device, message: Message) -> RecordDict | Error:
        return content(values(message.content.array_records["arrays"]), num_examples=1)

    with pytest.raises(StrategyError, match=r"no metric 'effective-steps'.* for FedNova's average"):
        play("paced", NOVA, plain, parameters={"normalise": True})


def test_the_box_lets_a_share_finish_an_epoch_and_replies_come_together() -> None:
    """100 examples at 10, 5 and 1 a second, with 2, 4 and 6 s for the rest: 12, 24 and 106 s."""
    strategy = Paced(share=0.6, grace=7)
    devices = [device(n, examples_per_second=speed) for n, speed in ((1, 10), (2, 5), (3, 1))]
    for each, overhead in zip(devices, (2, 4, 6), strict=True):
        strategy.observe(reply(each, 100 / each.examples_per_second, overhead))
    assert strategy.select(1, devices) == devices
    assert strategy.round_seconds() == pytest.approx(24 + 7)
    limits = [strategy.device_config(each)["time-limit"] for each in devices]
    assert limits == pytest.approx([22, 20, 18])


def test_a_fixed_box_is_kept() -> None:
    strategy = Paced(box=30, grace=5, proximal_mu=0.1)
    strategy.select(1, [device(1, receive_seconds=2.0)])
    assert strategy.round_seconds() == 35
    config = strategy.device_config(device(1, receive_seconds=2.0))
    assert config == {"time-limit": 26, "fill-time": True, "proximal-mu": 0.1}
    # A device that messages take long to reach gets less, and never nothing.
    assert strategy.device_config(device(1, receive_seconds=12.0))["time-limit"] == 16
    assert strategy.device_config(device(1, receive_seconds=40.0))["time-limit"] == 1


def test_the_first_round_has_no_limit_if_no_speed_is_known() -> None:
    """Devices need 1 to 4 s. With a share of 0.5 the box of round 2 is d2's 2 s."""
    _, grid = play("paced", parameters={"grace": 0.5})
    first = [config for sent, _, config in grid.sent if sent == 1]
    assert len(first) == 4
    assert all("time-limit" not in config and "fill-time" not in config for config in first)
    second = {name: config for sent, name, config in grid.sent if sent == 2}
    assert set(second) == {"d1", "d2", "d3", "d4"}
    assert all(config["time-limit"] == pytest.approx(2.0) for config in second.values())
    # This app ignores the limit: d3 and d4 are late, and the round ends without them.
    assert grid.ends == pytest.approx([4.0, 6.0], abs=0.5)


# --- fedbuff -------------------------------------------------------------------------------------


def constant(to: Device, message: Message) -> RecordDict | Error:
    """Add the device's number to all arrays; the variance is what the device measures."""
    arrays = values(message.content.array_records["arrays"])
    result = {key: array + np.asarray(to.node_id, array.dtype) for key, array in arrays.items()}
    return content(result | {VARIANCE: np.full(3, 3.0)}, num_examples=1)


def test_buffered_updates_count_less_the_staler_they_are() -> None:
    """A buffer of 2; d1 needs 1 s, d3 2.5 s.

    Round 1 gets d1 twice: 0 + (1 + 1) / 2 = 1. Round 2 gets d3's update of version 1, scaled by
    1 / sqrt 2, and d1's: 1 + (3 / sqrt 2 + 1) / 2. The variance goes from 1 to 3, then by
    (1 / sqrt 2 + 1) / 2 of nothing more: it is 3 already.
    """
    two = [device(1), device(3)]
    seconds = {1: 1.0, 3: 2.5}
    parameters = {"buffer_size": 2}
    first, _ = play("fedbuff", two, constant, rounds=1, seconds=seconds, parameters=parameters)
    np.testing.assert_allclose(first["block/dense/bias"], 1.0)
    np.testing.assert_allclose(first[VARIANCE], 3.0)
    result, grid = play("fedbuff", two, constant, rounds=2, seconds=seconds, parameters=parameters)
    np.testing.assert_allclose(result["block/dense/bias"], 1 + (3 / math.sqrt(2) + 1) / 2)
    np.testing.assert_allclose(result[VARIANCE], 3.0)
    assert grid.ends == [2.0, 3.0]


def test_statistics_move_by_the_scale_and_stay_positive() -> None:
    """From version 3, a reply to version 1: 1 / sqrt 3 of the way from 0.5 to 2."""
    strategy = FedBuff(buffer_size=1)
    asked = MemoryGrid([device(1)], strategy)
    (message,) = strategy.configure_train(1, initial(), ConfigRecord(), asked)
    message.metadata.group_id = "1"
    now = values(initial()) | {VARIANCE: np.full(3, 0.5, np.float32)}
    now["block/dense/bias"] = np.full(3, 7.0)
    record = ArrayRecord({key: Array(array) for key, array in now.items()})
    nobody = MemoryGrid([])
    for server_round in (2, 3):
        strategy.configure_train(server_round, record, ConfigRecord(), nobody)
    back = values(initial()) | {VARIANCE: np.full(3, 2.0)}
    back["block/dense/bias"] = np.full(3, 2.0)  # an update of 2 from version 1
    replies = [Message(content(back, num_examples=1), reply_to=message)]
    arrays, _ = strategy.aggregate_train(3, replies)
    np.testing.assert_allclose(values(arrays)[VARIANCE], 0.5 + 1.5 / math.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(values(arrays)["block/dense/bias"], 7 + 2 / math.sqrt(3))


def test_a_device_asked_again_from_one_version_does_other_work() -> None:
    """d1 fills the buffer alone: three updates with three seeds."""
    updates: list[np.ndarray] = []

    def recording(to: Device, message: Message) -> RecordDict | Error:
        result = app(to, message)
        updates.append(values(result.array_records["arrays"])["block/dense/bias"])
        return result

    slow = {1: 1.0, 2: 60.0}
    _, grid = play("fedbuff", [device(1), device(2)], recording, rounds=2, seconds=slow)
    asked = [(sent, config["attempt"]) for sent, name, config in grid.sent if name == "d1"]
    assert asked == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert len({update.tobytes() for update in updates[:3]}) == 3


def test_no_aggregation_is_lost_when_nobody_may_be_asked() -> None:
    """d1 is away in round 2, in which d3's reply from round 1 comes: 0 + 1, then + 3 / sqrt 2."""
    result, _ = play(
        "fedbuff",
        [device(1), device(3)],
        constant,
        rounds=2,
        seconds={1: 1.0, 3: 1.5},
        parameters={"buffer_size": 1},
        available=lambda _device, server_round: server_round == 1,
    )
    np.testing.assert_allclose(result["block/dense/bias"], 1 + 3 / math.sqrt(2))


def test_a_buffer_adds_to_the_result_of_the_one_before() -> None:
    """Even if nothing is configured between two aggregations."""
    strategy = FedBuff(buffer_size=1)
    grid = MemoryGrid([device(1), device(3)], strategy, constant)
    messages = list(strategy.configure_train(1, initial(), ConfigRecord(), grid))
    first, second = (grid.answer(message) for message in messages)
    strategy.aggregate_train(1, [first])
    arrays, _ = strategy.aggregate_train(2, [second])
    np.testing.assert_allclose(values(arrays)["block/dense/bias"], 1 + 3 / math.sqrt(2))


def test_the_server_learning_rate_scales_updates_but_no_statistics() -> None:
    parameters = {"buffer_size": 1, "server_learning_rate": 0.5}
    result, _ = play("fedbuff", [device(2)], constant, rounds=1, parameters=parameters)
    np.testing.assert_allclose(result["block/dense/bias"], 1.0)
    np.testing.assert_allclose(result[VARIANCE], 3.0)


def test_a_device_that_has_failed_is_asked_in_the_next_round() -> None:
    seconds = {1: 0.1, 2: 5.0}
    two = [device(1), device(2)]
    _, grid = play("fedbuff", two, failing(1), seconds=seconds, parameters={"buffer_size": 1})
    asked = [(sent, name) for sent, name, _ in grid.sent]
    assert asked == [(1, "d1"), (1, "d2"), (2, "d1"), (2, "d2")]


def test_old_versions_are_forgotten() -> None:
    strategy = make_strategy("fedbuff", {"buffer_size": 1})
    grid = MemoryGrid([device(1), device(2)], strategy, seconds={1: 1.0, 2: 4.5})
    strategy.start(grid, initial(), num_rounds=20, timeout=60)
    assert len(strategy._versions) <= 3


# --- tifl ----------------------------------------------------------------------------------------


def test_tiers_are_of_equal_size_and_the_fastest_first(rng: np.random.Generator) -> None:
    seconds: dict[str, float | None] = {"a": 9.0, "b": 1.0, "c": 5.0, "d": 7.0, "e": 3.0}
    assert tiers_of(seconds, 2, rng) == [["b", "e", "c"], ["d", "a"]]
    assert tiers_of({"a": 1.0}, 3, rng) == [["a"]]


def test_a_device_of_unknown_speed_may_be_in_any_tier(rng: np.random.Generator) -> None:
    """The order of the known devices stays; each unknown one is in the first tier at times."""
    seconds: dict[str, float | None] = {"a": 3.0, "b": None, "c": 1.0, "d": None}
    first = [tiers_of(seconds, 2, rng)[0] for _ in range(300)]
    shares = {name: sum(name in tier for tier in first) / 300 for name in seconds}
    assert shares["b"] == pytest.approx(0.5, abs=0.1)
    assert shares["d"] == pytest.approx(0.5, abs=0.1)
    assert shares["c"] > shares["a"]
    nothing: dict[str, float | None] = dict.fromkeys("abcd")
    assert all(
        sum(name in tiers_of(nothing, 2, rng)[0] for _ in range(300)) / 300
        == pytest.approx(0.5, abs=0.1)
        for name in nothing
    )


def test_a_round_asks_one_tier() -> None:
    strategy = TiFL(tiers=2, probabilities=[1, 3])
    devices = [
        device(node, examples_per_second=speed) for node, speed in enumerate((10, 1, 9, 2), 1)
    ]
    asked = [tuple(each.name for each in strategy.select(1, devices)) for _ in range(400)]
    assert set(asked) == {("d1", "d3"), ("d2", "d4")}
    assert asked.count(("d2", "d4")) == pytest.approx(300, abs=40)


def test_a_round_may_ask_some_of_a_tier() -> None:
    strategy = TiFL(tiers=1, devices=2)
    devices = [device(node) for node in (1, 2, 3, 4)]
    asked = {tuple(each.name for each in strategy.select(1, devices)) for _ in range(200)}
    assert len(asked) == 6
    assert all(len(names) == 2 for names in asked)


# --- oort ----------------------------------------------------------------------------------------


def test_utilities_are_clipped_and_scaled_as_by_the_authors() -> None:
    """Of 1 to 40, the 95th percentile is the 39th; the range starts at 0.999 of the least."""
    scaled = normalised([float(value) for value in range(1, 41)])
    width = 40 - 0.999
    assert scaled[0] == pytest.approx(0.001 / width)
    assert scaled[38] == scaled[39] == pytest.approx((39 - 0.999) / width)
    assert normalised([0.0, 5.0]) == [0.0, pytest.approx(1.0)]
    assert normalised([0.0, 0.0]) == [0.0, 0.0]


def test_utility_is_oorts() -> None:
    """In round 5, for 0.5 measured in round 2; a round of 20 s where 10 s are preferred."""
    known: dict[str, Any] = {"since": 2, "server_round": 5, "preferred": 10.0, "penalty": 2.0}
    uncertain = math.sqrt(0.1 * math.log(5) / 2)
    assert uncertain == pytest.approx(0.2837, abs=1e-4)
    assert utility(0.5, seconds=10, **known) == pytest.approx(0.5 + uncertain)
    assert utility(0.5, seconds=20, **known) == pytest.approx((0.5 + uncertain) / 4)


def four_known(strategy: Oort, losses: Sequence[float], seconds: Sequence[float]) -> list[Any]:
    """Four devices that have replied in round 1."""
    devices = [device(node, examples_per_second=10.0) for node in (1, 2, 3, 4)]
    strategy.select(1, devices)
    for each, loss, train in zip(devices, losses, seconds, strict=True):
        strategy.observe(reply(each, train, train_loss_rms=loss))
    return devices


def test_oort_prefers_what_is_worth_most_in_its_time() -> None:
    """d4 has the highest losses, but is ten times slower."""
    strategy = Oort(fraction=0.25, quantile=0.5)
    devices = four_known(strategy, (1, 2, 1, 3), (10, 10, 10, 100))
    assert {each.name for _ in range(20) for each in strategy.select(2, devices)} == {"d2"}


@pytest.mark.parametrize(("since", "chosen"), [(79, {"d3"}), (1, {"d1", "d3"})])
def test_oort_asks_again_what_it_has_not_asked_for_long(since: int, chosen: set[str]) -> None:
    """Losses of 1.4, 1.6, 2 and 1, scaled to 0.4, 0.6, 1 and 0, in round 80.

    Measured in round 79, all have a bonus of 0.07, and d3 is the best by far. Measured in round 1,
    d1 has one of 0.66 and comes near d3.
    """
    strategy = Oort(fraction=0.25, quantile=1.0)
    devices = four_known(strategy, (1.4, 1.6, 2.0, 1.0), (10, 10, 10, 10))
    for each, measured in zip(devices, (since, 79, 79, 79), strict=True):
        loss = strategy._utility[each.name][0] / 100
        strategy.observe(reply(each, 10, server_round=measured, train_loss_rms=loss))
    assert {each.name for _ in range(40) for each in strategy.select(80, devices)} == chosen


def test_oort_explores_what_it_does_not_know() -> None:
    strategy = Oort(fraction=0.5)
    devices = [device(node) for node in (1, 2, 3, 4)]
    strategy.select(1, devices)
    for each in devices[:2]:
        strategy.observe(reply(each, 10))
    assert [each.name for each in strategy.select(2, devices)] == ["d3", "d4"]


def test_oort_treats_devices_of_unknown_speed_alike() -> None:
    strategy = Oort(fraction=0.25)
    devices = [device(node) for node in (1, 2, 3, 4)]
    asked = [strategy.select(1, devices)[0].name for _ in range(400)]
    assert all(asked.count(each.name) == pytest.approx(100, abs=35) for each in devices)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, -1.0])
def test_a_loss_that_is_no_number_does_not_decide(loss: float) -> None:
    strategy = Oort(fraction=0.5, quantile=1.0)
    devices = four_known(strategy, (loss, 1.0, 2.0, 2.0), (10, 10, 10, 10))
    for server_round in range(2, 60):
        chosen = strategy.select(server_round, devices)
        assert [each.name for each in chosen] == ["d3", "d4"]
        for each in chosen:
            strategy.observe(reply(each, 10, server_round=server_round, train_loss_rms=2.0))
        if server_round == 30:
            strategy.observe(reply(devices[0], 10, server_round=30, train_loss_rms=loss))


def test_oort_goes_on_if_no_device_is_worth_anything() -> None:
    strategy = Oort(fraction=0.5)
    devices = four_known(strategy, [math.nan] * 4, [10] * 4)
    assert len(strategy.select(2, devices)) == 2


def test_a_device_that_fails_is_not_explored_for_ever() -> None:
    strategy = Oort(fraction=0.25)
    devices = four_known(strategy, (1.0, 1.0, 1.0, 1.0), (10, 10, 10, 10))
    new = device(5)
    assert strategy.select(2, [*devices, new]) == [new]
    strategy.observe(reply(new, 0, outcome="out_of_memory", server_round=2))
    assert new not in [each for _ in range(20) for each in strategy.select(3, [*devices, new])]
    # A device that was only away is new as before.
    away = device(6)
    strategy.observe(reply(away, 0, outcome="offline", server_round=2))
    assert strategy.select(4, [*devices, away]) == [away]


def test_the_pacer_needs_two_windows() -> None:
    """Utility falls from window to window: the quantile rises at the end of the second."""
    strategy = Oort(fraction=1.0, quantile=0.3, pacer_rounds=2)
    devices = [device(node) for node in (1, 2)]
    quantiles = []
    for server_round, loss in enumerate((4.0, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0), 1):
        for each in strategy.select(server_round, devices):
            strategy.observe(reply(each, 10, server_round=server_round, train_loss_rms=loss))
        quantiles.append(strategy.quantile)
    assert quantiles == pytest.approx([0.3, 0.3, 0.3, 0.3, 0.35, 0.35, 0.35])


def test_oort_refuses_an_app_without_a_loss() -> None:
    def silent(to: Device, message: Message) -> RecordDict | Error:
        return content(values(message.content.array_records["arrays"]), num_examples=1)

    with pytest.raises(StrategyError, match=r"oort: the reply of d\d has no train-loss-rms"):
        play("oort", app=silent)


def test_a_strategy_that_selects_is_the_users_to_write() -> None:
    class Fastest(Selective):
        def select(self, server_round: int, devices: Sequence[Any]) -> Sequence[Any]:
            del server_round
            return [max(devices, key=lambda each: each.examples_per_second)]

        def device_config(self, device: Any) -> dict[str, Any]:
            return {"hello": device.name}

    strategy = Fastest()
    grid = MemoryGrid([device(n, examples_per_second=n) for n in (1, 2)], strategy)
    config = ConfigRecord({"lr": 0.1})
    strategy.start(grid, initial(), num_rounds=1, train_config=config)
    assert grid.sent == [(1, "d2", {"lr": 0.1, "server-round": 1, "hello": "d2"})]
    assert dict(config) == {"lr": 0.1}
