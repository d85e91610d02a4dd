"""Checkpoints written by torch.save, as before safetensors: real pickles, and hostile ones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from checkpoints import Tensor

INDEX = "pytorch_model.bin.index.json"

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}


class Payload:
    """Runs a shell command in a process that unpickles it: it creates the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


def random_tensors(tensors: list[Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(DTYPES[dtype])
        for name, dtype, shape in tensors
    }


def save_pickled(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    num_shards: int = 1,
    as_zip: bool = True,
) -> Path:
    """Write a checkpoint in one file, or in shards with about equal numbers of tensors and an
    index; without `as_zip`, in the format before torch 1.6.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if num_shards == 1:
        torch.save(dict(state), folder / "pytorch_model.bin", _use_new_zipfile_serialization=as_zip)
        return folder
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        shard = f"pytorch_model-{number + 1:05}-of-{num_shards:05}.bin"
        names = list(state)[
            number * len(state) // num_shards : (number + 1) * len(state) // num_shards
        ]
        part = {name: state[name] for name in names}
        torch.save(part, folder / shard, _use_new_zipfile_serialization=as_zip)
        weight_map |= dict.fromkeys(names, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_pickled(
    folder: Path,
    tensors: list[Tensor],
    config: Mapping[str, Any],
    *,
    num_shards: int = 1,
    as_zip: bool = True,
) -> Path:
    """Write a checkpoint with random values; see `save_pickled`."""
    return save_pickled(
        folder, random_tensors(tensors), config, num_shards=num_shards, as_zip=as_zip
    )
