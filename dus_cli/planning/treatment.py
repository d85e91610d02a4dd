"""How output tensors are made from the base's: copied, cast, scaled, or zeros."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from dus_cli.common.workers import PIECE
from dus_cli.maps.layers import split_name
from dus_cli.planning.dtypes import FLOATS, Cast, Dtype, cast_dtype, overflow
from dus_cli.planning.projections import pattern
from dus_cli.planning.scaling import Scale
from dus_cli.source.headers import DTYPE_BITS, TensorInfo
from dus_cli.source.strided import tensor_pieces

_NONE: frozenset[int] = frozenset()

# The factors of a tensor that is not scaled in any layer.
UNSCALED: Mapping[int, Scale] = MappingProxyType({})


class Making(Enum):
    """How a tensor is made from the base's. A scaled tensor may also be cast, before.

    To add a way, add a line here and in `made_pieces`, and a writer in `writing.transfer`.
    """

    copied = "copied"
    zeros = "zeros"
    cast = "cast"
    scaled = "scaled"


@dataclass(frozen=True)
class Treatment:
    """How output tensors are made from the base's; by default all are copied as they are.

    Attributes:
        layer_prefix: the prefix of the layers' names.
        new_layers: the new output layers.
        zeros: the tensors of new layers that are zeros, by name within the layer
            (`projections.pattern`).
        dtype: what floating-point tensors are cast to; None for no cast.
        factors: one for each output layer; empty if nothing is scaled.
        scaled: the tensors that are multiplied by their layer's factor, by name within the layer,
            with the offset of each (`planning.scaling`).
    """

    layer_prefix: str = ""
    new_layers: frozenset[int] = frozenset()
    zeros: frozenset[str] = frozenset()
    dtype: Dtype | None = None
    factors: tuple[float, ...] = ()
    scaled: Mapping[str, int] = field(default_factory=dict)
    _scales: dict[tuple[str, int], Mapping[int, Scale]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def making(self, name: str, tensor: TensorInfo) -> Making:
        """How the output tensor of this name is made from this base tensor."""
        if self.is_zero(name):
            return Making.zeros
        if self.scale_of(name, tensor) is not None:
            return Making.scaled
        return making_of(tensor, self.dtype_of(tensor))

    def dtype_of(self, tensor: TensorInfo) -> str:
        """The dtype that this base tensor has in the output, by safetensors' name."""
        return cast_dtype(tensor, self.dtype)

    @property
    def changes_layers(self) -> bool:
        """Whether some tensors are zeros or scaled, which goes by their names and layers."""
        return bool(self.zeros or self.scaled)

    def is_zero(self, name: str) -> bool:
        split = split_name(name) if self.zeros else None
        return split is not None and split.index in self.zeroed(split.prefix, split.suffix)

    def zeroed(self, prefix: str, suffix: str) -> frozenset[int]:
        """The layers in which a tensor, whose name has these parts, is zeros."""
        if not self.zeros or prefix != self.layer_prefix or pattern(suffix) not in self.zeros:
            return _NONE
        return self.new_layers

    def scales(self, prefix: str, suffix: str, tensor: TensorInfo) -> Mapping[int, Scale]:
        """The factors on a tensor whose name has these parts, by layer; they apply after a cast."""
        if not self.scaled or prefix != self.layer_prefix:
            return UNSCALED
        dtype, offset = self.dtype_of(tensor), self.scaled.get(pattern(suffix))
        if offset is None or dtype not in FLOATS:
            return UNSCALED
        if (dtype, offset) not in self._scales:  # shared by all tensors of this kind
            by_layer = {
                layer: Scale(dtype, self.factors[layer], offset) for layer in self.scaled_layers
            }
            self._scales[dtype, offset] = by_layer
        return self._scales[dtype, offset]

    def scale_of(self, name: str, tensor: TensorInfo) -> Scale | None:
        """The factor on the output tensor of this name, made from this base tensor; None if it is
        not scaled.
        """
        split = split_name(name) if self.scaled else None
        return (
            None
            if split is None
            else self.scales(split.prefix, split.suffix, tensor).get(split.index)
        )

    @property
    def scaled_layers(self) -> tuple[int, ...]:
        """The output layers whose factor is not 1."""
        return tuple(layer for layer, factor in enumerate(self.factors) if factor != 1)


def making_of(tensor: TensorInfo, dtype: str) -> Making:
    """How a tensor of this dtype is made, unless it is zeros or scaled."""
    return Making.copied if dtype == tensor.dtype else Making.cast


def made_pieces(
    file: int, tensor: TensorInfo, making: Making, dtype: str, scale: Scale | None = None
) -> Iterator[bytes | memoryview]:
    """An output tensor's bytes in order, at most 8 MiB at a time, made from the base tensor in
    `file`.

    A piece is valid until the next one. The pieces end early if the file does.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: a finite number is out of the range of `dtype`, or a strided tensor is
            beyond the file's end.
    """
    if making is Making.zeros:
        num_bytes = tensor.num_elements * DTYPE_BITS[dtype] // 8
        for position in range(0, num_bytes, PIECE):
            yield bytes(min(PIECE, num_bytes - position))
    elif making is Making.copied:
        yield from tensor_pieces(file, tensor)
    else:
        cast = Cast(tensor.dtype, dtype) if dtype != tensor.dtype else None
        for piece in tensor_pieces(file, tensor):
            buffer = bytearray(piece)
            if cast is not None:
                buffer = bytearray(len(piece) // cast.source_size * cast.target_size)
                if cast(memoryview(bytearray(piece)), memoryview(buffer)):
                    raise overflow(tensor.name, cast)
            if scale is not None:
                scale.apply(memoryview(buffer), tensor.name)
            yield bytes(buffer)
