"""Models loaded by transformers: from local files, quietly, without running the checkpoint's
code.
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

from dus_cli.common.libraries import TRANSFORMERS_REFUSALS
from dus_cli.errors import LoadError, reason_of, shown, shown_list

# By their safetensors names: the types that torch computes in, or casts from without a scale.
STORED_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def load_config(folder: str | Path) -> Any:
    """The config that transformers reads from a model's folder."""
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_model(folder: str | Path, name: object, dtype: torch.dtype, **options: Any) -> Any:
    """Load a causal language model with all its weights.

    Args:
        folder: the checkpoint.
        name: the model's name in an error.
        dtype: of the weights in memory.
        options: further arguments of `from_pretrained`.

    Raises:
        LoadError: transformers cannot load it, or would initialise weights that the files lack.
    """
    with transformers_errors(name):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if missing:
        raise missing_weights(name, missing)
    return model


@contextmanager
def transformers_errors(name: object) -> Iterator[None]:
    """Silence transformers, and translate its errors about a checkpoint into one line.

    Raises:
        LoadError: transformers raised an error. torch.OutOfMemoryError is not translated.
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
    except TRANSFORMERS_REFUSALS as error:
        raise LoadError(f"transformers cannot load {shown(name)}: {reason_of(error)}") from error
    finally:
        transformers_logging.set_verbosity(level)
        if has_bars:
            transformers_logging.enable_progress_bar()


def missing_weights(name: object, parameters: Iterable[str]) -> LoadError:
    """The error for parameters that the files have no tensors for."""
    return LoadError(
        f"{shown(name)}: transformers finds no weights for {shown_list(sorted(parameters))} and "
        "would make them up; see what the files hold with dus verify"
    )
