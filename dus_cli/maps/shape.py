"""A model's shape: parameters, FLOPs, context length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dus_cli.errors import ConfigError, described

# The fields of config.json with a decoder's context length: the usual one, then GPT-2's, GPT's and
# CTRL's, MPT's, DBRX's, ChatGLM's and BLOOM's, RWKV's.
_CONTEXT_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "context_length",
)

# The compute-optimal number of tokens per parameter (Chinchilla, arXiv:2203.15556, table 3).
TOKENS_PER_PARAMETER = 20


@dataclass(frozen=True)
class Shape:
    """The numbers that FLOPs and memory depend on. `num_matmul_parameters` excludes an embedding
    that is only looked up; `attention_size` is the width of attention over all heads.
    """

    num_parameters: int
    num_matmul_parameters: int
    num_layers: int
    hidden_size: int
    attention_size: int
    vocab_size: int


def context_length(fields: dict[str, Any]) -> int | None:
    """A decoder's context length in tokens; None if its fields of config.json do not give it.

    >>> context_length({"model_type": "mpt", "max_seq_len": 2048})
    2048
    """
    lengths = (fields.get(name) for name in _CONTEXT_LENGTHS)
    return next((length for length in lengths if type(length) is int and length > 1), None)


def vocab_size(config: dict[str, Any], fields: dict[str, Any] | None = None) -> int | None:
    """The number of tokens in a model's vocabulary; None if config.json does not give it.

    Args:
        config: the whole config.json.
        fields: the decoder's part of it, which takes precedence.

    Raises:
        ConfigError: the field does not hold a number of tokens.
    """
    size = (fields or {}).get("vocab_size")
    size = config.get("vocab_size") if size is None else size
    if size is None:
        return None
    if type(size) is not int or size < 1:
        raise ConfigError(f"config.json: vocab_size is {described(size)}, not a number of tokens")
    return size


def shape_of(config: dict[str, Any], num_parameters: int, num_layers: int) -> Shape:
    """The shape of a decoder. `config` is the decoder's part of config.json."""
    hidden = int(config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 0)
    head_size = int(config.get("head_dim") or (hidden // heads if heads else 0))
    vocab = vocab_size(config) or 0
    # num_parameters counts tied embeddings once, and they are multiplied once, as the head; it
    # counts untied ones twice, and one of them is only looked up.
    looked_up = 0 if config.get("tie_word_embeddings") else vocab * hidden
    return Shape(
        num_parameters, num_parameters - looked_up, num_layers, hidden, heads * head_size, vocab
    )


def flops_per_token(shape: Shape, seq_length: int) -> float:
    """FLOPs of forward and backward for one token: 6 · N + 12 · L · A · T (PaLM, arXiv:2204.02311,
    appendix B).

    N is the number of parameters that are multiplied, L of layers, A the width of attention over
    all heads, T the sequence length. As in the paper, the causal half is not subtracted and
    recomputation is not counted.
    """
    return (
        6.0 * shape.num_matmul_parameters
        + 12.0 * shape.num_layers * shape.attention_size * seq_length
    )


def pretraining_flops(shape: Shape, seq_length: int) -> float:
    """FLOPs of pretraining a model of this shape on 20 tokens per parameter (Chinchilla,
    arXiv:2203.15556).
    """
    return TOKENS_PER_PARAMETER * shape.num_parameters * flops_per_token(shape, seq_length)
