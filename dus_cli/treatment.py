"""How the bytes of output tensors come to be from the base's: as they are, zeros, or cast."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dus_cli.dtypes import Dtype, cast_dtype
from dus_cli.headers import TensorInfo
from dus_cli.layers import split_name
from dus_cli.projections import pattern


class Making(Enum):
    """How a tensor's bytes come to be.

    A further kind is a line here, its writer in `transfer` and what is expected of it in `verify`.
    """

    copied = "copied"
    zeros = "zeros"
    cast = "cast"


@dataclass(frozen=True)
class Treatment:
    """What becomes of the base's tensors; by default they are copied as they are.

    `zeros` are the tensors of `new_layers` that are zeros, by their names within the layer (`projections.pattern`).
    `dtype` is what floating-point tensors are cast to.
    """

    layer_prefix: str = ""
    new_layers: frozenset[int] = frozenset()
    zeros: frozenset[str] = frozenset()
    dtype: Dtype | None = None

    def making(self, name: str, tensor: TensorInfo) -> Making:
        """How the output tensor of this name comes to be from this base tensor."""
        if self.is_zero(name):
            return Making.zeros
        return Making.copied if self.dtype_of(tensor) == tensor.dtype else Making.cast

    def dtype_of(self, tensor: TensorInfo) -> str:
        """The dtype that this base tensor has in the output, by safetensors' name."""
        return cast_dtype(tensor, self.dtype)

    def is_zero(self, name: str) -> bool:
        if not self.zeros:
            return False
        split = split_name(name)
        return (
            split is not None
            and split.prefix == self.layer_prefix
            and split.index in self.new_layers
            and pattern(split.suffix) in self.zeros
        )
