"""FedAvg as Flower has it, telling when a round begins."""

from typing import Any

import journal
import shard
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Timed(FedAvg):
    """FedAvg that tells when a round begins."""

    def configure_train(self, server_round: int, *rest: Any) -> Any:
        """As FedAvg."""
        journal.tell("round", round=server_round)
        return super().configure_train(server_round, *rest)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, then evaluate the model centrally."""
    model = shard.build_model()
    clients = int(context.run_config["clients"])
    strategy = Timed(
        min_train_nodes=clients, min_evaluate_nodes=clients, min_available_nodes=clients
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.get_weights()),
        num_rounds=int(context.run_config["rounds"]),
    )
    journal.tell("end")
    model.set_weights(result.arrays.to_numpy_ndarrays())
    _, accuracy = model.evaluate(*shard.load("test", shard.TEST), verbose=0)
    journal.tell("accuracy", accuracy=accuracy)
