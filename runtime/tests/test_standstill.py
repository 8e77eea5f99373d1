"""A SuperLink that stands still in the middle of a round, with TLS, a device and the lab's server.

It takes two minutes, nearly all of which are waiting.
"""

import csv
import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hosting import RUNTIME, free_port

STANDSTILL = 90.0
ROUNDS = 3
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "still"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "flowerbed"
[tool.flwr.app.components]
serverapp = "still.server_app:app"
clientapp = "still.client_app:app"
[tool.flwr.app.config]
num-server-rounds = 3
"""
SERVER = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    arrays = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
    strategy.start(grid, arrays, num_rounds=context.run_config["num-server-rounds"])
"""
CLIENT = """
import time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    time.sleep(3)
    trained = ArrayRecord({"w": Array(message.content["arrays"]["w"].numpy() + np.float32(1))})
    metrics = MetricRecord({"num-examples": 1, "train-loss": 0.5})
    return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)
"""


def write_certificate(directory: Path) -> None:
    """A key, and a certificate for 127.0.0.1 that is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


class Lab:
    """A SuperLink with TLS and one device, without containers."""

    def __init__(self, root: Path) -> None:
        self.root, self.results = root, root / "results"
        port = free_port()
        write_certificate(root)
        home = root / "home" / ".flwr"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "lab"\n[superlink.lab]\naddress = "127.0.0.1:{port}"\n'
            f'root-certificates = "{root}/crt"\n'
        )
        (root / "cgroup").mkdir()
        (root / "cgroup/memory.events").write_text("oom_kill 0\n")
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(RUNTIME),
            "FLWR_HOME": str(home),
            "HOME": str(home.parent),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLOWERBED_DEVICE_DIRECTORY": str(root / "device"),
            "FLOWERBED_CGROUP": str(root / "cgroup"),
            "FLOWERBED_RESULTS": str(self.results),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3",
        }
        self.superlink = self._start(
            "superlink.log",
            *("-m", "flowerbed.server.superlink", "--host=127.0.0.1", f"--port={port}"),
            *(f"--ssl-ca-certfile={root}/crt", f"--ssl-certfile={root}/crt"),
            *(f"--ssl-keyfile={root}/key", "--disable-runtime-dependency-installation"),
            f"--database={root}/superlink.db",
        )
        self.until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), 60)
        self.device = self._start(
            "device.log",
            *("-m", "flowerbed.device", "--", f"--root-certificates={root}/crt"),
            *(f"--superlink=127.0.0.1:{port}", f"--port={free_port()}"),
            "--node-config",
            'device="phone" device-class="phone" machine="here"',
        )

    def _start(self, log: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", *arguments]
        with (self.root / log).open("wb") as output:
            return subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )

    def until(self, condition: Callable[[], object], seconds: float) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)

    def logs(self) -> str:
        """The end of each log."""
        return "\n".join(log.read_text()[-3000:] for log in sorted(self.root.glob("*.log")))

    @property
    def status(self) -> dict[str, Any]:
        """The status of the run; a state alone before there is one."""
        file = self.results / "run" / "status.json"
        found: dict[str, Any] = {"state": "starting", "begun": 0, "devices": {}}
        return json.loads(file.read_text()) if file.exists() else found

    def run(self) -> None:
        """Start the run."""
        app = self.results / "run" / "app"
        (app / "still").mkdir(parents=True)
        files = {"pyproject.toml": PROJECT, "still/__init__.py": ""}
        files |= {"still/server_app.py": SERVER, "still/client_app.py": CLIENT}
        for name, text in files.items():
            (app / name).write_text(text)
        settings: dict[str, Any] = {
            "run_name": "run",
            "app": "hash",
            "layer": "",
            "devices": ["phone"],
        }
        settings |= {"device_wait": 300, "round_timeout": 600, "config": {}}
        (self.results / "run" / "run.json").write_text(json.dumps(settings))
        command = [sys.executable, "-P", "-m", "flowerbed.server.start", "run"]
        done = subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True
        )
        assert "run" in json.loads(done.stdout), done.stdout

    def close(self) -> None:
        """End both."""
        self.superlink.send_signal(signal.SIGCONT)
        for process in (self.device, self.superlink):
            process.terminate()
        for process in (self.device, self.superlink):
            process.wait(30)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    try:
        yield lab
    finally:
        lab.close()


def test_a_superlink_that_stands_still_costs_at_most_its_round(lab: Lab) -> None:
    lab.run()
    lab.until(lambda: lab.status["begun"] == 2, 120)
    lab.until(lambda: lab.status["devices"]["phone"]["doing"] == "working", 60)
    lab.superlink.send_signal(signal.SIGSTOP)
    time.sleep(STANDSTILL)
    lab.superlink.send_signal(signal.SIGCONT)
    lab.until(lambda: lab.status["state"] in ("completed", "failed"), 300)
    assert lab.status["state"] == "completed", (lab.status, lab.logs())
    with (lab.results / "run" / "rounds.csv").open() as lines:
        rounds = list(csv.DictReader(lines))
    assert [row["round"] for row in rounds] == ["1", "2", "3"]
    assert [row["devices"] for row in rounds] in (["1", "0", "1"], ["1", "1", "1"])
