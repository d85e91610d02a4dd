"""What a field or column holds: a text, the messages of a chat, or token ids; and the document that
is made of it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dus_cli.data.documents import Column
from dus_cli.data.texts import BadRecordError, Document, encodable_text
from dus_cli.data.tokeniser import Tokeniser
from dus_cli.errors import reason_of, shown


def document_of(column: Column, tokeniser: Tokeniser) -> Callable[[object], Document] | None:
    """What makes a document of a field's value, and raises BadRecordError where it is none; None of
    a text, which is one itself.

    Raises:
        DataError: the model's tokenizer has no chat template.
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
    except (ValueError, OverflowError):  # lists within it, or numbers of any length
        ids = np.asarray(None)
    if ids.size == 0 and isinstance(value, list):
        return np.empty(0, np.uint32)
    # an array of JSON has its numbers as floats
    if ids.ndim != 1 or ids.dtype.kind not in "iuf" or (ids != np.floor(ids)).any():
        raise BadRecordError("not_tokens", "no list of token ids in the field (--token-field)")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise BadRecordError(
            "no_such_token", f"token id {wrong}, where the model has ids from 0 to {vocab_size - 1}"
        )
    return ids.astype(np.uint32)


def _chat(value: object, tokeniser: Tokeniser) -> str:
    """A chat as the model's template writes it."""
    messages = value if isinstance(value, list) else []
    if not messages or not all(isinstance(each, dict) and "role" in each for each in messages):
        raise BadRecordError(
            "not_messages", "no list of messages with role and content in the field (--chat-field)"
        )
    # a table has every field in every row
    given = [{name: part for name, part in each.items() if part is not None} for each in messages]
    try:
        return encodable_text(tokeniser.chat_text(given))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadRecordError(
            "not_messages", f"the model's chat template refuses it ({shown(reason_of(error))})"
        ) from None
