"""What config.json says of a model's size: one rule for every command, with a test for each
spelling.
"""

from __future__ import annotations

from typing import Any

import pytest

from dus_cli.errors import ConfigError
from dus_cli.maps.shape import context_length, vocab_size


@pytest.mark.parametrize(
    ("model_type", "field"),
    [
        ("llama", "max_position_embeddings"),
        ("gpt2", "n_positions"),
        ("openai-gpt", "n_ctx"),
        ("mpt", "max_seq_len"),
        ("dbrx", "max_sequence_length"),
        ("chatglm", "seq_length"),
        ("rwkv", "context_length"),
    ],
)
def test_the_context_length_has_these_names(model_type: str, field: str) -> None:
    assert context_length({"model_type": model_type, field: 2048}) == 2048


@pytest.mark.parametrize("value", [None, "2048", True, 0, 1, -1, 2048.0, [2048]])
def test_a_context_length_that_is_no_number_of_tokens_is_unknown(value: Any) -> None:
    assert context_length({"max_position_embeddings": value}) is None


def test_the_first_context_length_counts() -> None:
    assert context_length({"n_ctx": 512, "n_positions": 1024}) == 1024
    assert context_length({"max_position_embeddings": None, "n_positions": 1024}) == 1024


def test_the_vocabulary_stands_in_the_decoders_part_or_beside_it() -> None:
    assert vocab_size({"vocab_size": 10, "text_config": {}}, {"vocab_size": 20}) == 20
    assert vocab_size({"vocab_size": 10, "text_config": {}}, {}) == 10
    assert vocab_size({"vocab_size": 10}) == 10
    assert vocab_size({}) is None


@pytest.mark.parametrize("value", ["32000", 0, -5, True, 1.5, [1]])
def test_a_vocabulary_that_is_no_number_of_words_is_one_line(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size is .*, not a number of tokens"):
        vocab_size({"vocab_size": value})
