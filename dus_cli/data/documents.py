"""Training text: which files there are, which of them are no data, and the documents in them, one
at a time.

`texts` has the kinds of files. All but Parquet and Arrow may be compressed: .jsonl.gz, .csv.xz.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from dus_cli.data.containers import UnreadableError
from dus_cli.data.remote import RemoteFile
from dus_cli.data.sources import kind_of
from dus_cli.data.texts import BadRecordError, Document, OfValue, texts_in
from dus_cli.errors import DataError, shown


class BadLine(str, Enum):
    """What to do with a line or row that holds no text: stop there, or count it and go on."""

    error = "error"
    skip = "skip"


class Column(str, Enum):
    """What a field or column holds."""

    text = "text"
    chat = "chat"
    tokens = "tokens"


@dataclass
class Tally:
    """What was read: documents, how many lines were left out for which reason, bytes of the
    current file.
    """

    documents: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    position: int = 0

    def skip(self, reason: str, count: int = 1) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + count


# --- the documents in a file ----------------------------------------------------------------------


def documents(
    path: Path | RemoteFile, text_field: str, on_bad_line: BadLine, tally: Tally
) -> Iterator[str]:
    """As `documents_of`, of texts alone."""
    for text in documents_of(path, text_field, on_bad_line, tally, None):
        assert isinstance(text, str)
        yield text


def documents_of(
    path: Path | RemoteFile,
    text_field: str,
    on_bad_line: BadLine,
    tally: Tally,
    of_value: OfValue | None,
) -> Iterator[Document]:
    """The documents in a file, in order, each made by `of_value` of a field's value. Texts of
    nothing but white space are counted as `empty` and left out.

    Reasons in `tally.skipped`: malformed_json, malformed_csv, missing_field, not_a_string,
    invalid_utf8, too_long, empty, not_messages, not_tokens, no_such_token.

    Raises:
        DataError: the file cannot be read, ends too early, lacks the column; or with `error`, the
            first bad line, row or item, by its number from 1.
    """

    def on_bad(unit: str, number: int, problem: BadRecordError) -> None:
        if on_bad_line is BadLine.error:
            raise DataError(
                f"{shown(path)}, {unit} {number}: {problem.detail}; mend it, or leave such {unit}s "
                "out with --on-bad-line skip"
            )
        tally.skip(problem.reason)

    def on_position(position: int) -> None:
        tally.position = position

    kind = kind_of(path.name)
    assert kind is not None
    try:
        if not path.stat().st_size:
            return
        for text in texts_in(path, kind, text_field, on_bad, on_position, of_value):
            if not len(text) or (isinstance(text, str) and text.isspace()):
                tally.skip("empty")
            else:
                tally.documents += 1
                yield text
        if isinstance(path, RemoteFile):
            path.check_unchanged()
    except UnreadableError as error:
        raise DataError(f"cannot read {shown(path)}: {error}") from error
    except OSError as error:
        reason = error.strerror or shown(error)
        raise DataError(
            f"cannot read {shown(path)}: {reason}; check the disk or the network mount"
        ) from error


@dataclass(frozen=True)
class Reading:
    """How documents are found in files."""

    text_field: str = "text"
    on_bad_line: BadLine = BadLine.error
