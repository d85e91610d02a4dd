"""The bars that show what doubling each layer alone costs, and the legend of starts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dus_cli.maps.starts import StartRule
from dus_cli.pictures.axes import (
    Axis,
    Tick,
    levels,
    line_across,
    nice_step,
    number_below,
    ticks,
)
from dus_cli.pictures.svg import CHARACTER, DASHED, heading, text_at
from dus_cli.probe.found import Doublings

BARS_HEIGHT = 280

# The edges of the bars: across as the plots above them, down from where those end.
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 618, 56, 226

# The axis is logarithmic; costs below this share of the largest are drawn as nothing.
_SMALLEST = 1e-4


def of_start(start: int, series: Sequence[str]) -> str:
    """The colour of a start by its number; the second of a series is that of the parameters."""
    colours = (series[0], *series[2:])
    return colours[start % len(colours)]


def names_of_starts(starts: Sequence[StartRule], y: float, series: Sequence[str]) -> list[str]:
    """The legend of starts: one line of coloured names."""
    parts, x = [], float(_LEFT)
    for number, start in enumerate(starts):
        fill = of_start(number, series)
        parts.append(f'<path d="M{x:.1f} {y - 9:.1f}h9v9h-9z" fill="{fill}"/>')
        parts.append(text_at(x + 14, y, str(start), fill))
        x += 14 + CHARACTER * (len(str(start)) + 2)
    return parts


def bars(
    doublings: Sequence[Doublings], top: float, colour: dict[str, str], series: Sequence[str]
) -> list[str]:
    """Draw, for each layer and each start, what doubling that layer alone adds to the loss."""
    costs = [cost for one in doublings for cost in one.costs if cost is not None and cost > 0]
    high = max(costs, default=1.0)
    low = max(min(costs, default=0.1), _SMALLEST * high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9) + 1)
    scale = Axis(powers[0], powers[-1], start=top + _BOTTOM - 2, end=top + _TOP)

    def y_of(cost: float) -> float:
        """A layer that costs nothing, or less, lies at the bottom."""
        return scale.at(math.log10(max(cost, 10.0 ** powers[0])))

    num_layers = len(doublings[0].losses)
    each = (_RIGHT - _LEFT) / num_layers
    wide = 0.84 * each / len(doublings)
    bottom = top + _BOTTOM
    parts = [heading(top + 16, "Each layer doubled alone: loss above the base's")]
    parts += names_of_starts([one.start for one in doublings], top + 40, series)
    costs_named = [Tick(y_of(10.0**power), f"{10.0**power:g}") for power in powers]
    parts += levels(costs_named, _LEFT, _RIGHT, colour)
    for number, one in enumerate(doublings):
        places = [
            f"M{_LEFT + each * (layer + 0.08) + wide * number:.1f} {bottom}"
            f"V{y_of(cost):.1f}h{wide:.1f}V{bottom}z"
            for layer, cost in enumerate(one.costs)
            if cost is not None
        ]
        parts.append(f'<path d="{"".join(places)}" fill="{of_start(number, series)}"/>')
    most = doublings[0].most
    if 10.0 ** powers[0] <= most <= 10.0 ** powers[-1]:
        line = f"M{_LEFT} {y_of(most):.1f}H{_RIGHT}"
        parts.append(f'<path d="{line}" stroke="{colour["scaled"]}" {DASHED}/>')
    parts.append(line_across(_LEFT, _RIGHT, bottom, colour))
    for layer in ticks(0, num_layers - 1, nice_step(num_layers - 1, 15, least=1.0)):
        x = _LEFT + each * (layer + 0.5)
        parts.append(number_below(bottom + 20, Tick(x, f"{layer:g}"), colour))
    said = "layer; above the dashed line it is not doubled"
    parts.append(text_at(_RIGHT, bottom + 38, said, colour["axis"], anchor="end"))
    return parts
