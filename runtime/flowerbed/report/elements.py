"""The elements that pages are built of. Text is escaped."""

from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from markupsafe import Markup

from flowerbed.report.findings import percent
from flowerbed.report.pictures import MARKERS, THEME

NOTHING = Markup("-")

PAGE = Markup("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
""")


def join(parts: Iterable[Markup | None]) -> Markup:
    """The parts that are not empty, one a line."""
    return Markup("\n").join(part for part in parts if part)


def page(title: str, body: Iterable[Markup | None]) -> str:
    """A whole page around its body."""
    style = Markup(resources.files(__package__).joinpath("page.css").read_text())  # noqa: S704
    return str(PAGE.format(title=title, style=style, body=join(body)))


def section(heading: str, *content: Markup | None) -> Markup | None:
    """A heading and its content; None if all content is empty."""
    if not any(content):
        return None
    return Markup("<section>\n<h2>{}</h2>\n{}\n</section>").format(heading, join(content))


def text(text: str) -> Markup:
    """A paragraph."""
    return Markup("<p>{}</p>").format(text)


def details(summary: str, content: str) -> Markup:
    """Preformatted text that a click opens."""
    return Markup("<details><summary>{}</summary><pre>{}</pre></details>").format(summary, content)


def figure(svg: Markup | None, caption: str, least: int = 0) -> Markup | None:
    """A chart with its caption; it scrolls in its box where it has less than `least` pixels."""
    if svg is None:
        return None
    return Markup(
        '<figure><div class="scroll" style="--least: {}px">{}</div>'
        "<figcaption>{}</figcaption></figure>"
    ).format(least, svg, caption)


def pair(*figures: Markup | None) -> Markup | None:
    """Charts side by side on a wide page, one below the other on a narrow one."""
    if not any(figures):
        return None
    return Markup('<div class="pair">{}</div>').format(join(figures))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], words: Iterable[int] = ()) -> Markup:
    """A table that scrolls in its box.

    Args:
        words: indices of columns with text, which is aligned left; the first column is one anyway.
    """
    texts = set(words)
    kinds = [Markup(' class="words"') if n in texts else "" for n in range(len(head))]

    def line(cell: Markup, cells: Sequence[Any]) -> Markup:
        filled = (cell.format(*pair) for pair in zip(kinds, cells, strict=True))
        return Markup("<tr>{}</tr>").format(join(filled))

    return Markup(
        '<div class="scroll tall"><table>\n<thead>{}</thead>\n<tbody>\n{}\n</tbody></table></div>'
    ).format(
        line(Markup("<th{}>{}</th>"), head),
        join(line(Markup("<td{}>{}</td>"), row) for row in rows),
    )


def tiles(tiles: Iterable[tuple[str, Any, Any]]) -> Markup:
    """Figures in large letters, each with its name and a remark."""
    return Markup('<dl class="figures">\n{}\n</dl>').format(
        join(
            Markup("<div><dt>{}</dt><dd>{} <small>{}</small></dd></div>").format(*tile)
            for tile in tiles
        )
    )


def number(value: float | None, digits: int = 0, unit: str = "") -> str:
    """A number with its thousands apart; None is shown as "-"."""
    return NOTHING if value is None else f"{value:,.{digits}f}{unit}".replace(",", "\u202f")


def share(value: float | None) -> str:
    """A share as a whole percentage; None is shown as "-"."""
    return NOTHING if value is None else percent(value)


def _colour(colour: str) -> Markup:
    return Markup('style="--colour: var(--{})"').format(THEME[colour])


def named(name: str, colour: str, marker: str = MARKERS[0]) -> Markup:
    """A name with the colour and the shape of its marker."""
    return Markup('<span class="dot m{}" {}></span>{}').format(
        MARKERS.index(marker), _colour(colour), name
    )


def bar(share: float | None, colour: str) -> Markup:
    """A share as a number and as a bar; None is shown as "-"."""
    if share is None:
        return NOTHING
    return Markup('{}<span class="bar" {}><i style="width: {:.1f}%"></i></span>').format(
        percent(share), _colour(colour), 100 * min(share, 1)
    )


def legend(entries: Iterable[Markup]) -> Markup:
    """Names with their looks."""
    return Markup('<ul class="legend">{}</ul>').format(
        join(Markup("<li>{}</li>").format(entry) for entry in entries)
    )
