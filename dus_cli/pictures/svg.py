"""What the pictures share: colours for a light and a dark page, text, axes, the document around
them.
"""

from __future__ import annotations

import html
import math
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

# Of every picture with axes, by which one that is there is known as dus's own.
_BEGINNING = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}"'

DASHED = 'stroke-width="1.5" stroke-dasharray="6 4"'


def text_at(
    x: float, y: float, text: str, fill: str, *, anchor: str = "start", halo: str | None = None
) -> str:
    """A text; with a halo of the page's colour where lines may run below it."""
    around = (
        ""
        if halo is None
        else f' stroke="{halo}" stroke-width="4" stroke-linejoin="round" paint-order="stroke"'
    )
    at = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}"{at}{around}>{escaped(text)}</text>'


def document(
    parts: Iterable[str], title: str, description: str, height: int, colour: Mapping[str, str]
) -> str:
    """The whole picture. Title and description are for those who do not see it."""
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
    """A text in lines of at most so many characters, none of it left out: broken at blanks or
    behind - / _ . if it can.

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


def nice_step(spread: float, count: int, *, least: float = 0.0) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that cuts a spread into at most `count`
    pieces.

    >>> nice_step(0.73, 6), nice_step(4_096_000, 6)
    (0.2, 1000000.0)
    """
    power = 10.0 ** math.floor(math.log10(max(spread / count, least)))
    return next(
        (
            step
            for step in (power, 2 * power, 5 * power)
            if step >= max(spread / count, least) * (1 - 1e-9)
        ),
        10 * power,
    )


def ticks(low: float, high: float, step: float) -> list[float]:
    """Multiples of the step from low to high.

    >>> ticks(2.72, 3.5, 0.25)
    [2.75, 3.0, 3.25, 3.5]
    """
    return [
        k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def is_drawn(path: Path) -> bool:
    """Whether a file begins as the pictures here do."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(_BEGINNING)) == _BEGINNING.encode()
    except OSError:
        return False
