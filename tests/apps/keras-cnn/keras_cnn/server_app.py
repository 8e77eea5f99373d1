"""keras-cnn: the ServerApp."""

from typing import Any

import keras
from flwr.app import Context
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp

from keras_cnn.task import load_model


def weighted_average(metrics: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Return the accuracy over the examples of all clients."""
    examples = sum(count for count, _ in metrics)
    return {"accuracy": sum(count * values["accuracy"] for count, values in metrics) / examples}


def server_fn(context: Context) -> ServerAppComponents:
    """Construct the strategy and its configuration."""
    keras.utils.set_random_seed(0)
    clients = int(context.run_config["min-available-clients"])
    strategy = FedAvg(
        min_fit_clients=clients,
        min_evaluate_clients=clients,
        min_available_clients=clients,
        on_fit_config_fn=lambda server_round: {"server_round": server_round},
        initial_parameters=ndarrays_to_parameters(load_model(0.0).get_weights()),
        fit_metrics_aggregation_fn=weighted_average,
        evaluate_metrics_aggregation_fn=weighted_average,
    )
    config = ServerConfig(num_rounds=int(context.run_config["num-server-rounds"]))
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)
