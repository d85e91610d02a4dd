"""The layer map as text: the base, the copies cut from it, and the seams between them."""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence

from dus_cli.common.units import counted
from dus_cli.maps.layers import LayerMap

# More rows than this do not help to see the map.
_MAX_ROWS = 12


def draw_map(layer_map: LayerMap, width: int = 80) -> str:
    """Draw a bar for the base and one for each run of the map. The horizontal axis is the base's
    layers.

    >>> from dus_cli.maps.layers import stack
    >>> print(draw_map(stack(8, trim=2), width=60))
    base     ████████████████████████   0…7   8 layers
    copy 1   ██████████████████         0…5   output 0…5
    copy 2         ██████████████████   2…7   output 6…11
    seam     layer 5 feeds layer 2: distance 3, output 5|6
    """
    n = layer_map.num_base_layers
    output = 0
    rows = [("base", range(n), f"{n} layers")]
    for number, run in enumerate(layer_map.runs, start=1):
        last = output + len(run) - 1
        rows.append((f"copy {number}", run, f"output {_span(output, last)}"))
        output = last + 1
    spans = [_span(run.start, run.stop - 1) for _, run, _ in rows]
    span_width = max(map(len, spans))
    bar_width = max(
        10, min(n * 3, width - 9 - 3 - span_width - 3 - max(len(note) for *_, note in rows))
    )
    lines = []
    for (label, run, note), span in zip(rows, spans, strict=True):
        start, stop = (
            run.start * bar_width // n,
            max(run.stop * bar_width // n, run.start * bar_width // n + 1),
        )
        bar = (" " * start + "█" * (stop - start)).ljust(bar_width)
        lines.append(f"{label:<9}{bar}   {span:<{span_width}}   {note}")
    if len(lines) > _MAX_ROWS:
        lines = [
            *lines[: _MAX_ROWS - 1],
            f"…        {len(lines) - _MAX_ROWS} copies more",
            lines[-1],
        ]
    seams = [
        f"seam     layer {s.base_layers[0]} feeds layer {s.base_layers[1]}: distance {s.distance}, "
        f"output {s.output_layers[0]}|{s.output_layers[1]}"
        for s in layer_map.seams
    ]
    if len(seams) > _MAX_ROWS:
        seams = [*seams[: _MAX_ROWS - 1], f"…        {len(seams) - _MAX_ROWS + 1} seams more"]
    return "\n".join(lines + seams)


def draw_kinds(
    kinds: Mapping[str, Sequence[str]], layer_map: LayerMap, width: int = 80
) -> list[str]:
    """The kinds of the output's layers, a letter each, with a bar at every seam; lines of at most
    `width` columns.

    >>> from dus_cli.maps.layers import stack
    >>> kinds = ["sliding_attention"] * 5 + ["full_attention"]
    >>> for line in draw_kinds({"layer_types": kinds}, stack(4, trim=1), 60): print(line)
    layer_types: s sliding_attention, f full_attention
           0 sss|ssf
    """
    above = {seam.output_layers[1] for seam in layer_map.seams}
    lines = []
    for name, kinds_by_layer in kinds.items():
        letters = _letters(kinds_by_layer)
        legend = ", ".join(f"{letter} {kind}" for kind, letter in letters.items())
        lines.append(_cut(f"{name}: {legend}", width))
        row, first = "", 0
        for layer, kind in enumerate(kinds_by_layer):
            mark = ("|" if layer in above else "") + letters[kind]
            if len(row) + len(mark) > width - 9:
                lines.append(f"{first:8} {row}")
                row, first = "", layer
            row += mark
        lines.append(f"{first:8} {row}")
    return lines


def describe_scales(factors: Sequence[float], names: Collection[str]) -> str:
    """Which tensors of how many layers are multiplied, and by what.

    >>> describe_scales((1.0, 0.5, 0.5, 1.0), ["mlp.down_proj.weight", "self_attn.o_proj.weight"])
    'mlp.down_proj.weight and self_attn.o_proj.weight of 2 layers × 0.5'
    """
    scaled = [factor for factor in factors if factor != 1]
    different = sorted(set(scaled))
    by = f"{different[0]:g}" if len(different) == 1 else f"{different[0]:g} to {different[-1]:g}"
    *first, last = sorted(names)
    named = f"{', '.join(first)} and {last}" if first else last
    return f"{named} of {counted(len(scaled), 'layer')} × {by}"


def _letters(kinds: Sequence[str]) -> dict[str, str]:
    """A letter for each kind: one from its name if one is free, else any other."""
    letters: dict[str, str] = {}
    for kind in dict.fromkeys(kinds):
        own_letters = [c for c in f"{kind.lower()}{kind.upper()}" if c.isalnum()]
        free = (
            c
            for c in (*own_letters, *string.ascii_letters, *string.digits)
            if c not in letters.values()
        )
        letters[kind] = next(free, "?")
    return letters


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}…{last}"
