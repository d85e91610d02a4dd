r"""Loss right after scaling against depth, for several families of maps, as SVG from what `dus
probe` printed.

    dus probe MODEL --data heldout.jsonl > two.txt
    dus probe MODEL --data heldout.jsonl --copies 3 > three.txt
    python tests/benchmarks/depths.py "two copies=two.txt" "three copies=three.txt" --most 62 \
        --plot docs/depths.svg

A map that is in an earlier file, too, is left out of the later series. With --above-base the base's
loss in the same file is subtracted, to compare the same maps on several texts.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from dus_cli.pictures.axes import Axis, levels, line_across, marks
from dus_cli.pictures.files import write_pictures
from dus_cli.pictures.svg import COLOURS, DASHED, SERIES, caption, document, heading, text_at

_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 664, 64, 350

# Name, layers, parameters, bytes with their unit, FLOP per token, loss.
_LINE = re.compile(
    r"^(\S+(?: \d+)?(?: --copies \d)?) +(\d+) +\S+ +[\d.]+ .B +\S+ +([\d.]+) ", re.MULTILINE
)

Points = list[tuple[int, float]]


def read(files: list[str], most: int, *, above_base: bool) -> tuple[float, dict[str, Points]]:
    """The base's loss, and (layers, loss) of each series, with the base's loss subtracted on
    request.
    """
    base = 0.0
    seen: set[tuple[str, str]] = set()
    series: dict[str, Points] = {}
    for entry in files:
        name, path = entry.split("=", 1)
        points = series[name] = []
        if above_base:
            seen.clear()
        for map_name, layers, loss in _LINE.findall(Path(path).read_text(encoding="utf-8")):
            base = float(loss) if map_name == "base" else base
            if map_name != "base" and (layers, loss) not in seen and int(layers) <= most:
                seen.add((layers, loss))
                points.append((int(layers), float(loss)))
        points.sort()
        if above_base:
            points[:] = [(layers, loss - base) for layers, loss in points]
    return 0.0 if above_base else base, series


def picture(base: float, series: dict[str, Points], title: str, *, dark: bool) -> str:
    colour = COLOURS[dark]
    points = [point for each in series.values() for point in each]
    low, high = min(layers for layers, _ in points) - 1, max(layers for layers, _ in points) + 1
    top = max(loss for _, loss in points) * 1.04
    bottom = base - 0.05 * (top - base)

    depths = Axis(low, high, _LEFT, _RIGHT)
    losses = Axis(bottom, top, _BOTTOM, _TOP)
    x, y = depths.at, losses.at
    above = "" if base else " above the base's"
    parts = [heading(28, title), caption(f"loss{above} (nats per token)", colour["axis"])]
    parts += levels(losses.ticks(6, name="{:g}".format), _LEFT, _RIGHT, colour)
    parts += marks(depths.ticks(10, name="{:g}".format), _BOTTOM, colour)
    parts.append(line_across(_LEFT, _RIGHT, _BOTTOM, colour))
    parts.append(text_at(_RIGHT, _BOTTOM + 38, "layers", colour["axis"], anchor="end"))
    parts.append(f'<path d="M{_LEFT} {y(base):.1f}H{_RIGHT}" stroke="{colour["base"]}" {DASHED}/>')
    label = f"base {base:.3f}" if base else "base"
    parts.append(text_at(_RIGHT, y(base) - 6, label, colour["base"], anchor="end"))
    for number, (name, each) in enumerate(series.items()):
        stroke, row = SERIES[dark][number], _TOP + 14 + 20 * number
        if len({layers for layers, _ in each}) == len(each):
            line = " ".join(f"{x(layers):.1f},{y(loss):.1f}" for layers, loss in each)
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{stroke}" stroke-width="1.8"/>'
            )
        parts += [
            f'<circle cx="{x(layers):.1f}" cy="{y(loss):.1f}" r="3.4" fill="{stroke}"/>'
            for layers, loss in each
        ]
        parts.append(f'<circle cx="{_LEFT + 18}" cy="{row - 4}" r="3.4" fill="{stroke}"/>')
        parts.append(text_at(_LEFT + 30, row, name, stroke))
    said = " ".join(
        f"{name}: {', '.join(f'{layers} layers {loss:.3f}' for layers, loss in each)}."
        for name, each in series.items()
    )
    return document(parts, title, f"Base {base:.3f}. {said}", _BOTTOM + 52, colour)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--above-base", action="store_true")
    parser.add_argument("--most", type=int, default=1 << 20, help="layers")
    parser.add_argument("--title", default="Loss right after scaling, by depth")
    parser.add_argument("--plot", type=Path, required=True)
    options = parser.parse_args()
    base, series = read(options.files, options.most, above_base=options.above_base)
    write_pictures(options.plot, lambda dark: picture(base, series, options.title, dark=dark))


if __name__ == "__main__":
    main()
