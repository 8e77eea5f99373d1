"""A device from end to end: Flower's own SuperLink, SuperNode and command, and the supervisor."""

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosting import APP, RUNTIME, free_port, kill, toml

SERVER = """
import json, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
from flowerbed.messages import is_sealed, pack, seal, unpack, unseal

app = ServerApp()

@app.main()
def main(grid, context):
    desk = Path(context.run_config["desk"])
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    for number in range(1000):
        question = desk / f"{number}.question"
        while not question.exists():
            if (desk / "stop").exists():
                return
            time.sleep(0.05)
        asked = json.loads(question.read_text())
        if asked["sealed"]:
            content = seal(asked["header"])
        else:
            content = RecordDict({"config": ConfigRecord({"x": 1})})
        message = Message(content, nodes[0], asked["kind"], ttl=asked["ttl"], group_id="3")
        started = time.monotonic()
        (identity,) = grid.push_messages([message])
        if asked["header"].get("end"):
            return  # as the lab's server does
        reply = []
        while not reply:
            time.sleep(0.05)
            reply = list(grid.pull_messages([identity]))
        seconds = time.monotonic() - started
        if reply[0].has_error():
            answer = {"error": reply[0].error.reason}
        elif is_sealed(reply[0].content):
            answer, data = unseal(reply[0].content)
            if "records" in answer:
                records = unpack(answer.pop("records"), data)
                answer["metrics"] = dict(records["metrics"])
        else:
            answer = {"metrics": dict(reply[0].content["metrics"])}
        draft = desk / f"{number}.draft"
        draft.write_text(json.dumps(answer | {"seconds": seconds}))
        draft.rename(desk / f"{number}.answer")
"""

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "tiny"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "flowerbed"
[tool.flwr.app.components]
serverapp = "tiny.server_app:app"
clientapp = "{clientapp}"
[tool.flwr.app.config]
desk = "{desk}"
"""

PLAIN = APP.replace("def reply(message", "import tiny\n\ndef reply(message").replace(
    'metrics |= {"pid"', 'metrics |= {"in_fab": int("/.flwr/apps/" in tiny.__file__), "pid"'
)


def processes(word: str) -> list[int]:
    """Processes that have a word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


class Lab:
    """A SuperLink and one device, without containers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.device = root / "device"
        self.log = root / "device.log"
        port = free_port()
        home = root / "home" / ".flwr"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "lab"\n[superlink.lab]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(RUNTIME),
            "FLWR_HOME": str(home),
            "HOME": str(home.parent),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLOWERBED_DEVICE_DIRECTORY": str(self.device),
            "FLOWERBED_CGROUP": str(root / "cgroup"),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3",
        }
        self.cgroup = root / "cgroup"
        self.cgroup.mkdir()
        self.count_kills(0)
        self.runs = 0
        self.superlink = self._start(
            "superlink.log",
            "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port),
            "--disable-runtime-dependency-installation", "--database", str(root / "superlink.db"),
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline, "the SuperLink does not start"
            time.sleep(0.2)
        self.supervisor = self._start(
            "device.log",
            sys.executable, "-P", "-m", "flowerbed.device", "--",
            "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port()),
            "--node-config", 'device="phone" batch-size=32 out-of-memory-policy="halve_batch"',
        )  # fmt: skip

    def _start(self, log: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.root / log).open("wb") as output:
            return subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )

    def close(self) -> None:
        """End both."""
        for process in (self.supervisor, self.superlink):
            process.terminate()
        assert self.supervisor.wait(20) == 0
        self.superlink.wait(20)

    def count_kills(self, kills: int) -> None:
        """Let the container's cgroup count so many kills of the kernel."""
        (self.cgroup / "memory.events").write_text(f"oom_kill {kills}\n")

    def command(self, *arguments: str) -> dict[str, Any]:
        """Run `flwr`; return its JSON."""
        done = subprocess.run(
            ["flwr", *arguments, "--format", "json"],
            env=self.environment,
            check=False,
            capture_output=True,
            text=True,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        assert answer["success"], answer
        return answer

    def worker(self) -> int:
        """The number of the worker's process."""
        own = f"FLOWERBED_DEVICE_DIRECTORY={self.device}".encode()
        (worker,) = [
            pid
            for pid in processes("flowerbed.device.worker")
            if own in Path(f"/proc/{pid}/environ").read_bytes()
        ]
        return worker

    def position(self) -> int:
        """Where the device's log ends now."""
        return len(self.log.read_text())

    def wait_for(self, line: str, since: int = 0, patience: float = 30.0) -> None:
        """Wait until the device's log has a line below a position."""
        deadline = time.monotonic() + patience
        while line not in (text := self.log.read_text()[since:]):
            assert time.monotonic() < deadline, f"no line {line!r} in\n{text[-3000:]}"
            time.sleep(0.05)

    def run(self, *, composed: bool = True, **table: Any) -> "Run":
        """Start a run of the app, as the lab composes it or as it is."""
        self.runs += 1
        directory = self.root / f"app-{self.runs}"
        desk = self.root / f"desk-{self.runs}"
        desk.mkdir()
        (directory / "tiny").mkdir(parents=True)
        clientapp = "flowerbed.device.client:app" if composed else "tiny.client_app:app"
        text = PYPROJECT.format(clientapp=clientapp, desk=desk)
        if composed:
            values = {"clientapp": "tiny.client_app:app", "app": "hash", "run": desk.name} | table
            text += "[tool.flowerbed]\n"
            text += "".join(f"{key} = {toml(value)}\n" for key, value in values.items())
        (directory / "pyproject.toml").write_text(text)
        (directory / "tiny" / "__init__.py").write_text("")
        (directory / "tiny" / "client_app.py").write_text(APP if composed else PLAIN)
        (directory / "tiny" / "server_app.py").write_text(SERVER)
        return Run(self, desk, int(self.command("run", str(directory), "lab")["run-id"]))


class Run:
    """A run whose server sends what the test tells it to."""

    def __init__(self, lab: Lab, desk: Path, run_id: int) -> None:
        self.lab, self.desk, self.run_id = lab, desk, run_id
        self.asked = 0

    def ask(
        self,
        kind: str = "train",
        header: dict[str, Any] | None = None,
        *,
        sealed: bool = True,
        ttl: float = 60.0,
    ) -> int:
        """Have a message sent; return its number."""
        number, self.asked = self.asked, self.asked + 1
        draft = self.desk / "draft"
        question = {"kind": kind, "ttl": ttl, "sealed": sealed, "header": header or {"records": []}}
        draft.write_text(json.dumps(question))
        draft.rename(self.desk / f"{number}.question")
        return number

    def answer(self, number: int, patience: float = 60.0) -> dict[str, Any]:
        """Wait for the reply to a message."""
        path = self.desk / f"{number}.answer"
        deadline = time.monotonic() + patience
        while not path.exists():
            assert time.monotonic() < deadline, "no reply"
            time.sleep(0.05)
        answer: dict[str, Any] = json.loads(path.read_text())
        return answer

    def send(self, kind: str = "train", **options: Any) -> dict[str, Any]:
        """Have a message sent, and wait for its reply."""
        return self.answer(self.ask(kind, **options))

    def end(self) -> None:
        """Let the server end; it says goodbye, and does not wait for a reply."""
        self.ask("query.flowerbed", {"end": True})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def run(lab: Lab) -> Run:
    """A run for tests that need no run of their own."""
    run = lab.run()
    introduction = run.send("query.flowerbed", header={"introduce": True})
    assert introduction["node_config"]["device"] == "phone"
    assert introduction["warm_up"]["count"] == 1
    return run


# --- messages -----------------------------------------------------------------------------


def test_messages_of_a_run_find_what_the_app_has_kept(run: Run) -> None:
    replies = [run.send() for _ in range(5)]
    first = replies[0]["metrics"]
    for number, reply in enumerate(replies):
        assert reply["metrics"]["count"] == first["count"] + number
        assert reply["metrics"]["state"] == first["state"] + number
        assert reply["metrics"]["draw"] == first["draw"]
        assert reply["batch_size"] == 32
    assert {reply["metrics"]["pid"] for reply in replies} == {run.lab.worker()}
    # The SuperNode's pause of 3 s is no part of it.
    assert min(reply["seconds"] for reply in replies) < 2


def test_every_type_and_every_failure_is_answered(run: Run) -> None:
    before = run.send()
    assert run.send("train.personalise")["metrics"]["personal"] == 1
    assert run.send("evaluate")["metrics"]["evaluated"] == 1
    failed = run.send("train.divide")
    assert failed["reason"] == "ZeroDivisionError: integer division or modulo by zero"
    assert failed["traceback"].splitlines()[-1] == failed["reason"]
    assert run.send("train.leave")["reason"] == "SystemExit: 3"
    plain = run.send(sealed=False)
    assert plain["metrics"]["count"] == before["metrics"]["count"] + 3
    assert "flowerbed.worker: train.personalise, round 3" in run.lab.log.read_text()


def test_an_expired_message_does_not_block_the_device(run: Run) -> None:
    before = run.send()["metrics"]
    expired = run.send("train.sleep", ttl=3.0)
    assert "metrics" not in expired
    started = time.monotonic()
    after = run.send()["metrics"]
    assert time.monotonic() - started < 10
    assert after["draw"] == before["draw"]


# --- deaths -------------------------------------------------------------------------------


def test_a_worker_that_crashes_is_an_outcome_and_starts_again(run: Run) -> None:
    before = run.send()["metrics"]
    started = time.monotonic()
    reply = run.send("train.abort")
    assert (reply["outcome"], reply["reason"]) == ("error", "the worker died: signal 6")
    assert time.monotonic() - started < 10
    after = run.send()["metrics"]
    assert after["pid"] not in (before["pid"], run.lab.supervisor.pid)
    assert after["count"] == 1
    assert after["state"] == before["state"] + 1


def test_a_worker_that_is_stuck_with_the_interpreters_lock_is_killed(run: Run) -> None:
    expired = run.send("train.locked", ttl=2.0)
    assert "metrics" not in expired
    assert run.send()["metrics"]["count"] == 1


def test_where_memory_is_short_the_batch_is_halved_for_good(run: Run) -> None:
    reply = run.send("train.greedy")
    assert reply["outcome"] == "completed"
    assert reply["reason"] == "out of memory with batches of 16, went on with 8"
    assert (reply["batch_size"], reply["metrics"]["batch"]) == (8, 8)
    assert run.send()["metrics"]["batch"] == 8
    # Its death by another hand afterwards is none of memory.
    position = run.lab.position()
    number = run.ask("train.sleep")
    run.lab.wait_for("train.sleep, round 3", position)
    kill(run.lab.worker())
    assert run.answer(number)["reason"] == "the worker died: signal 9"


def test_the_worker_is_the_first_to_die_of_memory_and_its_decoy_the_second(run: Run) -> None:
    def adjust(pid: int) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    run.send()
    worker = run.lab.worker()
    members = {
        int(path.name)
        for path in Path("/proc").glob("[0-9]*")
        if group_of(int(path.name)) == worker
    }
    (decoy,) = members - {worker}
    assert adjust(worker) > adjust(decoy) > adjust(run.lab.supervisor.pid)


# --- the supervisor -----------------------------------------------------------------------


def group_of(pid: int) -> int:
    """The process group of a process; 0 if it is gone."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def client_app(lab: Lab, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Flower's ClientApp program as a SuperNode starts it, and its processor seconds.

    Those of the fork are the fork server's, so they are not among them.
    """
    programs = RUNTIME / "flowerbed" / "device" / "bin"
    path = f"{programs}:{lab.environment['PATH']}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        ["env", f"PATH={path}", "flwr-clientapp", *arguments],
        env=lab.environment,
        check=False,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_client_app_is_forked_and_not_imported(lab: Lab) -> None:
    done, seconds = client_app(lab, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: flwr-clientapp" in done.stdout
    assert seconds < 0.3
    done, _ = client_app(lab, "--token", "with spaces\nand lines", "--none-such")
    assert done.returncode == 2
    assert "unrecognized arguments: --none-such" in done.stderr


def test_no_packet_ends_the_supervisor(lab: Lab) -> None:
    with (lab.root / "nothing").open("w") as nothing:
        for packet, files in (
            (b"\xff\xfe", [nothing.fileno()] * 2),
            (b"rm\0-rf", [nothing.fileno()]),
            (b"", []),
        ):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.connect(str(lab.device / "forkserver.sock"))
                socket.send_fds(connection, [packet], files)
                assert connection.recv(16) == b"1"
    assert client_app(lab, "--help")[0].returncode == 0
    assert lab.supervisor.poll() is None


def test_no_failed_fork_ends_the_supervisor(tmp_path: Path) -> None:
    code = """
import os, socket, threading
from pathlib import Path
from flowerbed.device.forkserver import ForkServer
from flowerbed.device.supervisor import Child

def refused(*_, **__):
    raise BlockingIOError(11, "Resource temporarily unavailable")

server = ForkServer(Path("s"))
os.fork = refused
answers = []

def ask():
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect("s")
        socket.send_fds(connection, [b"flwr-clientapp"], [1, 2])
        answers.append(connection.recv(16))

thread = threading.Thread(target=ask)
thread.start()
open_before = len(os.listdir("/proc/self/fd"))
server.serve(10, 0)
thread.join()
assert answers == [b"1"]
assert len(os.listdir("/proc/self/fd")) <= open_before
child = Child("SuperNode", lambda: server.fork(["flower-supernode"]))
child.start()
assert child.pid == 0 and child.start_at > 0
"""
    environment = os.environ | {"PYTHONPATH": str(RUNTIME)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_what_a_supernode_starts_is_of_its_group_and_ends_with_it(lab: Lab, run: Run) -> None:
    def named(name: str) -> int:
        for path in Path("/proc").glob("[0-9]*/stat"):
            pid = int(path.parent.name)
            with contextlib.suppress(OSError):
                parent = int(path.read_text().rpartition(") ")[2].split()[1])
                if f"({name})" in path.read_text() and parent == lab.supervisor.pid:
                    return pid
        raise AssertionError(f"no {name} runs")

    run.send()
    group = group_of(named("flower-superexe"))
    assert group == group_of(named("flower-supernod"))
    assert group != group_of(lab.supervisor.pid)


def test_the_sockets_are_the_containers_own(lab: Lab, run: Run) -> None:
    run.send()
    for name in ("worker.sock", "forkserver.sock"):
        path = lab.device / name
        assert path.is_socket()
        assert path.stat().st_uid == os.getuid()
    assert (lab.device / "forkserver.sock").stat().st_mode & 0o077 == 0
    assert (lab.device / "healthy").exists()


def test_without_a_fork_server_it_is_flowers_own_program(tmp_path: Path) -> None:
    """That is the next one of its name on the PATH; here, one that exists everywhere."""
    ours = RUNTIME / "flowerbed" / "device" / "bin" / "flwr-clientapp"
    (tmp_path / "echo").symlink_to(ours)
    done = subprocess.run(
        [tmp_path / "echo", "--token", "a b"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "FLOWERBED_DEVICE_DIRECTORY": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "--token a b\n"


def modules_after(code: str) -> set[str]:
    """What is imported after some code has run in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(RUNTIME)}
    command = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return set(done.stdout.split())


def test_supervisor_client_app_and_idle_worker_import_no_app_and_no_data_library() -> None:
    code = "import flowerbed.device.supervisor, flowerbed.device.client, flowerbed.device.worker"
    modules = modules_after(code)
    assert "flowerbed.device.handoff" in modules
    heavy = {"tensorflow", "keras", "torch", "datasets", "flwr_datasets", "pandas", "PIL"}
    assert not modules & (heavy | {"flowerbed.data.place", "flowerbed.server", "mobilenet"})


# --- the end of a run ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def next_run(lab: Lab, run: Run) -> Run:
    """A run that follows one that has ended in good order."""
    run.send()
    position = lab.position()
    run.end()
    lab.wait_for("ready for the same app's next run", position)
    return lab.run()


def test_the_next_run_begins_afresh_in_a_worker_that_is_ready(next_run: Run) -> None:
    worker = next_run.lab.worker()
    metrics = next_run.send()["metrics"]
    assert (metrics["count"], metrics["state"], metrics["pid"]) == (1, 1, worker)


def test_flwr_stop_frees_the_device(lab: Lab, next_run: Run) -> None:
    """Even from work that cannot be interrupted."""
    position = lab.position()
    next_run.ask("train.native")
    lab.wait_for("train.native, round 3", position)
    lab.command("stop", str(next_run.run_id), "lab")
    started = time.monotonic()
    lab.wait_for("nobody waits for the reply any more", position)
    lab.wait_for("is not in `RUNNING` status. Ignoring reply message", position)
    assert time.monotonic() - started < 10


def test_an_app_that_is_not_composed_runs_from_its_own_files(lab: Lab) -> None:
    plain = lab.run(composed=False).send(sealed=False)["metrics"]
    assert plain["in_fab"] == 1
    assert (plain["count"], plain["state"]) == (1, 1)
    assert plain["pid"] != lab.worker()
