"""The pages that the lab's runs have left, in a real browser."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import chromium, opened
from conftest import RESULTS
from labs import Played
from playwright.sync_api import Browser

REPORT = RESULTS / "test-first/report.html"
COMPARISON = RESULTS / "test-first-test-watched.html"
PHONE = 390
"""Width in pixels of a phone held upright."""
LEAST_LETTER = 8
"""Pixels."""
PICTURES = {
    REPORT: [
        "Accuracy after each round",
        "Loss after each round",
        "Timeline of the rounds by device",
        "cores over time",
        "memory over time",
        "Training examples by device and label",
    ],
    COMPARISON: ["Accuracy by seconds", "Accuracy by rounds"],
}

pages = pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all of them."""
    with chromium() as started:
        yield started


@pages
def test_nothing_goes_wrong_and_nothing_is_fetched(
    lab: Played, browser: Browser, path: Path
) -> None:
    with opened(browser, path, 1200) as seen:
        assert seen.console == []
        assert seen.requests == [path.resolve().as_uri()]


@pages
@pytest.mark.parametrize("width", [1200, PHONE])
def test_it_is_as_wide_as_the_window(lab: Played, browser: Browser, path: Path, width: int) -> None:
    with opened(browser, path, width) as seen:
        assert seen.page.evaluate("document.documentElement.scrollWidth") == width
        # What is wider than the window has a box of its own to scroll in.
        beyond = seen.page.locator(":not(.scroll *, pre)").evaluate_all(
            "all => all.filter(e => e.getBoundingClientRect().right > innerWidth).length"
        )
        assert beyond == 0


@pages
@pytest.mark.parametrize("width", [1200, PHONE])
def test_every_picture_is_there_and_readable(
    lab: Played, browser: Browser, path: Path, width: int
) -> None:
    with opened(browser, path, width) as seen:
        pictures = seen.page.locator("svg[role=img]")
        names = [picture.get_attribute("aria-label") for picture in pictures.all()]
        assert names == PICTURES[path]
        for picture in pictures.all():
            box = picture.bounding_box()
            assert box
            assert box["width"] > 300
            assert box["height"] > 80
            letters = picture.locator("text").evaluate_all(
                "all => all.map(e => parseFloat(getComputedStyle(e).fontSize))"
            )
            # In the picture's own units.
            scale = picture.evaluate(
                "e => e.getBoundingClientRect().width / e.viewBox.baseVal.width"
            )
            assert min(letters) * scale >= LEAST_LETTER


def test_the_page_is_readable_in_the_dark(lab: Played, browser: Browser) -> None:
    with opened(browser, REPORT, 1200) as seen:
        seen.page.emulate_media(color_scheme="dark")
        colours = "['body', 'svg text'].map(e => getComputedStyle(document.querySelector(e)))"
        paper, ink, letters = seen.page.evaluate(
            f"(([body, text]) => [body.backgroundColor, body.color, text.fill])({colours})"
        )
    assert _lightness(paper) < 0.2
    assert _lightness(ink) > 0.7
    assert _lightness(letters) > 0.6


def _lightness(colour: str) -> float:
    red, green, blue = map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))
    return (red + green + blue) / (3 * 255)


def test_the_report_shows_what_the_rows_say(lab: Played, browser: Browser) -> None:
    with (RESULTS / "test-first/rounds.csv").open() as lines:
        last = list(csv.DictReader(lines))[-1]
    with opened(browser, REPORT, 1200) as seen:
        text = seen.page.inner_text("body")
    assert f"{float(last['central_accuracy']):.3f}" in text
    assert f"Every device completed every round (4 devices, {last['round']} rounds)." in text
    assert "No data:" not in text


def test_the_findings_name_a_device_that_was_paused(lab: Played, browser: Browser) -> None:
    with (RESULTS / "test-paused/devices.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    (paused,) = {row["device"] for row in rows if row["outcome"] != "completed"}
    with opened(browser, RESULTS / "test-paused/report.html", 1200) as seen:
        grave = seen.page.locator(".findings .grave").all_inner_texts()
    assert any(re.match(rf"{paused} was offline in rounds? \d", text) for text in grave), grave
