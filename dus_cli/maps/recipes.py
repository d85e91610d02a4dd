"""Published layer maps by name, for `--recipe`. docs/recipes.md says more about each.

- `solar`: SOLAR 10.7B (arXiv:2312.15166, section 2), m = 8 of 32 layers: 48. A quarter is trimmed
  from each copy.
- `yi`: Yi-9B from Yi-6B ("Dive Deeper into Yi-9B", 01-ai.github.io/blog/dive-deeper-into-yi-9b;
  arXiv:2403.04652, section 7.3): layers 12 to 27 of 32 stand twice: 48.
- `bielik`: Bielik 11B v2 from Mistral 7B (arXiv:2505.02410, section 2), m = 7 of 32: 50.
- `granite-34b-code`: from Granite 20B Code (arXiv:2405.04324, section 3), m = 8 of 52: 88.
- `llama-pro`: LLaMA Pro 8.3B from LLaMA 2 7B (arXiv:2401.02415, section 3.2): a copy of every 4th
  of 32 layers right behind it, its output projections zeros: 40.
- `llama-3-120b`: mlabonne/Meta-Llama-3-120B-Instruct (its model card's mergekit configuration):
  seven slices of 20 of 80 layers, each begun 10 after the last: 140.
- `kl3m-007`: KL3M-007 500M from KL3M-006 170M (model card of alea-institute/kl3m-007-500m-step0;
  G_stack of arXiv:2405.15319, a growth of 4): all 30 layers four times: 120.

A map whose bounds are ratios of the depth fits other depths too: its bounds are multiplied by n /
the published depth, the start of a slice rounded down and its end up, so that rounding never drops
a layer. A map with a number of layers that was not published as a ratio is refused for other
depths; `--trim` gives the same map explicitly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from dus_cli.errors import LayerMapError
from dus_cli.maps.layers import LayerMap, largest_trim, source_layers


class PublishedMap(NamedTuple):
    """A published map for a base of `num_layers` layers.

    Attributes:
        source: the publication.
        num_layers: the depth of the published base.
        slices: half-open ranges of base layers, as published.
        scales: the bounds are ratios of the depth.
        every: in place of slices: each k-th layer is followed by a copy.
        identity: the new layers start as identities.
    """

    source: str
    num_layers: int
    slices: tuple[tuple[int, int], ...] = ()
    scales: bool = False
    every: int | None = None
    identity: bool = False

    @property
    def smallest(self) -> int:
        """The smallest depth at which every group, and every step between bounds, is at least one
        layer.
        """
        bounds = (bound for part in self.slices for bound in part)
        return self.every or self.num_layers // math.gcd(*bounds)


RECIPES: Mapping[str, PublishedMap] = {
    "solar": PublishedMap("SOLAR 10.7B, arXiv:2312.15166", 32, ((0, 24), (8, 32)), scales=True),
    "yi": PublishedMap("Yi-9B, arXiv:2403.04652", 32, ((0, 28), (12, 32)), scales=True),
    "bielik": PublishedMap("Bielik 11B v2, arXiv:2505.02410", 32, ((0, 25), (7, 32))),
    "granite-34b-code": PublishedMap("Granite 34B Code, arXiv:2405.04324", 52, ((0, 44), (8, 52))),
    "llama-pro": PublishedMap("LLaMA Pro, arXiv:2401.02415", 32, every=4, identity=True),
    "llama-3-120b": PublishedMap(
        "mlabonne/Meta-Llama-3-120B-Instruct",
        80,
        ((0, 20), (10, 30), (20, 40), (30, 50), (40, 60), (50, 70), (60, 80)),
        scales=True,
    ),
    "kl3m-007": PublishedMap("alea-institute/kl3m-007-500m-step0", 30, ((0, 30),) * 4, scales=True),
}


def recipe_map(name: str, num_layers: int) -> LayerMap:
    """The map of a recipe for a base of this depth.

    >>> str(recipe_map("solar", 32)), str(recipe_map("yi", 32))
    ('0:24,8:32', '0:28,12:32')
    >>> str(recipe_map("yi", 30))
    '0:27,11:30'

    Raises:
        LayerMapError: there is no such recipe, or it does not fit this depth.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        raise LayerMapError(f"there is no recipe {name!r}; use one of {', '.join(RECIPES)}")
    if num_layers != recipe.num_layers and recipe.every is None and not recipe.scales:
        raise LayerMapError(_not_for(name, recipe, num_layers))
    if num_layers < recipe.smallest:
        raise LayerMapError(
            f"--recipe {name} needs {recipe.smallest} layers or more and this model has "
            f"{num_layers}; use --layers"
        )
    sources = (
        _scaled(recipe, num_layers)
        if recipe.every is None
        else _with_copies(num_layers, recipe.every)
    )
    return LayerMap(sources, num_layers, _trim(sources, num_layers))


def _with_copies(num_layers: int, every: int) -> tuple[int, ...]:
    """All layers, each k-th of them followed by its copy."""
    return tuple(
        k for layer in range(num_layers) for k in (layer,) * (2 if (layer + 1) % every == 0 else 1)
    )


def _scaled(recipe: PublishedMap, num_layers: int) -> tuple[int, ...]:
    depth = recipe.num_layers
    bounds = [
        (start * num_layers // depth, -(-end * num_layers // depth)) for start, end in recipe.slices
    ]
    return tuple(layer for start, end in bounds for layer in range(start, end))


def _trim(sources: tuple[int, ...], num_layers: int) -> int | None:
    """The trim m if the map is a depthwise scaling; else None."""
    trim = num_layers - len(sources) // 2
    return trim if trim >= 0 and sources == source_layers(num_layers, trim) else None


def _not_for(name: str, recipe: PublishedMap, num_layers: int) -> str:
    trim = recipe.num_layers - recipe.slices[0][1]
    advice = (
        f"--trim {trim} is the same cut" if trim <= largest_trim(num_layers) else "choose a --trim"
    )
    return (
        f"--recipe {name} is for {recipe.num_layers} layers and this model has {num_layers}: its "
        f"trim of {trim} was published as a number of layers, not as a ratio; {advice}"
    )
