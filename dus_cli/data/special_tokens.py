"""The special tokens that a model's own tokenizer puts around a text.

`<s>` of Llama, Mistral and Gemma, ChatGLM's two, [CLS] and [SEP], an end-of-text; nothing for GPT-2
and Qwen. A model that was trained with such a token predicts badly without it, so text is trained
on and measured with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Texts to try a tokenizer with, which nearly every vocabulary can encode.
_TEXTS = ("a", "1", "the end.")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids before and after a text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def special_tokens_of(tokenizer: Any) -> SpecialTokens:
    """The special tokens that a loaded tokenizer of transformers puts around a text.

    Found by encoding texts with and without special tokens, because a template, add_bos_token or
    the tokenizer's class may add them.

    Raises:
        ValueError: they change with the text.
    """
    results = {_around(tokenizer, text) for text in _TEXTS} - {None}
    if not results:  # no text has tokens of its own, so all special tokens count as before it
        ids = tokenizer("", add_special_tokens=True)["input_ids"]
        results = {SpecialTokens(tuple(ids))}
    if len(results) > 1:
        raise ValueError("the special tokens that it puts around a text change with the text")
    (only,) = results
    assert only is not None
    return only


def _around(tokenizer: Any, text: str) -> SpecialTokens | None:
    """The special tokens around this text; None if the text has no tokens of its own."""
    plain, whole = (
        list(tokenizer(text, add_special_tokens=adds, verbose=False)["input_ids"])
        for adds in (False, True)
    )
    if not plain:
        return None
    for start in range(len(whole) - len(plain) + 1):
        end = start + len(plain)
        if whole[start:end] == plain:
            return SpecialTokens(tuple(whole[:start]), tuple(whole[end:]))
    raise ValueError("with special tokens it gives other tokens for the text itself")
