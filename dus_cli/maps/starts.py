"""Starts: a factor for each output layer on what it adds to the residual stream before training.
Pure.

A copied layer adds its output a second time. That output is the product of matrices, so a factor on
the last of them, the output projection, scales it in an ordinary checkpoint without another tensor:

- `copy`: no factors; every layer is as in the base, as in SOLAR (arXiv:2312.15166).
- `identity`: new layers add nothing, as in LLaMA Pro (arXiv:2401.02415). This takes zeros instead
  of factors: see `planning.projections`.
- `half`: each of K copies of a base layer adds 1/K: a residual block is a step of an integrator,
  taken in K steps of a K-th of its size.
- `fade`: if the layers that end one copy also begin the next, the first copy fades out while the
  second fades in. Each pair of factors adds up to 1. `fade:cosine`, the default, changes more
  slowly at both ends than `fade:linear`.
- `scale:C`: new layers add C times their output.

docs/starts.md has measurements.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

from dus_cli.errors import LayerMapError, shown
from dus_cli.maps.layers import LayerMap

IDENTITY = "identity"

# The names in --help and messages.
STARTS = ("copy", IDENTITY, "half", "fade", "scale:C")

# The second copy's factor in a pair, by the position in the overlap, which is between 0 and 1. The
# first is the default.
_SHAPES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda way: (1 - math.cos(math.pi * way)) / 2,
    "linear": lambda way: way,
}

LARGEST_FACTOR = 16.0

# Decimals of a factor: the same on every machine, whatever its cosine, and easy to read.
_DIGITS = 6


@dataclass(frozen=True)
class StartRule:
    """A start: its name, and the shape of a fade or the factor of a scale.

    >>> StartRule.parse("fade"), str(StartRule.parse("scale:.25"))
    (StartRule(name='fade', shape='cosine', factor=1.0), 'scale:0.25')
    """

    name: str = "copy"
    shape: str = ""
    factor: float = 1.0

    @classmethod
    def parse(cls, text: str) -> StartRule:
        """Parse a start.

        Raises:
            ValueError: there is no such start, or it does not take what follows the colon.
        """
        name, colon, value = text.strip().partition(":")
        if name == "scale":
            return cls(name, factor=_factor(value))
        if name == "fade" and (value in _SHAPES or not colon):
            return cls(name, value or next(iter(_SHAPES)))
        if name == "fade":
            raise ValueError(
                f"{shown(text)!r} is not a start: a fade is one of fade:{', fade:'.join(_SHAPES)}"
            )
        if name not in STARTS or colon:
            raise ValueError(f"{shown(text)!r} is not a start; use one of {', '.join(STARTS)}")
        return cls(name)

    @property
    def scales(self) -> bool:
        """Whether it takes factors: not for a copy, and not for an identity, which takes zeros."""
        return self.name not in {"copy", IDENTITY}

    def __str__(self) -> str:
        if self.name == "scale":
            return f"scale:{self.factor!r}"
        return f"{self.name}:{self.shape}" if self.shape else self.name


# The default start.
COPY = StartRule()


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor <= LARGEST_FACTOR:  # NaN is not
        raise ValueError(
            f"scale:{shown(text)} is not a start; give a factor above 0, at most "
            f"{LARGEST_FACTOR:g}, such as scale:0.25 (for 0 use identity)"
        )
    return factor


def factors(start: StartRule, layer_map: LayerMap) -> tuple[float, ...]:
    """The factor of each output layer on what it adds to the residual stream; all 1 for a copy.

    >>> from dus_cli.maps.layers import stack
    >>> factors(StartRule.parse("half"), stack(4, trim=1))
    (1.0, 0.5, 0.5, 0.5, 0.5, 1.0)
    >>> factors(StartRule.parse("fade:linear"), stack(4, trim=0))
    (0.875, 0.625, 0.375, 0.125, 0.125, 0.375, 0.625, 0.875)

    Raises:
        LayerMapError: this map has nothing to scale, or its copies do not overlap as a fade needs.
    """
    if not start.scales:
        return (1.0,) * len(layer_map)
    if start.name == "fade":
        return _faded(layer_map, _SHAPES[start.shape])
    if not layer_map.new_layers:
        raise LayerMapError(
            f"--start {start}: this map has no layer of the base twice; leave it out"
        )
    if start.name == "half":
        counts = Counter(layer_map.sources)
        return tuple(1 / counts[base] for base in layer_map.sources)
    new = frozenset(layer_map.new_layers)
    return tuple(start.factor if output in new else 1.0 for output in range(len(layer_map)))


def _faded(layer_map: LayerMap, shape: Callable[[float], float]) -> tuple[float, ...]:
    """The factors of a fade. Over an overlap of W layers the k-th pair is (1 - s, s), with
    s = shape((k + ½) / W), so that no factor is 0.
    """
    layer_factors = [1.0] * len(layer_map)
    runs = layer_map.runs
    begins = accumulate((len(run) for run in runs), initial=0)
    faded: set[int] = set()
    for (first, second), begin in zip(pairwise(runs), begins, strict=False):
        width = first.stop - second.start
        if width <= 0:  # layers are left out between the two
            continue
        if second.start < first.start or second.stop < first.stop:
            raise _no_fade(
                f"layers {second.start} to {second.stop - 1} occur again after "
                f"{first.start}:{first.stop}"
            )
        for step in range(width):
            above = begin + len(first) + step
            below = above - width
            if below in faded:
                raise _no_fade(f"layer {layer_map.sources[below]} fades in and out again")
            faded |= {below, above}
            layer_factors[above] = round(shape((step + 0.5) / width), _DIGITS)
            layer_factors[below] = round(1 - layer_factors[above], _DIGITS)
    if not faded:
        raise LayerMapError("--start fade: this map has no layer of the base twice; leave it out")
    if len(set(layer_map.sources)) + len(faded) // 2 < len(layer_map):
        raise _no_fade("a layer is in two copies that are not adjacent")
    return tuple(layer_factors)


def _no_fade(why: str) -> LayerMapError:
    return LayerMapError(
        "--start fade needs copies that each begin with the layers that end the previous one, and "
        f"{why}; use --start half"
    )
