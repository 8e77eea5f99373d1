"""The benchmarks, as far as nothing has to be deployed; the pages show their figures."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = (
    "rounds",
    "learning",
    "memory",
    "deployment",
    "scale",
    "watching",
    "strategies",
    "faults",
    "apps",
    "bookkeeping",
)
MEASURED = [name for name in BENCHMARKS if (ROOT / f"benchmarks/results/{name}.csv").exists()]
NOT_MEASURED = sorted(set(BENCHMARKS) - set(MEASURED))
HERE = {"machine": "this one", "engine": "27", "commit": "abc"}


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def measure() -> ModuleType:
    return importlib.import_module("measure")


@pytest.fixture
def figures(measure: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory in place of results/, and no engine to ask."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- rounds -->\nNot measured yet.\n<!-- /rounds -->\nafter\n")
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(measure, "DRAFTS", tmp_path / "drafts")
    monkeypatch.setattr(measure, "PAGES", (page,))
    monkeypatch.setattr(measure, "surroundings", HERE.copy)
    return tmp_path


# --- what is published ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_pages_quote_the_figures(name: str, measure: ModuleType) -> None:
    assert measure.ROOT == ROOT
    table = importlib.import_module(name).table() if name not in NOT_MEASURED else measure.NOT_YET
    wanted = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
    quoting = [page for page in measure.PAGES if f"<!-- {name} -->" in page.read_text()]
    assert quoting
    assert [page for page in quoting if wanted not in page.read_text()] == []


@pytest.mark.parametrize("name", MEASURED)
def test_every_row_tells_where_it_was_measured(name: str, measure: ModuleType) -> None:
    rows = measure.results(name)
    assert rows
    assert all(row["machine"] and row["commit"] and row["engine"] for row in rows)


def test_figures_are_published_at_the_end(measure: ModuleType, figures: Path) -> None:
    record = measure.Record("rounds")
    record.add({"way": "plain", "seconds": 1.5}, {"way": "floor", "commit": "other"})
    assert measure.results("rounds") == []
    measure.publish(lambda: measure.markdown(["a"], [["b"]]), record)
    rows = measure.results("rounds")
    assert rows[0] == {"way": "plain", "seconds": "1.5"} | HERE
    assert rows[1] == {"way": "floor", "seconds": ""} | HERE | {"commit": "other"}
    table = "| a |\n| --- |\n| b |"
    page = f"before\n<!-- rounds -->\n{table}\n<!-- /rounds -->\nafter\n"
    assert (figures / "page.md").read_text() == page
    assert list((figures / "drafts").iterdir()) == []


@pytest.mark.usefixtures("figures")
def test_figures_from_another_machine_are_not_kept(
    measure: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = measure.Record("rounds")
    record.add({"way": "plain"}, {"way": "floor"})
    record.finish()

    def kept() -> list[str]:
        found = measure.Record("rounds", keep=lambda row: row["way"] == "plain").rows
        return [row["way"] for row in found]

    assert kept() == ["plain"]
    monkeypatch.setattr(measure, "surroundings", lambda: HERE | {"machine": "another one"})
    assert kept() == []


# --- the command line ----------------------------------------------------------------------------


def test_make_knows_every_benchmark() -> None:
    text = (ROOT / "Makefile").read_text()
    assert f"BENCHMARKS = {' '.join(BENCHMARKS)}\n" in text


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    benchmark = importlib.import_module(name)
    with pytest.raises(SystemExit, match=r"^0$"):
        benchmark.main()
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_a_terminated_benchmark_ends_what_it_has_started(tmp_path: Path) -> None:
    # The program that it runs, in place of ansible-playbook: needs a moment to end.
    program = tmp_path / "slow"
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys, time\n"
        "try:\n"
        "    print('  1/5  0.1', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(0.3); print('ended', file=open(sys.argv[1], 'w'))\n"
    )
    program.chmod(0o755)
    script = (
        "import sys, measure, pathlib\n"
        "measure.command_line('').parse_args([])\n"
        f"sys.executable = {str(tmp_path / 'python')!r}\n"
        "try:\n"
        f"    measure.run('slow', {str(tmp_path / 'log')!r})\n"
        "finally:\n"
        f"    print('removed', pathlib.Path({str(tmp_path / 'log')!r}).read_text())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert "1/5  0.1" in process.stdout.readline()
        process.terminate()
        output, errors = process.communicate(timeout=20)
    assert output == "removed ended\n\n"
    assert errors == "terminated\n"
    assert process.returncode == 1


# --- what is made of a run -----------------------------------------------------------------------


def write_csv(path: Path, text: str) -> None:
    """Write a CSV file from lines with spaces between the cells; `-` is an empty cell."""
    lines = [line.split() for line in text.strip().splitlines()]
    path.write_text("\n".join(",".join(c.strip("-") for c in line) for line in lines) + "\n")


@pytest.fixture
def run(measure: ModuleType, tmp_path: Path) -> Any:
    """Two rounds of two devices, of which one fails in the second round."""
    write_csv(
        tmp_path / "rounds.csv",
        """
        round started seconds devices_seconds examples central_accuracy
        1     100     10      9               30       0.25
        2     110     12      11              10       0.5
        """,
    )
    parts = "receive_seconds queue_seconds evaluate_seconds train_seconds send_seconds wait_seconds"
    write_csv(
        tmp_path / "devices.csv",
        f"""
        round type     started device outcome   aggregated examples accuracy seconds {parts}
        1     train    100     pi     completed 1          10       0.1      4       1 0 1 1 1 6
        1     train    100     phone  completed 1          20       0.3      8       1 1 1 4 1 2
        2     train.me 110     pi     completed 2          10       0.5      4       1 0 1 1 1 8
        2     train    110     phone  timeout   -          0        -        12      0 0 0 0 0 0
        2     evaluate 122     pi     completed -          5        0.9      1       0 0 1 0 0 0
        """,
    )
    write_csv(
        tmp_path / "faults.csv",
        """
        time round fault  target seconds problem
        115  2     pause  phone  3       -
        118  2     rejoin phone  -       -
        """,
    )
    return measure.Run(tmp_path, 50.0)


def test_only_messages_of_training_are_training(run: Any) -> None:
    assert [row["type"] for row in run.trained] == ["train", "train", "train.me", "train"]


def test_results_of_older_versions_are_all_training(measure: ModuleType, tmp_path: Path) -> None:
    write_csv(tmp_path / "devices.csv", "round device\n1 pi")
    assert len(measure.Run(tmp_path, 0).trained) == 1


def test_the_curve_of_a_run(measure: ModuleType, run: Any) -> None:
    assert measure.accuracy_curve(run) == [
        {"round": "1", "seconds": 10.0, "accuracy": 0.25},
        {"round": "2", "seconds": 22.0, "accuracy": 0.5},
    ]


def test_a_round_beside_the_slowest_device(run: Any) -> None:
    first, second = importlib.import_module("rounds").rows_of_run(run)
    assert first["slowest_device"] == "phone"
    assert first["outside_seconds"] == 5.0
    assert first["transport_seconds"] == 3.0
    assert first["fixed_seconds"] == second["fixed_seconds"] == 28.0


def test_the_summary_of_a_run_with_a_strategy(run: Any) -> None:
    summary = importlib.import_module("strategies").summary(run)
    assert summary == {
        "waiting": round(16 / (16 + 17), 3),
        "longest_round": 11.0,
        "least_device": 0.3,
    }


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("faults")
    monkeypatch.setattr(module, "DEVICES", ["phone", "pi"])
    return module


def test_correct_records_are_accepted(faults: ModuleType, run: Any) -> None:
    row = {"round": "2", "fault": "pause", "target": "phone", "seconds": "3"}
    assert faults.check(run, [{}], 2) == [row | {"felt": "timeout:2"}]


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("rounds", "2,110,12,11,10,0.5\n", "", "1 rounds of 2"),
        ("rounds", "100,10,9,30", "100,10,9,31", "round 1: its examples"),
        ("devices", "110,pi,completed", "110,pi,late", "round 2: pi counts, and is late"),
        ("devices", "1,train,100,pi", "2,train,110,phone", "round 2: 2 rows of phone"),
        ("devices", "1,train,100,pi", "1,query,100,pi", "round 1: no row of pi"),
        ("faults", "pause,phone", "pause,pi", "round 2: phone is timeout for no reason"),
        ("faults", "115,2,pause,phone,3,", "115,2,pause,phone,3,gone", "pause phone: gone"),
        ("faults", "115,2,pause,phone,3,\n", "", "0 faults of 1"),
    ],
)
def test_wrong_records_are_found(
    faults: ModuleType, run: Any, *, file: str, old: str, new: str, problem: str
) -> None:
    path = run.directory / f"{file}.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(SystemExit, match=problem):
        faults.check(run, [{}], 2)


def test_faults_are_spread_over_kinds_and_devices() -> None:
    faults = importlib.import_module("faults")
    planned = faults.schedule(50, 1)
    assert planned == faults.schedule(50, 1)
    assert [fault["at_round"] for fault in planned] == list(range(2, 50, 2))
    assert all(sum(fault["do"] == kind for fault in planned) == 4 for kind in faults.KINDS)
    assert all(("device" in fault) == (fault["do"] != "restart_superlink") for fault in planned)


# --- what is made of logs ------------------------------------------------------------------------

LOG = """\
2026-11-28T01:19:40.5Z INFO :      [RUN 1]
2026-11-28T01:19:40.6Z INFO :      Receiving: query message (ID: a)
2026-11-28T01:19:5{0}.926131519Z \x1b[92mINFO \x1b[0m:      [RUN 6650095242531541998, ROUND 1]
2026-11-28T01:19:5{0}.981157948Z \x1b[92mINFO \x1b[0m:      Receiving: train message (ID: b)
2026-11-28T01:19:58.178543653Z \x1b[92mINFO \x1b[0m:      [RUN 6650095242531541998, ROUND 1]
2026-11-28T01:19:58.178758930Z \x1b[92mINFO \x1b[0m:      Sending: train message (ID: c)
2026-11-28T01:19:59.853283812Z \x1b[92mINFO \x1b[0m:      [RUN 6650095242531541998, ROUND 1]
2026-11-28T01:19:59.869046740Z \x1b[92mINFO \x1b[0m:      Receiving: evaluate message (ID: d)
2026-11-28T01:20:0{0}.926131519Z \x1b[92mINFO \x1b[0m:      [RUN 6650095242531541998, ROUND 2]
2026-11-28T01:20:0{0}.981157948Z \x1b[92mINFO \x1b[0m:      Receiving: train message (ID: e)
"""


def test_rounds_are_measured_from_the_logs_of_all_devices() -> None:
    apps = importlib.import_module("apps")
    logs = [LOG.format(second).splitlines() for second in (4, 3)]
    logs[1] = logs[1][:-2]  # the earlier device has no second round
    assert apps.seconds_of_rounds(logs, 2) == pytest.approx([11.0])


def test_a_round_that_is_missing_in_the_logs_is_an_error() -> None:
    apps = importlib.import_module("apps")
    with pytest.raises(SystemExit, match=r"the rounds \[1, 2\], of 3"):
        apps.seconds_of_rounds([LOG.format(4).splitlines()], 3)


def test_what_a_container_takes() -> None:
    containers = importlib.import_module("containers")
    cost = containers.Cost()

    def stats(usage: int, cpu: int, periods: int, throttled: int) -> dict[str, Any]:
        throttling = {"periods": periods, "throttled_periods": throttled}
        memory = {"usage": usage, "stats": {"inactive_file": 10}}
        processor = {"cpu_usage": {"total_usage": cpu * 10**9}, "throttling_data": throttling}
        return {"memory_stats": memory, "cpu_stats": processor}

    for each in (stats(100, 5, 10, 1), stats(300, 7, 20, 5), stats(200, 8, 30, 6), {}):
        cost.add(each)
    assert (cost.peak, cost.cpu, cost.throttled) == (290, 3.0, 0.25)


def test_the_recap_of_a_playbook(measure: ModuleType) -> None:
    recap = "PLAY RECAP ***\nlocal  : ok=20   changed=3    failed=0\npi : ok=1 changed=1 failed=0\n"
    assert measure.Played(1.0, recap).changed == 4


# --- two checkouts -------------------------------------------------------------------------------


class Engine:
    """Docker's images: names to ids. The engine forgets an id when its last name is removed."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.images = self

    def list(self) -> list[Any]:
        return [Image(self, identifier) for identifier in sorted(set(self.tags.values()))]

    def get(self, identifier: str) -> Any:
        assert identifier in self.tags.values()
        return Image(self, identifier)

    def remove(self, tag: str) -> None:
        del self.tags[tag]


class Image:
    def __init__(self, engine: Engine, identifier: str) -> None:
        self.id, self._engine = identifier, engine

    @property
    def tags(self) -> list[str]:
        return [tag for tag, identifier in self._engine.tags.items() if identifier == self.id]

    def tag(self, repository: str, tag: str) -> None:
        self._engine.tags[f"{repository}:{tag}"] = self.id


def test_the_images_of_two_checkouts_are_built_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkouts = importlib.import_module("checkouts")
    engine = Engine()
    built: list[str] = []
    removed: list[Path] = []

    def deploy(inventory: Path) -> None:
        """As the lab: build what is missing, remove images that are not known."""
        name = "old" if tmp_path in inventory.parents else "new"
        tag = f"flowerbed/application:{name}"
        if tag not in engine.tags:
            built.append(name)
            engine.tags[tag] = f"sha256:{name}"
        for other in [other for other in engine.tags if other.startswith("flowerbed/")]:
            if other != tag:
                engine.remove(other)

    monkeypatch.setattr(checkouts, "deploy", deploy)
    monkeypatch.setattr(checkouts, "remove", removed.append)
    monkeypatch.setattr(checkouts, "stop", lambda _: None)
    inventory = ROOT / "benchmarks" / "inventory"
    labs = checkouts.Labs(engine, inventory)
    for root in (ROOT, ROOT, tmp_path, ROOT, tmp_path):
        labs.deploy(root)
    other = tmp_path / "benchmarks" / "inventory"
    assert built == ["new", "old"]
    assert removed == [inventory, other, inventory]
    labs.close()
    assert removed == [inventory, other, inventory, other]
    assert engine.tags == {"flowerbed/application:old": "sha256:old"}
