"""sklearn-extra: the ServerApp."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from sklearn_extra.task import create_model, get_weights

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with FedAvg; evaluate on a part of the clients."""
    strategy = FedAvg(fraction_evaluate=context.run_config["fraction-evaluate"])
    result = strategy.start(
        grid=grid,
        initial_arrays=get_weights(create_model(context.run_config["alpha"])),
        num_rounds=context.run_config["num-server-rounds"],
    )
    for server_round, metrics in result.evaluate_metrics_clientapp.items():
        print(f"round {server_round}: accuracy on the clients {metrics['test_accuracy']:.3f}")
