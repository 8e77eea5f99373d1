"""sklearn-extra: the ClientApp."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from sklearn_extra import task

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the received weights on the digits of this client's partition."""
    partition_id = context.node_config["partition-id"]
    data, _ = task.load_data(partition_id, context.node_config["num-partitions"])
    model = task.create_model(context.run_config["alpha"], msg.content["arrays"])
    seed = [partition_id, msg.content["config"]["server-round"]]
    task.train(model, data, context.run_config, seed)
    loss, accuracy = task.test(model, data)
    metrics = {"train_logloss": loss, "train_accuracy": accuracy, "num-examples": len(data[1])}
    content = RecordDict({"arrays": task.get_weights(model), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the received weights on the test digits of this client's partition."""
    _, data = task.load_data(
        context.node_config["partition-id"], context.node_config["num-partitions"]
    )
    model = task.create_model(context.run_config["alpha"], msg.content["arrays"])
    loss, accuracy = task.test(model, data)
    metrics = {"test_logloss": loss, "test_accuracy": accuracy, "num-examples": len(data[1])}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
