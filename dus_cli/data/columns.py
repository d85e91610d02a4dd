"""Documents made from a field or column that holds a text, a chat's messages or token ids."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dus_cli.data.documents import Column
from dus_cli.data.texts import BadRecordError, Document, encodable_text
from dus_cli.data.tokeniser import Tokeniser
from dus_cli.errors import reason_of, shown


def document_of(column: Column, tokeniser: Tokeniser) -> Callable[[object], Document] | None:
    """The function that makes a document from a field's value; None for a text, which is used as it
    is. The function raises BadRecordError if the value makes no document.

    Raises:
        DataError: the field holds chats, and the model's tokenizer has no chat template.
    """
    if column is Column.tokens:
        return lambda value: _token_ids(value, tokeniser.vocab_size)
    if column is Column.chat:
        tokeniser.check_chat_template()
        return lambda value: _chat(value, tokeniser)
    return None


def _token_ids(value: object, vocab_size: int) -> npt.NDArray[np.uint32]:
    try:
        ids = np.asarray(value if isinstance(value, list) else None)
    except (ValueError, OverflowError):  # nested lists, or numbers beyond 64 bits
        ids = np.asarray(None)
    if ids.size == 0 and isinstance(value, list):
        return np.empty(0, np.uint32)
    # in a JSON array file all numbers are parsed as floats
    if ids.ndim != 1 or ids.dtype.kind not in "iuf" or (ids != np.floor(ids)).any():
        raise BadRecordError(
            "not_tokens", "the field does not hold a list of token ids (--token-field)"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise BadRecordError(
            "no_such_token", f"token id {wrong}, but the model has ids from 0 to {vocab_size - 1}"
        )
    return ids.astype(np.uint32)


def _chat(value: object, tokeniser: Tokeniser) -> str:
    """A chat's text, written by the model's template."""
    messages = value if isinstance(value, list) else []
    if not messages or not all(isinstance(each, dict) and "role" in each for each in messages):
        raise BadRecordError(
            "not_messages",
            "the field does not hold a list of messages with role and content (--chat-field)",
        )
    # a table gives every message every field, with None for those that it lacks
    present = [{name: part for name, part in each.items() if part is not None} for each in messages]
    try:
        return encodable_text(tokeniser.chat_text(present))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadRecordError(
            "not_messages", f"the model's chat template refuses it ({shown(reason_of(error))})"
        ) from None
