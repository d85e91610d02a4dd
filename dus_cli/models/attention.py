"""Attention of packed rows on a CPU: document by document, without a mask.

SDPA's CPU kernel pays for every pair of tokens of a row once it is given a mask. A mask that only
keeps documents apart is therefore taken for what it says: each document attends to itself,
causally, which costs the sum of their lengths' squares, halved (docs/healing.md has figures).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Where a mask's documents are remembered: each layer is handed the same mask.
_REMEMBERED = "_dus_documents"


def attend_by_document() -> None:
    """Put it in the place of "sdpa" in transformers, for this process. Any other mask goes the
    way that it went.
    """
    AttentionInterface.register("sdpa", _attention)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention (rows, length, heads, head size) of queries, keys and values (rows, heads,
    length, head size).
    """
    documents = None if attention_mask is None else _documents(attention_mask, query, key)
    if documents is None or options.get("position_bias") is not None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return found
    options["is_causal"] = True
    rows = []
    for row, lengths in enumerate(documents):
        parts = zip(
            *(torch.split(part[row : row + 1], lengths, dim=2) for part in (query, key, value)),
            strict=True,
        )
        outputs = [sdpa_attention_forward(module, *part, None, **options)[0] for part in parts]
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows), None


def _documents(mask: Tensor, query: Tensor, key: Tensor) -> list[list[int]] | None:
    """The lengths of each row's documents, where the mask keeps documents apart and does nothing
    else.
    """
    rows, length = query.shape[0], query.shape[2]
    if (
        mask.dtype != torch.bool
        or mask.shape != (rows, 1, length, length)
        or key.shape[2] != length
    ):
        return None
    if not hasattr(mask, _REMEMBERED):
        setattr(mask, _REMEMBERED, _read(mask))
    found: list[list[int]] | None = getattr(mask, _REMEMBERED)
    return found


def _read(mask: Tensor) -> list[list[int]] | None:
    goes_on = mask.diagonal(-1, 2, 3)[:, 0]  # (rows, length - 1): each token sees the one before it
    # of its document, (rows, length)
    number = torch.nn.functional.pad((~goes_on).cumsum(1), (1, 0))
    if not torch.equal(mask[:, 0], (number[:, :, None] == number[:, None, :]).tril()):
        return None
    return [torch.bincount(row).tolist() for row in number]
