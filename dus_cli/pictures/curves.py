"""Loss against tokens as SVG: of one run for its model card, of several runs for a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dus_cli.common.units import human_count
from dus_cli.pictures.axes import Axis, levels, line_across, marks
from dus_cli.pictures.svg import (
    CHARACTER,
    COLOURS,
    DASHED,
    SERIES,
    WIDTH,
    caption,
    cut,
    document,
    escaped,
    heading,
    text_at,
)

Point = tuple[float, float]

# The picture in pixels, and the four edges of the plot in it.
_HEIGHT = 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 670, 64, 330

# A run of a million steps is drawn with this many points: each is the mean of its neighbours.
_MAX_POINTS = 600

# Above this many, dots would hide their line.
_MAX_DOTS = 60

MAX_SERIES = 8


def loss_curve(
    rows: Iterable[Mapping[str, Any]], *, base_loss: float | None, title: str, dark: bool = False
) -> str:
    """The picture of a run, from the rows of its metrics.jsonl.

    Thin: training loss, smoothed. Thick: held-out loss, from right after scaling to the end.
    Dashed: the base's held-out loss, with the first measurement that is at it or below it.
    """
    ordered = [row for _, row in sorted({row["step"]: row for row in rows}.items())]
    training = _points(
        (row["tokens"], row.get("loss")) for row in ordered if not row.get("skipped")
    )
    heldout = _points((row["tokens"], row.get("eval_loss")) for row in ordered)
    base_loss = _finite(base_loss)
    reached = None if base_loss is None else next((p for p in heldout if p[1] <= base_loss), None)
    smooth = _smoothed(_thinned(training))
    plot = _Plot.around([*smooth, *heldout], base_loss, dark)
    colour = plot.colour
    parts = [plot.frame(title)]
    parts.append(plot.line(smooth, f'stroke="{colour["training"]}" stroke-width="1.3"'))
    legend = [("training (smoothed)", colour["training"], 1.3)] * bool(training)
    legend.append(("held-out", colour["heldout"], 2.5))
    parts.append(_legend_row(legend, colour))
    if base_loss is not None:
        parts.append(plot.base_line(base_loss, colour["base"]))
        parts.append(plot.base_label(base_loss, heldout))
    parts.append(plot.line(_ends_kept(heldout), f'stroke="{colour["heldout"]}" stroke-width="2.5"'))
    parts += [plot.dot(point, f'r="3.2" fill="{colour["heldout"]}"') for point in _dotted(heldout)]
    if heldout and heldout[0][0] == 0:
        scaled = heldout[0]
        parts.append(plot.dot(scaled, f'r="4.5" fill="{colour["scaled"]}"'))
        name = "at the start" if base_loss is None else "scaled"
        parts.append(plot.text(scaled, f"{name} {scaled[1]:.3f}", colour["scaled"], dx=10, dy=-6))
    if reached is not None and reached[0] > 0:
        parts.append(plot.reached(reached))
    if not training and not heldout:
        parts.append(
            plot.text((0, plot.losses.low), "nothing measured yet", colour["axis"], dx=10, dy=-10)
        )
    return document(
        parts, title, _description(training, heldout, base_loss, reached), _HEIGHT, colour
    )


def compare_curves(
    series: Mapping[str, Sequence[Point]],
    *,
    base_loss: float | None,
    title: str,
    dark: bool = False,
) -> str:
    """Held-out losses of several runs in one picture, each as (tokens, loss) under its name.

    Raises:
        ValueError: more series than can be told apart.
    """
    if len(series) > MAX_SERIES:
        raise ValueError(f"{len(series)} series cannot be told apart; give at most {MAX_SERIES}")
    curves = {name: sorted(_points(points)) for name, points in series.items()}
    base_loss = _finite(base_loss)
    plot = _Plot.around([point for points in curves.values() for point in points], base_loss, dark)
    parts, legend = [plot.frame(title)], _Legend()
    if base_loss is not None:
        parts.append(plot.base_line(base_loss, plot.colour["axis"]))
        legend.add(f"base {base_loss:.3f}", f'stroke="{plot.colour["axis"]}" {DASHED}')
    for index, (name, points) in enumerate(curves.items()):
        colour, hollow = SERIES[dark][index % 4], index >= 4
        style = f'stroke="{colour}" stroke-width="2.2"' + hollow * ' stroke-dasharray="7 3"'
        dot = f'r="3.2" fill="{plot.colour["page"] if hollow else colour}" stroke="{colour}" stroke-width="1.5"'
        parts.append(plot.line(_ends_kept(points), style))
        parts += [plot.dot(point, dot) for point in _dotted(points)]
        legend.add(name, style, dot)
    ends = "; ".join(f"{name} {points[-1][1]:.3f}" for name, points in curves.items() if points)
    base = "" if base_loss is None else f" Base: {base_loss:.3f}."
    description = f"Held-out loss at the end: {ends or 'none'}.{base}"
    return document([*parts, *legend.parts], title, description, legend.bottom, plot.colour)


# --- what is drawn --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plot:
    """The axes: tokens from 0 across, loss up."""

    tokens: Axis
    losses: Axis
    colour: dict[str, str]

    @classmethod
    def around(cls, points: Sequence[Point], base_loss: float | None, dark: bool) -> _Plot:
        """Axes that hold all points and the base's line, with space for the labels."""
        losses = [loss for _, loss in points] + ([] if base_loss is None else [base_loss])
        low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
        # a constant needs a spread, too
        middle, spread = ((low + high) / 2, max(high - low, 0.02 * abs(high), 1e-3))
        most = max((tokens for tokens, _ in points), default=0.0)
        return cls(
            Axis(0.0, most, _LEFT, _RIGHT),
            Axis(middle - 0.62 * spread, middle + 0.62 * spread, _BOTTOM, _TOP),
            COLOURS[dark],
        )

    def x(self, tokens: float) -> float:
        return self.tokens.at(tokens)

    def y(self, loss: float) -> float:
        """Pixels from the top. A spike that leaves the plot stops at its edge."""
        return self.losses.at(min(max(loss, self.losses.low), self.losses.high))

    def frame(self, title: str) -> str:
        """Title, grid and ticks."""
        colour = self.colour
        parts = [heading(28, cut(title, int((WIDTH - 40) / (CHARACTER * 15 / 13))))]
        parts.append(caption("loss (nats per token)", colour["axis"]))
        parts += levels(self.losses.ticks(6), _LEFT, _RIGHT, colour)
        parts.append(line_across(_LEFT, _RIGHT, _BOTTOM, colour))
        parts += marks(self.tokens.ticks(6, least=1.0, name=human_count), _BOTTOM, colour)
        parts.append(text_at(_RIGHT, _BOTTOM + 38, "tokens", colour["axis"], anchor="end"))
        return "".join(parts)

    def line(self, points: Sequence[Point], style: str) -> str:
        if len(points) < 2:
            return ""
        path = " ".join(f"{self.x(tokens):.1f},{self.y(loss):.1f}" for tokens, loss in points)
        return f'<polyline points="{path}" fill="none" stroke-linejoin="round" {style}/>'

    def dot(self, point: Point, style: str) -> str:
        return f'<circle cx="{self.x(point[0]):.1f}" cy="{self.y(point[1]):.1f}" {style}/>'

    def text(
        self, point: Point, text: str, fill: str, *, dx: float, dy: float, anchor: str = "start"
    ) -> str:
        return text_at(
            self.x(point[0]) + dx,
            self.y(point[1]) + dy,
            text,
            fill,
            anchor=anchor,
            halo=self.colour["page"],
        )

    def base_line(self, base_loss: float, colour: str) -> str:
        return f'<path d="M{_LEFT} {self.y(base_loss):.1f}H{_RIGHT}" stroke="{colour}" {DASHED}/>'

    def base_label(self, base_loss: float, points: Sequence[Point]) -> str:
        """Write the base's loss at its line, where the held-out losses leave room."""
        label, colour, start = f"base {base_loss:.3f}", self.colour["base"], (0.0, base_loss)
        if points and points[0][1] < base_loss:  # they stay below
            return self.text(start, label, colour, dx=10, dy=-6)
        reached = next((tokens for tokens, loss in points if loss <= base_loss), math.inf)
        if self.x(reached) < _LEFT + 120:  # they come down at once, and stay below
            return self.text(
                (self.tokens.high, base_loss), label, colour, dx=-4, dy=-6, anchor="end"
            )
        return self.text(start, label, colour, dx=10, dy=17)

    def reached(self, point: Point) -> str:
        """Draw a ring where the base is reached, and a line up to its label, where no curve runs by
        then.
        """
        colour, x, y = self.colour["base"], self.x(point[0]), self.y(point[1])
        label = f"at the base after {human_count(point[0])} tokens"
        fits = x + 10 + len(label) * CHARACTER < _RIGHT
        anchor, dx = ("start", 6) if fits else ("end", -6)
        return (
            f'<path d="M{x:.1f} {_TOP + 36}V{y - 7:.1f}" stroke="{colour}" stroke-dasharray="1.5 3"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6.5" fill="none" stroke="{colour}" stroke-width="2"/>'
            + text_at(x + dx, _TOP + 48, label, colour, anchor=anchor, halo=self.colour["page"])
        )


class _Legend:
    """The legend below the plot, in as many rows as it takes."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self._x, self._y = float(_LEFT), _BOTTOM + 64

    @property
    def bottom(self) -> int:
        return self._y + 16

    def add(self, name: str, line: str, dot: str = "") -> None:
        shown = cut(name, int((_RIGHT - _LEFT - 34) / CHARACTER))
        width = 34 + len(shown) * CHARACTER
        if self._x > _LEFT and self._x + width > _RIGHT:
            self._x, self._y = float(_LEFT), self._y + 20
        x, y = self._x, self._y
        self.parts.append(f'<path d="M{x:g} {y - 4}h26" fill="none" {line}/>')
        if dot:
            self.parts.append(f'<circle cx="{x + 13:g}" cy="{y - 4}" {dot}/>')
        self.parts.append(f'<text x="{x + 34:g}" y="{y}">{escaped(shown)}</text>')
        self._x += width + 20


def _legend_row(entries: Sequence[tuple[str, str, float]], colour: Mapping[str, str]) -> str:
    """The legend above the plot, flush right."""
    parts, x = [], float(_RIGHT)
    for name, stroke, width in reversed(entries):
        x -= len(name) * CHARACTER
        parts.append(text_at(x, 50, name, colour["axis"]))
        parts.append(f'<path d="M{x - 32:g} 46h26" stroke="{stroke}" stroke-width="{width}"/>')
        x -= 32 + 18
    return "".join(parts)


def _description(
    training: Sequence[Point],
    heldout: Sequence[Point],
    base_loss: float | None,
    reached: Point | None,
) -> str:
    """The picture in words, for readers who cannot see it."""
    said = []
    if training:
        said.append(f"Training loss from {training[0][1]:.3f} to {training[-1][1]:.3f}.")
    if heldout:
        end = human_count(heldout[-1][0])
        said.append(
            f"Held-out loss from {heldout[0][1]:.3f} to {heldout[-1][1]:.3f} after {end} tokens."
        )
    if base_loss is not None:
        when = (
            "not reached" if reached is None else f"reached after {human_count(reached[0])} tokens"
        )
        said.append(f"Held-out loss of the base: {base_loss:.3f}, {when}.")
    return " ".join(said) or "Nothing measured yet."


# --- numbers --------------------------------------------------------------------------------------


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _points(pairs: Iterable[tuple[float, float | None]]) -> list[Point]:
    """The pairs whose loss is a finite number."""
    return [(tokens, loss) for tokens, loss in pairs if loss is not None and math.isfinite(loss)]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most _MAX_POINTS points, each the mean of as many neighbours.

    >>> len(_thinned([(k, 1.0) for k in range(1_000_000)]))
    600
    """
    count = min(len(points), _MAX_POINTS)
    edges = [len(points) * k // count for k in range(count + 1)] if count else []
    groups = [points[start:stop] for start, stop in pairwise(edges)]
    return [
        (math.fsum(t for t, _ in g) / len(g), math.fsum(loss for _, loss in g) / len(g))
        for g in groups
    ]


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """Smooth losses: each is a mean over a sixth of the run, so that noise hides neither the trend
    nor the held-out line.

    Only the middle half of each window counts, which leaves out spikes. At the start windows are
    shorter, because there the loss falls fastest.
    """
    losses = [loss for _, loss in points]
    reaches = [min(k + 1, len(points) // 12) for k in range(len(points))]
    windows = [losses[max(0, k - reach) : k + reach + 1] for k, reach in enumerate(reaches)]
    return [(tokens, _midmean(window)) for (tokens, _), window in zip(points, windows, strict=True)]


def _midmean(values: Sequence[float]) -> float:
    """The mean without the lowest and the highest quarter.

    >>> _midmean([2.0, 3.0, 90.0]), _midmean([2.0, 3.0])
    (3.0, 2.5)
    """
    left_out = (len(values) + 1) // 4
    middle = sorted(values)[left_out : len(values) - left_out]
    return math.fsum(middle) / len(middle)


def _ends_kept(points: Sequence[Point]) -> list[Point]:
    """Choose at most _MAX_POINTS of the measurements, with the first and the last."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    return [points[(len(points) - 1) * k // (_MAX_POINTS - 1)] for k in range(_MAX_POINTS)]


def _dotted(points: Sequence[Point]) -> list[Point]:
    """The points that get a dot: all of them, or only the two ends if that would be too many."""
    return list(points) if len(points) <= _MAX_DOTS else [points[0], points[-1]]
