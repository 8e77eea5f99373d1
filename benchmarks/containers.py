"""Containers beside the lab: their limits, their cost, and plain Flower in them."""

import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
from measure import ROOT, say

NETWORK = "flowerbed-benchmark"
"""Name of the network and label of the containers."""
SERVER = f"{NETWORK}-server"
BUILT_IMAGE = ROOT / ".cache" / "application-image"
"""The file in which `make images` notes the application image of this checkout."""
SUPERLINK = [
    *("flower-superlink", "--insecure", "--host=0.0.0.0", "--port=9092"),
    "--disable-runtime-dependency-installation",
]
_SUPERNODE = ["flower-supernode", "--insecure", "--superlink", f"{SERVER}:9092", "--node-config"]
CONNECTION = '[superlink.lab]\naddress = "127.0.0.1:9092"\ninsecure = true\n'
"""What config.toml in FLWR_HOME says of the SuperLink in the same container, `lab`."""
_SAMPLE_INTERVAL = 1.0
_PATIENCE = 2400.0


@contextmanager
def network(engine: docker.DockerClient) -> Iterator[None]:
    """Create the network of the containers; remove it and them at the end.

    What a benchmark that was killed has left is removed first.
    """
    _clear(engine)
    engine.networks.create(NETWORK)
    try:
        yield
    finally:
        _clear(engine)


def _clear(engine: docker.DockerClient) -> None:
    for container in engine.containers.list(all=True, filters={"label": NETWORK}):
        container.remove(force=True)
    for each in engine.networks.list(names=[NETWORK]):
        each.remove()


def start(
    engine: docker.DockerClient,
    name: str,
    image: str,
    command: Sequence[str],
    *,
    cpus: float | None = None,
    memory: str | None = None,
    **options: Any,
) -> Any:
    """Start a container; `memory` is a size such as 512m, and there is no swap beyond it."""
    limits: dict[str, Any] = {"nano_cpus": int(cpus * 1e9)} if cpus else {}
    if memory:
        limits |= {"mem_limit": memory, "memswap_limit": memory}
    return engine.containers.run(
        image,
        list(command),
        name=f"{NETWORK}-{name}",
        network=NETWORK,
        labels=[NETWORK],
        detach=True,
        **limits,
        **options,
    )


def execute(container: Any, *command: str) -> str:
    """Run a command in a container and return what it prints.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    code, output = container.exec_run(list(command), demux=True)
    printed, errors = ((part or b"").decode(errors="replace") for part in output)
    if code:
        sys.exit(f"{printed}\n{errors}\n{command[:3]} in {container.name} failed: see above")
    return printed


def output_of(container: Any) -> str:
    """Wait for the end of a container and return what it has printed.

    Raises:
        SystemExit: it failed; the end of its log is shown.
    """
    if code := container.wait()["StatusCode"]:
        _give_up(container, f"has failed ({code})")
    return str(container.logs(stderr=False).decode())


def _give_up(container: Any, problem: str) -> None:
    log = container.logs(tail=40).decode(errors="replace")
    sys.exit(f"{log}\n{container.name} {problem}: see above")


def wait_until(
    condition: Callable[[], bool], container: Any, what: str, patience: float, pause: float = 1.0
) -> None:
    """Look every `pause` seconds until a condition is true.

    Raises:
        SystemExit: the container has ended, or it took more than `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while not condition():
        container.reload()
        if container.status == "exited" or time.monotonic() > deadline:
            _give_up(container, f"is {container.status}, without: {what}")
        time.sleep(pause)


# --- what a container takes --------------------------------------------------------------------


@dataclass
class Cost:
    """What a container took while it was watched.

    Attributes:
        peak: bytes of its working set (usage without file pages that can be dropped).
        cpu: seconds.
        throttled: share of its periods.
    """

    peak: int = 0
    cpu: float = 0.0
    throttled: float = 0.0
    _first: dict[str, Any] = field(default_factory=dict, repr=False)

    def add(self, stats: dict[str, Any]) -> None:
        """Add a sample of the engine's statistics."""
        memory = stats.get("memory_stats") or {}
        if "usage" not in memory:  # the container has ended
            return
        details = memory["stats"]
        idle = details.get("total_inactive_file", details.get("inactive_file", 0))
        self.peak = max(self.peak, memory["usage"] - idle)
        processor = stats["cpu_stats"]
        first = self._first or processor
        self._first = first
        self.cpu = (processor["cpu_usage"]["total_usage"] - first["cpu_usage"]["total_usage"]) / 1e9
        throttling = processor["throttling_data"]
        periods = throttling["periods"] - first["throttling_data"]["periods"]
        held = throttling["throttled_periods"] - first["throttling_data"]["throttled_periods"]
        self.throttled = held / periods if periods else 0.0


@contextmanager
def repeating(action: Callable[[], None], interval: float) -> Iterator[None]:
    """Call `action` in a thread until the block ends, with pauses of `interval` seconds."""
    end = threading.Event()

    def repeat() -> None:
        while not end.wait(interval):
            action()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@contextmanager
def watch(containers: Mapping[str, Any]) -> Iterator[dict[str, Cost]]:
    """Sample containers each second until the block ends."""
    costs = {name: Cost() for name in containers}

    def sample() -> None:
        for name, container in containers.items():
            try:
                costs[name].add(container.stats(stream=False, one_shot=True))
            except docker.errors.APIError:
                continue  # it has been removed

    with repeating(sample, _SAMPLE_INTERVAL):
        yield costs


# --- events ------------------------------------------------------------------------------------


def journal(container: Any) -> list[dict[str, Any]]:
    """Return the events that a way has printed (`ways/journal.py`), oldest first."""
    lines = container.logs().decode(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"event"')]


def wait_for(container: Any, event: str, patience: float = _PATIENCE) -> None:
    """Wait until a way has printed an event; show all events meanwhile.

    Raises:
        SystemExit: see `wait_until`.
    """
    shown = 0

    def printed() -> bool:
        nonlocal shown
        events = journal(container)
        for each in events[shown:]:
            detail = each.get("round", each.get("accuracy", ""))
            say(f"  {container.name}: {each['event']} {detail}")
        shown = len(events)
        return any(each["event"] == event for each in events)

    wait_until(printed, container, event, patience)


def round_seconds(events: Iterable[Mapping[str, Any]]) -> list[float]:
    """Return the seconds of each round: from its event `round` to the next one, or to `end`."""
    times = [event["time"] for event in events if event["event"] in ("round", "end")]
    return [after - before for before, after in itertools.pairwise(times)]


# --- plain Flower ------------------------------------------------------------------------------


def wait_until_healthy(superlink: Any) -> None:
    """Wait until the SuperLink in a container replies.

    Raises:
        SystemExit: see `wait_until`.
    """
    code = "import urllib.request as u; u.urlopen('http://127.0.0.1:9092/health', timeout=5)"
    command = ["python", "-c", code]
    wait_until(lambda: not superlink.exec_run(command).exit_code, superlink, "a reply", 120)


def run_plain_flower(
    engine: docker.DockerClient,
    image: str,
    app: Path,
    config: str,
    nodes: Mapping[str, Mapping[str, Any]],
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Start a SuperLink and SuperNodes as Flower's documentation has them, and a run of an app.

    Args:
        app: its directory.
        config: run configuration, for `flwr run`.
        nodes: name to the options of the SuperNode's container (see `start`), and as `node_config`
            its node configuration.
        options: of all containers.

    Returns:
        The container of the SuperLink, and those of the SuperNodes by name.
    """
    volumes = [*options.pop("volumes", ()), f"{app}:/plain:ro"]
    server = start(engine, "server", image, SUPERLINK, volumes=volumes, **options)
    containers = {}
    for name, node in nodes.items():
        own = dict(node)
        command = [*_SUPERNODE, own.pop("node_config")]
        mounted = [*volumes, *own.pop("volumes", ())]
        containers[name] = start(engine, name, image, command, volumes=mounted, **own, **options)
    wait_until_healthy(server)
    note = f"mkdir -p $FLWR_HOME && printf '%s' '{CONNECTION}' > $FLWR_HOME/config.toml"
    execute(server, "sh", "-c", f"{note} && flwr run /plain lab --run-config '{config}'")
    return server, containers


def wait_for_plain_run(server: Any) -> None:
    """Wait for the end of the only run of a plain SuperLink.

    Raises:
        SystemExit: it failed, or does not end.
    """

    def finished() -> bool:
        listed = json.loads(execute(server, "flwr", "list", "lab", "--format", "json"))["runs"]
        status = str(listed[0]["status"])
        if status.startswith("finished") and status != "finished:completed":
            _give_up(server, f"says of the run: {status}")
        return status.startswith("finished")

    # Each look starts Flower's command line, which takes a second of a core.
    wait_until(finished, server, "the end of the run", _PATIENCE, pause=10)
