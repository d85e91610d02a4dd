"""Starts: how loudly each output layer speaks before any training. Pure functions of a layer map.

A copied layer says its word a second time. What a layer adds to the residual stream is a product of
matrices, so a factor on the last of them, the output projection, scales it in an ordinary
checkpoint, without a tensor more:

- `copy`: every layer as it is in the base. SOLAR's way (arXiv:2312.15166).
- `identity`: new layers add nothing, as in LLaMA Pro (arXiv:2401.02415). No factors:
  `planning.projections` has it.
- `half`: a base layer that stands K times adds 1/K each time: a residual block as a step of an
  integrator, taken as K steps of a K-th of the size.
- `fade`: where the end of one copy is the beginning of the next, the first fades out as the second
  fades in. Each pair of factors comes to 1. `fade:cosine`, the default, stays longer at either
  end than `fade:linear`.
- `scale:C`: new layers add C times what they would.

docs/starts.md has what each of them brings.
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

# What --help and messages list.
STARTS = ("copy", IDENTITY, "half", "fade", "scale:C")

# The second copy's share of a pair, by how far the overlap has come: above 0, below 1. The first is
# the default.
_SHAPES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda way: (1 - math.cos(math.pi * way)) / 2,
    "linear": lambda way: way,
}

LARGEST_FACTOR = 16.0

# A factor is a number that any machine's cosine comes to, and that a person can read.
_DIGITS = 6


@dataclass(frozen=True)
class StartRule:
    """A start by its name, with the shape of a fade or the factor of a scale.

    >>> StartRule.parse("fade"), str(StartRule.parse("scale:.25"))
    (StartRule(name='fade', shape='cosine', factor=1.0), 'scale:0.25')
    """

    name: str = "copy"
    shape: str = ""
    factor: float = 1.0

    @classmethod
    def parse(cls, text: str) -> StartRule:
        """The start that was typed.

        Raises:
            ValueError: there is none of this name, or what stands behind the colon is not of it.
        """
        name, colon, value = text.strip().partition(":")
        if name == "scale":
            return cls(name, factor=_factor(value))
        if name == "fade" and (value in _SHAPES or not colon):
            return cls(name, value or next(iter(_SHAPES)))
        if name == "fade":
            raise ValueError(
                f"{shown(text)!r} is no start: a fade is one of fade:{', fade:'.join(_SHAPES)}"
            )
        if name not in STARTS or colon:
            raise ValueError(f"{shown(text)!r} is no start; there are {', '.join(STARTS)}")
        return cls(name)

    @property
    def scales(self) -> bool:
        """Whether it is one of factors; a copy has none, and an identity's zeros are no factor."""
        return self.name not in {"copy", IDENTITY}

    def __str__(self) -> str:
        if self.name == "scale":
            return f"scale:{self.factor!r}"
        return f"{self.name}:{self.shape}" if self.shape else self.name


# How a model starts where nothing is said.
COPY = StartRule()


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor <= LARGEST_FACTOR:  # NaN is not
        raise ValueError(
            f"scale:{shown(text)} is no start; give a factor above 0, at most {LARGEST_FACTOR:g}, "
            "such as scale:0.25 (for 0 there is identity)"
        )
    return factor


def factors(start: StartRule, layer_map: LayerMap) -> tuple[float, ...]:
    """For each output layer the factor on what it adds to the stream; all of them 1 for a copy.

    >>> from dus_cli.maps.layers import stack
    >>> factors(StartRule.parse("half"), stack(4, trim=1))
    (1.0, 0.5, 0.5, 0.5, 0.5, 1.0)
    >>> factors(StartRule.parse("fade:linear"), stack(4, trim=0))
    (0.875, 0.625, 0.375, 0.125, 0.125, 0.375, 0.625, 0.875)

    Raises:
        LayerMapError: this map has nothing to scale, or it is not what a fade is for.
    """
    if not start.scales:
        return (1.0,) * len(layer_map)
    if start.name == "fade":
        return _faded(layer_map, _SHAPES[start.shape])
    if not layer_map.new_layers:
        raise LayerMapError(
            f"--start {start}: no layer of the base stands twice in this map; leave it out"
        )
    if start.name == "half":
        counts = Counter(layer_map.sources)
        return tuple(1 / counts[base] for base in layer_map.sources)
    new = frozenset(layer_map.new_layers)
    return tuple(start.factor if output in new else 1.0 for output in range(len(layer_map)))


def _faded(layer_map: LayerMap, shape: Callable[[float], float]) -> tuple[float, ...]:
    """Over an overlap of W layers the k-th pair is (1 - s, s), with s = shape((k + ½) / W): no
    layer is silent.
    """
    found = [1.0] * len(layer_map)
    runs = layer_map.runs
    begins = accumulate((len(run) for run in runs), initial=0)
    faded: set[int] = set()
    for (first, second), begin in zip(pairwise(runs), begins, strict=False):
        width = first.stop - second.start
        if width <= 0:  # layers are left out between the two
            continue
        if second.start < first.start or second.stop < first.stop:
            raise _no_fade(
                f"layers {second.start} to {second.stop - 1} stand again behind "
                f"{first.start}:{first.stop}"
            )
        for step in range(width):
            above = begin + len(first) + step
            below = above - width
            if below in faded:
                raise _no_fade(f"layer {layer_map.sources[below]} fades in and out again")
            faded |= {below, above}
            found[above] = round(shape((step + 0.5) / width), _DIGITS)
            found[below] = round(1 - found[above], _DIGITS)
    if not faded:
        raise LayerMapError(
            "--start fade: no layer of the base stands twice in this map; leave it out"
        )
    if len(set(layer_map.sources)) + len(faded) // 2 < len(layer_map):
        raise _no_fade("a layer stands in two copies that do not follow each other")
    return tuple(found)


def _no_fade(why: str) -> LayerMapError:
    return LayerMapError(
        "--start fade is for copies of which each begins with the layers that end the one before "
        f"it, and {why}; use --start half"
    )
