"""Loss curves as SVG, for model cards and docs: no library, no font, no script, the same bytes each time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

Point = tuple[float, float]

_WIDTH, _HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 40, 44

# More points than this are told apart by nobody, and make a file of megabytes.
_MOST_POINTS = 600

_THEMES = {
    False: {"text": "#1f2328", "grid": "#d1d9e0", "train": "#afb8c1", "heldout": "#0969da", "base": "#1a7f37"},
    True: {"text": "#e6edf3", "grid": "#3d444d", "train": "#59636e", "heldout": "#4493f8", "base": "#3fb950"},
}

# Okabe and Ito's colours, which the colour-blind tell apart; the last but one reads on light and dark.
_SERIES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999", "#b8a800")


class _Frame(NamedTuple):
    """From data to the picture: x in tokens from 0 to `right`, y in nats from `low` to `high`."""

    right: float
    low: float
    high: float

    def x(self, tokens: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * tokens / self.right, 1)

    def y(self, loss: float) -> float:
        share = (min(loss, self.high) - self.low) / (self.high - self.low)
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share, 1)


def loss_curve(rows: Sequence[Mapping[str, Any]], *, base_loss: float | None, title: str, dark: bool = False) -> str:
    """The picture of a run: training and held-out loss against tokens, with the base's line.

    Args:
        rows: of metrics.jsonl.
        base_loss: the held-out loss to reach, in nats per token; None draws no line.
        title: told above the picture.
        dark: for a dark page.
    """
    theme = _THEMES[dark]
    heldout = _finite((row["tokens"], row["eval_loss"]) for row in rows if "eval_loss" in row)
    train = _smoothed(_finite((row["tokens"], row["loss"]) for row in rows if "loss" in row and not row.get("skipped")))
    frame = _frame([*heldout, *train], base_loss)
    parts = [_axes(frame, theme), _line(frame, train, theme["train"], 1.2)]
    parts.append(_line(frame, heldout, theme["heldout"], 2.4))
    parts += [f'<circle cx="{frame.x(x)}" cy="{frame.y(y)}" r="3" fill="{theme["heldout"]}"/>' for x, y in heldout]
    if base_loss is not None:
        parts.append(_base_line(frame, base_loss, theme))
        reached = next((point for point in heldout if point[1] <= base_loss), None)
        if reached is not None:
            at = f'cx="{frame.x(reached[0])}" cy="{frame.y(reached[1])}"'
            parts.append(f'<circle {at} r="6" fill="none" stroke="{theme["base"]}" stroke-width="2"/>')
    legend = [("training", theme["train"]), ("held-out", theme["heldout"])]
    return _svg(title, [*parts, _legend(legend, theme)], theme, _described(heldout, base_loss))


def compare_curves(
    series: Mapping[str, Sequence[Point]], *, base_loss: float | None, title: str, dark: bool = False
) -> str:
    """Several held-out curves, each (tokens, loss), in one picture with a legend."""
    theme = _THEMES[dark]
    curves = {name: _finite(points) for name, points in series.items()}
    frame = _frame([point for points in curves.values() for point in points], base_loss)
    colours = [_SERIES[index % len(_SERIES)] for index in range(len(curves))]
    parts = [_axes(frame, theme)]
    parts += [_line(frame, points, colour, 2) for points, colour in zip(curves.values(), colours, strict=True)]
    if base_loss is not None:
        parts.append(_base_line(frame, base_loss, theme))
    parts.append(_legend(list(zip(curves, colours, strict=True)), theme))
    ends = "; ".join(f"{name} ends at {points[-1][1]:.3f}" for name, points in curves.items() if points)
    return _svg(title, parts, theme, ends)


def _finite(points: Any) -> list[Point]:
    return [(float(x), float(y)) for x, y in points if y is not None and math.isfinite(y)]


def _smoothed(points: list[Point]) -> list[Point]:
    """At most 600 points, each the mean of its share."""
    each = math.ceil(len(points) / _MOST_POINTS) or 1
    groups = [points[i : i + each] for i in range(0, len(points), each)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _frame(points: list[Point], base_loss: float | None) -> _Frame:
    losses = [y for _, y in points] + ([] if base_loss is None else [base_loss])
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    # A first step may be far above all that follows: what is cut off there is drawn at the upper edge.
    ordered = sorted(losses)
    if len(ordered) > 20:
        high = min(high, ordered[int(len(ordered) * 0.98)] + (ordered[-1] - low) * 0.1)
    room = (high - low) * 0.06 or 0.05
    return _Frame(max([x for x, _ in points] or [0.0]) or 1.0, low - room, high + room)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two bounds.

    >>> _ticks(2.7, 3.5, 5)
    [2.8, 3.0, 3.2, 3.4]
    """
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    first = math.ceil(low / step)
    return [round(index * step, 10) for index in range(first, math.floor(high / step) + 1)]


def _count(tokens: float) -> str:
    """A number of tokens, short.

    >>> _count(2500.0), _count(3e9), _count(0.0)
    ('2.5K', '3B', '0')
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:g}"


def _axes(frame: _Frame, theme: Mapping[str, str]) -> str:
    parts = []
    for loss in _ticks(frame.low, frame.high, 6):
        y = frame.y(loss)
        parts.append(f'<path d="M{_LEFT} {y}H{_WIDTH - _RIGHT}" stroke="{theme["grid"]}" stroke-width="1"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{loss:g}</text>')
    for tokens in _ticks(0.0, frame.right, 8):
        anchor = "end" if frame.x(tokens) > _WIDTH - 30 else "middle"
        parts.append(f'<text x="{frame.x(tokens)}" y="{_HEIGHT - 24}" text-anchor="{anchor}">{_count(tokens)}</text>')
    parts.append(f'<text x="{(_WIDTH + _LEFT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">tokens</text>')
    parts.append(f'<text x="10" y="{_TOP - 10}">nats</text>')
    return "".join(parts)


def _line(frame: _Frame, points: Sequence[Point], colour: str, width: float) -> str:
    if len(points) < 2:
        return ""
    path = "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"/>'


def _base_line(frame: _Frame, base_loss: float, theme: Mapping[str, str]) -> str:
    y, right = frame.y(base_loss), _WIDTH - _RIGHT
    return (
        f'<path d="M{_LEFT} {y}H{right}" stroke="{theme["base"]}" stroke-width="1.6" stroke-dasharray="6 4"/>'
        f'<text x="{right}" y="{y - 5}" text-anchor="end" fill="{theme["base"]}">base {base_loss:.3f}</text>'
    )


def _legend(entries: Sequence[tuple[str, str]], theme: Mapping[str, str]) -> str:
    """Upper right, a line for each entry."""
    widest = max(len(name) for name, _ in entries) if entries else 0
    x = _WIDTH - _RIGHT - 30 - 7.3 * min(widest, 40)
    parts = []
    for index, (name, colour) in enumerate(entries):
        y = _TOP + 8 + 17 * index
        text = name if len(name) <= 40 else name[:39] + "…"
        parts.append(f'<path d="M{x:.0f} {y - 4}h20" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 26:.0f}" y="{y}" fill="{theme["text"]}">{escape(text)}</text>')
    return "".join(parts)


def _described(heldout: list[Point], base_loss: float | None) -> str:
    """The picture in words, for those who do not see it."""
    if not heldout:
        return "No held-out loss was measured."
    text = f"Held-out loss from {heldout[0][1]:.3f} to {heldout[-1][1]:.3f} over {_count(heldout[-1][0])} tokens"
    return text + ("." if base_loss is None else f"; the base's is {base_loss:.3f}.")


def _svg(title: str, parts: Sequence[str], theme: Mapping[str, str], described: str) -> str:
    short = title if len(title) <= 70 else title[:69] + "…"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(described)}</desc>"
        f'<g font-family="ui-monospace, monospace" font-size="12" fill="{theme["text"]}">'
        f'<text x="{_LEFT}" y="18" font-size="14">{escape(short)}</text>{"".join(parts)}</g></svg>\n'
    )
