"""A probe as SVG: losses against the trim; below them how far apart the base's depths are; and, of
a search over starts, what doubling each layer costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dus_cli.common.units import human_count
from dus_cli.pictures.axes import (
    Axis,
    Tick,
    levels,
    line_across,
    marks,
    nice_step,
    number_below,
    number_left,
    ticks,
)
from dus_cli.pictures.svg import (
    CHARACTER,
    COLOURS,
    DASHED,
    SERIES,
    WIDTH,
    caption,
    document,
    heading,
    text_at,
    wrapped,
)
from dus_cli.probe.bars import BARS_HEIGHT, bars, names_of_starts, of_start
from dus_cli.probe.found import Measured, Probe

# The edges of the upper plot, and of the heat map below it, in pixels. What is recommended is named
# above the plot.
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 618, 112, 378
_NAMES, _NAME = 76, 20
_MAP_TOP, _MAP_SIZE = 476, 372
_SCALE_LEFT, _SCALE_WIDTH = 500, 16
_HEIGHT = 898

# From near to far: a light page goes from pale to deep blue, a dark one from deep to bright. By
# lightness alone, so that every kind of sight reads it.
_NEAR_TO_FAR = {
    False: ((247, 251, 255), (158, 202, 225), (49, 130, 189), (8, 48, 107)),
    True: ((13, 27, 42), (29, 78, 125), (75, 150, 205), (214, 236, 255)),
}

# Wider heat maps leave depths out: their cells would be thinner than a pixel or two.
_MOST_CELLS = 80

_SHADES = 64


@dataclass(frozen=True)
class _Axes:
    """Trims from left to right, loss on the left, parameters on the right."""

    trims: Axis
    losses: Axis
    sizes: Axis


def probe_svg(found: Probe, *, dark: bool = False) -> str:
    """Draw a probe. Depthwise scalings are a line over the trim, other maps are dots at their
    depth.
    """
    colour, series = COLOURS[dark], SERIES[dark]
    measured = [m for m in found.maps if m.is_finite]
    title = f"{found.plan.name}: loss right after scaling, {found.plan.num_layers} layers"
    lines = wrapped(title, 70)
    parts = [heading(28 + 20 * number, line) for number, line in enumerate(lines)]
    below = 20 * (len(lines) - 1)
    parts.append(f'<g transform="translate(0 {below})">')
    parts += _losses(found, measured, colour, series)
    parts += _heat_map(found, colour, dark=dark)
    height = _HEIGHT + below
    if found.doublings:
        parts += bars(found.doublings, _HEIGHT, colour, series)
        height += BARS_HEIGHT
    parts.append("</g>")
    return document(parts, title, _description(found, measured), height, colour)


def _trim_of(measured: Measured, num_layers: int) -> float:
    """The trim; for other maps the trim (whole or half) that a depthwise scaling of the same depth
    would have.
    """
    layer_map = measured.candidate.layer_map
    return layer_map.trim if layer_map.trim is not None else num_layers - len(layer_map) / 2


def _losses(
    found: Probe, measured: Sequence[Measured], colour: dict[str, str], series: Sequence[str]
) -> list[str]:
    points = sorted(
        (
            _trim_of(m, found.plan.num_layers),
            m.loss or 0.0,
            m.candidate.cost.num_parameters,
            m.candidate.layer_map.trim is None,
            found.plan.starts.index(m.candidate.start) if found.plan.starts else 0,
        )
        for m in measured
        if m.candidate.cost is not None
    )
    axes = _axes(points, found)
    loss_colour, size_colour = series[0], series[1]
    parts = [
        caption("loss (nats per token)", loss_colour),
        text_at(WIDTH - 20, 50, "parameters", size_colour, anchor="end"),
    ]
    parts += levels(axes.losses.ticks(6), _LEFT, _RIGHT, colour)
    # of several sizes with one name, the last one is marked
    named = {tick.name: tick.at for tick in axes.sizes.ticks(5, name=human_count)}
    for name, y in named.items():
        parts.append(f'<path d="M{_RIGHT} {y:.1f}h5" stroke="{size_colour}"/>')
        parts.append(text_at(_RIGHT + 10, y + 4.5, name, colour["axis"]))
    parts.append(line_across(_LEFT, _RIGHT, _BOTTOM, colour))
    parts += marks(axes.trims.ticks(15, least=1.0, name="{:g}".format), _BOTTOM, colour)
    parts.append(
        text_at(
            _RIGHT,
            _BOTTOM + 38,
            "trim (layers left out of each copy)",
            colour["axis"],
            anchor="end",
        )
    )
    sizes = " ".join(
        f"{axes.trims.at(trim):.1f},{axes.sizes.at(size):.1f}"
        for trim, _, size, is_other, start in points
        if not is_other and not start
    )
    parts.append(
        f'<polyline points="{sizes}" fill="none" stroke="{size_colour}" stroke-width="1.8" stroke-dasharray="2 3"/>'
    )
    base_y = axes.losses.at(found.base_loss)
    parts.append(f'<path d="M{_LEFT} {base_y:.1f}H{_RIGHT}" stroke="{colour["base"]}" {DASHED}/>')
    parts.append(f'<path d="M240 46h26" stroke="{colour["base"]}" {DASHED}/>')
    parts.append(text_at(274, 50, f"base {found.base_loss:.3f}", colour["base"]))
    for start in range(max(1, len(found.plan.starts))):
        mine = [point for point in points if point[4] == start]
        other_colour = of_start(start, series) if found.plan.starts else series[3]
        parts += _of_one_start(mine, axes, of_start(start, series), other_colour, colour["page"])
    if any(is_other for _, _, _, is_other, _ in points):
        text_colour = colour["axis"] if found.plan.starts else series[3]
        parts.append(text_at(_LEFT, _BOTTOM + 38, "○ other maps of that depth", text_colour))
    parts += names_of_starts(found.plan.starts, _BOTTOM + 58, series)
    return parts + _marks(found, axes, colour)


def _of_one_start(
    points: Sequence[tuple[float, float, int, bool, int]],
    axes: _Axes,
    line_colour: str,
    other_colour: str,
    page: str,
) -> list[str]:
    """Draw a line through the depthwise scalings, and a hollow dot for each other map."""
    at = [
        (f"{axes.trims.at(trim):.1f}", f"{axes.losses.at(loss):.1f}", is_other)
        for trim, loss, _, is_other, _ in points
    ]
    line = " ".join(f"{x},{y}" for x, y, is_other in at if not is_other)
    return [
        f'<polyline points="{line}" fill="none" stroke="{line_colour}" stroke-width="2.5"/>',
        *(
            f'<circle cx="{x}" cy="{y}" r="3.2" fill="{line_colour}"/>'
            for x, y, is_other in at
            if not is_other
        ),
        *(
            f'<circle cx="{x}" cy="{y}" r="4" fill="{page}" '
            f'stroke="{other_colour}" stroke-width="2"/>'
            for x, y, is_other in at
            if is_other
        ),
    ]


def _axes(points: Sequence[tuple[float, float, int, bool, int]], found: Probe) -> _Axes:
    losses = [loss for _, loss, *_ in points] + [found.base_loss]
    sizes = [size for _, _, size, *_ in points] or [found.plan.base_cost.num_parameters]
    trims = [trim for trim, *_ in points] or [0.0]
    low, high = min(losses), max(losses)
    spread = max(high - low, 0.02 * abs(high), 1e-3)
    span = max(max(sizes) - min(sizes), 0.02 * max(sizes), 1)
    # Space for the marks.
    return _Axes(
        Axis(min(trims), max(trims), _LEFT + 14, _RIGHT - 14, alone=0.5),
        Axis(low - 0.14 * spread, high + 0.1 * spread, _BOTTOM, _TOP),
        Axis(min(sizes) - 0.14 * span, max(sizes) + 0.1 * span, _BOTTOM, _TOP),
    )


def _marks(found: Probe, axes: _Axes, colour: dict[str, str]) -> list[str]:
    """Draw a ring around each recommended map, and its name above the plot, where no line runs."""
    names: dict[int, list[str]] = {}
    for number, name in ((found.within, f"within {found.plan.bound:.0%}"), (found.knee, "knee")):
        if number is not None:
            names.setdefault(number, []).append(name)
    marks = []
    for number, words in names.items():
        measured = found.maps[number]
        x, y = (
            axes.trims.at(_trim_of(measured, found.plan.num_layers)),
            axes.losses.at(measured.loss or 0.0),
        )
        layers = len(measured.candidate.layer_map)
        marks.append((x, y, f"{', '.join(words)}: {layers} layers, {measured.loss:.3f}"))
    parts = []
    for row, (x, y, label, anchor) in enumerate(_placed(sorted(marks))):
        baseline = _NAMES + _NAME * row
        dx = 6 if anchor == "start" else -6
        parts.append(
            f'<path d="M{x:.1f} {baseline - 6}V{y - 8:.1f}" stroke="{colour["axis"]}" stroke-dasharray="1.5 3"/>'
        )
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7.5" fill="none" stroke="{colour["text"]}" stroke-width="2"/>'
        )
        parts.append(
            text_at(x + dx, baseline, label, colour["text"], anchor=anchor, halo=colour["page"])
        )
    return parts


def _placed(marks: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str, str]]:
    """Place marks in rows, from left to right, so that no name crosses the line from another name
    to its ring.
    """
    if not marks:
        return []
    room_behind = WIDTH - 10 - 6 - CHARACTER * len(marks[-1][2])
    room_before = 20 + 6 + CHARACTER * len(marks[0][2])
    if marks[-1][0] <= room_behind:
        return [(*mark, "start") for mark in marks]
    if marks[0][0] >= room_before:
        return [(*mark, "end") for mark in reversed(marks)]
    return [(*mark, "start" if mark is marks[0] else "end") for mark in marks]


def _heat_map(found: Probe, colour: dict[str, str], *, dark: bool) -> list[str]:
    """Draw the angular distance of every two depths. A seam is a cell below the diagonal, (out of
    a, into b).
    """
    table = found.distances.angular
    size = len(table)
    every = -(-size // _MOST_CELLS)
    depths = range(0, size, every)
    cell = _MAP_SIZE / len(depths)
    most = max(max(row) for row in table) or 1.0
    left, top = _LEFT, _MAP_TOP
    parts = [
        f'<text x="20" y="{top - 26}" font-size="15" font-weight="600">Angular distance of the base\'s depths</text>'
    ]
    shades: dict[int, list[str]] = {}
    for row, above in enumerate(depths):
        for column, below in enumerate(depths):
            where = f"M{left + column * cell:.1f} {top + row * cell:.1f}"
            shades.setdefault(round(_SHADES * table[above][below] / most), []).append(where)
    # A little wider than the cell, so that the page does not show between two cells.
    square = f"h{cell + 0.4:.1f}v{cell + 0.4:.1f}h-{cell + 0.4:.1f}z"
    for shade, places in sorted(shades.items()):
        path = "".join(f"{where}{square}" for where in places)
        parts.append(f'<path d="{path}" fill="{_mixed(shade / _SHADES, dark=dark)}"/>')
    step = nice_step(size - 1, 8, least=1.0)
    for depth in ticks(0, size - 1, step):
        at = (depth / every + 0.5) * cell
        name = f"{depth:g}"
        parts.append(number_left(left, Tick(top + at, name), colour))
        parts.append(number_below(top + _MAP_SIZE + 18, Tick(left + at, name), colour))
    parts.append(text_at(left, top + _MAP_SIZE + 38, "depth d: before layer d", colour["axis"]))
    parts += _seams_on_map(found, left, top, cell / every, colour)
    return parts + _scale(most, colour, dark=dark)


def _seams_on_map(
    found: Probe, left: float, top: float, cell: float, colour: dict[str, str]
) -> list[str]:
    """Draw a ring on each seam of a recommended map."""
    parts = []
    for number in dict.fromkeys(n for n in (found.within, found.knee) if n is not None):
        for seam in found.maps[number].candidate.layer_map.seams:
            below, above = seam.base_layers
            x, y = left + (above + 0.5) * cell, top + (below + 1.5) * cell
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{max(4.0, cell * 0.45):.1f}" fill="none" '
                f'stroke="{colour["scaled"]}" stroke-width="2"/>'
            )
    return parts


def _scale(most: float, colour: dict[str, str], *, dark: bool) -> list[str]:
    """The legend: what the colours and the rings mean."""
    parts = []
    height = 220
    each = height / _SHADES
    for shade in range(_SHADES):
        y, fill = _MAP_TOP + height - (shade + 1) * each, _mixed((shade + 0.5) / _SHADES, dark=dark)
        parts.append(
            f'<path d="M{_SCALE_LEFT} {y:.1f}h{_SCALE_WIDTH}v{each + 0.4:.1f}h-{_SCALE_WIDTH}z" fill="{fill}"/>'
        )
    distances = Axis(0, most, _MAP_TOP + height, _MAP_TOP)
    for tick in distances.ticks(5, name="{:g}".format):
        x, y = _SCALE_LEFT + _SCALE_WIDTH + 8, tick.at + 4.5
        parts.append(text_at(x, y, tick.name, colour["axis"]))
    y = _MAP_TOP + height + 34
    parts.append(
        f'<circle cx="{_SCALE_LEFT + 8}" cy="{y - 4}" r="5" fill="none" stroke="{colour["scaled"]}" stroke-width="2"/>'
    )
    for row, words in enumerate(
        ("seam of what is", "recommended:", "row out of a,", "column into b")
    ):
        parts.append(text_at(_SCALE_LEFT + 24, y + 18 * row, words, colour["axis"]))
    return parts


def _mixed(share: float, *, dark: bool) -> str:
    """The colour of a distance from 0, near, to 1, far."""
    stops = _NEAR_TO_FAR[dark]
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    index = min(int(place), len(stops) - 2)
    red, green, blue = (
        round(a + (b - a) * (place - index))
        for a, b in zip(stops[index], stops[index + 1], strict=True)
    )
    return f"#{red:02x}{green:02x}{blue:02x}"


def _description(found: Probe, measured: Sequence[Measured]) -> str:
    """The picture in words, for readers who cannot see it."""
    scaled = [m for m in measured if m.candidate.layer_map.trim is not None]
    said = [f"Base: {found.base_loss:.3f}."]
    for m in scaled:
        start = f", {m.candidate.start}" if found.plan.starts else ""
        said.append(f"Trim {m.candidate.layer_map.trim}{start}: {m.loss:.3f}.")
    for one in found.doublings:
        layers = ", ".join(map(str, one.not_borne)) or "none"
        said.append(f"Not doubled with {one.start}: {layers}.")
    if found.within is not None:
        said.append(
            f"Largest within {found.plan.bound:.0%}: {found.maps[found.within].candidate.options}."
        )
    if found.knee is not None:
        said.append(f"Knee: {found.maps[found.knee].candidate.options}.")
    return " ".join(said)
