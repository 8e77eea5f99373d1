"""The report's pages: complete, self-contained, and also there where little is known."""

import http.server
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from rows import evaluation_row, message_row, round_row, started

from flowerbed.faults import FaultRow
from flowerbed.prometheus import Prometheus
from flowerbed.report.__main__ import comparison_name
from flowerbed.report.comparison import (
    compared_accuracies,
    comparison_page,
    differences,
    grouped,
    spread,
    time_to,
)
from flowerbed.report.page import run_page
from flowerbed.report.pictures import (
    MARKERS,
    MOST_DEVICES,
    PALETTE,
    block_size,
    colours_of,
    drawn_devices,
)
from flowerbed.report.record import NoSuchRunError, Record, read_record
from flowerbed.report.usage import Usage, read_usage
from flowerbed.results import DeviceRow, RoundRow
from flowerbed.server.recorder import Recorder

DEVICES = {"phone<b>": 0.5, "pi": 1.0}
SLOW = "phone<b>"


def _describe(run: str, config: dict[str, Any]) -> dict[str, Any]:
    devices = {
        name: {"device_class": "phone", "cpus": cpus, "memory": "1000m", "labels": [5, 0, 9]}
        for name, cpus in DEVICES.items()
    }
    return {
        "run": {"run_name": run, "seed": 1, **config},
        "app": {"name": "digits", "version": "1.2", "sha256": "ab" * 32},
        "devices": devices,
    }


def _play(root: Path, run: str, rounds: int, **config: Any) -> Recorder:
    """Results of a run as the ServerApp writes them; in the third round a device times out."""
    recorder = Recorder(run, 600, root)
    for name, cpus in DEVICES.items():
        recorder.meet(name, "phone", {"machine": "local", "cpus": cpus, "memory": "1000m"})
    recorder.plan(rounds, central=True)
    recorder.describe(_describe(run, config))
    for number in range(1, rounds + 1):
        failed = number == 3
        rows = [
            message_row(number, SLOW, 0, "timeout" if failed else "completed", accuracy=0.2),
            message_row(number, "pi", 9),
            evaluation_row(number, "pi"),
        ]
        row = round_row(number, slowest_device=SLOW)
        recorder.central(number, row.central_accuracy, row.central_loss)
        recorder.finish_round(row, rows)
    return recorder


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A run of four rounds; in the third a device did not reply."""
    _play(tmp_path, "run-1", 4).state("completed")
    return read_record(tmp_path, "run-1")


class _Page(HTMLParser):
    """Tags and their attributes, and whether each that was opened is closed."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @property
    def pictures(self) -> list[str | None]:
        return [attributes.get("aria-label") for tag, attributes in self.seen if tag == "svg"]


def _check(text: str) -> _Page:
    """Check what holds for every page."""
    page = _Page(text)
    assert page.open == []
    assert not {tag for tag, _ in page.seen} & {"script", "link", "img", "iframe", "b"}
    defined: set[str | None] = set()
    for tag, attributes in page.seen:
        for name, value in attributes.items():
            assert not name.startswith("on"), tag
            if name in ("href", "src", "xlink:href", "style"):
                assert "//" not in str(value), (tag, name, value)
                assert "url(" not in re.sub(r"url\(#\w+\)", "", str(value)), (tag, name, value)
            if name == "id":
                defined.add(value)
    # What a chart refers to is in the page, and nothing else has an id.
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([\w.-]+)', text))
    assert used == defined
    # Charts have the page's own colours, so that they are readable on a dark page.
    colours = re.findall(r"#[0-9a-f]{6}\b", text[text.index("</style>") :])
    assert colours == []
    return page


def test_the_page_of_a_run_is_complete(record: Record) -> None:
    text = run_page(record, {}, "Prometheus does not answer.")
    page = _check(text)
    assert page.pictures == [
        "Accuracy after each round",
        "Loss after each round",
        "Timeline of the rounds by device",
        "Training examples by device and label",
    ]
    assert "No data: Prometheus does not answer." in text
    assert "phone&lt;b&gt; held up 4 of 4 rounds" in text
    assert ">timeout<" in text
    assert "digits 1.2" in text
    assert "3 of 4 <span" in text  # training messages of the slow device
    assert "4 evaluate" in text


def test_the_final_model_on_each_device(record: Record) -> None:
    rows = [
        row if row.device != SLOW or row.round < 4 else replace(row, accuracy=0.4, loss=1.5)
        for row in record.messages
    ]
    rows += [evaluation_row(4, SLOW, accuracy=0.35, loss=1.7)]
    shown = _section(run_page(replace(record, messages=rows), {}), "What each device did")
    assert "of the global model after round 4, on the device&#39;s own test data" in shown
    assert re.search(r"<td>0\.350</td>\n?<td>1\.700</td>", shown)
    bare = [replace(row, accuracy=None, loss=None) for row in record.messages]
    assert "accuracy" not in _section(
        run_page(replace(record, messages=bare), {}), "What each device did"
    )


def _section(text: str, heading: str) -> str:
    found = re.search(rf"<h2>{heading}</h2>(.*?)</section>", text, re.DOTALL)
    assert found, heading
    return found[1]


def test_the_configuration_has_the_keys_of_the_app(tmp_path: Path) -> None:
    _play(tmp_path, "run-1", 1, sparsity=0.25, schedule="cosine", warm=True).state("completed")
    record = read_record(tmp_path, "run-1")
    record.settings["pi"]["camera_fps"] = 30
    record.description["data"] = {"dataset": "digits", "partitioner": "iid", "seed": 4}
    record.description["repeatable"] = {"bitwise": False, "because": ["a time limit", "threads"]}
    shown = _section(run_page(record, {}), "What was run")
    assert "no: a time limit; threads" in shown
    for key, value in {"sparsity": "0.25", "schedule": "cosine", "warm": "True"}.items():
        assert re.search(rf"<td>{key}</td>\n<td class=\"words\">{value}</td>", shown)
    assert "camera fps" in shown
    assert "digits; partitioner iid; seed 4" in shown


def test_an_app_without_central_evaluation_has_no_curve_of_it(record: Record) -> None:
    rounds = [
        replace(row, central_accuracy=None, central_loss=None, accuracy=0.1 * row.round, loss=1.0)
        for row in record.rounds
    ]
    text = run_page(replace(record, rounds=rounds), {})
    assert _check(text).pictures[:2] == ["Accuracy after each round", "Loss after each round"]
    assert ">central evaluation<" not in text
    assert ">mean over the devices<" in text
    assert ">central evaluation<" in run_page(record, {})


def test_an_app_that_reports_nothing_has_no_curves(record: Record) -> None:
    rounds = [replace(row, central_accuracy=None, central_loss=None) for row in record.rounds]
    rows = [replace(row, accuracy=None, loss=None) for row in record.messages]
    bare = replace(record, rounds=rounds, messages=rows, description={"devices": {"pi": {}}})
    text = run_page(bare, {})
    assert _check(text).pictures == ["Timeline of the rounds by device"]
    assert "What the model learned" not in text


def test_an_app_with_a_loss_alone_has_its_curve(record: Record) -> None:
    rounds = [replace(row, central_accuracy=None) for row in record.rounds]
    rows = [replace(row, accuracy=None) for row in record.messages]
    page = _check(text := run_page(replace(record, rounds=rounds, messages=rows), {}))
    assert page.pictures[:2] == ["Loss after each round", "Timeline of the rounds by device"]
    assert "<dt>Loss</dt><dd>2.600 <small>central evaluation" in text


def test_values_that_are_not_finite_are_left_out_of_charts(record: Record) -> None:
    rounds = [
        replace(row, central_loss=float("nan") if row.round > 1 else 1.0) for row in record.rounds
    ]
    text = run_page(replace(record, rounds=rounds), {})
    _check(text)
    assert "is not finite after rounds 2 to 4." in text


def test_a_run_whose_devices_all_fail_has_a_page(tmp_path: Path) -> None:
    recorder = Recorder("run-1", 600, tmp_path)
    recorder.meet("pi", "phone", {})
    rows = [message_row(1, "pi", 0, "error", reason="KeyError: <x>")]
    nothing = {"central_accuracy": None, "central_loss": None, "devices": 0, "examples": 0}
    recorder.finish_round(round_row(1, slowest_device="pi", **nothing), rows)
    recorder.state("failed", "KeyError: <x>\nTraceback:\n  File <y>")
    text = run_page(read_record(tmp_path, "run-1"), {}, "Prometheus does not answer.")
    assert _check(text).pictures == ["Timeline of the rounds by device"]
    assert "The run failed: KeyError: &lt;x&gt;<pre>Traceback:\n  File &lt;y&gt;</pre>" in text


def test_a_run_that_failed_at_once_has_a_page(tmp_path: Path) -> None:
    Recorder("run-1", 600, tmp_path).state("failed", "not ready after 300 s: <pi>.")
    text = run_page(read_record(tmp_path, "run-1"), {}, "The run has no rounds.")
    assert _check(text).pictures == []
    assert "The run failed: not ready after 300 s: &lt;pi&gt;." in text


def test_messages_before_the_first_round_are_in_the_timeline(record: Record) -> None:
    early = evaluation_row(0, "pi", type="query.hello", started=started(1) - 30)
    with_query = replace(record, messages=[early, *record.messages])
    assert with_query.begin == started(1) - 30
    text = run_page(with_query, {})
    _check(text)
    assert "1 query.hello" in text


def test_a_messages_evaluation_counts_for_its_own_round(record: Record) -> None:
    """A message of training brings the model of the round before, one of evaluation the newest."""
    assert [n for n, _ in record.measured(SLOW, "accuracy")] == [0, 1, 2, 3]
    assert [n for n, _ in record.measured("pi", "accuracy")] == [1, 2, 3, 4]


def test_runs_are_compared_on_one_page(record: Record, tmp_path: Path) -> None:
    _play(tmp_path, "run-2", 2, strategy="fedprox").state("completed")
    text = comparison_page([record, read_record(tmp_path, "run-2")])
    assert _check(text).pictures == ["Accuracy by seconds", "Accuracy by rounds"]
    assert re.search(r"run\.strategy.*-.*fedprox", text, re.DOTALL)


def test_runs_without_accuracy_are_compared_by_their_loss(record: Record) -> None:
    rounds = [replace(row, central_accuracy=None) for row in record.rounds]
    runs = [replace(record, name=name, rounds=rounds) for name in ("a", "b")]
    text = comparison_page([runs[0], replace(runs[1], description={"run": {"x": 1}})])
    assert _check(text).pictures == ["Loss by seconds", "Loss by rounds"]
    assert "No run has reached an accuracy" in text


def test_runs_that_differ_in_their_seeds_are_one_group(tmp_path: Path) -> None:
    for run, seed, momentum in (("a", 1, 0.9), ("b", 2, 0.9), ("c", 3, 0.9), ("d", 1, 0.0)):
        _play(tmp_path, run, 2, seed=seed, momentum=momentum).state("completed")
    records = [read_record(tmp_path, run) for run in "abcd"]
    records[1] = replace(
        records[1], rounds=[replace(row, central_accuracy=0.5) for row in records[1].rounds]
    )
    groups = grouped(records)
    assert [[r.name for r in group.records] for group in groups] == [["a", "b", "c"], ["d"]]
    assert groups[0].curve("accuracy", "rounds") == [(1, 0.1, 0.1, 0.5), (2, 0.2, 0.2, 0.5)]
    assert differences(groups) == [("run.momentum", (0.9, 0.0))]
    text = comparison_page(records)
    _check(text)
    assert "a and 2 more" in text
    assert "0.200 (0.200 to 0.500)" in text


def test_many_runs_have_different_looks(record: Record) -> None:
    runs = [
        replace(record, name=f"run-{n}", description={"run": {"x": n}})
        for n in range(len(PALETTE) + 3)
    ]
    text = comparison_page(runs)
    looks = re.findall(r'<span class="dot (m\d)" style="--colour: var\(--(c\d)\)"', text)
    assert len(set(looks)) == len(runs)
    style = text[: text.index("</style>")]
    assert all(f".dot.m{n} " in style for n in range(1, len(MARKERS)))


def test_the_settings_in_which_runs_differ(record: Record, tmp_path: Path) -> None:
    _play(tmp_path, "run-2", 2, strategy="fedprox")
    other = read_record(tmp_path, "run-2")
    assert differences(grouped([record, other])) == [("run.strategy", (None, "fedprox"))]
    assert differences(grouped([record, record])) == []


def test_the_time_to_an_accuracy(record: Record, tmp_path: Path) -> None:
    _play(tmp_path, "run-2", 2)
    other = read_record(tmp_path, "run-2")
    assert time_to(record, 0.15) == pytest.approx(50)
    assert time_to(other, 0.25) is None
    assert compared_accuracies([record, other]) == [0.15, 0.2, 0.25, 0.3, 0.35, 0.4]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([], "-"),
        ([40.0], "40 s"),
        ([None], "never"),
        ([30.0, 10.0, 20.0], "20 s (10 s to 30 s)"),
        ([30.0, None, 20.0], "30 s (20 s to never)"),
    ],
)
def test_values_of_several_runs(values: list[float | None], shown: str) -> None:
    assert spread(values, 0, " s") == shown


def test_a_long_list_of_runs_makes_a_short_file_name() -> None:
    assert comparison_name(["one", "other"]) == "one-other.html"
    names = [f"run-20261127-2047{n:02}" for n in range(60)]
    name = comparison_name(names)
    assert re.fullmatch(r"comparison-of-60-runs-[0-9a-f]{8}\.html", name)
    assert name != comparison_name(names[::-1])


def test_a_missing_run_is_named_with_those_that_exist(record: Record, tmp_path: Path) -> None:
    with pytest.raises(NoSuchRunError, match=r"run 'run-7' has no results; .*results: run-1$"):
        read_record(tmp_path, "run-7")


def test_devices_keep_their_colours(tmp_path: Path) -> None:
    recorder = Recorder("many", 600, tmp_path)
    recorder.describe(
        {"devices": {f"d{n:02}": {"device_class": f"class-{n % 3}"} for n in range(20)}}
    )
    colours = colours_of(read_record(tmp_path, "many"))
    assert colours["d00"] == colours["d03"] != colours["d01"]
    recorder.describe({"devices": {f"d{n}": {} for n in range(len(PALETTE))}})
    assert len(set(colours_of(read_record(tmp_path, "many")).values())) == len(PALETTE)


# --- large runs --------------------------------------------------------------------------------


def _large(devices: int, rounds: int) -> Record:
    """A run in which the third device is offline in the second round."""
    names = [f"phone-{n:03}" for n in range(devices)]
    rows: list[DeviceRow] = []
    rounds_: list[RoundRow] = []
    for number in range(1, rounds + 1):
        rounds_.append(round_row(number, slowest_device=names[0]))
        for n, name in enumerate(names):
            outcome = "offline" if n == 2 and number == 2 else "completed"
            rows.append(message_row(number, name, n % 7, outcome, accuracy=0.2, loss=1.0))
            rows.append(evaluation_row(number, name))
    settings = {
        name: {"device_class": f"class-{n % 5}", "cpus": 0.5, "labels": [10, 20] * 5}
        for n, name in enumerate(names)
    }
    faults = [FaultRow(started(2), 2, "kill", names[2], "local", 5.0, "")]
    described = {"run": {"run_name": "large"}, "devices": settings}
    return Record("large", "completed", "", rounds_, rows, described, faults, rounds)


def test_rounds_are_merged_in_the_timeline_of_a_long_run() -> None:
    assert block_size(5, 4) == block_size(40, 40) == 1
    assert block_size(200, 40) == 5
    assert block_size(200, 4) == 4
    record = _large(40, 200)
    text = run_page(record, {})
    _check(text)
    assert "5 rounds are merged" in text
    timeline = text[text.index('aria-label="Timeline') :]
    timeline = timeline[: timeline.index("</svg>")]
    # Without merging there would be 80,000 bars.
    assert 2000 < timeline.count("<path") < 12_000


def test_a_merged_block_keeps_the_seconds_of_each_part() -> None:
    from flowerbed.report.pictures import _device_lane

    record = _large(3, 12)
    merged, single = (_device_lane(record, "phone-002", size).bars for size in (4, 1))
    assert len(merged["train"]) == 3
    for part in ("train", "evaluate", "transit", "wait", "queue"):
        seconds = [sum(length for _, length in bars[part]) for bars in (merged, single)]
        assert seconds[0] == pytest.approx(seconds[1]), part


def test_charts_of_a_large_lab_show_the_devices_that_matter() -> None:
    record = _large(100, 3)
    drawn = drawn_devices(record)
    assert len(drawn) == MOST_DEVICES
    assert "phone-002" in drawn  # it failed
    text = run_page(record, {name: Usage(cores=0.1) for name in record.names})
    _check(text)
    assert f"It shows {MOST_DEVICES} of 100 devices" in text
    assert text.count("phone-097") == 4  # three tables, and run.yml


def test_a_report_of_500_devices_is_written_in_seconds() -> None:
    """On two cores of 2026 in 4 s; the limit leaves room for slow machines."""
    record = _large(500, 20)
    begin = time.monotonic()
    text = run_page(record, {})
    assert time.monotonic() - begin < 40
    assert len(text) < 8e6


# --- usage -------------------------------------------------------------------------------------


class _Answers(http.server.BaseHTTPRequestHandler):
    """A Prometheus that knows pi, but not how much of the time pi was throttled."""

    def do_GET(self) -> None:
        asked = parse_qs(urlsplit(self.path).query)
        labels = {"device": "pi"}
        if "query_range" in self.path:
            begin = float(asked["start"][0])
            result: list[dict[str, Any]] = [
                {"metric": labels, "values": [[begin, "0.5"], [begin + 10, "NaN"]]}
            ]
        else:
            value = "NaN" if "throttled" in asked["query"][0] else "20"
            result = [{"metric": labels, "value": [float(asked["time"][0]), value]}]
        body = json.dumps({"status": "success", "data": {"result": result}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        pass


class _Refuses(_Answers):
    """A proxy in the way: an error, and no JSON."""

    def do_GET(self) -> None:
        self.send_error(503, "Service Unavailable")


@pytest.fixture
def prometheus(request: pytest.FixtureRequest) -> Iterator[Prometheus]:
    handler = getattr(request, "param", _Answers)
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Prometheus(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    thread.join()
    server.server_close()


def test_usage_is_of_the_time_of_the_run(record: Record, prometheus: Prometheus) -> None:
    usage, why_not = read_usage(prometheus, record)
    assert why_not == ""
    assert list(usage) == ["pi"]
    used = usage["pi"]
    assert used.cores == pytest.approx(20 / 100)  # core seconds over four rounds of 25 s
    assert used.throttled is None
    assert used.memory_over_time == [(0.0, 0.5)]
    page = _check(run_page(record, usage))
    assert {"cores over time", "memory over time"} <= set(page.pictures)


@pytest.mark.parametrize("prometheus", [_Refuses], indirect=True)
def test_an_error_page_is_a_reason(record: Record, prometheus: Prometheus) -> None:
    usage, why_not = read_usage(prometheus, record)
    assert usage == {}
    assert why_not.endswith("refuses the query: Service Unavailable")


def test_a_missing_prometheus_is_a_reason(record: Record) -> None:
    usage, why_not = read_usage(Prometheus("http://127.0.0.1:9", timeout=1), record)
    assert usage == {}
    assert why_not.startswith("Prometheus at http://127.0.0.1:9 does not answer")


def _report(root: Path, runs: Iterable[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowerbed.report", *runs, "--results", str(root)]
    return subprocess.run(
        [*command, "--prometheus", "http://127.0.0.1:9"],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_the_path_of_the_page(record: Record, tmp_path: Path) -> None:
    _play(tmp_path, "run-2", 1)
    for runs, path in ((["run-1"], "run-1/report.html"), (["run-1", "run-2"], "run-1-run-2.html")):
        done = _report(tmp_path, runs)
        assert (done.stdout, done.stderr) == (f"{tmp_path / path}\n", "")
        _check((tmp_path / path).read_text())
    assert _report(tmp_path, ["run-9"]).stderr == (
        "run 'run-9' has no results; runs with results: run-1, run-2\n"
    )
