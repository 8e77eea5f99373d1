"""The device's processes for real: supervisor, trainer and ClientApp code, without a SuperLink."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowerbed.device
from flowerbed.config import Task
from flowerbed.data import load_shard
from flowerbed.handoff import (
    DEATH_RECORD,
    FORKSERVER_SOCKET,
    TRAINER_SOCKET,
    TrainerDiedError,
    TrainerError,
    request,
)
from flowerbed.network import NetworkLearner


@pytest.fixture(scope="module")
def supervisor(shards: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The supervisor with a real trainer; the SuperNode has no SuperLink and keeps trying."""
    command = [
        sys.executable,
        "-m",
        "flowerbed.device",
        "--shard",
        str(shards / "devices" / "phone"),
    ]
    process = subprocess.Popen([*command, "--", "--insecure", "--superlink", "127.0.0.1:9"])
    yield process
    process.terminate()
    assert process.wait(20) == 0


def _header(operation: str, device: dict[str, Any], **task: Any) -> dict[str, Any]:
    return {"operation": operation, "task": Task(**task).as_config(), "device": device}


def _trainer_pid() -> int:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"flowerbed.trainer" in path.read_bytes():
                return int(path.parent.name)
        except OSError:
            continue
    raise AssertionError("no trainer runs")


def _group(leader: int) -> set[int]:
    members = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(int(path.name)) == leader:
                members.add(int(path.name))
    return members


def test_prepare_train_evaluate(
    supervisor: subprocess.Popen[bytes], device_settings: dict[str, Any], shards: Path
) -> None:
    shard = load_shard(shards / "devices" / "phone")
    prepared, _ = request(_header("prepare", device_settings))
    assert prepared["shard"] == shard.fingerprint
    assert prepared["metrics"]["num-examples"] == len(shard.train_labels)
    assert prepared["labels"] == [int((shard.train_labels == n).sum()) for n in range(10)]

    learner = NetworkLearner(Task(), shard.image_shape, shard.classes, batch_size=16, seed=1)
    start = learner.get_weights()
    header = _header("train", device_settings, server_round=1, seed=1)
    before = time.time()
    answer, data = request(header, start.tobytes())
    took = answer["metrics"]["evaluate-seconds"] + answer["metrics"]["train-seconds"]
    assert before <= answer["began"] <= time.time() - took + 0.1
    assert answer["outcome"] == "completed"
    assert answer["metrics"]["num-examples"] == 160
    local = learner.evaluate(start, shard.test_images, shard.test_labels)
    assert answer["metrics"]["eval-loss"] == pytest.approx(local.loss, rel=1e-4)
    _, same = request(header, start.tobytes())
    trained = np.frombuffer(data, np.float32)
    np.testing.assert_allclose(trained, np.frombuffer(same, np.float32), atol=1e-6)

    evaluated, nothing = request(_header("evaluate", device_settings), data)
    assert not nothing
    expected = learner.evaluate(trained, shard.test_images, shard.test_labels)
    assert evaluated["metrics"]["eval-accuracy"] == pytest.approx(expected.accuracy)


def test_a_bad_request_is_answered_and_the_trainer_lives(
    supervisor: subprocess.Popen[bytes], device_settings: dict[str, Any]
) -> None:
    pid = _trainer_pid()
    with pytest.raises(TrainerError, match="different models"):
        request(_header("train", device_settings), b"\0" * 40)
    with pytest.raises(TrainerError, match="batch-size"):
        request(_header("train", device_settings | {"batch-size": 0}))
    assert _trainer_pid() == pid


def test_a_killed_trainer_is_reported_and_started_again(
    supervisor: subprocess.Popen[bytes], device_settings: dict[str, Any], shards: Path
) -> None:
    request(_header("prepare", device_settings))
    weights = NetworkLearner(Task(), (32, 32, 3), 10).get_weights().tobytes()
    pid = _trainer_pid()
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {pid}"])

    def train_for_ever() -> None:
        while True:
            request(_header("train", device_settings), weights)

    with pytest.raises(TrainerDiedError, match="signal 9"):
        train_for_ever()
    killer.wait()
    assert json.loads(DEATH_RECORD.read_text())["cause"] == "signal 9"
    answer, _ = request(_header("prepare", device_settings))
    assert answer["outcome"] == "completed"
    assert _trainer_pid() != pid


def test_the_trainer_is_the_one_to_die_of_memory_then_its_decoy(
    supervisor: subprocess.Popen[bytes],
) -> None:
    def adjust(pid: int) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    trainer = _trainer_pid()
    (decoy,) = _group(trainer) - {trainer}
    assert adjust(trainer) > adjust(decoy) > adjust(supervisor.pid)


def test_the_client_app_imports_neither_tensorflow_nor_data() -> None:
    code = "import flowerbed.client_app, sys; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "flowerbed.handoff" in modules
    heavy = {"tensorflow", "keras", "datasets", "flwr_datasets", "pandas", "PIL", "flowerbed.data"}
    assert not heavy & set(modules)


def test_the_trainer_imports_no_data_set_library() -> None:
    code = (
        "import sys, flowerbed.trainer as trainer\n"
        "trainer.load_tensorflow()\n"
        "import flowerbed.network\n"
        "print(*(name for name, module in sys.modules.items() if module))"
    )
    modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "tensorflow" in modules
    assert not {"datasets", "flwr_datasets", "flwr", "pandas", "matplotlib"} & set(modules)


def test_the_sockets_are_the_containers_own(supervisor: subprocess.Popen[bytes]) -> None:
    for path in (TRAINER_SOCKET, FORKSERVER_SOCKET):
        assert path.is_socket()
        assert path.stat().st_uid == os.getuid()
    assert FORKSERVER_SOCKET.stat().st_mode & 0o077 == 0


def _client_app(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Flower's ClientApp program as a SuperNode would start it, and its processor seconds.

    Those of the fork are the fork server's, so they are not among them.
    """
    programs = Path(flowerbed.device.__file__).parent / "bin"
    path = f"{programs}:{os.environ['PATH']}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Which program PATH names is looked up in this process' own environment.
    done = subprocess.run(
        ["env", f"PATH={path}", "flwr-clientapp", *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_client_app_is_forked_and_not_imported(supervisor: subprocess.Popen[bytes]) -> None:
    while not FORKSERVER_SOCKET.exists():
        time.sleep(0.1)
    done, seconds = _client_app("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: flwr-clientapp" in done.stdout
    assert seconds < 0.3
    done, _ = _client_app("--token", "with spaces\nand lines", "--none-such")
    assert done.returncode == 2
    assert "unrecognized arguments: --none-such" in done.stderr


def test_what_a_supernode_starts_is_of_its_group(supervisor: subprocess.Popen[bytes]) -> None:
    """So that it ends with it."""

    def group_of(name: str) -> int:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for path in Path("/proc").glob("[0-9]*/stat"):
                with contextlib.suppress(OSError):
                    if f"({name})" in (text := path.read_text()):
                        return int(text.rpartition(") ")[2].split()[2])
            time.sleep(0.2)
        raise AssertionError(f"no {name} runs")

    group = group_of("flower-superexe")
    assert group == group_of("flower-supernod")
    assert group != os.getpgid(supervisor.pid)


def test_without_a_fork_server_it_is_flowers_own_program() -> None:
    aside = FORKSERVER_SOCKET.with_name("aside")
    there = FORKSERVER_SOCKET.exists()
    if there:
        FORKSERVER_SOCKET.rename(aside)
    try:
        done, _ = _client_app("--help")
    finally:
        if there:
            aside.rename(FORKSERVER_SOCKET)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: flwr-clientapp" in done.stdout


def test_a_trainer_that_needs_no_tensorflow_has_none() -> None:
    code = "import flowerbed.trainer, sys; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "flowerbed.linear" in modules
    assert not {"tensorflow", "keras"} & set(modules)
