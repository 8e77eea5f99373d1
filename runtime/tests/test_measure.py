"""What an app needs of memory: measured on small apps, with a real worker."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flowerbed.device import measure

MEBIBYTE = 2**20
PROJECT = """
[project]
name = "tiny"
version = "1.0.0"

[tool.flwr.app]
publisher = "test"

[tool.flwr.app.components]
serverapp = "tiny.server_app:app"
clientapp = "tiny.client_app:app"

[tool.flwr.app.config]
rounds = 5
"""
SERVER = """
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    arrays = ArrayRecord([np.zeros(4, np.float32)])
    FedAvg().start(grid=grid, initial_arrays=arrays, num_rounds=context.run_config["rounds"])
"""
CLIENT = """
import os
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
COUNTS = {"train": 0, "evaluate": 0}

def reply(message, kind):
    COUNTS[kind] += 1
    print("counted", kind, COUNTS[kind])
    metrics = MetricRecord({"num-examples": 1, "loss": 0.5})
    content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
    return Message(content, reply_to=message)

@app.train()
def train(message, context):
    np.ones(context.node_config["batch-size"] << 20, np.uint8).sum()
    return reply(message, "train")

@app.evaluate()
def evaluate(message, context):
    return reply(message, "evaluate")
"""
OLDER_SERVER = """
import numpy as np
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp

def server_fn(context):
    start = ndarrays_to_parameters([np.zeros(4, np.float32)])
    return ServerAppComponents(
        strategy=FedAvg(initial_parameters=start), config=ServerConfig(num_rounds=5)
    )

app = ServerApp(server_fn=server_fn)
"""
OLDER_CLIENT = """
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

class Client(NumPyClient):
    def fit(self, parameters, config):
        print("counted train")
        return parameters, 1, {}

    def evaluate(self, parameters, config):
        print("counted evaluate")
        return 0.5, 1, {}

app = ClientApp(client_fn=lambda context: Client().to_client())
"""


def measured(
    directory: Path, *arguments: str, server: str = SERVER, client: str = CLIENT
) -> tuple[dict[str, Any], str]:
    """Measure an app; return the result, and all that was printed beside it."""
    app = directory / "app"
    (app / "tiny").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT)
    for name, text in {"__init__": "", "server_app": server, "client_app": client}.items():
        (app / "tiny" / f"{name}.py").write_text(text)
    environment = os.environ | {"FLOWERBED_DEVICE_DIRECTORY": str(directory / "device")}
    environment["PYTHONPATH"] = str(Path(measure.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "flowerbed.device.measure", str(app), *arguments],
        env=environment,
        cwd=directory,
        text=True,
        capture_output=True,
        check=True,
    )
    *printed, last = done.stdout.splitlines()
    return json.loads(last), "\n".join(printed) + done.stderr


def test_peaks_are_those_of_training_by_batch_size(tmp_path: Path) -> None:
    result, printed = measured(tmp_path, "--batch-sizes", "8,200")
    assert result["problem"] == ""
    peaks = result["peaks"]
    assert peaks["8"] * MEBIBYTE > measure.REST + 20 * MEBIBYTE
    assert 170 < peaks["200"] - peaks["8"] < 215
    # A worker of each batch size: the device trains twice, because two nodes are asked.
    assert printed.count("counted train 1") == printed.count("counted train 2") == 2
    assert printed.count("counted evaluate 1") == 2
    assert "counted train 3" not in printed
    assert "counted evaluate 2" not in printed


def test_an_app_of_the_older_kind_is_measured(tmp_path: Path) -> None:
    result, printed = measured(
        tmp_path, "--batch-sizes", "4", server=OLDER_SERVER, client=OLDER_CLIENT
    )
    assert result["problem"] == ""
    assert result["peaks"].keys() == {"4"}
    assert printed.count("counted train") == 2
    assert printed.count("counted evaluate") == 1


def test_configurations_reach_the_app(tmp_path: Path) -> None:
    checks = """
    assert context.node_config["note"] == "hello"
    assert context.node_config["num-partitions"] == 40
    assert context.run_config["rounds"] == 3
"""
    client = CLIENT.replace("    np.ones(", f"{checks}    np.ones(")
    arguments = ["--run-config", '{"rounds": 3}', "--batch-sizes", "1", "--node-config"]
    result, _ = measured(
        tmp_path, *arguments, '{"note": "hello", "num-partitions": 40}', client=client
    )
    assert result["problem"] == ""


@pytest.mark.parametrize(
    ("server", "client", "first", "more"),
    [
        (
            SERVER,
            CLIENT.replace("    np.ones(", "    1 // 0\n    np.ones("),
            "ZeroDivisionError: integer division or modulo by zero",
            "client_app.py",
        ),
        (SERVER, "import missing_module", "ModuleNotFoundError: ", "client_app.py"),
        (
            SERVER.replace("    arrays =", "    raise KeyError('seed')\n    arrays ="),
            CLIENT,
            "KeyError: 'seed'",
            "server_app.py",
        ),
        (
            SERVER.replace("FedAvg().start", "dict"),
            CLIENT,
            "the ServerApp ended without asking a client to train",
            "",
        ),
        (
            SERVER,
            CLIENT.replace("    np.ones(", "    os.kill(os.getpid(), 9)\n    np.ones("),
            "the worker died: signal 9",
            "",
        ),
        ("import os; os._exit(7)", CLIENT, "the ServerApp's process ended with 7", ""),
        ("app = 3", CLIENT, "serverapp tiny.server_app:app is no ServerApp, but int", ""),
    ],
)
def test_a_failure_is_told_by_its_last_line(
    tmp_path: Path, server: str, client: str, first: str, more: str
) -> None:
    result, _ = measured(tmp_path, "--batch-sizes", "8", server=server, client=client)
    assert result["peaks"] == {}
    assert result["problem"].splitlines()[0].startswith(first)
    assert more in result["problem"]


def test_what_a_device_takes_beside_the_worker_grows_with_the_model() -> None:
    sizes = [0, 1, 2**20, 10 * 2**20, 10 * 2**20 + 1, 100 * 2**20]
    rests = [measure.rest(size) for size in sizes]
    assert rests == sorted(rests)
    assert rests[4] - rests[3] < 10
    assert measure.rest(0) == measure.REST


def test_the_device_has_the_labs_keys() -> None:
    config = measure.node_config(16, {"partition-id": 3, "own": "x"})
    assert (config["batch-size"], config["partition-id"], config["own"]) == (16, 3, "x")
    assert all(value is not None for value in config.values())
