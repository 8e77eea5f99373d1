"""The ClientApp: trains and evaluates on the data of one device."""

import time

import numpy as np
from flowerbed import TimeLimit
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from mobilenet.data import Data, load_data
from mobilenet.learner import Learner, Parameters, get_learner
from mobilenet.settings import DeviceSettings, RunSettings

app = ClientApp()

MEASURED_SECONDS = 1.0
"""Seconds of training by which `warm_up` measures how fast the device is."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """Evaluate the received model on the device's test images, then train it.

    One message a round, not two: the evaluation is that of the model after the round before.
    """
    run, device, data, learner = _load(context)
    received = Parameters.from_record(message.content["arrays"])
    metrics = _evaluate(learner, received, data)
    config = message.content["config"]
    # A device that is asked again in a round (an attempt) draws other batches.
    seed = run.seed, config.get("server-round", 0), data.partition, config.get("attempt", 0)
    limit = TimeLimit(message)
    started = time.monotonic()
    trained, training = learner.train(
        received,
        data.train,
        device,
        seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
        proximal_mu=config.get("proximal-mu", 0.0),
        stop=lambda: limit.reached,
        fill=limit.fill,
    )
    metrics |= training | {"train-seconds": time.monotonic() - started}
    content = RecordDict({"arrays": trained.as_record(), "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received model on the device's test images."""
    *_, data, learner = _load(context)
    metrics = _evaluate(learner, Parameters.from_record(message.content["arrays"]), data)
    metrics["num-examples"] = metrics["eval-examples"]
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


@app.query("warm_up")
def warm_up(message: Message, context: Context) -> Message:
    """Build and compile what training needs, and measure how fast this device trains.

    The lab sends this message to each device before the first round.
    """
    _, device, data, learner = _load(context)
    learner.evaluate(learner.initial, data.test)
    learner.train(learner.initial, data.train, device, stop=lambda: True)  # one step
    started = time.monotonic()
    _, training = learner.train(
        learner.initial,
        data.train,
        device,
        stop=lambda: time.monotonic() - started >= MEASURED_SECONDS,
        fill=True,
    )
    metrics = {
        "num-examples": len(data.train["label"]),
        "examples-per-second": training["num-examples"] / (time.monotonic() - started),
    }
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def _load(context: Context) -> tuple[RunSettings, DeviceSettings, Data, Learner]:
    """Load settings, data and the model, which is kept compiled from message to message."""
    run = RunSettings.parse(context.run_config)
    device = DeviceSettings.of(context.node_config, run)
    data = load_data(context, run)
    learner = get_learner(run.network, data.train["image"].shape[1:], data.classes)
    return run, device, data, learner


def _evaluate(learner: Learner, parameters: Parameters, data: Data) -> dict[str, float]:
    started = time.monotonic()
    metrics = learner.evaluate(parameters, data.test)
    return metrics | {"evaluate-seconds": time.monotonic() - started}
