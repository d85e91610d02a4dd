"""The layer map as a picture: SVG for a light and a dark page, drawn for the map at hand."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import groupby

from dus_cli.maps.layers import LayerMap, Seam

# The files beside a model card, and whether they are for a dark page.
PICTURES = {"layer-map-light.svg": False, "layer-map-dark.svg": True}

# GitHub's own colours for text, a neutral bar, a series of things, and an alarm.
_LIGHT = {"text": "#1f2328", "base": "#afb8c1", "seam": "#cf222e"}
_DARK = {"text": "#e6edf3", "base": "#59636e", "seam": "#f85149"}
_LIGHT_RUNS = ("#0969da", "#1a7f37", "#8250df", "#bc4c00", "#1b7c83", "#bf3989")
_DARK_RUNS = ("#4493f8", "#3fb950", "#ab7df8", "#db6d28", "#39c5cf", "#db61a2")

_LEFT, _WIDTH, _HEIGHT = 96, 480, 13  # of the bars, in pixels
_TOTAL_WIDTH = 700
_MAX_ROWS = 9  # copies that have a row of their own
_MAX_SEAMS = 40  # seams that are marked; more would be a red bar
_SMALLEST_CELL = 3.0  # narrower layers are drawn as one bar for each run

# A bar: where it starts, how wide it is, its colour, and whether it is only outlined.
Bar = tuple[float, float, str, bool]


def describe_map(layer_map: LayerMap) -> str:
    """The map in words, for readers who cannot see the picture.

    >>> from dus_cli.maps.layers import stack
    >>> describe_map(stack(32, trim=8))
    'Base layers 0 to 23, then 8 to 31, make 48 layers'
    """
    runs = layer_map.runs
    if len(runs) > 4:
        return (
            f"{layer_map.num_base_layers} base layers, cut into {len(runs)} runs, make "
            f"{len(layer_map)} layers"
        )
    spans = [str(r.start) if len(r) == 1 else f"{r.start} to {r.stop - 1}" for r in runs]
    return (
        f"Base layers {', then '.join(spans)}{',' * (len(runs) > 1)} make {len(layer_map)} layers"
    )


def layer_map_svg(layer_map: LayerMap, *, dark: bool, identities: Collection[int] = ()) -> str:
    """The base, each run cut from it under the base's layers, and the output with its seams: some
    kB for any map.

    `identities` are output layers that start as identities: outlined, not filled. Holds numbers and
    colours only.
    """
    colour, run_colours = (_DARK, _DARK_RUNS) if dark else (_LIGHT, _LIGHT_RUNS)
    n, runs = layer_map.num_base_layers, layer_map.runs
    rows = [("base", _cells(range(n), n, colour["base"]), f"{n} layers")]
    for number, run in enumerate(runs):
        if len(runs) > _MAX_ROWS and _MAX_ROWS - 2 <= number < len(runs) - 1:
            if number == _MAX_ROWS - 2:
                rows.append(("…", [], f"{len(runs) - _MAX_ROWS + 1} more"))
            continue
        bars = _cells(run, n, run_colours[number % len(run_colours)])
        rows.append(
            (
                f"copy {number + 1}",
                bars,
                f"layers {_span(run)}" if len(run) > 1 else f"layer {run.start}",
            )
        )
    pitch = 34 if len(rows) <= 4 else 22
    parts: list[str] = []
    y = 20
    for label, bars, note in rows:
        parts += _row(label, bars, note, y)
        y += pitch
    y += 10
    outputs = _outputs(layer_map, run_colours, frozenset(identities))
    parts += _row("output", outputs, f"{len(layer_map)} layers", y)
    parts += _seams(layer_map, y, colour["seam"])
    height = y + 58 if layer_map.seams else y + 34
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_TOTAL_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_TOTAL_WIDTH} {height}" role="img"><title>{describe_map(layer_map)}</title>'
        f'<g font-family="ui-monospace, monospace" font-size="13" fill="{colour["text"]}">{"".join(parts)}</g></svg>\n'
    )


def _cells(layers: range, of: int, colour: str) -> list[Bar]:
    """Draw a run of layers on the scale of `of` layers: a cell for each, or one bar if cells would
    be too narrow.
    """
    pitch = _pitch(of)
    if pitch < _SMALLEST_CELL:
        return [(layers.start * pitch, max(1.0, len(layers) * pitch), colour, False)]
    return [(k * pitch, pitch - _gap(pitch), colour, False) for k in layers]


def _outputs(
    layer_map: LayerMap, colours: tuple[str, ...], identities: frozenset[int]
) -> list[Bar]:
    """Draw the output's layers, each in its run's colour; pixels of one colour are one bar if cells
    would be too narrow.
    """
    run_of = [number for number, run in enumerate(layer_map.runs) for _ in run]
    pitch = _pitch(len(layer_map))

    def look(output: int) -> tuple[int, bool]:
        return run_of[output], output in identities

    if pitch >= _SMALLEST_CELL:
        looks = [(j, look(j)) for j in range(len(layer_map))]
        return [
            (j * pitch, pitch - _gap(pitch), colours[run % len(colours)], hollow)
            for j, (run, hollow) in looks
        ]
    pixels = [look(x * len(layer_map) // _WIDTH) for x in range(_WIDTH)]
    bars, x = [], 0
    for (run, hollow), group in groupby(pixels):
        width = len(list(group))
        bars.append((float(x), float(width), colours[run % len(colours)], hollow))
        x += width
    return bars


def _row(label: str, bars: list[Bar], note: str, y: int) -> Iterator[str]:
    yield f'<text x="8" y="{y + 11}">{label}</text>'
    for x, width, colour, hollow in bars:
        if hollow:
            box = f'x="{_LEFT + x + 0.6:g}" y="{y + 0.6:g}" width="{max(0.4, width - 1.2):g}" height="{_HEIGHT - 1.2:g}"'
            yield f'<rect {box} fill="none" stroke="{colour}" stroke-width="1.2"/>'
        else:
            yield f'<rect x="{_LEFT + x:g}" y="{y}" width="{width:g}" height="{_HEIGHT}" fill="{colour}"/>'
    yield f'<text x="{_LEFT + _WIDTH + 12}" y="{y + 11}">{note}</text>'


def _seams(layer_map: LayerMap, y: int, colour: str) -> Iterator[str]:
    """Mark each seam, and write which layer feeds which if there is room."""
    seams, pitch = layer_map.seams, _pitch(len(layer_map))
    if len(seams) > _MAX_SEAMS:
        yield _seam_text(_LEFT + _WIDTH / 2, y, f"{len(seams)} seams", colour)
        return
    right = 0.0
    for seam in seams:
        x = _LEFT + seam.output_layers[1] * pitch - _gap(pitch) / 2
        yield f'<path d="M{x:g} {y - 5}v24" stroke="{colour}" stroke-width="2"/>'
        text = _seam_label(seam, alone=len(seams) == 1)
        half = len(text) * 4.0  # a monospaced character of 13 pixels is about 8 wide
        middle = min(max(x, half + 8), _TOTAL_WIDTH - half - 8)
        if middle - half >= right:
            yield _seam_text(middle, y, text, colour)
            right = middle + half + 8


def _seam_label(seam: Seam, *, alone: bool) -> str:
    below, above = seam.base_layers
    return f"the seam: layer {below} feeds layer {above}" if alone else f"{below}→{above}"


def _seam_text(x: float, y: int, text: str, colour: str) -> str:
    return f'<text x="{x:g}" y="{y + 36}" text-anchor="middle" fill="{colour}">{text}</text>'


def _pitch(num_layers: int) -> float:
    """The distance from one layer's cell to the next; a few layers do not fill the width."""
    return min(_WIDTH / num_layers, 40.0)


def _gap(pitch: float) -> float:
    return min(2.0, pitch * 0.15)


def _span(run: range) -> str:
    return f"{run.start}–{run.stop - 1}"
