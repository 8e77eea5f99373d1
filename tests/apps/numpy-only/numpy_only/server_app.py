"""numpy-only: the ServerApp."""

import numpy as np
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from numpy_only import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with FedAvg; evaluate on all clients and on the server."""
    nodes = context.run_config["min-available-nodes"]
    strategy = FedAvg(
        fraction_evaluate=1.0,
        min_train_nodes=nodes,
        min_evaluate_nodes=nodes,
        min_available_nodes=nodes,
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros((task.FEATURES + 1, task.CLASSES), np.float32)]),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=global_evaluate,
    )
    if model_file := context.run_config["model-file"]:
        np.savez(model_file, *result.arrays.to_numpy_ndarrays())


def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Evaluate the global model on test data that no client has."""
    [weights] = arrays.to_numpy_ndarrays()
    loss, accuracy = task.test(weights, task.make_data(1000, seed=10**6))
    print(f"round {server_round}: accuracy on the server {accuracy:.3f}")
    return MetricRecord({"accuracy": accuracy, "loss": loss})
