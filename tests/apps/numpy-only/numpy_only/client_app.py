"""numpy-only: the ClientApp."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from numpy_only import task
from numpy_only.misbehave import misbehave

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the received weights on the data of this client's partition."""
    partition_id = context.node_config["partition-id"]
    data, _ = task.load_data(partition_id, context.node_config["num-partitions"])
    # An entry that only some federations have; Flower's simulation runtime has none.
    note = str(context.node_config.get("note", ""))
    server_round = msg.content["config"]["server-round"]

    [weights] = msg.content["arrays"].to_numpy_ndarrays()
    weights = task.train(weights, data, context.run_config, seed=[partition_id, server_round])
    loss, accuracy = task.test(weights, data)
    print(f"partition {partition_id}, round {server_round}: {accuracy:.3f} {note}")

    metrics = {"train_loss": loss, "train_acc": accuracy, "num-examples": len(data[1])}
    metrics["note-length"] = len(note)
    reply = RecordDict({"arrays": ArrayRecord([weights]), "metrics": MetricRecord(metrics)})
    return Message(content=misbehave(reply, server_round, context), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the received weights on the test data of this client's partition."""
    _, data = task.load_data(
        context.node_config["partition-id"], context.node_config["num-partitions"]
    )
    [weights] = msg.content["arrays"].to_numpy_ndarrays()
    loss, accuracy = task.test(weights, data)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(data[1])}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
