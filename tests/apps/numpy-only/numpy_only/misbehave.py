"""numpy-only: what the client of partition 0 can do wrong, by run configuration."""

import sys
import time

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict


def misbehave(reply: RecordDict, server_round: int, context: Context) -> RecordDict:
    """Return the content of a train reply, changed if the run configuration says so.

    Raises:
        ZeroDivisionError: in the round `raise-in-round`.
        SystemExit: in the round `exit-in-round`, with status 3.
    """
    partition_id, config = context.node_config["partition-id"], context.run_config
    if config["sleep-partition"] in (-1, partition_id):
        time.sleep(config["sleep"])
    faults = [name for name in config if name.endswith("-in-round")]
    for fault in [name for name in faults if partition_id == 0 and config[name] == server_round]:
        [weights] = reply["arrays"].to_numpy_ndarrays()
        match fault:
            case "raise-in-round":
                raise ZeroDivisionError("on purpose: raise-in-round")
            case "exit-in-round":
                sys.exit(3)
            case "nan-in-round":
                reply["arrays"] = ArrayRecord([np.full_like(weights, np.nan)])
            case "wrong-shape-in-round":
                reply["arrays"] = ArrayRecord([weights[:-1]])
            case "no-metrics-in-round":
                del reply["metrics"]
            case "text-metric-in-round":
                # A MetricRecord refuses text; an app that replies with text uses a ConfigRecord.
                del reply["metrics"]
                reply["metrics"] = ConfigRecord({"train_acc": "good", "num-examples": "many"})
    return reply
