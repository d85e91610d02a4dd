"""The tokens that a model's own tokenizer puts around a text: decided here, and nowhere else.

`<s>` of Llama, Mistral and Gemma, ChatGLM's two, [CLS] and [SEP], an end-of-text; nothing for GPT-2
and Qwen. A model that was trained behind such a token knows little without it, so text is trained
and measured with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What the tokenizer is asked with: texts that nearly every vocabulary can say.
_TEXTS = ("a", "1", "the end.")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids before a text and behind it."""

    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()


def special_tokens_of(tokenizer: Any) -> SpecialTokens:
    """What a tokenizer of transformers puts around a text, as it is loaded: template, add_bos_token
    and all.

    Found by asking, with special tokens and without: whether a template, a class of its own or a
    setting adds them, fast or slow, what counts is what users of the model get.

    Raises:
        ValueError: it changes with the text, so that no document can be said to begin in one way.
    """
    found = {_around(tokenizer, text) for text in _TEXTS} - {None}
    if not found:  # no text has tokens, so it cannot be told what stands before it and what behind
        ids = tokenizer("", add_special_tokens=True)["input_ids"]
        found = {SpecialTokens(tuple(ids))}
    if len(found) > 1:
        raise ValueError("the special tokens that it puts around a text change with the text")
    (only,) = found
    assert only is not None
    return only


def _around(tokenizer: Any, text: str) -> SpecialTokens | None:
    """What stands around this text. None where the text has no tokens of its own."""
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
    raise ValueError("its special tokens change the tokens of the text that they stand around")
