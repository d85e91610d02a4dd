"""How the bytes of output tensors come to be from the base's: as they are, zeros, cast, or
scaled.
"""

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

# What a tensor has that is multiplied nowhere.
UNSCALED: Mapping[int, Scale] = MappingProxyType({})


class Making(Enum):
    """How a tensor's bytes come to be.

    A further kind is a line here and in `made_pieces`, and its writer in `writing.transfer`. What
    is scaled may be cast before.
    """

    copied = "copied"
    zeros = "zeros"
    cast = "cast"
    scaled = "scaled"


@dataclass(frozen=True)
class Treatment:
    """What becomes of the base's tensors; by default they are copied as they are.

    `zeros` are the tensors of `new_layers` that are zeros, by their names within the layer
    (`projections.pattern`). `dtype` is what floating-point tensors are cast to. `scaled` are the
    tensors that are multiplied, with the offset of each (`planning.scaling`), in the layers whose
    entry in `factors`, one for each output layer, is not 1.
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
        """How the output tensor of this name comes to be from this base tensor."""
        if self.is_zero(name):
            return Making.zeros
        if self.scale_of(name, tensor) is not None:
            return Making.scaled
        return making_of(tensor, self.dtype_of(tensor))

    def dtype_of(self, tensor: TensorInfo) -> str:
        """The dtype that this base tensor has in the output, by safetensors' name."""
        return cast_dtype(tensor, self.dtype)

    def is_zero(self, name: str) -> bool:
        split = split_name(name) if self.zeros else None
        return split is not None and split.index in self.zeroed(split.prefix, split.suffix)

    def zeroed(self, prefix: str, suffix: str) -> frozenset[int]:
        """The layers in which the tensor with a name of these parts is zeros."""
        if not self.zeros or prefix != self.layer_prefix or pattern(suffix) not in self.zeros:
            return _NONE
        return self.new_layers

    def scales(self, prefix: str, suffix: str, tensor: TensorInfo) -> Mapping[int, Scale]:
        """By what, in which layers, a tensor with a name of these parts is multiplied, once it
        is cast.
        """
        if not self.scaled or prefix != self.layer_prefix:
            return UNSCALED
        dtype, offset = self.dtype_of(tensor), self.scaled.get(pattern(suffix))
        if offset is None or dtype not in FLOATS:
            return UNSCALED
        if (dtype, offset) not in self._scales:  # one for all of its kind
            by_layer = {
                layer: Scale(dtype, self.factors[layer], offset) for layer in self.scaled_layers
            }
            self._scales[dtype, offset] = by_layer
        return self._scales[dtype, offset]

    def scale_of(self, name: str, tensor: TensorInfo) -> Scale | None:
        """By what the output tensor of this name, from this base tensor, is scaled; None for one
        that is not.
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
    """How a tensor that is no zeros comes to have this dtype."""
    return Making.copied if dtype == tensor.dtype else Making.cast


def made_pieces(
    file: int, tensor: TensorInfo, making: Making, dtype: str, scale: Scale | None = None
) -> Iterator[bytes | memoryview]:
    """An output tensor's bytes in order, at most 8 MiB at a time, from the base tensor that lies in
    `file`.

    A piece is valid until the next is asked for. They end early where the file does.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: a finite number is beyond `dtype`, or a strided tensor lies beyond the
            file's end.
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
            made = bytearray(piece)
            if cast is not None:
                made = bytearray(len(piece) // cast.source_size * cast.target_size)
                if cast(memoryview(bytearray(piece)), memoryview(made)):
                    raise overflow(tensor.name, cast)
            if scale is not None:
                scale.apply(memoryview(made), tensor.name)
            yield bytes(made)
