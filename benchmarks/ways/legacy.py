"""The legacy way: `start_server` and `start_client`, as in Flower's Docker Compose example.

python legacy.py server ROUNDS CLIENTS
python legacy.py client SERVER BATCH
"""

import logging
import sys
from typing import Any

import flwr
import journal
import shard
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAvg


class Timed(FedAvg):
    """FedAvg that tells when a round begins."""

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        """As FedAvg."""
        journal.tell("round", round=server_round)
        self.last = parameters
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """As FedAvg."""
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        self.last = parameters
        return parameters, metrics


class Client(flwr.client.NumPyClient):
    """Data and model stay in memory, a round is `fit` and `evaluate`."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.train, self.test = shard.load("train"), shard.load("test")
        self.model = shard.build_model()

    def fit(self, parameters: Any, _config: Any) -> Any:
        """One epoch."""
        self.model.set_weights(parameters)
        self.model.fit(*self.train, batch_size=self.batch, verbose=0)
        return self.model.get_weights(), len(self.train[0]), {}

    def evaluate(self, parameters: Any, _config: Any) -> Any:
        """On the device's test split."""
        self.model.set_weights(parameters)
        loss, accuracy = self.model.evaluate(*self.test, batch_size=self.batch, verbose=0)
        return loss, len(self.test[0]), {"accuracy": accuracy}


def serve(rounds: int, clients: int) -> None:
    """Run the server, then evaluate the model centrally."""
    model = shard.build_model()
    strategy = Timed(
        min_fit_clients=clients,
        min_evaluate_clients=clients,
        min_available_clients=clients,
        initial_parameters=ndarrays_to_parameters(model.get_weights()),
    )
    flwr.server.start_server(
        server_address="0.0.0.0:8080",
        config=flwr.server.ServerConfig(num_rounds=rounds),
        strategy=strategy,
    )
    journal.tell("end")
    model.set_weights(parameters_to_ndarrays(strategy.last))
    _, accuracy = model.evaluate(*shard.load("test", shard.TEST), verbose=0)
    journal.tell("accuracy", accuracy=accuracy)


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)  # it is deprecated, which is known here
    if sys.argv[1] == "server":
        serve(int(sys.argv[2]), int(sys.argv[3]))
    else:
        flwr.client.start_client(
            server_address=sys.argv[2], client=Client(int(sys.argv[3])).to_client()
        )
