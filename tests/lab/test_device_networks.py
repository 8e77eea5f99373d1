"""Limits of a network as a device feels them: bytes over a socket between two containers."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from repository import ROOT, program

NAME = "flowerbed-test-network"
RATE = 20e6
BYTES = 5_000_000
SECONDS = BYTES * 8 / RATE
"""That a transfer takes at the rate, headers not counted."""
PEER = """
import socket
with socket.create_server(("", 7000)) as server:
    while True:
        connection, _ = server.accept()
        with connection:
            if connection.recv(1) == b"<":
                connection.sendall(bytes({bytes}))
            else:
                while connection.recv(1 << 20):
                    pass
                connection.sendall(b".")
"""
MEASURE = """
import socket, time
for way in "<>":
    with socket.create_connection(("{peer}", 7000)) as connection:
        began = time.monotonic()
        connection.sendall(way.encode())
        if way == ">":
            connection.sendall(bytes({bytes}))
            connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 20):
            pass
        print(time.monotonic() - began)
"""


@pytest.fixture(scope="module")
def image() -> str:
    """The application image, as `make images` has left it."""
    return (ROOT / ".cache/application-image").read_text().strip()


@pytest.fixture
def device(engine: docker.DockerClient, image: str) -> Iterator[Any]:
    """A container without capabilities, and another one on the same network."""
    network = engine.networks.create(NAME)
    containers = []
    try:
        for name, command in (("peer", ["python", "-c", PEER.format(bytes=BYTES)]), ("device", [])):
            containers.append(
                engine.containers.run(
                    image,
                    command or ["sleep", "300"],
                    name=f"{NAME}-{name}",
                    network=NAME,
                    cap_drop=["ALL"],
                    security_opt=["no-new-privileges"],
                    detach=True,
                )
            )
        yield containers[-1]
    finally:
        for container in containers:
            container.remove(force=True)
        network.remove()


def measured(device: Any) -> list[float]:
    """Seconds of a transfer to the device and of one from it."""
    code = MEASURE.format(peer=f"{NAME}-peer", bytes=BYTES)
    status, printed = device.exec_run(["python", "-c", code])
    assert status == 0, printed
    return [float(line) for line in printed.split()]


def shape(device: Any, *arguments: str, **limits: str) -> dict[str, Any]:
    """What the module answers."""
    containers = json.dumps({"containers": [{"name": device.name, **limits}]})
    command = [program("ansible"), "local", "-i", "inventory/local", "-o", "-m", "shape_networks"]
    command += ["-M", str(Path("plugins/modules")), "-a", containers, *arguments]
    told = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    answer: dict[str, Any] = json.loads(told.stdout.split("=>", 1)[1])
    return answer


def test_a_rate_holds_both_ways_and_goes_again(device: Any) -> None:
    device.reload()
    started = device.attrs["State"]["StartedAt"]
    assert shape(device, "--check", rate="20mbit")["changed"]
    assert max(measured(device)) < SECONDS / 4
    assert shape(device, rate="20mbit")["shaped"] == [device.name]
    for seconds in measured(device):
        assert SECONDS < seconds < 1.15 * SECONDS
    assert not shape(device, rate="20mbit")["changed"]
    assert shape(device, rate="80mbit")["changed"]
    for seconds in measured(device):
        assert SECONDS / 4 < seconds < 1.3 * SECONDS / 4
    assert shape(device)["changed"]
    assert max(measured(device)) < SECONDS / 4
    device.reload()
    assert device.attrs["State"]["StartedAt"] == started


def test_limits_end_with_the_container_and_come_back(device: Any) -> None:
    shape(device, rate="20mbit")
    device.restart(timeout=1)
    assert max(measured(device)) < SECONDS / 4
    assert shape(device, rate="20mbit")["changed"]
    assert min(measured(device)) > SECONDS
    device.stop(timeout=1)
    assert shape(device, rate="20mbit")["idle"] == [device.name]
