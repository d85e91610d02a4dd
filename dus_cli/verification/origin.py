"""What an output was made from, and how."""

from __future__ import annotations

from typing import NamedTuple

from dus_cli.maps.layers import LayerMap
from dus_cli.maps.model_config import decoder_config
from dus_cli.maps.naming import Assumption
from dus_cli.maps.stacks import LayerStack, find_stack
from dus_cli.planning.treatment import Treatment
from dus_cli.source.checkpoint import Checkpoint


class Origin(NamedTuple):
    """A base, where each layer of an output comes from, and what became of its tensors."""

    base: Checkpoint
    layer_map: LayerMap
    treatment: Treatment
    assume: dict[str, Assumption]

    def stack(self) -> LayerStack:
        """The base's layers.

        Raises:
            CheckpointError: they are not found among its tensors.
        """
        names = (tensor.name for _, tensor in self.base.tensors())
        return find_stack(names, decoder_config(self.base.config), self.assume)[0]

    def factor(self, output: int) -> float:
        """How many times an output layer adds what its base layer does."""
        treatment = self.treatment
        if treatment.zeros and output in treatment.new_layers:
            return 0.0
        return treatment.factors[output] if treatment.scaled else 1.0
