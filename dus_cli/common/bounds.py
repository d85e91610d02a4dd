"""The bounds of every number that a command takes, in one table, and the error for a number
outside of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dus_cli.errors import UsageError, shown

_BILLION, _TRILLION, _QUADRILLION = 10**9, 10**12, 10**15

# Tokens in a row: longer than any context in use.
_LONGEST_ROW = 1 << 24

# The most layers that an output may have (`maps.layers`).
_MOST_LAYERS = 100_000


@dataclass(frozen=True)
class Bounds:
    """The numbers that an option takes, from `least` to `most`.

    If `is_whole`, only integers; if `is_above`, not `least` itself.
    """

    least: float
    most: float
    is_whole: bool = True
    is_above: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.is_whole else "a number"
        first = f"above {self.least:,}, at most" if self.is_above else f"from {self.least:,} to"
        return f"{kind} {first} {self.most:,}"

    def holds(self, value: Any) -> bool:
        """Whether a value is a number within the bounds; NaN and infinity never are."""
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else (int, float)):
            return False
        return bool(
            self.least <= value <= self.most and not (self.is_above and value == self.least)
        )


# By option name; a name means the same in every command. Sizes are in bytes, losses in nats per
# token, shares between 0 and 1.
BOUNDS = {
    "average": Bounds(2, 1000),
    "batch-tokens": Bounds(1, _BILLION),
    "best": Bounds(1, _MOST_LAYERS),
    "copies": Bounds(2, _MOST_LAYERS),
    "document-weight": Bounds(0, 100, is_whole=False),  # in the field that --weight-field names
    "epochs": Bounds(0, 1_000_000, is_whole=False, is_above=True),
    "eval-every": Bounds(1, _BILLION),
    "eval-tasks-every": Bounds(1, _BILLION),
    "eval-tasks-limit": Bounds(1, _BILLION),
    "eval-tokens": Bounds(1, _TRILLION),
    "export-every": Bounds(1, _BILLION),
    "gain-lr": Bounds(0, 1, is_whole=False),
    "grad-clip": Bounds(0, 1_000_000, is_whole=False),
    "holdout": Bounds(0, 0.5, is_whole=False),
    "interval": Bounds(1, _BILLION, is_whole=False),  # of --save-every: steps or seconds
    "jobs": Bounds(1, 64),
    "keep": Bounds(1, 1000),
    "limit": Bounds(1, _BILLION),
    "lr": Bounds(0, 1, is_whole=False),
    "max-documents": Bounds(1, _TRILLION),
    "max-drop": Bounds(0, 100, is_whole=False),
    "max-loss": Bounds(0, 1000, is_whole=False, is_above=True),
    "max-memory": Bounds(1, _QUADRILLION),
    "max-restarts": Bounds(0, 1000),
    "max-shard-size": Bounds(1, _QUADRILLION),
    "max-skipped": Bounds(1, 1_000_000),
    "micro-batch": Bounds(1, 65_536),
    "min-improvement": Bounds(-1000, 1000, is_whole=False),
    "nnodes": Bounds(1, 65_536),
    "node-rank": Bounds(0, 65_535),
    "nproc-per-node": Bounds(1, 1024),
    "num-fewshot": Bounds(0, 1000),
    "pilot-seconds": Bounds(1, _BILLION, is_whole=False),  # of --pilot
    "push-every": Bounds(1, _BILLION),
    "seed": Bounds(0, (1 << 32) - 1),  # what every generator of random numbers takes
    "seq-length": Bounds(2, _LONGEST_ROW),
    "shuffle-window": Bounds(1, _TRILLION),
    "steps": Bounds(1, _BILLION),
    "stride": Bounds(1, _LONGEST_ROW),
    "token-cache-size": Bounds(1, _QUADRILLION),
    "tokens": Bounds(1, _QUADRILLION),
    "trim": Bounds(0, _MOST_LAYERS),
    "weight": Bounds(1e-6, 1_000_000, is_whole=False),  # of --data FILE:WEIGHT
    "weight-decay": Bounds(0, 10, is_whole=False),
    "within": Bounds(0, 1, is_whole=False),
}


def parse_number(name: str, text: str, parse: Callable[[str], Any] | None = None) -> Any:
    """Parse an option's number and check its bounds.

    >>> parse_number("jobs", "8"), parse_number("lr", "1e-4")
    (8, 0.0001)

    Args:
        name: the option's name, without leading dashes.
        text: the text that was typed.
        parse: parses a number that is not a plain one, such as 10M; raises ValueError.

    Raises:
        ValueError: the text is not a number within the option's bounds, which the message gives.
    """
    bounds = BOUNDS[name]
    if parse is None:
        try:
            value: Any = int(text) if bounds.is_whole else float(text)
        except ValueError:
            raise ValueError(f"{shown(text)} is not {bounds}") from None
    else:
        value = parse(text)
    if not bounds.holds(value):
        raise ValueError(f"{shown(text)} is not {bounds}")
    return value


def check_numbers(**numbers: Any) -> None:
    """Check that numbers are within their bounds.

    Each is passed by its option's name, with underscores; None stands for no number.

    >>> check_numbers(jobs=8, trim=None)

    Raises:
        UsageError: a number is out of bounds.
    """
    for name, value in numbers.items():
        bounds = BOUNDS.get(name.replace("_", "-"))
        if bounds is not None and value is not None and not bounds.holds(value):
            raise UsageError(f"{name}: {shown(repr(value))} is not {bounds}")


def check_fields(options: Any) -> None:
    """Check the numbers in a dataclass whose fields are named like options.

    Raises:
        UsageError: a number is out of bounds.
    """
    check_numbers(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    )
