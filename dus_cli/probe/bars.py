"""What doubling each layer alone costs, as bars, and which colour is which start."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dus_cli.maps.starts import StartRule
from dus_cli.pictures.svg import CHARACTER, DASHED, escaped, nice_step, text_at, ticks
from dus_cli.probe.found import Doublings

BARS_HEIGHT = 280

# The edges of the bars: across as the plots above them, down from where those end.
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 618, 56, 226

# The axis is logarithmic: what costs less than this share of the largest looks like nothing.
_SMALLEST = 1e-4


def of_start(start: int, series: Sequence[str]) -> str:
    """The colour of a start by its number; the second of a series is that of the parameters."""
    colours = (series[0], *series[2:])
    return colours[start % len(colours)]


def names_of_starts(starts: Sequence[StartRule], y: float, series: Sequence[str]) -> list[str]:
    """Which colour is which start, in a line."""
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
    """For each layer a bar for each start: what doubling it alone adds to the loss."""
    costs = [cost for one in doublings for cost in one.costs if cost is not None and cost > 0]
    high = max(costs, default=1.0)
    low = max(min(costs, default=0.1), _SMALLEST * high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9) + 1)

    def y_of(cost: float) -> float:
        """Costs of nothing and less lie at the bottom, and are drawn as a line there."""
        way = (math.log10(max(cost, 10.0 ** powers[0])) - powers[0]) / (powers[-1] - powers[0])
        return top + _BOTTOM - 2 - way * (_BOTTOM - _TOP - 2)

    num_layers = len(doublings[0].losses)
    each = (_RIGHT - _LEFT) / num_layers
    wide = 0.84 * each / len(doublings)
    bottom = top + _BOTTOM
    title = "Each layer doubled alone: loss above the base's"
    parts = [
        f'<text x="20" y="{top + 16:g}" font-size="15" font-weight="600">{escaped(title)}</text>'
    ]
    parts += names_of_starts([one.start for one in doublings], top + 40, series)
    for power in powers:
        y = y_of(10.0**power)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}" stroke="{colour["grid"]}"/>')
        parts.append(text_at(_LEFT - 8, y + 4.5, f"{10.0**power:g}", colour["axis"], anchor="end"))
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
    parts.append(f'<path d="M{_LEFT} {bottom}H{_RIGHT}" stroke="{colour["axis"]}"/>')
    for layer in ticks(0, num_layers - 1, nice_step(num_layers - 1, 15, least=1.0)):
        x = _LEFT + each * (layer + 0.5)
        parts.append(text_at(x, bottom + 20, f"{layer:g}", colour["axis"], anchor="middle"))
    said = "layer; above the dashed line it is not doubled"
    parts.append(text_at(_RIGHT, bottom + 38, said, colour["axis"], anchor="end"))
    return parts
