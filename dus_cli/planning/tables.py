"""Tensors outside the layers that have a block for each layer, such as the per-layer embeddings
of Gemma 3n and Gemma 4, [vocabulary, layers × width], and their projection, [layers × width,
hidden].

In the output, each layer has the block of its source layer. `maps.architectures` names the modules.
"""

from __future__ import annotations

from math import prod

from dus_cli.errors import CheckpointError, shown
from dus_cli.maps.layers import LayerMap
from dus_cli.maps.stacks import LayerStack
from dus_cli.source.headers import DTYPE_BITS, Blocks, TensorInfo


def expected_size(tensor: TensorInfo, stack: LayerStack) -> tuple[int, int] | None:
    """The axis along which a tensor has a block for each layer, and its size along it; None for a
    tensor that has none, or is a single scale of a whole table.
    """
    axis = stack.tables.get(tensor.name)
    if axis is None or tensor.num_elements == 1:
        return None
    return axis, stack.num_layers * stack.table_width


def followed(tensor: TensorInfo, stack: LayerStack, layer_map: LayerMap) -> TensorInfo:
    """A base tensor as the output has it: unchanged, unless it has a block for each layer.

    Raises:
        CheckpointError: the tensor should consist of such blocks, but its shape does not fit, or
            it does not lie row by row in its file.
    """
    size = expected_size(tensor, stack)
    if size is None:
        return tensor
    (axis, expected), width = size, stack.table_width
    bits = DTYPE_BITS[tensor.dtype] * prod(tensor.shape[axis + 1 :]) * width
    if len(tensor.shape) <= axis or tensor.shape[axis] != expected or bits % 8:
        raise CheckpointError(
            f"tensor {shown(tensor.name)} is {tensor.dtype} {list(tensor.shape)}, and not "
            f"{expected} along axis {axis}, {width} for each of {stack.num_layers} layers: dus "
            "does not know which part of it is which layer's; start from the checkpoint that is "
            "not quantised"
        )
    if tensor.strides is not None:
        raise CheckpointError(
            f"tensor {shown(tensor.name)} has a part for each layer, and does not lie row by row "
            "in its file; load and save the base once with a current transformers"
        )
    order = layer_map.sources
    shape = (*tensor.shape[:axis], len(order) * width, *tensor.shape[axis + 1 :])
    blocks = Blocks(prod(tensor.shape[:axis]), stack.num_layers, bits // 8, order)
    end = tensor.start + blocks.num_rows * blocks.row
    return tensor._replace(shape=shape, end=end, blocks=blocks)
