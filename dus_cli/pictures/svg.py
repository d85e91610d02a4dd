"""What the pictures share: colours for a light and a dark page, text, the document around them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

# The width of a picture, in pixels.
WIDTH = 690

# Advance of a 13 px monospace character, a little too wide rather than too narrow.
CHARACTER = 8.0

# As the pictures of the layer map have it; the page's own colour lies below, whichever theme the
# page is in.
COLOURS: dict[bool, dict[str, str]] = {
    False: {
        "page": "#ffffff",
        "text": "#1f2328",
        "axis": "#59636e",
        "grid": "#e4e8ec",
        "training": "#afb8c1",
        "heldout": "#0969da",
        "base": "#1a7f37",
        "scaled": "#cf222e",
    },
    True: {
        "page": "#0d1117",
        "text": "#e6edf3",
        "axis": "#9198a1",
        "grid": "#21262d",
        "training": "#59636e",
        "heldout": "#4493f8",
        "base": "#3fb950",
        "scaled": "#f85149",
    },
}

# Okabe and Ito's colours for all kinds of sight, without their yellow and black. Two of eight
# series that share a colour differ in their dots (full, hollow) and their lines.
SERIES = {
    False: ("#0072b2", "#d55e00", "#009e73", "#a34f86"),
    True: ("#56b4e9", "#e8793a", "#2fc296", "#d68fb9"),
}

# Every picture with axes begins like this, by which dus knows its own.
_BEGINNING = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}"'

DASHED = 'stroke-width="1.5" stroke-dasharray="6 4"'


def text_at(
    x: float, y: float, text: str, fill: str, *, anchor: str = "start", halo: str | None = None
) -> str:
    """A text, with a halo of the page's colour if lines may run below it."""
    around = (
        ""
        if halo is None
        else f' stroke="{halo}" stroke-width="4" stroke-linejoin="round" paint-order="stroke"'
    )
    at = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}"{at}{around}>{escaped(text)}</text>'


def heading(y: float, text: str) -> str:
    """A line of a picture's or a plot's title."""
    return f'<text x="20" y="{y:g}" font-size="15" font-weight="600">{escaped(text)}</text>'


def caption(text: str, fill: str) -> str:
    """What the axis that goes up the page shows, below the title: our own words, no name."""
    return f'<text x="20" y="50" fill="{fill}">{text}</text>'


def document(
    parts: Iterable[str], title: str, description: str, height: int, colour: Mapping[str, str]
) -> str:
    """The whole picture. Title and description are for readers who cannot see it."""
    return (
        f'{_BEGINNING} height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">'
        f"<title>{escaped(title)}</title><desc>{escaped(description)}</desc>"
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="{colour["page"]}"/>'
        f'<g font-family="ui-monospace, monospace" font-size="13" fill="{colour["text"]}">{"".join(parts)}</g></svg>\n'
    )


def escaped(text: str) -> str:
    """Text for XML, which has no control characters at all."""
    return html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def wrapped(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` characters, if possible at a space or after one of
    - / _ . ; nothing is left out.

    >>> wrapped("a-long-name of a model", 9)
    ['a-long-', 'name of a', 'model']
    """
    lines: list[str] = []
    while len(text) > width:
        ends = [match.end() for match in re.finditer(r"[\s/_.-]", text[:width])]
        ends += [width] * (text[width] == " ")
        end = max(ends, default=width)
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*lines, text]


def is_drawn(path: Path) -> bool:
    """Whether a file begins as the pictures here do."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(_BEGINNING)) == _BEGINNING.encode()
    except OSError:
        return False
