"""The tables of the README are those of the benchmarks' figures."""

import importlib
import sys
from pathlib import Path

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


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("name", MEASURED)
def test_the_pages_quote_the_figures(name: str) -> None:
    measure, benchmark = importlib.import_module("measure"), importlib.import_module(name)
    assert sys.modules["measure"].ROOT == ROOT
    wanted = f"<!-- {name} -->\n{benchmark.table()}\n<!-- /{name} -->"
    quoting = [page for page in measure.PAGES if f"<!-- {name} -->" in page.read_text()]
    assert quoting
    assert [page for page in quoting if wanted not in page.read_text()] == []


@pytest.mark.parametrize("name", MEASURED)
def test_every_row_tells_where_it_was_measured(name: str) -> None:
    measure = importlib.import_module("measure")
    rows = measure.results(name)
    assert rows
    assert all(row["machine"] and row["commit"] and row["engine"] for row in rows)


def test_no_page_has_a_place_for_what_was_not_measured() -> None:
    assert "rounds" in MEASURED
    measure = importlib.import_module("measure")
    pages = " ".join(page.read_text() for page in measure.PAGES)
    missing = set(BENCHMARKS) - set(MEASURED)
    assert not [name for name in missing if f"\n<!-- {name} -->" in pages]


def test_make_knows_every_benchmark() -> None:
    text = (ROOT / "Makefile").read_text()
    assert f"BENCHMARKS = {' '.join(BENCHMARKS)}\n" in text
