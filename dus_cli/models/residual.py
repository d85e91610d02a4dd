"""A factor on what a layer adds to the residual stream. It works for any architecture, without
knowing which tensors `dus upscale --start` would scale.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SUMS = frozenset(["add", "__add__", "__radd__", "__iadd__", "add_"])

# Operations whose result is still the stream: casts, copies and views of it.
_SAME = frozenset(
    "to float clone dropout contiguous view reshape squeeze type_as".split()
)  # fmt: skip


def scaled_residual(hidden: Tensor, factor: float) -> AbstractContextManager[object]:
    """A context in which a layer that is called on `hidden` adds `factor` times what it adds."""
    return nullcontext() if factor == 1 else _ScaledResidual(hidden, factor)


class _ScaledResidual(TorchFunctionMode):
    """Multiplies everything that is added to the stream: to the layer's input, and to its sums."""

    def __init__(self, hidden: Tensor, factor: float) -> None:
        super().__init__()
        self._stream = [hidden]  # referenced, so that no other tensor can be taken for one of these
        self._factor = factor

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _SUMS and len(args) == 2 and all(isinstance(part, Tensor) for part in args):
            is_stream = [self._holds(part) for part in args]
            if is_stream[0] != is_stream[1] and args[0].shape == args[1].shape:
                stream, added = args if is_stream[0] else args[::-1]
                return self._keep(torch.add(stream, added, alpha=self._factor))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and name in _SAME and self._holds(args[0]):
            return self._keep(result)
        return result

    def _holds(self, tensor: Tensor) -> bool:
        return any(tensor is known for known in self._stream)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._stream.append(tensor)
        return tensor
