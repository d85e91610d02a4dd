"""The layers of a decoder are found by one rule, under whatever name a model holds them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from dus_cli.errors import HealError, ReplayError  # noqa: E402
from dus_cli.models.decoder import layers_of, stack_name  # noqa: E402


def layers(count: int = 3) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(count))


def holding(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


@pytest.mark.parametrize("name", ["layers", "h", "blocks", "block"])
def test_the_layers_have_these_names(name: str) -> None:
    stack = layers()
    decoder = holding(others=layers(2), **{name: stack})
    assert stack_name(decoder, 3) == name
    assert layers_of(decoder, 3) == list(stack)


def test_a_list_without_parameters_is_not_the_layers() -> None:
    decoder = holding(drops=nn.ModuleList(nn.Dropout() for _ in range(3)), layers=layers())
    assert stack_name(decoder, 3) == "layers"
    assert isinstance(layers_of(decoder, 3)[0], nn.Linear)


def test_layers_deeper_inside_are_replayed_and_not_healed() -> None:
    stack = layers()
    model = holding(transformer=holding(h=stack))
    assert layers_of(model, 3) == list(stack)
    with pytest.raises(HealError, match="no list of 3 layers, so dus heal cannot train"):
        stack_name(model, 3)


def test_a_model_without_as_many_layers_is_refused() -> None:
    with pytest.raises(ReplayError, match="no list of 4 layers"):
        layers_of(holding(layers=layers()), 4)
