"""Measure how fast one core of a machine trains, in reference cores.

    python -m mobilenet.calibrate [SECONDS]

in a container with one core, while the machine does nothing else. Trains the default network on
noise and prints a JSON object. A reference core trains 1,000 examples a second; the catalogue of
device classes is written in reference cores.
"""

import json
import sys
import time

import numpy as np

from mobilenet.data import IMAGE_SIDE
from mobilenet.learner import get_learner
from mobilenet.settings import DeviceSettings, ModelSettings

REFERENCE = 1000.0
"""Training examples a second of MobileNet 0.25 in batches of 32."""
_EXAMPLES = 3200


def measure(seconds: float) -> float:
    """Return training examples a second without compilation; the median of several runs."""
    shape, classes = (IMAGE_SIDE, IMAGE_SIDE, 3), 10
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (_EXAMPLES, *shape), np.uint8)
    data = {"image": images, "label": rng.integers(0, classes, _EXAMPLES)}
    network = ModelSettings(model="mobilenet", alpha=0.25, recipe="small-images")
    learner, device = get_learner(network, shape, classes), DeviceSettings(learning_rate=0.01)
    learner.train(learner.initial, data, device, stop=lambda: True)  # compiles
    speeds: list[float] = []
    end = time.monotonic() + seconds
    while not speeds or time.monotonic() < end:
        started = time.monotonic()
        learner.train(learner.initial, data, device)
        speeds.append(_EXAMPLES / (time.monotonic() - started))
    return float(np.median(speeds))


if __name__ == "__main__":
    speed = measure(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0)
    print(json.dumps({"examples_per_second": round(speed), "speed": round(speed / REFERENCE, 2)}))
