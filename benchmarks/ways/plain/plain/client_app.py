"""Imports TensorFlow, loads the data and builds the model at each message, in a new process."""

import shard
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One epoch."""
    model = shard.build_model()
    model.set_weights(message.content["arrays"].to_numpy_ndarrays())
    images, labels = shard.load("train")
    model.fit(images, labels, batch_size=int(context.node_config["batch-size"]), verbose=0)
    metrics = MetricRecord({"num-examples": len(images)})
    content = RecordDict({"arrays": ArrayRecord(model.get_weights()), "metrics": metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """On the device's test split."""
    model = shard.build_model()
    model.set_weights(message.content["arrays"].to_numpy_ndarrays())
    images, labels = shard.load("test")
    batch = int(context.node_config["batch-size"])
    loss, accuracy = model.evaluate(images, labels, batch_size=batch, verbose=0)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(images)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
