"""Learning rates by group: the factor of each parameter's rate."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dus_cli.heal.run import RatesPlan
from dus_cli.models.decoder import Decoder


def rate_scales(decoder: Decoder, rates: RatesPlan | None) -> dict[str, float]:
    """The factor of each parameter's learning rate, by its name; 1 throughout without `rates`."""
    if rates is None:
        return dict.fromkeys(decoder.parameters, 1.0)
    by_layer = {
        id(parameter): scale
        for layer, scale in zip(decoder.layers, rates.layers, strict=True)
        for parameter in layer.parameters()
    }
    scales = {
        name: by_layer.get(id(parameter), rates.outside)
        for name, parameter in decoder.parameters.items()
    }
    if rates.norms is not None:
        scales |= dict.fromkeys(norms(decoder.parameters), rates.norms)
    return scales


def norms(parameters: Mapping[str, Tensor]) -> list[str]:
    """The parameters of norms: weight and bias of every module whose weight is a vector.

    >>> import torch
    >>> shapes = {"q.weight": (4, 4), "q.bias": (4,), "ln.weight": (4,), "ln.bias": (4,)}
    >>> norms({name: torch.empty(shape) for name, shape in shapes.items()})
    ['ln.weight', 'ln.bias']
    """
    vectors = {
        name.removesuffix(".weight")
        for name, parameter in parameters.items()
        if name.endswith(".weight") and parameter.ndim == 1
    }
    return [
        name
        for name in parameters
        if name.endswith((".weight", ".bias")) and name.rpartition(".")[0] in vectors
    ]
