"""A model's shape: parameters, FLOPs, context length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Tokens per parameter at which pretraining spends its compute best (Chinchilla, arXiv:2203.15556, table 3).
TOKENS_PER_PARAMETER = 20


@dataclass(frozen=True)
class Shape:
    """What FLOPs and memory depend on. `num_matmul_parameters` excludes the embedding that is only looked up."""

    num_parameters: int
    num_matmul_parameters: int
    num_layers: int
    hidden_size: int
    attention_size: int
    vocab_size: int


def shape_of(config: dict[str, Any], num_parameters: int, num_layers: int) -> Shape:
    """The shape of a decoder, from its config's fields (the text part of it)."""
    hidden = int(config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 0)
    head_size = int(config.get("head_dim") or (hidden // heads if heads else 0))
    vocab = int(config.get("vocab_size") or 0)
    # Tied weights stand once in num_parameters and are multiplied once, as the head; untied ones stand twice.
    looked_up = 0 if config.get("tie_word_embeddings") else vocab * hidden
    return Shape(num_parameters, num_parameters - looked_up, num_layers, hidden, heads * head_size, vocab)


def flops_per_token(shape: Shape, seq_length: int) -> float:
    """FLOPs of forward and backward for one token: 6 · N + 12 · L · A · T (PaLM, arXiv:2204.02311, appendix B).

    N are the parameters that are multiplied, L layers, A the width of attention over all heads, T the
    sequence length. As in the paper the causal half is not subtracted and recomputation is not counted.
    """
    return 6.0 * shape.num_matmul_parameters + 12.0 * shape.num_layers * shape.attention_size * seq_length


def pretraining_flops(shape: Shape, seq_length: int) -> float:
    """FLOPs of pretraining a model of this shape on 20 tokens a parameter (Chinchilla, arXiv:2203.15556)."""
    return TOKENS_PER_PARAMETER * shape.num_parameters * flops_per_token(shape, seq_length)
