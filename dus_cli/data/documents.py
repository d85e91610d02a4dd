"""The documents in a file, one at a time, and counts of those left out.

`texts` reads each format. All but Parquet and Arrow may be compressed: .jsonl.gz, .csv.xz.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from dus_cli.data.containers import UnreadableError
from dus_cli.data.remote import StoreFile
from dus_cli.data.sources import kind_of
from dus_cli.data.texts import BadRecordError, Fields, Record, records_in
from dus_cli.errors import DataError, shown


class BadLine(str, Enum):
    """What to do with a line or row that holds no text: stop, or count it and go on."""

    error = "error"
    skip = "skip"


class Column(str, Enum):
    """What a field or column holds."""

    text = "text"
    chat = "chat"
    tokens = "tokens"


@dataclass
class ReadCounts:
    """Counts while reading: documents, skipped lines and documents by reason, and bytes of the
    current file.
    """

    documents: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    position: int = 0

    def skip(self, reason: str, count: int = 1) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + count


def documents(
    path: Path | StoreFile, text_field: str, on_bad_line: BadLine, counts: ReadCounts
) -> Iterator[str]:
    """The documents in a file whose field holds text; see `records`."""
    for text, _ in records(path, Fields(text_field), on_bad_line, counts):
        assert isinstance(text, str)
        yield text


def records(
    path: Path | StoreFile, fields: Fields, on_bad_line: BadLine, counts: ReadCounts
) -> Iterator[Record]:
    """The documents in a file with their weights, in order. Texts of nothing but white space are
    counted as `empty` and left out.

    Reasons in `counts.skipped`: malformed_json, malformed_csv, missing_field, not_a_string,
    invalid_utf8, too_long, empty, not_messages, not_tokens, no_such_token, no_weight, bad_weight.

    Raises:
        DataError: the file cannot be read, is truncated or lacks a column; or, with
            `BadLine.error`, the first bad line, row or item, with its number from 1.
    """

    def on_bad(unit: str, number: int, problem: BadRecordError) -> None:
        if on_bad_line is BadLine.error:
            raise DataError(
                f"{shown(path)}, {unit} {number}: {problem.detail}; mend it, or leave such "
                f"{unit}s out with --on-bad-line skip"
            )
        counts.skip(problem.reason)

    def on_position(position: int) -> None:
        counts.position = position

    kind = kind_of(path.name)
    assert kind is not None
    try:
        if not path.stat().st_size:
            return
        for record in records_in(path, kind, fields, on_bad, on_position):
            text = record.document
            if not len(text) or (isinstance(text, str) and text.isspace()):
                counts.skip("empty")
            else:
                counts.documents += 1
                yield record
        if isinstance(path, StoreFile):
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
    weight_field: str | None = None
