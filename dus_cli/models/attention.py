"""Attention over packed rows on a CPU, document by document and without a mask.

Given a mask, SDPA's CPU kernel computes every pair of tokens in a row. If the mask only keeps
documents apart, causal attention within each document gives the same result for half the sum of
their squared lengths (docs/healing.md has figures).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# The attribute of a mask that caches its documents: every layer gets the same mask.
_CACHE = "_dus_documents"


def attend_by_document() -> None:
    """Replace "sdpa" in transformers, for this process. Other masks are computed as before."""
    AttentionInterface.register("sdpa", _attention)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention, (rows, length, heads, head size), of queries, keys and values, each (rows, heads,
    length, head size).
    """
    documents = None if attention_mask is None else _documents(attention_mask, query, key)
    if documents is None or options.get("position_bias") is not None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return result
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
    """The lengths of each row's documents if the mask is causal within documents and nothing else;
    otherwise None.
    """
    rows, length = query.shape[0], query.shape[2]
    if (
        mask.dtype != torch.bool
        or mask.shape != (rows, 1, length, length)
        or key.shape[2] != length
    ):
        return None
    if not hasattr(mask, _CACHE):
        setattr(mask, _CACHE, _read(mask))
    lengths: list[list[int]] | None = getattr(mask, _CACHE)
    return lengths


def _read(mask: Tensor) -> list[list[int]] | None:
    # whether a token continues the document of the token before it, (rows, length - 1)
    goes_on = mask.diagonal(-1, 2, 3)[:, 0]
    # the number of each token's document, (rows, length)
    number = torch.nn.functional.pad((~goes_on).cumsum(1), (1, 0))
    if not torch.equal(mask[:, 0], (number[:, :, None] == number[:, None, :]).tril()):
        return None
    return [torch.bincount(row).tolist() for row in number]
