"""The base of an output, and how the output was made from it."""

from __future__ import annotations

from typing import NamedTuple

from dus_cli.maps.layers import LayerMap
from dus_cli.maps.model_config import decoder_config
from dus_cli.maps.naming import Assumption
from dus_cli.maps.stacks import LayerStack, find_stack
from dus_cli.planning.treatment import Treatment
from dus_cli.source.checkpoint import Checkpoint


class OutputOrigin(NamedTuple):
    """How an output was made.

    Attributes:
        base: the checkpoint.
        layer_map: the base layer of each output layer.
        treatment: how tensors were copied, cast, scaled or set to zero.
        assume: the decisions (--assume) about fields that dus does not know.
    """

    base: Checkpoint
    layer_map: LayerMap
    treatment: Treatment
    assume: dict[str, Assumption]

    def stack(self) -> LayerStack:
        """The stack of the base's layers.

        Raises:
            CheckpointError: it is not found among the base's tensors.
        """
        names = (tensor.name for _, tensor in self.base.tensors())
        return find_stack(names, decoder_config(self.base.config), self.assume)[0]

    def factor(self, output: int) -> float:
        """The factor on what an output layer adds to the residual stream, relative to its base
        layer.
        """
        treatment = self.treatment
        if treatment.zeros and output in treatment.new_layers:
            return 0.0
        return treatment.factors[output] if treatment.scaled else 1.0
