"""The local lab, deployed by the fixture `lab`; the tests build on each other, in this order."""

import csv
import json
import re
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import docker
import pytest
from conftest import (
    BATCH,
    EXAMPLES,
    HOME,
    RESULTS,
    ROUNDS,
    eventually,
    on_a_terminal,
    prometheus,
    query,
    run_yml,
)
from dashboards import DASHBOARDS, Query, queries
from dashboards import variables as variables_of
from labs import (
    DATA,
    Played,
    assert_a_device_reaches_the_fleet_api_alone,
    assert_no_more_rights_than_needed,
    play,
    published,
    secret_in,
)
from repository import ROOT

BYTES = {"m": 2**20, "g": 2**30}


def _bytes(text: str) -> int:
    return int(float(text[:-1]) * BYTES[text[-1].lower()])


def _rows(run: str, file: str) -> list[dict[str, str]]:
    with (RESULTS / run / file).open() as lines:
        return list(csv.DictReader(lines))


def _trained(run: str) -> list[dict[str, str]]:
    """The rows of a run's messages that asked for training."""
    return [row for row in _rows(run, "devices.csv") if row["type"] == "train"]


def test_check_mode_reaches_the_end_without_docker(
    before: None, variables: dict[str, Any], tmp_path: Path
) -> None:
    played = play(
        "site", "--check", env={"DOCKER_HOST": f"unix://{tmp_path}/no-engine.sock"}, **variables
    )
    assert "failed=0" in played.output
    assert not list(tmp_path.iterdir())
    assert not HOME.exists()


def test_site_shows_a_line_a_round_and_where_to_look(lab: Played) -> None:
    for number in range(1, ROUNDS + 1):
        line = rf"^ +{number}/{ROUNDS} +0\.\d{{4}} +\d\.\d{{4}} +\d+\.\d"
        assert re.search(line, lab.output, re.MULTILINE)
    assert "http://127.0.0.1:9090" in lab.output
    assert str(RESULTS) in lab.output


def test_limits_are_the_inventorys(
    lab: Played, engine: docker.DockerClient, inventory: dict[str, dict[str, Any]]
) -> None:
    assert len(inventory) == 4
    for device, wanted in inventory.items():
        host = engine.containers.get(f"flowerbed-device-{device}").attrs["HostConfig"]
        assert host["NanoCpus"] == round(wanted["device_speed"] * 1e9)
        assert host["CpuShares"] == round(wanted["device_speed"] * 1024)
        assert host["Memory"] == host["MemorySwap"] == _bytes(wanted["device_memory"])


def test_containers_have_no_more_rights_than_they_need(
    lab: Played, engine: docker.DockerClient
) -> None:
    containers = engine.containers.list(filters={"label": "flowerbed.part"})
    assert len(containers) == 4 + 6
    for container in containers:
        assert_no_more_rights_than_needed(container.attrs)
        assert {address for address, _ in published(container.attrs)} <= {"127.0.0.1"}


def test_prometheus_sees_everything(lab: Played, inventory: dict[str, dict[str, Any]]) -> None:
    up = {(s["metric"]["job"], s["metric"].get("instance")): s["value"][1] for s in query("up")}
    assert {job for job, _ in up} >= {"training", "cadvisor"}
    assert set(up.values()) == {"1"}
    assert len(query("model_accuracy")) == 1
    devices = run_yml("test-first")["devices"]
    # While a container goes, that of the report here, cAdvisor may tell nothing at all.
    disks = "container_fs_limit_bytes"
    eventually(
        lambda: bool({s["metric"]["disk"] for s in query(disks)}), 30, "cAdvisor tells of the disks"
    )
    for metric in (
        "rate(container_cpu_usage_seconds_total[1m])",
        "container_memory_working_set_bytes",
        "container_network_receive_bytes_total",
        "flowerbed_device_train_seconds",
        "flowerbed_device_info",
    ):
        seen = {s["metric"].get("device"): s["metric"] for s in query(metric)}
        assert set(inventory) <= set(seen), metric
        for device in inventory:
            assert seen[device]["device_class"] == devices[device]["device_class"]


def test_results_are_what_prometheus_saw(lab: Played) -> None:
    rounds = _rows("test-first", "rounds.csv")
    assert [int(row["round"]) for row in rounds] == list(range(1, ROUNDS + 1))

    last = rounds[-1]
    wanted = {
        "model_accuracy": float(last["accuracy"]),
        "model_loss": float(last["loss"]),
        "model_central_accuracy": float(last["central_accuracy"]),
        "flowerbed_round": ROUNDS,
    }

    def agrees() -> bool:
        return wanted == {name: float(query(name)[0]["value"][1]) for name in wanted}

    eventually(agrees, 30, "Prometheus shows the last row of rounds.csv")


def test_every_device_took_part(lab: Played, inventory: dict[str, dict[str, Any]]) -> None:
    rows = _trained("test-first")
    assert {(row["device"], int(row["round"])) for row in rows} == {
        (device, number) for device in inventory for number in range(1, ROUNDS + 1)
    }
    assert {row["outcome"] for row in rows} == {"completed"}
    told = run_yml("test-first")
    held = {name: device["examples"] for name, device in told["devices"].items()}
    for device, wanted in inventory.items():
        share = EXAMPLES / len(inventory) * wanted["device_data_fraction"]
        assert held[device] == pytest.approx(0.8 * share, abs=2)
    for row in rows:
        epochs = inventory[row["device"]]["device_local_epochs"]
        assert int(row["examples"]) == held[row["device"]] // BATCH * BATCH * epochs


def test_the_parts_of_a_round_add_up_to_it(lab: Played) -> None:
    rounds = {row["round"]: row for row in _rows("test-first", "rounds.csv")}
    rows = _trained("test-first")
    for number, row in rounds.items():
        whole = float(row["seconds"])
        server = [float(row[f"{part}_seconds"]) for part in ("configure", "aggregate", "evaluate")]
        devices = float(row["devices_seconds"])
        assert sum(server) + devices == pytest.approx(whole, rel=0.05)
        for device in (device for device in rows if device["round"] == number):
            parts = ("receive", "queue", "evaluate", "train", "send", "wait")
            own = [float(device[f"{part}_seconds"]) for part in parts]
            assert min(own) >= 0
            assert sum(server) + sum(own) == pytest.approx(whole, rel=0.05), device
            assert int(device["bytes_received"]) == int(device["bytes_sent"]) > 100_000
    starts = [float(row["started"]) for row in rounds.values()]
    assert starts[1] - starts[0] == pytest.approx(float(rounds["1"]["seconds"]), abs=1)


def test_run_yml_says_how_it_came_about(lab: Played) -> None:
    told = run_yml("test-first")
    assert told["run"]["num_server_rounds"] == ROUNDS
    assert told["server"]["libraries"]["flwr"] == "1.42.0"
    for each in (told["server"], *(device["environment"] for device in told["devices"].values())):
        assert each["processor"]
        assert each["kernel"]
        assert each["vector_extensions"]
        assert each["threads"] >= 1
    assert all(told["lab"]["machines"].values())  # the version of each engine
    assert set(told["lab"]["core_speeds"]) == set(told["lab"]["machines"])
    assert isinstance(told["repeatable"]["bitwise"], bool)
    assert told["repeatable"]["bitwise"] == (not told["repeatable"]["because"])
    assert told["lab"]["commit"]
    assert told["data"]["dataset"] == str(DATA.resolve())
    assert told["lab"]["images"]["application"].startswith("flowerbed/application:")
    assert all(re.fullmatch("[0-9a-f]{64}", d["shard"]) for d in told["devices"].values())
    assert all(len(d["labels"]) == 10 for d in told["devices"].values())
    assert all(sum(d["labels"]) == d["examples"] for d in told["devices"].values())


def test_the_model_loads_in_plain_keras(lab: Played) -> None:
    """With nothing of this project: the images go in as they are."""
    code = (
        "import json, keras, numpy as np\n"
        "model = keras.models.load_model('/results/model.keras')\n"
        "images, labels = (np.load(f'/shard/test/{n}.npy') for n in ('image', 'label'))\n"
        "hits = model.predict(images, verbose=0, batch_size=128).argmax(1) == labels\n"
        "print(json.dumps([len(labels), float(hits.mean())]))\n"
    )
    image = run_yml("test-first")["lab"]["images"]["application"]
    command = ["docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--workdir", "/tmp"]
    command += ["-v", f"{RESULTS}/test-first:/results:ro"]
    command += ["-v", f"{HOME}/shards/test/shard:/shard:ro"]
    command += [image, "python", "-I", "-c", code]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    examples, accuracy = json.loads(printed.splitlines()[-1])
    assert examples == 10_000
    wanted = float(_rows("test-first", "rounds.csv")[-1]["central_accuracy"])
    assert accuracy == pytest.approx(wanted, abs=2e-4)


def test_a_second_run_changes_nothing(lab: Played, variables: dict[str, Any]) -> None:
    played = play("site", **variables)
    assert played.changed == 0
    assert "the last one is test-first" in played.output


def _secrets() -> dict[str, str]:
    """Every secret of the lab, by its file."""
    keys = [*(ROOT / "inventory/local/.secrets").rglob("*.key"), *HOME.glob("keys/*/key")]
    keys += [HOME / "certificates/machine.key", HOME / "superlink/secrets/superexec"]
    return {str(path): secret_in(path.read_text()) for path in keys}


def test_keys_are_new_after_a_rotation_and_no_secret_is_shown(
    lab: Played, variables: dict[str, Any], engine: docker.DockerClient
) -> None:
    before = _secrets()
    output = play("rotate", "--diff", "-v", **variables).output
    after = _secrets()
    assert len(after) == 1 + 1 + 4 + 1 + 1  # authority, machine (twice), devices, executor
    # A machine's key is named after its authority, too: what counts is what is in them.
    assert not {secret for name, secret in after.items() if name.endswith("key")} & {
        *before.values()
    }
    for secret in (*before.values(), *after.values()):
        assert secret not in output
    for container in engine.containers.list(filters={"label": "flowerbed.part"}):
        described = json.dumps(container.attrs) + container.logs().decode()
        assert not [name for name, secret in after.items() if secret in described], container.name
    for directory in (ROOT / "inventory/local/.secrets", HOME / "keys"):
        for path in (directory, *directory.rglob("*key")):
            assert not path.stat().st_mode & 0o077, path
    more = {"training_run": "test-rotated", "training_rounds": 1, "training_model": "linear"}
    play("train", **variables | more)
    told = run_yml("test-rotated")
    assert len(told["devices"]) == 4


@pytest.mark.parametrize("stranger", ["without a key", "with an unknown key", "with another CA"])
def test_a_stranger_gets_nowhere(
    lab: Played, engine: docker.DockerClient, tmp_path: Path, stranger: str
) -> None:
    device = next(iter(engine.containers.list(filters={"label": "flowerbed.part=device"})))
    image = device.attrs["Config"]["Image"]
    common: dict[str, Any] = {"user": "10001:10001", "labels": ["flowerbed-test"]}
    tmp_path.chmod(0o777)
    make = ["python", "-m", "flowerbed.device.keys", "/keys", "stranger"]
    keys = {str(tmp_path): {"bind": "/keys", "mode": "rw"}}
    engine.containers.run(image, make, volumes=keys, remove=True, **common)
    command = ["flower-supernode", "--superlink=flowerbed-superlink:9092", "--max-retries=1"]
    if stranger != "with another CA":
        command += ["--root-certificates=/ca.crt"]
    if stranger != "without a key":
        command += ["--auth-supernode-private-key=/keys/stranger/key"]
    authority = {str(HOME / "certificates/ca.crt"): {"bind": "/ca.crt", "mode": "ro"}}
    tried = engine.containers.run(
        image, command, volumes=keys | authority, network="flowerbed", detach=True, **common
    )
    try:
        status = tried.wait(timeout=60)["StatusCode"]
        words = tried.logs().decode()
    finally:
        tried.remove(force=True)
    assert status != 0, words
    reason = {
        "without a key": "SuperNode",
        "with an unknown key": "SuperNode",
        "with another CA": "CERTIFICATE_VERIFY_FAILED",
    }[stranger]
    assert reason in words, words
    listed = engine.containers.get("flowerbed-superlink").exec_run(
        ["flwr", "supernode", "list", "--format", "json"]
    )
    assert isinstance(listed.output, bytes)
    nodes = json.loads(listed.output)["nodes"]
    assert sum(node["status"] == "online" for node in nodes) == 4


def test_a_device_can_start_no_run(lab: Played, engine: docker.DockerClient) -> None:
    """It meets the SuperLink at the gate, which is the only one in both networks."""
    of_control = ["flowerbed-gate", "flowerbed-serverapp", "flowerbed-superlink"]
    for network, wanted in (("flowerbed-control", of_control), ("flowerbed", ["flowerbed-gate"])):
        members = engine.networks.get(network).attrs["Containers"].values()
        here = {member["Name"] for member in members}
        assert sorted(here & {*of_control}) == wanted
    device = engine.containers.list(filters={"label": "flowerbed.part=device"})[0]

    def run(command: list[str]) -> str:
        code, output = device.exec_run(command)
        assert code == 0, output
        assert isinstance(output, bytes)
        return output.decode()

    assert_a_device_reaches_the_fleet_api_alone(run)
    superlink = engine.containers.get("flowerbed-superlink").attrs["NetworkSettings"]["Networks"]
    address = superlink["flowerbed-control"]["IPAddress"]
    connect = f"import socket; socket.create_connection(({address!r}, 9092), 3)"
    assert device.exec_run(["python", "-c", connect])[0] != 0


def test_status_is_a_table(lab: Played, inventory: dict[str, dict[str, Any]]) -> None:
    output = play("status").output
    rounds = _status()["rounds"]
    assert f"test-rotated: completed, round {rounds} of {rounds}" in output
    for device, wanted in inventory.items():
        line = next(line for line in output.splitlines() if f"{device} " in line)
        for value in (wanted["device_speed"], wanted["device_memory"], "Up ", "completed"):
            assert str(value) in line


def _lab(engine: docker.DockerClient) -> dict[str, Any]:
    """All that the lab is on this machine: containers and what they are made from, and files."""
    containers = engine.containers.list(all=True, filters={"label": "flowerbed.part"})
    made = {
        container.name: [container.status, container.attrs["HostConfig"]]
        + [container.attrs["Config"][part] for part in ("Image", "Cmd", "Env", "Labels", "User")]
        for container in containers
    }
    # What runs write goes on meanwhile.
    kept = [path for path in HOME.rglob("*") if not {"prometheus", "superlink"} & {*path.parts}]
    folders = [*Path("/var/cache").glob("flowerbed*"), *Path("/var/tmp").glob("*.flowerbed*")]
    return {"containers": made, "files": sorted(map(str, kept)), "folders": folders}


def test_what_is_broken_off_anywhere_ends_the_same(
    lab: Played,
    variables: dict[str, Any],
    engine: docker.DockerClient,
    inventory: dict[str, dict[str, Any]],
) -> None:
    """In mid-run, and while images are built and services and devices started."""
    shutil.rmtree(RESULTS / "test-broken-off", ignore_errors=True)
    before = _lab(engine)
    assert before["folders"] == []
    more = {"training_run": "test-broken-off", "training_model": "linear", "training_rounds": 3}
    play("train", until=" 1/3 ", **(variables | more))
    # It stays, as containers run on it, and is built anew from what was built before.
    engine.images.remove(run_yml("test-first")["lab"]["images"]["application"], force=True)
    play("site", until="images : Build the application", **variables)
    eventually(lambda: _status()["state"] == "completed", 120, "the run goes on alone")
    for name in ("metrics", f"device-{min(inventory)}"):
        engine.containers.get(f"flowerbed-{name}").remove(force=True)
    play("site", until="superlink : Start SuperLink", **variables)
    play("site", until="device : Start the device", **variables)
    assert not (RESULTS / "test-broken-off/report.html").exists()
    play("site", **variables)
    assert (RESULTS / "test-broken-off/report.html").exists()
    assert play("site", **variables).changed == 0
    assert _lab(engine) == before


def _status() -> dict[str, Any]:
    runs = HOME / "superlink/results"
    newest = (runs / "current").read_text().strip()
    told: dict[str, Any] = json.loads((runs / newest / "status.json").read_text())
    return told


def _kill(engine: docker.DockerClient, device: str, command: str) -> None:
    """Kill the process of a device's container that has `command` in its name or command line."""
    container = engine.containers.get(f"flowerbed-device-{device}")
    for pid, *names in container.top(ps_args="-eo pid,comm,args")["Processes"]:
        if command in " ".join(names):
            subprocess.run(["kill", "-9", pid], check=True)
            return
    raise AssertionError(f"{device} runs no {command}")


def _pause(container: Any) -> None:
    """In a moment in which its quota holds it back runc cannot freeze it (cgroup v1)."""

    def paused() -> bool:
        with suppress(docker.errors.APIError):
            container.pause()
            return True
        return False

    eventually(paused, 20, f"{container.name} is paused")


@contextmanager
def _beside(disturb: Callable[[], None]) -> Iterator[None]:
    """Disturb what happens in the block; an assertion that fails there fails the test."""
    problems: list[str] = []

    def guarded() -> None:
        try:
            disturb()
        except AssertionError as error:
            problems.append(str(error))

    thread = threading.Thread(target=guarded)
    thread.start()
    yield
    thread.join()
    assert not problems


def test_a_run_survives_its_faults(
    lab: Played,
    variables: dict[str, Any],
    engine: docker.DockerClient,
    inventory: dict[str, dict[str, Any]],
) -> None:
    """In round 1 a worker and a SuperNode are killed by hand; the rest is on schedule."""
    worker, supernode, container, full = sorted(inventory)
    faults: list[dict[str, Any]] = [
        {"at_round": 1, "do": "kill", "device": container, "seconds": 3},
        {"at_round": 2, "do": "restart_superlink"},
        {"at_round": 3, "do": "fill_memory", "device": full, "seconds": 15},
        {"at_second": 20, "do": "slow", "device": container, "share": 0.5},
    ]

    def disturb() -> None:
        began = int(time.time())
        eventually(lambda: _status()["run"] == "test-faults", 120, "the run begins")
        eventually(lambda: _status()["state"] == "running", 300, "the run is running")
        time.sleep(1)
        _kill(engine, supernode, "flower-supernod")  # the kernel keeps 15 letters
        busy = engine.containers.get(f"flowerbed-device-{worker}")
        at_work = b"train, round 1"
        eventually(lambda: at_work in busy.logs(since=began), 60, f"{worker} trains")
        _kill(engine, worker, "flowerbed.device.worker")

    more = {"training_run": "test-faults", "training_rounds": 5, "training_round_timeout": 150}
    with _beside(disturb):
        play("train", training_faults=faults, **(variables | more))
    rows = _trained("test-faults")
    first = {row["device"]: row["outcome"] for row in rows if row["round"] == "1"}
    assert first[worker] == "error"
    assert first[supernode] == first[container] == "offline"
    last = {row["device"]: row["outcome"] for row in rows if row["round"] == "5"}
    assert set(last.values()) == {"completed"}
    assert set(last) == set(inventory)
    reason = next(r["reason"] for r in rows if r["device"] == worker and r["outcome"] == "error")
    assert "signal 9" in reason
    third = {row["device"]: row["outcome"] for row in rows if row["round"] == "3"}
    # Killed before it was asked, it is waited for and completes.
    assert third[full] in ("out_of_memory", "completed")
    log = engine.containers.get(f"flowerbed-device-{full}").logs()
    assert b"the worker died of: out_of_memory" in log
    for number in range(1, 6):
        assert len({row["device"] for row in rows if row["round"] == str(number)}) == len(inventory)
    injected = _rows("test-faults", "faults.csv")
    assert {row["problem"] for row in injected} == {""}
    what = [(row["fault"], row["target"]) for row in injected]
    assert sorted(what) == sorted(
        [
            *(("kill", container), ("rejoin", container)),
            *(("restart_superlink", "superlink"), ("rejoin", "superlink")),
            ("fill_memory", full),
            *(("slow", container), ("rejoin", container)),  # the latter when the run was over
        ]
    )
    assert all(row["round"] == "1" for row in injected if row["fault"] == "kill")
    limit = round(inventory[container]["device_speed"] * 1e9)
    host = engine.containers.get(f"flowerbed-device-{container}").attrs["HostConfig"]
    assert host["NanoCpus"] == limit
    seen = 'flowerbed_fault_seconds{fault="fill_memory"}'
    eventually(lambda: bool(query(seen)), 30, "Prometheus knows of the faults")


def test_faults_that_cannot_be_are_refused_before_the_run(
    lab: Played, variables: dict[str, Any]
) -> None:
    faults = [{"at_round": 1, "do": "kill", "device": "laptop-2"}]
    played = play("train", ok=False, training_faults=faults, **variables)
    assert played.code != 0
    assert re.search("no device or class 'laptop-2': write laptop-1", played.output)


def test_a_paused_device_is_alerted_and_counted(
    lab: Played,
    variables: dict[str, Any],
    engine: docker.DockerClient,
    inventory: dict[str, dict[str, Any]],
) -> None:
    paused = min(inventory)
    alert = f'ALERTS{{alertname="DeviceOffline",alertstate="firing",device="{paused}"}}'
    container = engine.containers.get(f"flowerbed-device-{paused}")

    def disturb() -> None:
        eventually(lambda: _status()["run"] == "test-paused", 120, "the run begins")
        eventually(lambda: _status()["round"] >= 1, 300, "round 1 ends")
        _pause(container)
        try:
            eventually(lambda: bool(query(alert)), 240, f"the alert for {paused} fires")
        finally:
            container.unpause()

    # Rounds of little work, so that what is waited for is the alert.
    more = {"training_run": "test-paused", "training_model": "linear", "training_rounds": 70}
    more["training_round_timeout"] = 60
    with _beside(disturb):
        play("train", **(variables | more))
    outcomes: dict[str, int] = {}
    for row in _trained("test-paused"):
        if row["device"] == paused:
            outcomes[row["outcome"]] = outcomes.get(row["outcome"], 0) + 1
        else:
            assert row["outcome"] == "completed"
    assert outcomes["offline"] + outcomes.get("timeout", 0) >= 2
    counted = f'flowerbed_device_outcomes_total{{device="{paused}"}} > 0'

    def agrees() -> bool:
        return outcomes == {s["metric"]["outcome"]: int(s["value"][1]) for s in query(counted)}

    eventually(agrees, 30, "Prometheus counts the outcomes as devices.csv does")
    eventually(lambda: not query(alert), 30, "the alert is over")


def test_a_stuck_device_holds_no_paced_round_up(
    lab: Played,
    variables: dict[str, Any],
    engine: docker.DockerClient,
    inventory: dict[str, dict[str, Any]],
) -> None:
    """Stopped while it trains, it answers when its round is long over."""
    box, grace = 15, 6
    stuck = min(inventory)
    container = engine.containers.get(f"flowerbed-device-{stuck}")

    def disturb() -> None:
        began = int(time.time())
        eventually(lambda: _status()["run"] == "test-paced", 120, "the run begins")
        at_work = b"train, round 2"
        eventually(lambda: at_work in container.logs(since=began), 120, f"{stuck} trains")
        _pause(container)
        time.sleep(box + grace + 5)
        container.unpause()

    more = {"training_run": "test-paced", "training_strategy": "paced", "training_rounds": 5}
    more["training_strategy_parameters"] = {"box": box, "grace": grace}
    with _beside(disturb):
        play("train", **(variables | more))
    rounds, devices = _rows("test-paced", "rounds.csv"), _trained("test-paced")
    # The server looks twice a second.
    assert all(float(row["devices_seconds"]) <= box + grace + 1.5 for row in rounds)
    (late,) = (row for row in devices if row["outcome"] == "late")
    assert (late["device"], late["round"], late["aggregated"]) == (stuck, "2", "")
    assert int(late["examples"]) > 0
    assert {row["outcome"] for row in devices if row["round"] == "5"} <= {"completed", "partial"}
    for row in rounds:
        counted = [int(r["examples"]) for r in devices if r["aggregated"] == row["round"]]
        assert int(row["examples"]) == sum(counted)


def test_every_rule_works(lab: Played) -> None:
    rules = [rule for group in prometheus("rules")["groups"] for rule in group["rules"]]
    assert {rule["type"] for rule in rules} == {"recording", "alerting"}
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}


def test_every_query_of_every_dashboard_returns_data(lab: Played) -> None:
    """Within the tests until here: of alerts and faults, too, there have been some."""
    now = time.time()
    window = {"start": now - 1800, "end": now, "step": 5}
    silent: list[str] = []
    for path in DASHBOARDS:
        values: dict[str, list[str]] = {}
        for name, (series, label) in variables_of(path).items():
            some = {"match[]": Query(path.name, series).expand(values)}
            values[name] = prometheus(f"label/{label}/values", **some)
            assert values[name], f"{path.name}: {name}"
        silent += [
            f"{each.where}: {each.expression}"
            for each in queries(path)
            if not prometheus("query_range", query=each.expand(values), **window)["result"]
        ]
    assert silent == []


def test_prometheus_keeps_its_data(
    lab: Played, variables: dict[str, Any], engine: docker.DockerClient
) -> None:
    oldest = "min_over_time(timestamp(flowerbed_round)[1h:15s])"
    before = float(query(oldest)[0]["value"][1])
    engine.containers.get("flowerbed-prometheus").remove(force=True)
    assert play("coordinator", **variables).changed == 1
    eventually(lambda: bool(query(oldest)), 30, "Prometheus answers")
    assert float(query(oldest)[0]["value"][1]) == pytest.approx(before, abs=60)


def test_a_new_target_needs_no_restart(
    lab: Played, variables: dict[str, Any], engine: docker.DockerClient
) -> None:
    def started() -> str:
        return str(engine.containers.get("flowerbed-prometheus").attrs["State"]["StartedAt"])

    before = started()
    targets = [
        {"job": target["labels"]["job"], "address": target["labels"]["instance"]}
        | {"labels": {"machine": target["labels"].get("machine", "")}}
        for target in prometheus("targets")["activeTargets"]
    ]
    newcomer = {"job": "cadvisor", "address": "flowerbed-prometheus:9090"}
    newcomer_up = 'up{instance="flowerbed-prometheus:9090"} == 1'
    play("coordinator", prometheus_targets=[*targets, newcomer], **variables)
    eventually(lambda: bool(query(newcomer_up)), 30, "the new target is scraped")
    play("coordinator", **variables)
    eventually(lambda: not query(newcomer_up), 30, "it is scraped no more")
    assert started() == before


def test_watching_shows_what_devices_do(
    lab: Played, variables: dict[str, Any], inventory: dict[str, dict[str, Any]]
) -> None:
    """On a terminal a table that is written over, while another terminal's run goes on."""
    more = {"training_run": "test-watched", "training_rounds": 2}
    thread = threading.Thread(target=lambda: play("train", **(variables | more)))
    thread.start()
    eventually(lambda: _status()["run"] == "test-watched", 120, "the run begins")
    code, seen = on_a_terminal("ansible-playbook", "playbooks/watch.yml")
    thread.join()
    assert code == 0
    over = re.findall(r"\x1b\[(\d+)A\x1b\[J", seen)
    assert over
    plain = re.sub(r"\x1b\[[\d;]*[AJm]", "", seen)
    assert re.search(r"^ +2/2 +0\.\d{4} ", plain, re.MULTILINE)
    for device, wanted in inventory.items():
        memory = _bytes(wanted["device_memory"]) // BYTES["m"]
        # A fast device may be done whenever the table is drawn.
        row = rf"{device} +\w+ +(working|waiting) +\d.* \d+ of {memory} MiB"
        assert re.search(row, plain), device
    assert re.search(r"\w +working +\d", plain)
    assert re.search(r"round 2/2, \d+ s", plain)


def test_classes_are_as_fast_as_the_catalogue_says(
    lab: Played, inventory: dict[str, dict[str, Any]]
) -> None:
    """By the rounds of all runs in which no device was slowed down on purpose.

    A round of ten seconds tells as much of what else the machine did, and of who shared a core.
    """
    rows = [row for run in ("first", "paced", "watched") for row in _trained(f"test-{run}")]
    measured = {
        device: statistics.median(
            float(row["examples_per_second"])
            for row in rows
            if row["device"] == device and row["outcome"] in ("completed", "partial")
        )
        for device in inventory
    }
    by_catalogue = sorted(measured, key=lambda device: inventory[device]["device_speed"])
    by_measure = sorted(measured, key=lambda device: measured[device])
    ranks = [by_measure.index(device) - place for place, device in enumerate(by_catalogue)]
    count = len(ranks)
    correlation = 1 - 6 * sum(rank**2 for rank in ranks) / (count * (count**2 - 1))
    print(f"rank correlation {correlation:.2f}: {measured}")
    assert correlation == 1.0, measured


def test_runs_are_compared_and_unknown_ones_refused(lab: Played) -> None:
    play("report", runs="test-first,test-watched")
    assert (RESULTS / "test-first-test-watched.html").exists()
    played = play("report", runs="test-first,nope", ok=False)
    assert played.code != 0
    assert re.search(
        r"run '+nope'+ has no results; runs with results:[\s\S]*test-first", played.output
    )


def _logs(run: str) -> dict[str, str]:
    """What was collected: container to log."""
    return {path.stem: path.read_text() for path in (RESULTS / run / "logs/local").glob("*.log")}


def test_logs_of_every_container_are_collected(lab: Played, engine: docker.DockerClient) -> None:
    play("logs")
    logs = _logs("test-watched")
    containers = engine.containers.list(all=True, filters={"label": "flowerbed.part"})
    assert set(logs) == {container.name for container in containers}
    assert re.search(r"round 2/2: \d+\.\d s, 4 models", logs["flowerbed-serverapp"])
    for log in logs.values():
        times = [line.split(" ")[0] for line in log.splitlines()]
        assert times == sorted(times)
    secrets = [path for path in (HOME / "superlink/secrets").rglob("*") if path.is_file()]
    secrets += [path for path in (ROOT / "inventory/local/.secrets").rglob("*") if path.is_file()]
    assert secrets
    for secret in secrets:
        text = secret.read_text().strip()
        assert not [name for name, log in logs.items() if text in log], secret


def test_missing_devices_are_named(
    lab: Played,
    variables: dict[str, Any],
    engine: docker.DockerClient,
    inventory: dict[str, dict[str, Any]],
) -> None:
    absent = min(inventory)
    engine.containers.get(f"flowerbed-device-{absent}").stop()
    more = {"training_run": "test-missing", "training_device_wait": 60}
    played = play("train", ok=False, **(variables | more))
    engine.containers.get(f"flowerbed-device-{absent}").start()
    assert played.code != 0
    assert re.search(rf"not ready after 60 s: {absent}\.", played.output)
    # The end of its log is shown, and those of all are there to read.
    log = RESULTS / f"test-missing/logs/local/flowerbed-device-{absent}.log"
    assert f"The end of {log}:" in played.output
    assert log.read_text().splitlines()[-1] in played.output
    assert "flowerbed-serverapp" in _logs("test-missing")
    assert "not ready after 60 s" in (RESULTS / "test-missing/report.html").read_text()
