"""Models as transformers loads them: from local files, quietly, and none of the checkpoint's
code is run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from dus_cli.errors import LoadError, reason_of, shown, shown_list

# By the names of the safetensors format: the types that torch computes in, or casts from without a
# scale.
STORED_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}

# What transformers raises for a checkpoint that it does not take; it has no exception of its own
# for that.
_REFUSALS = (ValueError, KeyError, OSError, ImportError, RuntimeError, AttributeError, TypeError)


def load_config(folder: str | Path) -> Any:
    """A model's config as transformers reads it."""
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_model(folder: str | Path, name: object, dtype: torch.dtype, **options: Any) -> Any:
    """A causal language model with all its weights.

    Args:
        folder: of the checkpoint.
        name: what to call it in an error.
        dtype: of its weights in memory.
        options: more of `from_pretrained`'s.

    Raises:
        LoadError: transformers cannot load it, or would make up weights that the files lack.
    """
    with refusals_told(name):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    missing = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    if missing:
        raise no_weights(name, missing)
    return model


@contextmanager
def refusals_told(name: object) -> Iterator[None]:
    """Let transformers work on a checkpoint: its bars and remarks are not shown, and a refusal is
    one line.

    Raises:
        LoadError: it refuses. An allocator's error passes as it is.
    """
    level, has_bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as error:
        raise LoadError(f"transformers cannot load {shown(name)}: {reason_of(error)}") from error
    finally:
        transformers_logging.set_verbosity(level)
        if has_bars:
            transformers_logging.enable_progress_bar()


def no_weights(name: object, parameters: Iterable[str]) -> LoadError:
    """What to say of parameters that the files have no tensors for."""
    return LoadError(
        f"{shown(name)}: transformers finds no weights for {shown_list(sorted(parameters))} and "
        "would make them up; dus verify tells what the files hold"
    )
