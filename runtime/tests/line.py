"""An app in numpy whose training is single-precision arithmetic: bits show each difference."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from played import Played

SIZES = {1: 40, 2: 90, 3: 60, 4: 110}


def learn(message: Message, config: Mapping[str, Any]) -> RecordDict:
    """Fit a line to the device's own data by single-precision gradient steps."""
    number = int(config["partition-id"]) + 1
    settings = message.content.config_records["config"]
    rng = np.random.default_rng([number, int(settings["server-round"])])
    data = np.random.default_rng(number)
    x = data.normal(size=(SIZES[number], 3)).astype(np.float32)
    y = x @ np.array([1.0, -2.0, number], np.float32)
    error = np.float32(0)
    weights = message.content.array_records["arrays"]["w"].numpy().copy()
    for index in rng.permutation(len(x)):
        error = x[index] @ weights - y[index]
        weights -= np.float32(0.013) * error * x[index]
    metrics = {"num-examples": len(x), "train-loss": float(error**2), "partial": 0}
    arrays = ArrayRecord({"w": Array(weights)})
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})


def weights(played: Played) -> bytes:
    """The bits of the trained model."""
    array = played.result.arrays["w"].numpy()
    assert array.dtype == np.float32
    assert np.isfinite(array).all()
    bits: bytes = array.tobytes()
    return bits


def described(played: Played) -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load((played.directory / "run.yml").read_text())
    return told
