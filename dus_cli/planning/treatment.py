"""How the bytes of output tensors come to be from the base's: as they are, zeros, or cast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from dus_cli.common.workers import PIECE
from dus_cli.maps.layers import split_name
from dus_cli.planning.dtypes import Cast, Dtype, cast_dtype, overflow
from dus_cli.planning.projections import pattern
from dus_cli.source.headers import DTYPE_BITS, TensorInfo
from dus_cli.source.strided import tensor_pieces

_NONE: frozenset[int] = frozenset()


class Making(Enum):
    """How a tensor's bytes come to be.

    A further kind is a line here and in `made_pieces`, and its writer in `writing.transfer`.
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
        return Making.zeros if self.is_zero(name) else making_of(tensor, self.dtype_of(tensor))

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


def making_of(tensor: TensorInfo, dtype: str) -> Making:
    """How a tensor that is no zeros comes to have this dtype."""
    return Making.copied if dtype == tensor.dtype else Making.cast


def made_pieces(file: int, tensor: TensorInfo, making: Making, dtype: str) -> Iterator[bytes | memoryview]:
    """An output tensor's bytes in order, at most 8 MiB at a time, from the base tensor that lies in `file`.

    A piece is valid until the next is asked for. They end early where the file does.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: a finite number is beyond `dtype`, or a strided tensor lies beyond the file's end.
    """
    if making is Making.zeros:
        num_bytes = tensor.num_elements * DTYPE_BITS[dtype] // 8
        for position in range(0, num_bytes, PIECE):
            yield bytes(min(PIECE, num_bytes - position))
    elif making is Making.copied:
        yield from tensor_pieces(file, tensor)
    else:
        cast = Cast(tensor.dtype, dtype)
        for piece in tensor_pieces(file, tensor):
            made = bytearray(len(piece) // cast.source_size * cast.target_size)
            if cast(memoryview(bytearray(piece)), memoryview(made)):
                raise overflow(tensor.name, cast)
            yield bytes(made)
