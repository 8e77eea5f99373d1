"""How fast one core of a machine trains, in reference cores.

    python -m flowerbed.calibrate [SECONDS]

in a container with one core, while the machine does nothing else. Trains the default network on
noise and prints a JSON object. A reference core trains 1,000 examples a second; the catalogue of
device classes is written in reference cores.
"""

import json
import sys
import time

import numpy as np

from flowerbed.config import ModelSettings
from flowerbed.data import IMAGE_SIDE
from flowerbed.trainer import load_tensorflow

REFERENCE = 1000.0
"""Training examples a second of MobileNet 0.25 in batches of 32."""
_BATCHES = 100
_BATCH = 32


def measure(seconds: float) -> float:
    """Training examples a second, compilation left out; the median of runs of 100 batches.

    Args:
        seconds: how long to measure at least.
    """
    load_tensorflow()
    from flowerbed.network import NetworkLearner

    shape, classes = (IMAGE_SIDE, IMAGE_SIDE, 3), 10
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (_BATCHES * _BATCH, *shape), np.uint8)
    labels = rng.integers(0, classes, len(images))
    learner = NetworkLearner(
        ModelSettings(), shape, classes, batch_size=_BATCH, optimizer="sgd", learning_rate=0.01
    )
    weights = learner.get_weights()
    learner.train(weights, images[:_BATCH], labels[:_BATCH])
    speeds = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.monotonic()
        learner.train(weights, images, labels)
        speeds.append(len(images) / (time.monotonic() - started))
    return float(np.median(speeds))


if __name__ == "__main__":
    speed = measure(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0)
    print(json.dumps({"examples_per_second": round(speed), "speed": round(speed / REFERENCE, 2)}))
