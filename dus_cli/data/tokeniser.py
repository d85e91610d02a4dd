"""A model's own tokenizer, and the digest that identifies it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dus_cli.common.libraries import TRANSFORMERS_REFUSALS
from dus_cli.data.quick import QuickEncoder, quick_encoder
from dus_cli.data.special_tokens import SpecialTokens, special_tokens_of
from dus_cli.errors import DataError, encodable, reason_of, shown
from dus_cli.source.mistaken import NUM_BYTES, not_fetched
from dus_cli.source.reading import open_regular, reading

# Characters; a longer document is tokenised in pieces.
_LONGEST_PIECE = 1 << 20

# Characters; for less text it does not pay to open fastokens.
_MUCH = 1 << 18

# The files of a tokenizer, by the names that transformers saves and reads.
_TOKENIZER_FILES = """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    merges.txt vocab.txt tokenizer.model spiece.model sentencepiece.bpe.model tekken.json
""".split()


def tokenizer_identity(folder: Path) -> str:
    """A digest of the files that a tokenizer is loaded from.

    Raises:
        DataError: there are no such files, or they cannot be read.
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
    """Check that a tokenizer's files were downloaded: none is a Git LFS pointer or an error page.

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


# The bound on token ids if config.json gives no vocab_size: they are stored in 32 bits.
UNKNOWN_VOCABULARY = 1 << 32


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder, as transformers loads it from local files; none of the
    checkpoint's code is run.

    Raises:
        DataError: it cannot be loaded, or has no tokens but those added to a vocabulary.
    """
    # If this is unset, tokenizers warns in every process forked from this one.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoTokenizer

    _check_fetched(folder)
    if str(folder) != encodable(str(folder)):
        raise DataError(
            f"the name of {shown(folder)} is not UTF-8, and tokenizers cannot open such a "
            "path; rename it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except TRANSFORMERS_REFUSALS as error:
        raise DataError(
            f"cannot load the tokenizer in {shown(folder)}: {reason_of(error)}; "
            "copy the tokenizer files of its base"
        ) from error
    # Without its vocabulary a tokenizer of Qwen2 or GPT-2 loads, and encodes any text as nothing.
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):
        raise DataError(
            f"the tokenizer in {shown(folder)} has no vocabulary; copy tokenizer.json, or "
            "vocab.json and merges.txt, of its base"
        )
    return tokenizer


def open_tokeniser(
    folder: Path, vocab_size: int | None, *, special_tokens: bool = True
) -> Tokeniser:
    """Load the tokenizer in a model's folder, and check that it fits the model.

    Args:
        folder: the model's.
        vocab_size: the model's; None if its config gives none, which allows any id.
        special_tokens: False leaves out the special tokens that the tokenizer puts around a text.

    Raises:
        DataError: the tokenizer cannot be loaded, has no end-of-text token, or gives an id beyond
            the model's vocabulary.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    around = _special_tokens(tokenizer, folder) if special_tokens else SpecialTokens()
    eos = tokenizer.eos_token_id
    if eos is None and around.after:
        eos = around.after[-1]  # BERT's [SEP], if the tokenizer names no eos_token
    if eos is None:
        raise DataError(
            f"the tokenizer in {shown(folder)} has no end-of-text token to put between "
            "documents; name its eos_token in tokenizer_config.json"
        )
    tokeniser = Tokeniser(
        tokenizer,
        folder,
        vocab_size=vocab_size or UNKNOWN_VOCABULARY,
        around=around,
        eos=int(eos),
    )
    tokeniser.check_ids(max((*tokeniser.before, *tokeniser.ending)))
    return tokeniser


def _special_tokens(tokenizer: Any, folder: Path) -> SpecialTokens:
    try:
        return special_tokens_of(tokenizer)
    except ValueError as error:
        raise DataError(
            f"cannot find the special tokens of the tokenizer in {shown(folder)}: "
            f"{error}; leave them out with --no-special-tokens"
        ) from error


class Tokeniser:
    """A model's tokenizer; `open_tokeniser` loads and checks one.

    Args:
        tokenizer: of transformers.
        folder: the model's.
        vocab_size: the model's.
        around: the special tokens that begin and end a document.
        eos: the end-of-text id.

    Attributes:
        before: the ids with which a document begins.
        ending: the ids with which a document ends: those that the tokenizer puts after a text, and
            the end-of-text if it is not among them.
        unknown: the id of text that the vocabulary cannot encode; None if there is none.
    """

    def __init__(
        self, tokenizer: Any, folder: Path, *, vocab_size: int, around: SpecialTokens, eos: int
    ) -> None:
        self._tokenizer = tokenizer
        self._fast = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self.folder, self.vocab_size, self.eos = folder, vocab_size, eos
        self.before = around.before
        self.ending = around.after if eos in around.after else (*around.after, eos)
        self.unknown: int | None = tokenizer.unk_token_id

    @cached_property
    def _quick(self) -> QuickEncoder | None:
        return quick_encoder(self._fast)

    def check_ids(self, highest: int) -> None:
        """Check that the model has an embedding for every id up to `highest`.

        Raises:
            DataError: it has not.
        """
        if highest >= self.vocab_size:
            raise DataError(
                f"the tokenizer in {shown(self.folder)} gives id {highest}, but the model's "
                f"vocabulary has {self.vocab_size}; use the tokenizer that belongs to the model"
            )

    def check_chat_template(self) -> None:
        """Check that the tokenizer has a chat template.

        Raises:
            DataError: it has none.
        """
        if not self._tokenizer.chat_template:
            raise DataError(
                f"the tokenizer in {shown(self.folder)} has no chat template, which --chat-field "
                "needs; use an instruct model's tokenizer, or write the messages as text"
            )

    def chat_text(self, messages: list[dict[str, Any]]) -> str:
        """A chat's text by the model's own template, without the beginning-of-text token if
        `before` has it.

        Raises:
            ValueError: the template refuses the messages. It may also raise an error of its own
                code (TypeError, KeyError, …).
        """
        from jinja2 import TemplateError

        try:
            text = str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError as error:
            raise ValueError(str(error)) from error
        begins = self._tokenizer.bos_token_id in self.before
        return text.removeprefix(self._tokenizer.bos_token) if begins else text

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The ids of each text, without special tokens around it.

        Raises:
            DataError: fastokens is installed, and differs from tokenizers.
        """
        if self._fast is None:
            for text in texts:
                yield self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        elif sum(map(len, texts)) >= _MUCH and self._quick is not None:
            yield from self._quick.encode(texts)
        else:
            for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False):
                yield encoding.ids


def pieces_of(text: str) -> Iterator[tuple[str, bool]]:
    """A long document in pieces, and whether each is the last.

    A cut is before a space that follows a letter or digit. A byte-level tokenizer begins a new word
    there, so the pieces have the tokens of the whole.
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
