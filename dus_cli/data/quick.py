"""fastokens in the place of tokenizers, where it is installed and gives the same ids.

It reads the same tokenizer.json and is some tens of times as fast, but takes fewer kinds of it
(byte-level BPE, mostly). It is used for large batches only, after it gave the same ids for hard
texts, and a share of each batch is compared.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from dus_cli.errors import DataError

# Of each so many texts of a batch, this many characters are compared.
_COMPARED_EVERY, _COMPARED_LENGTH = 32, 4096

# White space, numbers, contractions, scripts, joined emoji, marks and characters of compatibility.
_HARD = (
    "  two  spaces\n\n \tand\r\n tabs \u00a0\u2003\u200b\ufeff end ",
    "1234567 3.14 0x1F ½ Ⅷ ٣ 1st it's I'LL we'd don’t ''s",
    "naïve cafe\u0301 ﬁ Å \u212b ǆ ß İ ﷺ ｆｕｌｌ",
    "日本語、中文。한국어 العربية हिन्दी ไทย עברית Ελληνικά Русский",
    "👩‍👩‍👧‍👦 🇩🇪 ✌🏽 \U0001f600! \U00020000\U0010ffff",
    'if (x != y) { return "a\\n" + b[i++]; } // <|x|> </s> [MASK] __init__ https://a.b/c?d=e#f',
    "a" * 300 + " " * 300 + "\n" * 30 + "-" * 90 + "ab" * 90,
)


class QuickEncoder:
    """Encodes as the fast tokenizer that it was opened for."""

    def __init__(self, tokenizer: Any, quick: Any) -> None:
        self._tokenizer, self._quick = tokenizer, quick

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special tokens around it.

        Raises:
            DataError: fastokens and tokenizers differ in a part of them.
        """
        ids = self._ids(texts)
        compared = [text[:_COMPARED_LENGTH] for text in texts[::_COMPARED_EVERY]]
        if not self.is_same(compared):
            raise DataError(
                "fastokens gives other tokens for this text than tokenizers, which the model was "
                "trained with; uninstall fastokens, and start again"
            )
        return ids

    def is_same(self, texts: Sequence[str]) -> bool:
        """Whether the ids of these texts are those of tokenizers."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings] == self._ids(texts)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encodings = self._quick.encode_batch(list(texts), add_special_tokens=False)
        except ValueError:  # a text has a byte for which the vocabulary has no token
            return [self._ids_of_one(text) for text in texts]
        return [encoding.ids for encoding in encodings]

    def _ids_of_one(self, text: str) -> list[int]:
        for library in (self._quick, self._tokenizer):
            try:
                ids: list[int] = library.encode(text, add_special_tokens=False).ids
            except ValueError:
                continue
            return ids
        raise AssertionError("tokenizers encodes every text")


def quick_encoder(tokenizer: Any) -> QuickEncoder | None:
    """A tokenizer of the library tokenizers by fastokens; None if that is not installed, does not
    take the tokenizer, or gives other ids for hard texts or for the added tokens.
    """
    try:
        fastokens: Any = importlib.import_module("fastokens")
        quick = QuickEncoder(tokenizer, fastokens.Tokenizer.from_json_str(tokenizer.to_str()))
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        around = [f"a{text} {text}b {text}{text}\n" for text in added]
        return quick if quick.is_same([*_HARD, *around]) else None
    except Exception:  # noqa: BLE001  whatever it does not take, tokenizers does
        return None
