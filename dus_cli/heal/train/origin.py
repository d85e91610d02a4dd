"""The file that each parameter came from, and how it is stored there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dus_cli.errors import HealError, shown, shown_list
from dus_cli.models.loading import STORED_DTYPES
from dus_cli.source.checkpoint import Checkpoint, Shard
from dus_cli.source.headers import TensorInfo
from dus_cli.source.reading import open_regular, reading

if TYPE_CHECKING:
    from dus_cli.models.decoder import Decoder


def parameter_names(source: Checkpoint, student: Decoder) -> dict[str, str]:
    """For each tensor of the source that is a parameter of the model: the parameter's name.

    Tied weights are one parameter under two names. Older files leave out the base model's prefix.

    Raises:
        HealError: a parameter that learns stands under no name in the source: it was merged or
            split.
    """
    by_id = {id(parameter): name for name, parameter in student.parameters.items()}
    every = {
        name: by_id[id(p)] for name, p in student.model.named_parameters(remove_duplicate=False)
    }
    prefix = f"{student.model.base_model_prefix}."
    names: dict[str, str] = {}
    for _, tensor in source.tensors():
        # GPT-NeoX, whose files keep the older name
        head = tensor.name.replace("embed_out.", "lm_head.")
        for candidate in (
            tensor.name,
            prefix + tensor.name,
            tensor.name.removeprefix(prefix),
            head,
        ):
            if candidate in every and tensor.dtype in STORED_DTYPES:
                names[tensor.name] = every[candidate]
                break
    lacking = sorted(set(student.parameters) - set(names.values()))
    if lacking:
        raise not_written_back(student, shown_list(lacking))
    return names


def not_written_back(student: Decoder, what: str) -> HealError:
    return HealError(
        f"transformers converts {shown(what)} while it loads model_type "
        f"{student.model.config.model_type!r} (or its dtype is not a float): dus heal could not "
        "write it back as it stood, so it does not heal this architecture yet"
    )


def read_elements(shard: Shard, tensor: TensorInfo, count: int, start: int = 0) -> Tensor:
    """Elements start…start + count − 1 of a stored tensor."""
    dtype = STORED_DTYPES[tensor.dtype]
    if not count:
        return torch.empty(0, dtype=dtype)
    with reading(shard.name), open_regular(shard.path) as file:
        file.seek(tensor.start + start * dtype.itemsize)
        return torch.frombuffer(bytearray(file.read(count * dtype.itemsize)), dtype=dtype)
