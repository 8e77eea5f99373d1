"""A real browser for the pages that the lab writes: what it sees, and pictures of them.

python tests/lab/browser.py PAGE PICTURE takes the picture that the README shows.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

WIDTH = 1100
"""Of the README's picture, in pixels; it ends below this heading's section."""
LAST = "Who waited for whom"
MARGIN = 24


@dataclass
class Seen:
    """A page that was opened, and what happened on the way."""

    page: Page
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The distribution's browser, without a window."""
    program = shutil.which("chromium")
    if not program:
        sys.exit("There is no chromium on this machine: make browser, or install it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, path: Path, width: int, height: int = 844) -> Iterator[Seen]:
    """A file in a new window of a width in pixels, with nothing kept from others."""
    context = browser.new_context(viewport={"width": width, "height": height})
    seen = Seen(context.new_page())
    seen.page.on("console", lambda message: seen.console.append(message.text))
    seen.page.on("pageerror", lambda error: seen.console.append(str(error)))
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.goto(path.resolve().as_uri(), wait_until="networkidle")
    yield seen
    context.close()


def main(path: Path, picture: Path) -> None:
    """Take the README's picture of a report."""
    with chromium() as browser, opened(browser, path, WIDTH) as seen:
        box = seen.page.locator("section").filter(has_text=LAST).bounding_box()
        assert box, f"{path} has no section {LAST!r}"
        height = round(box["y"] + box["height"]) + MARGIN
        seen.page.set_viewport_size({"width": WIDTH, "height": height})
        seen.page.screenshot(path=picture)
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
