"""text-tokens: the ClientApp."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from text_tokens import task

app = ClientApp()


def reply_to(
    msg: Message, context: Context, metrics: dict[str, float], **arrays: ArrayRecord
) -> Message:
    """Return a reply whose metrics include the number of replies of this client in this run."""
    calls = context.state.metric_records.setdefault("calls", MetricRecord({"calls": 0}))
    calls["calls"] += 1
    content = RecordDict({**arrays, "metrics": MetricRecord({**metrics, **calls})})
    return Message(content=content, reply_to=msg)


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the received model on the sentences of this client's partition."""
    partition_id, config = context.node_config["partition-id"], context.run_config
    data, _ = task.load_data(partition_id)
    model = task.from_record(msg.content["arrays"])
    seed = [partition_id, msg.content["config"]["server-round"]]
    task.train(model, data, config["local-epochs"], config["learning-rate"], seed)
    metrics = {"train_loss": task.test(model, data)[0], "num-examples": len(data[1])}
    counts = {"tokens": np.bincount(data[0].ravel(), minlength=len(task.WORDS))}
    arrays = {"arrays": task.to_record(model), "counts": task.to_record(counts)}
    return reply_to(msg, context, metrics, **arrays)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the received model on the test sentences of this client's partition."""
    _, data = task.load_data(context.node_config["partition-id"])
    loss, accuracy = task.test(task.from_record(msg.content["arrays"]), data)
    metrics = {"loss": loss, "accuracy": accuracy, "num-examples": len(data[1])}
    return reply_to(msg, context, metrics)


@app.train("personalise")
def personalise(msg: Message, context: Context) -> Message:
    """Train the received model further for this client alone, and keep it in the state."""
    partition_id = context.node_config["partition-id"]
    train_data, test_data = task.load_data(partition_id)
    model = task.from_record(msg.content["arrays"])
    metrics = {"global_accuracy": task.test(model, test_data)[1]}
    epochs, learning_rate = msg.content["config"]["epochs"], context.run_config["learning-rate"]
    task.train(model, train_data, epochs, learning_rate, seed=[partition_id, 0])
    metrics["personal_accuracy"] = task.test(model, test_data)[1]
    context.state["personal-model"] = task.to_record(model)
    return reply_to(msg, context, metrics)


@app.query()
def query(msg: Message, context: Context) -> Message:
    """Report whether this client has a personal model."""
    has_model = int("personal-model" in context.state)
    return reply_to(msg, context, {"has_personal_model": has_model})
