"""The ClientApp: hands each message to the device's trainer and returns its answer.

Flower starts a process of this for every message, so it imports neither TensorFlow nor data: the
trainer (`flowerbed.trainer`) holds them and outlives the message.
"""

import time

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flowerbed.config import DeviceSettings, Task
from flowerbed.handoff import TrainerDiedError, TrainerError, request

app = ClientApp()

WEIGHTS = "weights"


def _hand_over(operation: str, message: Message, context: Context) -> Message:
    started = time.time()
    config = dict(message.content["config"])
    task = Task.parse(config)
    device = DeviceSettings.parse(context.node_config)
    arrays = message.content.array_records.get("arrays")
    weights = arrays[WEIGHTS].numpy().tobytes() if arrays else b""
    header = {"operation": operation, "task": task.as_config(), "device": device.as_config()}
    content = RecordDict()
    try:
        answer, data = request(header, weights)
    except TrainerDiedError as error:
        outcome = "out_of_memory" if error.cause == "out_of_memory" else "error"
        content["outcome"] = ConfigRecord({"outcome": outcome, "reason": str(error)})
    except TrainerError as error:
        content["outcome"] = ConfigRecord({"outcome": "error", "reason": str(error)})
    else:
        content["metrics"] = MetricRecord(
            answer["metrics"]
            | {
                "queue-seconds": max(0.0, answer.get("began", started) - started),
                "bytes-received": len(weights),
                "bytes-sent": len(data),
            }
        )
        content["outcome"] = ConfigRecord(
            {"outcome": answer["outcome"], "reason": "", "started": started}
        )
        if data:
            vector = np.frombuffer(data, np.float32)
            content["arrays"] = ArrayRecord({WEIGHTS: Array(vector)})
        if operation == "prepare":
            content["device"] = ConfigRecord(
                {
                    "settings": device.model_dump_json(),
                    "shard": answer["shard"],
                    "labels": answer["labels"],
                }
            )
    return Message(content, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Evaluate the received model on the device's test split, then train it."""
    return _hand_over("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received model on the device's test split."""
    return _hand_over("evaluate", message, context)


@app.query()
def prepare(message: Message, context: Context) -> Message:
    """Say which device this is and warm the trainer up for the run's model."""
    return _hand_over("prepare", message, context)
