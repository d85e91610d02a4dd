"""A model's own tokenizer, and what identifies it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dus_cli.data.special_tokens import SpecialTokens, special_tokens_of
from dus_cli.errors import DataError, encodable, reason_of, shown
from dus_cli.source.mistaken import NUM_BYTES, not_fetched
from dus_cli.source.reading import open_regular, reading

# A longer document is tokenised in pieces (characters).
_LONGEST_PIECE = 1 << 20

# What makes a tokenizer, by the names that transformers saves and reads.
_TOKENIZER_FILES = """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    merges.txt vocab.txt tokenizer.model spiece.model sentencepiece.bpe.model tekken.json
""".split()


def tokenizer_identity(folder: Path) -> str:
    """A digest of the files that a tokenizer is loaded from.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    digest = hashlib.sha256()
    names = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    names += sorted(path.name for path in folder.glob("*.tiktoken"))
    if not names:
        raise DataError(
            f"{shown(folder)} has no tokenizer; copy tokenizer.json and tokenizer_config.json of "
            "its base"
        )
    for name in names:
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read {shown(folder / name)}: {error.strerror}; check the file"
            ) from error
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _check_fetched(folder: Path) -> None:
    """Check that a tokenizer's files are not what a clone or a download left in their place.

    Raises:
        DataError: one is.
    """
    for name in _TOKENIZER_FILES:
        path = folder / name
        if not path.is_file() or not path.stat().st_size:
            continue
        with reading(name), open_regular(path) as file:
            head = file.read(NUM_BYTES)
        if (what := not_fetched(head, path.stat().st_size)) is not None:
            raise DataError(f"the tokenizer in {shown(folder)}: {name} {what}")


# Stands for a size that config.json does not give: token ids are numbers of 32 bits.
UNKNOWN_VOCABULARY = 1 << 32


class Tokeniser:
    """The tokenizer in a model's folder.

    `before` are the ids with which a document begins, `ending` those with which one ends in a row
    of documents: what the tokenizer itself puts around a text, and an end-of-text if that has none.
    `eos` is the end-of-text alone, and `unknown` the id of what it cannot say, None where it has
    none.

    Args:
        folder: the model's.
        vocab_size: of the model; None where its config does not say, and any id may be.
        special_tokens: False leaves out what the tokenizer puts around a text.

    Raises:
        DataError: it cannot be loaded, has no end-of-text token, or one beyond the model's
            vocabulary.
    """

    def __init__(
        self, folder: Path, vocab_size: int | None, *, special_tokens: bool = True
    ) -> None:
        # Otherwise tokenizers warns in every process that is forked from this one.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        from transformers import AutoTokenizer

        _check_fetched(folder)
        if str(folder) != encodable(str(folder)):
            raise DataError(
                f"the name of {shown(folder)} is not UTF-8, and tokenizers opens no such path; "
                "rename it"
            )
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise DataError(
                f"cannot load the tokenizer in {shown(folder)}: {reason_of(error)}; "
                "copy the tokenizer files of its base"
            ) from error
        self._fast = self._tokenizer.backend_tokenizer if self._tokenizer.is_fast else None
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
        self.folder, self.vocab_size = folder, vocab_size or UNKNOWN_VOCABULARY
        around = self._special_tokens() if special_tokens else SpecialTokens()
        eos = self._tokenizer.eos_token_id
        if eos is None and around.behind:
            eos = around.behind[-1]  # [SEP] of a tokenizer that knows no other end
        if eos is None:
            raise DataError(
                f"the tokenizer in {shown(folder)} has no end-of-text token to put between "
                "documents; name its eos_token in tokenizer_config.json"
            )
        self.eos = int(eos)
        self.before = around.before
        self.ending = around.behind if self.eos in around.behind else (*around.behind, self.eos)
        self.unknown: int | None = self._tokenizer.unk_token_id
        self.check_ids(max((*self.before, *self.ending)))

    def _special_tokens(self) -> SpecialTokens:
        try:
            return special_tokens_of(self._tokenizer)
        except ValueError as error:
            raise DataError(
                f"the tokenizer in {shown(self.folder)} cannot be asked how a text begins: "
                f"{error}; --no-special-tokens leaves out what it puts there"
            ) from error

    def check_ids(self, highest: int) -> None:
        """Check that the model has an embedding for each id.

        Raises:
            DataError: it does not.
        """
        if highest >= self.vocab_size:
            raise DataError(
                f"the tokenizer in {shown(self.folder)} gives id {highest}, but the model has "
                f"{self.vocab_size} words; use the tokenizer that belongs to the model"
            )

    def check_chat_template(self) -> None:
        """Check that there is a chat template.

        Raises:
            DataError: there is none.
        """
        if not self._tokenizer.chat_template:
            raise DataError(
                f"the tokenizer in {shown(self.folder)} has no chat template, so --chat-field has "
                "nothing to write messages with; use an instruct model's, or write them as text"
            )

    def chat_text(self, messages: list[dict[str, Any]]) -> str:
        """A chat as the model's own template writes it, without the token that a text begins with
        anyway.

        Raises:
            ValueError: the template refuses the messages; or another error of what it does with
                them.
        """
        from jinja2 import TemplateError

        try:
            text = str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError as error:
            raise ValueError(str(error)) from error
        begins = self._tokenizer.bos_token_id in self.before
        return text.removeprefix(self._tokenizer.bos_token) if begins else text

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Ids of each text, nothing put before or behind it."""
        if self._fast is None:
            for text in texts:
                yield self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        else:
            for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False):
                yield encoding.ids


def pieces_of(text: str) -> Iterator[tuple[str, bool]]:
    """A long document in pieces, and whether each is the last.

    Cut before a space behind a letter or digit: there a byte-level tokenizer begins a new word
    anyway, so its tokens are those of the whole.
    """
    start = 0
    while len(text) - start > _LONGEST_PIECE:
        end = stop = start + _LONGEST_PIECE
        for _ in range(1000):
            stop = text.rfind(" ", start + 1, stop)
            if stop < 0:
                break
            if text[stop - 1].isalnum():
                end = stop
                break
        yield text[start:end], False
        start = end
    yield text[start:], True
