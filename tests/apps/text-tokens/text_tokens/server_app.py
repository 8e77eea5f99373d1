"""text-tokens: the ServerApp."""

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from text_tokens.strategy import TokenFedAvg
from text_tokens.task import initial_model, to_record

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with TokenFedAvg, personalise the model on each client, and query all clients."""
    result = TokenFedAvg().start(
        grid=grid,
        initial_arrays=to_record(initial_model()),
        num_rounds=context.run_config["num-server-rounds"],
    )
    config = ConfigRecord({"epochs": context.run_config["personal-epochs"]})
    content = RecordDict({"arrays": result.arrays, "config": config})
    personal = ask_all(grid, content, f"{MessageType.TRAIN}.personalise")
    for name in ("global_accuracy", "personal_accuracy"):
        print(f"{name}: {np.mean([metrics[name] for metrics in personal]):.3f}")
    for metrics in ask_all(grid, RecordDict(), MessageType.QUERY):
        print(f"a client has a personal model and has sent {metrics['calls']} replies")


def ask_all(grid: Grid, content: RecordDict, message_type: str) -> list[dict[str, float]]:
    """Send a message to all clients and return the metrics of those that could answer it."""
    messages = [
        Message(content=content, message_type=message_type, dst_node_id=node_id)
        for node_id in grid.get_node_ids()
    ]
    replies = grid.send_and_receive(messages, timeout=600)
    return [dict(reply.content["metrics"]) for reply in replies if reply.has_content()]
