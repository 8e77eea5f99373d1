"""keras-cnn: the ClientApp."""

from typing import Any

import keras
import numpy as np
from flwr.app import Context
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from keras_cnn.task import Data, load_cached_model, load_data, load_model

Weights = list[NDArray[np.float32]]
MEBIBYTE = 2**20


class FlowerClient(NumPyClient):
    """Train and evaluate a model on the data of one partition."""

    def __init__(self, model: keras.Model, data: tuple[Data, Data], context: Context) -> None:
        self.model = model
        self.train_data, self.test_data = data
        self.run_config = context.run_config
        self.is_first = context.node_config["partition-id"] == 0

    def fit(
        self, parameters: Weights, config: dict[str, Any]
    ) -> tuple[Weights, int, dict[str, Any]]:
        """Train the received weights."""
        if self.is_first and self.run_config["allocate-in-round"] == config["server_round"]:
            allocate()
        images, labels = self.train_data
        self.model.set_weights(parameters)
        history = self.model.fit(
            images,
            labels,
            epochs=int(self.run_config["local-epochs"]),
            batch_size=int(self.run_config["batch-size"]),
            verbose=0,
        ).history
        metrics = {"loss": history["loss"][-1], "accuracy": history["accuracy"][-1]}
        return self.model.get_weights(), len(images), metrics

    def evaluate(
        self,
        parameters: Weights,
        config: dict[str, Any],  # noqa: ARG002 - part of the interface of NumPyClient
    ) -> tuple[float, int, dict[str, Any]]:
        """Evaluate the received weights."""
        images, labels = self.test_data
        self.model.set_weights(parameters)
        loss, accuracy = self.model.evaluate(images, labels, verbose=0)
        return loss, len(images), {"accuracy": accuracy}


def allocate() -> None:
    """Allocate and fill memory until the kernel kills this process.

    Raises:
        MemoryError: at 8 GiB, to spare a machine without a memory limit.
    """
    blocks = [b"x" * 64 * MEBIBYTE for _ in range(128)]
    raise MemoryError(f"this process was not killed at {64 * len(blocks)} MiB")


def client_fn(context: Context) -> Any:
    """Construct the client that answers one message."""
    learning_rate = float(context.run_config["learning-rate"])
    load = load_cached_model if context.run_config["cache-model"] else load_model
    data = load_data(int(context.node_config["partition-id"]))
    return FlowerClient(load(learning_rate), data, context).to_client()


app = ClientApp(client_fn=client_fn)
