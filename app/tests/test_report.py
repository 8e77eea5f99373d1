"""The report's page: whole, self-contained, and there also where little is known."""

import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from flowerbed.prometheus import Prometheus
from flowerbed.report.comparison import (
    comparison_page,
    differences,
    time_to,
    times_to_accuracy,
)
from flowerbed.report.page import run_page
from flowerbed.report.pictures import PALETTE, colours_of
from flowerbed.report.record import NoSuchRunError, Record, read_record
from flowerbed.report.usage import read_usage
from flowerbed.results import DeviceRow, Recorder, RoundRow

DEVICES = {"phone<b>": 0.5, "pi": 1.0}
STARTED = 1.79e9


def _play(root: Path, run: str, rounds: int, strategy: str = "fedavg") -> Recorder:
    """Results of a run as the ServerApp writes them: 10 s a round, phone<b> late by 4 s."""
    recorder = Recorder(run, rounds, 600, root)
    for name, cpus in DEVICES.items():
        recorder.meet(name, "phone", {"machine": "local", "cpus": cpus, "memory": "1000m"})
    described = {
        name: {"device_class": "phone", "cpus": cpus, "memory": "1000m", "labels": [5, 0, 9]}
        for name, cpus in DEVICES.items()
    }
    recorder.describe(
        {
            "run": {"run_name": run, "strategy": strategy, "model": "linear", "alpha": 0.5},
            "devices": described,
        }
    )
    for number in range(1, rounds + 1):
        late = "phone<b>"
        rows = [
            DeviceRow(
                round=number,
                device=name,
                device_class="phone",
                outcome="timeout" if number == 3 and name == late else "completed",
                reason="",
                started=STARTED + 10 * (number - 1) + 0.5,
                aggregated=None if number == 3 and name == late else number,
                examples=160,
                seconds=8,
                receive_seconds=0 if number == 3 and name == late else 1,
                queue_seconds=0,
                evaluate_seconds=0,
                train_seconds=0 if number == 3 and name == late else 7 if name == late else 3,
                send_seconds=0,
                wait_seconds=0 if name == late else 4,
                bytes_received=100,
                bytes_sent=100,
                examples_per_second=20,
                batch_size=16,
                throttled_share=0.5,
                throttled_seconds=1.5,
                loss=None,
                accuracy=None if number == 1 else 0.2,
                train_loss=None,
                train_accuracy=None,
            )
            for name in DEVICES
        ]
        recorder.finish_round(
            RoundRow(
                round=number,
                started=STARTED + 10 * (number - 1),
                accuracy=None,
                loss=None,
                central_accuracy=0.1 * number,
                central_loss=2.0,
                seconds=10,
                configure_seconds=0.5,
                devices_seconds=8,
                aggregate_seconds=0.5,
                evaluate_seconds=1,
                examples=320,
                devices=2,
                failed=0,
                slowest_device=late,
                slowest_seconds=8,
            ),
            rows,
        )
    return recorder


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A run of four rounds; in the third a device did not answer."""
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
    """What holds for every page."""
    page = _Page(text)
    assert page.open == []
    assert not {tag for tag, _ in page.seen} & {"script", "link", "img", "iframe", "b"}
    for tag, attributes in page.seen:
        for name, value in attributes.items():
            assert not name.startswith("on"), tag
            if name in ("href", "src", "xlink:href", "style"):
                assert "//" not in str(value), (tag, name, value)
                assert "url(" not in re.sub(r"url\(#\w+\)", "", str(value)), (tag, name, value)
    # Drawn in the page's own colours, so that they are readable on a dark page.
    colours = re.findall(r"#[0-9a-f]{6}\b", text[text.index("</style>") :])
    assert colours == []
    return page


def test_the_page_of_a_run_is_whole(record: Record) -> None:
    text = run_page(record, {}, "Prometheus does not answer.")
    page = _check(text)
    assert page.pictures == [
        "Accuracy after each round",
        "Loss after each round",
        "Timeline of the rounds by device",
        "Training images by device and label",
    ]
    assert "Nothing to show. Prometheus does not answer." in text
    assert "phone&lt;b&gt; held up 4 of 4 rounds" in text
    assert "timeout" in text


def test_a_run_that_failed_at_once_has_a_page(tmp_path: Path) -> None:
    Recorder("run-1", 3, 600, tmp_path).state("failed", "not ready after 300 s: <pi>.")
    text = run_page(read_record(tmp_path, "run-1"), {}, "The run has no rounds.")
    assert _check(text).pictures == []
    assert "The run failed: not ready after 300 s: &lt;pi&gt;." in text


def test_runs_are_compared_on_one_page(record: Record, tmp_path: Path) -> None:
    _play(tmp_path, "run-2", 2, strategy="fedprox").state("completed")
    text = comparison_page([record, read_record(tmp_path, "run-2")])
    assert _check(text).pictures == ["Accuracy by seconds", "Accuracy by rounds"]
    assert re.search(r"run\.strategy.*fedavg.*fedprox", text, re.DOTALL)


def test_what_differs_between_runs(record: Record, tmp_path: Path) -> None:
    _play(tmp_path, "run-2", 2, strategy="fedprox")
    other = read_record(tmp_path, "run-2")
    assert differences([record, other]) == [("run.strategy", ("fedavg", "fedprox"))]
    assert differences([record, record]) == []


def test_the_time_to_an_accuracy(record: Record, tmp_path: Path) -> None:
    _play(tmp_path, "run-2", 2)
    other = read_record(tmp_path, "run-2")
    assert time_to(record, 0.15) == pytest.approx(20)
    assert time_to(other, 0.25) is None
    reached = {round(at, 2): times for at, times in times_to_accuracy([record, other])}
    assert list(reached) == [0.15, 0.2, 0.25, 0.3, 0.35, 0.4]
    assert list(reached[0.15]) == [20, 20]
    assert list(reached[0.4]) == [40, None]


def test_a_run_that_is_not_there_is_named_with_those_that_are(
    record: Record, tmp_path: Path
) -> None:
    with pytest.raises(NoSuchRunError, match=r"there is no run 'run-7'.*there are: run-1$"):
        read_record(tmp_path, "run-7")


def test_devices_keep_their_colours(tmp_path: Path) -> None:
    recorder = Recorder("many", 1, 600, tmp_path)
    recorder.describe(
        {"devices": {f"d{n:02}": {"device_class": f"class-{n % 3}"} for n in range(20)}}
    )
    colours = colours_of(read_record(tmp_path, "many"))
    assert colours["d00"] == colours["d03"] != colours["d01"]
    recorder.describe({"devices": {f"d{n}": {} for n in range(len(PALETTE))}})
    assert len(set(colours_of(read_record(tmp_path, "many")).values())) == len(PALETTE)


class _Answers(http.server.BaseHTTPRequestHandler):
    """Prometheus' answers to a question about pi; and to none about the throttled share."""

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


@pytest.fixture
def prometheus() -> Iterator[Prometheus]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Prometheus(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    thread.join()
    server.server_close()


def test_usage_is_of_the_rounds(record: Record, prometheus: Prometheus) -> None:
    usage, why_not = read_usage(prometheus, record)
    assert why_not == ""
    assert list(usage) == ["pi"]
    used = usage["pi"]
    assert used.cores == pytest.approx(20 / 40)  # core seconds over four rounds of 10 s
    assert used.throttled is None
    assert used.memory_over_time == [(0.0, 0.5)]
    page = _check(run_page(record, usage))
    assert {"cores over time", "memory over time"} <= set(page.pictures)


def test_no_prometheus_is_said(record: Record) -> None:
    usage, why_not = read_usage(Prometheus("http://127.0.0.1:9", timeout=1), record)
    assert usage == {}
    assert why_not.startswith("Prometheus at http://127.0.0.1:9 does not answer")


def _report(root: Path, *runs: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowerbed.report", *runs, "--results", str(root)]
    return subprocess.run(
        [*command, "--prometheus", "http://127.0.0.1:9"],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_says_where_the_page_is(record: Record, tmp_path: Path) -> None:
    _play(tmp_path, "run-2", 1)
    for runs, path in ((["run-1"], "run-1/report.html"), (["run-1", "run-2"], "run-1-run-2.html")):
        done = _report(tmp_path, *runs)
        assert (done.stdout, done.stderr) == (f"{tmp_path / path}\n", "")
        _check((tmp_path / path).read_text())
    assert _report(tmp_path, "run-9").stderr == (
        "there is no run 'run-9' in the results; there are: run-1, run-2\n"
    )
