"""Residual gains: how loudly each block speaks, learned apart from what it says.

Scaling doubles what some layers add to the residual stream, and the quickest repair is to change by
how much each block adds. Every matrix W that writes to the stream (the output projections of
attention and MLP) is seen as exp(g) · W with g = 0; the gradient for g is ⟨∂L/∂W, W⟩, Adam steps on
g at a rate of its own, and the factor is folded into W at once. So the checkpoint stays an ordinary
one, and nothing is added to forward or backward. docs/healing.md has what it brings.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dus_cli.maps.layers import split_name
from dus_cli.planning.projections import pattern, stream_writers

_BETAS = (0.9, 0.95)
_EPSILON = 1e-8


def matrices_of_the_stream(parameters: Mapping[str, Tensor]) -> list[str]:
    """The matrices of output projections, found by name, shape and place; none of a layer for which
    this is not clear.

    >>> shapes = {"mlp.up_proj.weight": (32, 8), "mlp.down_proj.weight": (8, 32)}
    >>> layer = {f"model.layers.3.{name}": torch.empty(shape) for name, shape in shapes.items()}
    >>> matrices_of_the_stream(layer | {"lm_head.weight": torch.empty(64, 8)})
    ['model.layers.3.mlp.down_proj.weight']
    """
    layers: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    places: dict[str, tuple[str, str]] = {}
    for name, parameter in parameters.items():
        split = split_name(name)
        layer, suffix = (
            ("", name) if split is None else (f"{split.prefix}.{split.index}", split.suffix)
        )
        layers[layer][suffix] = tuple(parameter.shape)
        places[name] = (layer, suffix)
    found = {layer: stream_writers(shapes).found for layer, shapes in layers.items()}
    return [
        name
        for name, (layer, suffix) in places.items()
        if name.endswith(".weight") and pattern(suffix) in found[layer]
    ]


class Gains:
    """Adam's moments for the gains, one of each for every matrix, the same on every worker."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.names = matrices_of_the_stream(parameters)
        self.exp_avg = torch.zeros(len(self.names), dtype=torch.float64)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.steps = torch.zeros_like(self.exp_avg)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold; it is read back into these tensors."""
        return {
            "gains.exp_avg": self.exp_avg,
            "gains.exp_avg_sq": self.exp_avg_sq,
            "gains.steps": self.steps,
        }

    def factors(self, products: Sequence[float | None], rates: Sequence[float]) -> list[float]:
        """The factor for each matrix, from ⟨gradient, W⟩ over all workers and the learning rate of
        its gain. A product is None if the matrix does not learn.
        """
        first, second = _BETAS
        factors = []
        for index, product in enumerate(products):
            if product is None:
                factors.append(1.0)
                continue
            self.steps[index] += 1
            self.exp_avg[index] = first * self.exp_avg[index] + (1 - first) * product
            self.exp_avg_sq[index] = second * self.exp_avg_sq[index] + (1 - second) * product**2
            steps = float(self.steps[index])
            mean = float(self.exp_avg[index]) / (1 - first**steps)
            square = float(self.exp_avg_sq[index]) / (1 - second**steps)
            factors.append(math.exp(-rates[index] * mean / (math.sqrt(square) + _EPSILON)))
        return factors
