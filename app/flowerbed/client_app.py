"""The ClientApp: hands each message to the device's trainer and returns its answer.

Flower starts a process of this for every message, so it imports neither TensorFlow nor data: the
trainer (`flowerbed.trainer`) holds them and outlives the message.
"""

import logging
import time
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flowerbed.config import DeviceSettings, Task
from flowerbed.handoff import RUN_DIRECTORY, TrainerDiedError, TrainerError, request

app = ClientApp()
log = logging.getLogger("flwr")

WEIGHTS = "weights"
_OUT_OF_MEMORY = "out_of_memory"
BATCH_RECORD = RUN_DIRECTORY / "batch-size"
"""The batch that the device's memory has proved large enough for, as long as its container runs."""


def _fitting(device: DeviceSettings) -> DeviceSettings:
    """The device with no larger batch than has been found to fit."""
    try:
        size = min(device.batch_size, int(BATCH_RECORD.read_text()))
    except FileNotFoundError:
        return device
    return device.model_copy(update={"batch_size": size})


def _ask_trainer(
    operation: str, task: Task, device: DeviceSettings, weights: bytes
) -> tuple[dict[str, Any], bytearray, str]:
    """Ask the trainer; where it is out of memory and the device may, again with half the batch.

    Returns:
        Answer, payload, and what there is to say of the way to it.

    Raises:
        TrainerError, TrainerDiedError: see `flowerbed.handoff.request`.
    """
    device, said = _fitting(device), ""
    while True:
        header = {"operation": operation, "task": task.as_config(), "device": device.as_config()}
        try:
            return *request(header, weights), said
        except TrainerDiedError as error:
            halves = device.out_of_memory_policy == "halve_batch" and device.batch_size > 1
            if error.cause != _OUT_OF_MEMORY or not halves:
                raise
            half = device.batch_size // 2
            said = f"out of memory with batches of {device.batch_size}, went on with {half}"
            log.warning("%s: %s", device.device, said)
            BATCH_RECORD.write_text(str(half))
            device = device.model_copy(update={"batch_size": half})


def _hand_over(operation: str, message: Message, context: Context) -> Message:
    started = time.time()
    config = dict(message.content["config"])
    task = Task.parse(config)
    device = DeviceSettings.parse(context.node_config)
    arrays = message.content.array_records.get("arrays")
    weights = arrays[WEIGHTS].numpy().tobytes() if arrays else b""
    content = RecordDict()
    try:
        answer, data, said = _ask_trainer(operation, task, device, weights)
    except TrainerDiedError as error:
        outcome = _OUT_OF_MEMORY if error.cause == _OUT_OF_MEMORY else "error"
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
            {"outcome": answer["outcome"], "reason": said, "started": started}
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
