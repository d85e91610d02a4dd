"""What pictures with axes share: where a value lies, and how a grid and its numbers are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dus_cli.pictures.svg import text_at


class Tick(NamedTuple):
    """A place on an axis, in pixels, and the number that is written there."""

    at: float
    name: str


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` along the pixels from `start` to `end`.

    An axis that goes up the page starts at its lower edge. Where all values are one, `low` is
    `high` and it lies at the share `alone` of the way.
    """

    low: float
    high: float
    start: float
    end: float
    alone: float = 0.0

    def at(self, value: float) -> float:
        """The pixel of a value.

        >>> Axis(2.0, 4.0, start=330, end=64).at(3.0)
        197.0
        """
        spread = self.high - self.low
        share = (value - self.low) / spread if spread > 0 else self.alone
        return self.start + (self.end - self.start) * share

    def ticks(
        self, count: int, *, least: float = 0.0, name: Callable[[float], str] | None = None
    ) -> list[Tick]:
        """Round numbers that cut the axis into at most `count` pieces, none smaller than `least`,
        which an axis of one value must have.

        Without `name` they are written with as many decimals as their step has.

        >>> [tick.name for tick in Axis(2.72, 3.5, 0, 1).ticks(6)]
        ['2.8', '3.0', '3.2', '3.4']
        """
        step = nice_step(self.high - self.low, count, least=least)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        written = name or f"{{:.{decimals}f}}".format
        return [Tick(self.at(value), written(value)) for value in ticks(self.low, self.high, step)]


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


# --- grid and numbers -----------------------------------------------------------------------------


def levels(
    ticks: Iterable[Tick], left: float, right: float, colour: Mapping[str, str]
) -> list[str]:
    """Lines across the plot, each with its number to the left."""
    parts = []
    for tick in ticks:
        parts.append(f'<path d="M{left:g} {tick.at:.1f}H{right:g}" stroke="{colour["grid"]}"/>')
        parts.append(number_left(left, tick, colour))
    return parts


def columns(
    ticks: Iterable[Tick], top: float, bottom: float, gap: float, colour: Mapping[str, str]
) -> list[str]:
    """Lines down the plot, each with its number `gap` pixels below it."""
    parts = []
    for tick in ticks:
        parts.append(f'<path d="M{tick.at:.1f} {top:g}V{bottom:g}" stroke="{colour["grid"]}"/>')
        parts.append(number_below(bottom + gap, tick, colour))
    return parts


def marks(ticks: Iterable[Tick], bottom: float, colour: Mapping[str, str]) -> list[str]:
    """Short lines below the plot, each with its number."""
    parts = []
    for tick in ticks:
        parts.append(f'<path d="M{tick.at:.1f} {bottom:g}v5" stroke="{colour["axis"]}"/>')
        parts.append(number_below(bottom + 20, tick, colour))
    return parts


def line_across(left: float, right: float, y: float, colour: Mapping[str, str]) -> str:
    """The axis itself."""
    return f'<path d="M{left:g} {y:g}H{right:g}" stroke="{colour["axis"]}"/>'


def number_left(left: float, tick: Tick, colour: Mapping[str, str]) -> str:
    """A number to the left of an axis that goes up the page."""
    return text_at(left - 8, tick.at + 4.5, tick.name, colour["axis"], anchor="end")


def number_below(y: float, tick: Tick, colour: Mapping[str, str]) -> str:
    """A number below an axis that goes across the page, its baseline at `y`."""
    return text_at(tick.at, y, tick.name, colour["axis"], anchor="middle")
