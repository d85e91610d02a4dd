"""What a layer adds to the residual stream, added a number of times: a start's factors, on any
architecture, without knowing which of its tensors are scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SUMS = frozenset(["add", "__add__", "__radd__", "__iadd__", "add_"])

# What gives the stream another name, or another dtype, and leaves it the stream.
_SAME = frozenset(
    "to float clone dropout contiguous view reshape squeeze type_as".split()
)  # fmt: skip


def scaled_residual(hidden: Tensor, factor: float) -> AbstractContextManager[object]:
    """Within it, a layer that is called on `hidden` adds `factor` times what it would add."""
    return nullcontext() if factor == 1 else _Stream(hidden, factor)


class _Stream(TorchFunctionMode):
    """The stream is the layer's input, and every sum of it with something that is not it."""

    def __init__(self, hidden: Tensor, factor: float) -> None:
        super().__init__()
        self._stream = [hidden]  # held, so that no other tensor gets an id of theirs
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
            held = [self._holds(part) for part in args]
            if held[0] != held[1] and args[0].shape == args[1].shape:
                stream, added = args if held[0] else args[::-1]
                return self._keep(torch.add(stream, added, alpha=self._factor))
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and name in _SAME and self._holds(args[0]):
            return self._keep(found)
        return found

    def _holds(self, tensor: Tensor) -> bool:
        return any(tensor is known for known in self._stream)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._stream.append(tensor)
        return tensor
