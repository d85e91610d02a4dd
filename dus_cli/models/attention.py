"""Attention over packed rows on a CPU, document by document, with a backward pass of our own.

Given a mask, SDPA's CPU kernel computes every pair of tokens in a row. If the mask only keeps
documents apart, causal attention within each document gives the same result for half the sum of
their squared lengths. And its backward pass takes twice as long as the same sums written as batched
matrix products (docs/healing.md has figures). It is one operator, which torch.compile leaves whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# The attribute of a mask that caches its documents: every layer gets the same mask.
_CACHE = "_dus_documents"

# Queries whose scores are held at a time in a backward pass: they see no key after their block.
_BLOCK = 128

# SDPA's kernel on a CPU: what scaled_dot_product_attention calls, but with the log-sum-exp of each
# query's scores, which a backward pass needs.
_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001


def attend_by_document() -> None:
    """Replace "sdpa" in transformers, for this process. Other masks than of documents, and what the
    CPU's kernel does not compute, are computed as before.
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
    """Attention, (rows, length, heads, head size), of queries, keys and values, each (rows, heads,
    length, head size); there may be fewer heads of keys and values.
    """
    if not _is_ours(module, query, key, value, attention_mask, options):
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return result
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return attend(query, key, value, attention_mask, scale)[0], None


def _is_ours(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> bool:
    """Whether `attend` computes what transformers would; depends on shapes and settings only."""
    rows, heads, length, size = query.shape
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16)
        and key.dtype == value.dtype == query.dtype
        and key.shape == value.shape == (rows, key.shape[1], length, size)
        and heads == key.shape[1] * getattr(module, "num_key_value_groups", 1)
        and length > 1
        and not options.get("dropout")
        and not options.get("output_attentions")
        and all(options.get(name) is None for name in ("softcap", "position_bias", "cache"))
        and (
            causal
            if mask is None
            else mask.dtype == torch.bool and mask.shape == (rows, 1, length, length)
        )
    )


@torch.library.custom_op("dus::attend", mutates_args=())
def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention, (rows, length, heads, head size), and the log-sum-exp of each query's scores,
    fp32, (rows, heads, length).

    Args:
        query: (rows, heads, length, head size).
        key: the same, with as many heads or a divisor of it.
        value: as `key`.
        mask: bool, (rows, 1, length, length), whether a query sees a key; None is causal attention.
        scale: factor of the scores.
    """
    rows, heads, length, size = query.shape
    attended = query.new_empty(rows, length, heads, size)
    sums = query.new_empty(rows, heads, length, dtype=torch.float32)
    documents = [[length]] * rows if mask is None else _documents(mask)
    if documents is None:
        found, lse = _kernel(
            query, key, value, 0.0, False, attn_mask=_added(mask, query), scale=scale
        )
        return attended.copy_(found.transpose(1, 2)), sums.copy_(lse)
    for row, start, end in _spans(documents):
        part = (each[row : row + 1, :, start:end] for each in (query, key, value))
        found, lse = _kernel(*part, 0.0, True, scale=scale)
        attended[row, start:end] = found[0].transpose(0, 1)
        sums[row, :, start:end] = lse[0]
    return attended, sums


@attend.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, heads, length, size = query.shape
    return (
        query.new_empty(rows, length, heads, size),
        query.new_empty(rows, heads, length, dtype=torch.float32),
    )


@torch.library.custom_op("dus::attend_backward", mutates_args=())
def attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    sums: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, each (rows, length, heads, head size), from that
    of `attended`; the other arguments as `attend` takes and returns them.
    """
    rows, length = attended.shape[:2]
    gradients = _like_transposed(query, key, value)
    documents = [[length]] * rows if mask is None else _documents(mask)
    if documents is None:
        found = _kernel_backward(
            gradient.transpose(1, 2),
            *(query, key, value),
            attended.transpose(1, 2),
            sums,
            *(0.0, False),
            attn_mask=_added(mask, query),
            scale=scale,
        )
        for empty, each in zip(gradients, found, strict=True):
            empty.copy_(each.transpose(1, 2))
        return gradients
    # what each query's score gradients have in common, (rows, heads, length): Σ gradient · attended
    means = (gradient * attended).sum(-1, dtype=torch.float32).transpose(1, 2)
    for row, start, end in _spans(documents):
        at = (row, slice(None), slice(start, end))
        found = _document_backward(
            gradient.transpose(1, 2)[at],
            [each[at] for each in (query, key, value)],
            sums[at],
            means[at],
            scale,
        )
        for empty, each in zip(gradients, found, strict=True):
            empty[row, start:end] = each.transpose(0, 1)
    return gradients


@attend_backward.register_fake
def _(
    _: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_transposed(query, key, value)


def _like_transposed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for gradients, in the order in which projections take them: heads behind positions."""
    room = [each.new_empty(each.transpose(1, 2).shape) for each in (query, key, value)]
    return room[0], room[1], room[2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, mask)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = attend_backward(gradient, *ctx.saved_tensors, ctx.scale)
    return *(each.transpose(1, 2) for each in found), None, None


attend.register_autograd(_differentiate, setup_context=_save)


def _document_backward(
    gradient: Tensor, inputs: list[Tensor], sums: Tensor, means: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a document's queries, keys and values, each (heads, length, head size).

    With scores s, weights p = exp(s − sums) and the weights' gradient dp, the scores' gradient is
    p · (dp − means). Both subtractions are columns of the matrix products, which add up in fp32:
    so p is rounded where it is near 1, and not where s is large. Heads that share keys and values
    are rows of one product.
    """
    query, key, value = inputs
    heads, length, size = query.shape
    groups = len(key)
    keys, values = (_with_ones(each) for each in (key * scale, value))
    query_gradient = torch.empty_like(query)
    key_gradient, value_gradient = (
        torch.zeros(groups, length, size, dtype=torch.float32) for _ in range(2)
    )
    for start in range(0, length, _BLOCK):
        end = min(length, start + _BLOCK)
        rows = slice(start, end)
        ours, theirs = (
            _less(each[:, rows], less[:, rows]).view(groups, -1, keys.shape[-1])
            for each, less in ((query, sums), (gradient, means))
        )
        weights = torch.bmm(ours, keys[:, :end].mT).exp_()
        # A key after its query may have had a large score: it is overwritten, not multiplied.
        weights.view(heads, end - start, end)[:, :, start:].tril_()
        scores = torch.bmm(theirs, values[:, :end].mT).mul_(weights)
        query_gradient[:, rows] = torch.bmm(scores, keys[:, :end, :size]).view(heads, -1, size)
        key_gradient[:, :end] += torch.bmm(scores.mT, ours[..., :size])
        value_gradient[:, :end] += torch.bmm(weights.mT, theirs[..., :size])
    return query_gradient, key_gradient.mul_(scale), value_gradient


def _with_ones(vectors: Tensor) -> Tensor:
    """Vectors, (heads, length, size), with the columns that add what `_less` subtracts."""
    return torch.nn.functional.pad(vectors, (0, _num_columns(vectors)), value=1.0)


def _less(vectors: Tensor, number: Tensor) -> Tensor:
    """Vectors, (heads, length, size), with columns that subtract a number of each in fp32, (heads,
    length), from its products with `_with_ones`; in bf16 they are the number and its rounding.
    """
    size = vectors.shape[-1]
    longer = vectors.new_empty(*vectors.shape[:-1], size + _num_columns(vectors))
    longer[..., :size] = vectors
    longer[..., size] = -number
    if longer.dtype != torch.float32:
        longer[..., size + 1] = -number - longer[..., size]
    return longer


def _num_columns(vectors: Tensor) -> int:
    return 1 if vectors.dtype == torch.float32 else 2


def _added(mask: Tensor | None, query: Tensor) -> Tensor:
    """A mask as the kernel takes it: what is added to scores."""
    assert mask is not None
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)


def _spans(documents: list[list[int]]) -> Iterator[tuple[int, int, int]]:
    """Row, start and end of each document, from the lengths of each row's."""
    for row, lengths in enumerate(documents):
        end = 0
        for length in lengths:
            start, end = end, end + length
            yield row, start, end


def _documents(mask: Tensor) -> list[list[int]] | None:
    """The lengths of each row's documents if the mask is causal within documents and nothing else;
    otherwise None.
    """
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
