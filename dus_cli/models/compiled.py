"""Layers compiled by torch.compile, for training on a CPU that has a C++ compiler.

Inductor fuses what lies between the matrix products (norms, rotary positions, activations, casts,
residual sums), and keeps less for the backward pass: what is cheap is computed again. Layers of one
form share their code. docs/healing.md has figures.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

# The share of activations to keep, between 0 (all computed again) and 1 (as torch would). At this
# one it computes again what lies between matrix products, and neither these nor attention.
_MEMORY_BUDGET = 0.7

# What every kernel of inductor for a CPU includes, and a minimal system may lack.
_HEADERS = "#include <Python.h>\n#include <omp.h>\n#include <algorithm>\n"


def has_compiler() -> bool:
    """Whether there is the C++ compiler that inductor would call, with the headers of this
    Python.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return False
    include = sysconfig.get_paths()["include"]
    command = [compiler, "-x", "c++", "-fsyntax-only", f"-I{include}", "-"]
    done = subprocess.run(command, input=_HEADERS.encode(), capture_output=True, check=False)
    return done.returncode == 0


class CompiledLayers:
    """Layers that run compiled while gradients are recorded, and else as they are: measurements do
    not depend on a compiler.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        from torch._functorch import config  # PyTorch's own guide sets the budget there

        config.activation_memory_budget = _MEMORY_BUDGET
        self._is_on = False
        for layer in layers:
            layer.forward = self._switched(layer.forward)

    def switch(self, is_on: bool) -> bool:
        """Let all layers run compiled from now on, or as they are; return which."""
        self._is_on = is_on
        return is_on

    def _switched(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        compiled = torch.compile(plain)

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            runs = compiled if self._is_on and torch.is_grad_enabled() else plain
            return runs(*args, **kwargs)

        return forward
