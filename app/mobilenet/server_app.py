"""The ServerApp: from the initial model to the trained one."""

import logging

from flowerbed import evaluate_beside, results_directory
from flowerbed.strategies import make_strategy
from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from mobilenet.data import load_test_data
from mobilenet.learner import Parameters, load_tensorflow
from mobilenet.settings import RunSettings

load_tensorflow()  # before the devices are ready, and not after
from mobilenet.model import KerasLearner  # noqa: E402

app = ServerApp()
log = logging.getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the model with the devices of the grid, evaluate it centrally, and save it."""
    run = RunSettings.parse(context.run_config)
    strategy = make_strategy(run.strategy, run.strategy_parameters, seed=run.seed)
    data = load_test_data(run)
    shape = data.test["image"].shape[1:]
    learner = KerasLearner(run.network, shape, data.classes, run.seed)
    initial = learner.initial.as_record()

    def evaluate(_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Evaluate the global model on the data set's test split."""
        metrics = learner.evaluate(Parameters.from_record(arrays), data.test)
        return MetricRecord({"accuracy": metrics["eval-accuracy"], "loss": metrics["eval-loss"]})

    result = strategy.start(
        grid=grid,
        initial_arrays=initial,
        num_rounds=run.num_server_rounds,
        # In the lab, devices do not wait for this evaluation.
        evaluate_fn=evaluate_beside(evaluate) if len(data.test["label"]) else None,
    )
    final = result.arrays or initial
    path = results_directory() / "model.keras"
    learner.save(Parameters.from_record(final), path)
    log.info("The model is saved in %s", path.resolve())

    # In a round, devices evaluate the model that they receive. The last one is evaluated here.
    content = RecordDict({"arrays": final})
    messages = [Message(content, node, MessageType.EVALUATE) for node in grid.get_node_ids()]
    replies = grid.send_and_receive(messages, timeout=3600)
    metrics = strategy.aggregate_evaluate(run.num_server_rounds, replies)
    log.info("The model on the devices' test images: %s", metrics)
