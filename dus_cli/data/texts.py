"""The texts in a file, one at a time. The file's suffix says how it is read.

- JSON (`.jsonl`, `.ndjson`, `.json`): one object per line, one array of objects, or objects over
  several lines; the content decides. The text is in one of their fields.
- `.csv`, `.tsv`: each row is a document, with the text in a column named by the first row. RFC
  4180, but semicolons, tabs or bars also separate columns if the first row has the column with
  them.
- `.txt`: cut at blank lines into pieces of at most 64 KiB, each a document.
- `.parquet`, `.arrow`, `.feather`: each row is a document, with the text in one of the columns.
  Arrow files may be in the file or the stream format.

Memory grows with the longest document, not with the file. Text is UTF-8; a byte order mark at the
start of a file is dropped.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias

from dus_cli.common.bounds import BOUNDS
from dus_cli.data.containers import BUFFER, UnreadableError, check_is_text, import_library, opened
from dus_cli.data.remote import StoreFile
from dus_cli.errors import shown, shown_list

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Bytes. A longer line or item is not text: a file of zeros, or a binary file with a wrong suffix.
LONGEST_LINE = 64 << 20

# A piece of a .txt file, in bytes.
TEXT_PIECE = 64 << 10

# Bytes that are read to find the shape of a JSON file.
_HEAD = 64 << 10

_BOM = b"\xef\xbb\xbf"
# Arrow's types that can hold text; the type of a column without any value is "null".
_TEXT_TYPES = {
    "string",
    "large_string",
    "string_view",
    "binary",
    "large_binary",
    "binary_view",
    "null",
}
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_SPACE = re.compile(r"[ \t\r\n]*")

# Rows of a table that are turned into texts at a time.
_ROWS = 64


class BadRecordError(Exception):
    """A line, row or item holds no text. `reason` is the key of the count, `detail` a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


# Called with the unit ("line", "row" or "item"), its number from 1, and what is wrong with it.
OnBad = Callable[[str, int, BadRecordError], None]
# Called with how many bytes of the file were read.
OnPosition = Callable[[int], None]
# A text, or the ids of its tokens.
Document: TypeAlias = "str | npt.NDArray[np.uint32]"
# Makes a document from a field's value, or raises BadRecordError.
OfValue: TypeAlias = Callable[[object], Document]


@dataclass(frozen=True)
class Fields:
    """The fields or columns that are read.

    Attributes:
        text: the name of the field with the document.
        of_value: makes the document from the field's value; None if the value is the text.
        weight: the name of the field with the document's weight; None if there is none.
    """

    text: str
    of_value: OfValue | None = None
    weight: str | None = None


class Record(NamedTuple):
    """A document and its weight, which is 1 without a field for it."""

    document: Document
    weight: float = 1.0


def records_in(
    path: Path | StoreFile, kind: str, fields: Fields, on_bad: OnBad, on_position: OnPosition
) -> Iterator[Record]:
    """The documents in a file, including texts of white space only, with their weights.

    Args:
        path: the file.
        kind: its suffix without a compression's, such as ".jsonl".
        fields: the fields or columns that are read.
        on_bad: called for each line, row or item without a document or a weight.
        on_position: called with how many bytes of the file were read.

    Raises:
        UnreadableError: the file cannot be read, is truncated or lacks the column.
        OSError: the disk fails.
    """
    if kind in {".parquet", ".arrow", ".feather"}:
        read = _parquet_records if kind == ".parquet" else _arrow_records
        yield from read(path, fields, on_bad, on_position)
        return
    if fields.of_value is not None and kind not in {".jsonl", ".ndjson", ".json"}:
        raise UnreadableError(
            "it can hold only text, not messages or tokens; give .jsonl, .json, .parquet or .arrow"
        )
    if fields.weight is not None and kind == ".txt":
        raise UnreadableError(
            "a text file has no fields, so no weights (--weight-field); give .jsonl, .json, .csv, "
            ".parquet or .arrow"
        )
    head = head_of(path)
    check_is_text(head)
    with opened(path) as (raw, stream):
        records: Iterator[Record]
        if kind in {".csv", ".tsv"}:
            records = _csv_records(stream, "\t" if kind == ".tsv" else None, fields, on_bad)
        elif kind == ".txt":
            records = map(Record, _txt_pieces(stream, on_bad))
        elif (shape := _shape(head)) is _Shape.lines:
            records = _line_records(stream, fields, on_bad)
        else:
            records = _value_records(stream, shape, fields, on_bad)
        for record in records:
            on_position(raw.tell())
            yield record


def head_of(path: Path | StoreFile) -> bytes:
    """The first bytes of a file, decompressed."""
    with opened(path) as (_, stream):
        return stream.read(_HEAD)


def is_one_object_without(path: Path | StoreFile, text_field: str) -> bool:
    """Whether a JSON file is a single object without this field: it then describes data and holds
    none.

    Raises:
        OSError: the disk fails.
    """
    try:
        with opened(path) as (_, stream):
            first = list(islice(_Values(stream, is_array=False), 2))
    except UnreadableError:
        return False
    return len(first) == 1 and isinstance(first[0], dict) and text_field not in first[0]


# --- JSON -----------------------------------------------------------------------------------------


class _Shape(Enum):
    lines = "lines"
    array = "array"
    values = "values"


def _shape(head: bytes) -> _Shape:
    """The shape of a JSON file, by its first bytes: whether its first line is a value by itself."""
    text = head.removeprefix(_BOM).lstrip()
    line, newline, rest = text.partition(b"\n")
    try:
        first_line = line.decode(errors="replace").rstrip()
        json.loads(first_line, parse_int=float)
        goes_on = text.startswith(b"[") and not rest.strip()  # a whole array in one line
    except json.JSONDecodeError as error:
        goes_on = error.pos >= len(first_line) if newline else len(head) == _HEAD
    except (ValueError, RecursionError):
        goes_on = False
    if goes_on and text.startswith(b"["):
        return _Shape.array
    return _Shape.values if goes_on and newline and text.startswith(b"{") else _Shape.lines


def _line_records(stream: BinaryIO, fields: Fields, on_bad: OnBad) -> Iterator[Record]:
    number = 0
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        try:
            if len(line) > LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(BUFFER)
                raise BadRecordError("too_long", f"longer than {LONGEST_LINE >> 20} MiB")
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield _record_of(_value(line), fields)
        except BadRecordError as problem:
            on_bad("line", number, problem)


def _value(line: bytes) -> object:
    """The JSON value in a line."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from None
    except json.JSONDecodeError as error:
        raise BadRecordError(
            "malformed_json", f"not JSON ({error.msg} at column {error.colno})"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets too deep
        raise BadRecordError("malformed_json", "JSON beyond what Python reads") from None


def _value_records(
    stream: BinaryIO, shape: _Shape, fields: Fields, on_bad: OnBad
) -> Iterator[Record]:
    for number, value in enumerate(_Values(stream, is_array=shape is _Shape.array), 1):
        try:
            yield _record_of(value, fields)
        except BadRecordError as problem:
            on_bad("item", number, problem)


class _Values:
    """The items of a JSON array, or consecutive JSON values, decoded one at a time.

    Raises:
        UnreadableError: from the iteration, if a value cannot be read: its end is then unknown.
    """

    def __init__(self, stream: BinaryIO, *, is_array: bool) -> None:
        self._stream, self._is_array = stream, is_array
        # surrogateescape, so that a bad byte spoils one item only
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._text, self._at, self._is_end = "", 0, False
        self._lines_before = self._number = 0

    def __iter__(self) -> Iterator[object]:
        closing = "]" if self._is_array else ""
        if self._is_array:
            self._take("[")
        if self._next() != closing:
            yield self._value()
        while self._next() != closing:
            if self._is_array:
                self._take(",")
            yield self._value()
        if self._is_array:
            self._take("]")
            if self._next():
                raise self._error("the array has ended, but the file has not")

    def _more(self) -> None:
        """Read as much again as is left, so that a long item is scanned a few times only."""
        rest = self._text[self._at :]
        piece = self._stream.read(max(BUFFER, len(rest)))
        self._lines_before += self._text.count("\n", 0, self._at)
        self._text, self._at, self._is_end = rest + self._decode(piece, not piece), 0, not piece

    def _next(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text) or self._is_end:
                return self._text[self._at : self._at + 1]
            self._more()

    def _take(self, expected: str) -> None:
        if self._next() != expected:
            raise self._error(f"expected {expected}")
        self._at += 1

    def _value(self) -> object:
        self._number += 1
        self._next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._is_end:
                    raise self._error(error.msg, error.pos) from None
            except RecursionError:
                raise self._error("brackets too deep") from None
            else:
                if end < len(self._text) or self._is_end:  # else a number may be cut
                    self._at = end
                    return value
            if len(self._text) - self._at > LONGEST_LINE:
                raise self._error(f"longer than {LONGEST_LINE >> 20} MiB")
            self._more()

    def _error(self, why: str, at: int | None = None) -> UnreadableError:
        line = self._lines_before + self._text.count("\n", 0, self._at if at is None else at) + 1
        return UnreadableError(
            f"its JSON breaks off at item {self._number or 1}, line {line} ({why}); mend it, or "
            "copy it again"
        )


# Integers are read as floats: an int of too many digits is an error, which would end the file.
_DECODER = json.JSONDecoder(parse_int=float)


def _record_of(record: object, fields: Fields) -> Record:
    """The document in an object's field, with the weight in another."""
    if not isinstance(record, dict):
        raise BadRecordError(
            "missing_field", f"not an object with a field {shown(fields.text)} (--text-field)"
        )
    if fields.text not in record:
        names = shown_list(list(record)) or "none"
        raise BadRecordError(
            "missing_field",
            f"the object has no field {shown(fields.text)}; its fields are {names} (--text-field)",
        )
    value = record[fields.text]
    if fields.of_value is not None:
        document = fields.of_value(value)
    elif isinstance(value, str):
        document = encodable_text(value)
    else:
        raise BadRecordError(
            "not_a_string",
            f"the field {shown(fields.text)} is not a string: {shown(json.dumps(value))}",
        )
    if fields.weight is None:
        return Record(document)
    return Record(document, _checked_weight(record.get(fields.weight), fields.weight))


def _checked_weight(value: object, name: str) -> float:
    """The weight in the field `name`; `value` is None if the record lacks it.

    Raises:
        BadRecordError: it is not a number within the bounds.
    """
    if value is None:
        raise BadRecordError("no_weight", f"it has no weight in {shown(name)} (--weight-field)")
    if not (bounds := BOUNDS["document-weight"]).holds(value):
        raise BadRecordError(
            "bad_weight",
            f"its weight in {shown(name)} is {shown(repr(value))}, not {bounds} (--weight-field)",
        )
    assert isinstance(value, int | float)
    return value


def encodable_text(text: str) -> str:
    """The text itself, if UTF-8 can encode it.

    Raises:
        BadRecordError: it holds a byte or half a character that UTF-8 cannot encode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # of surrogateescape
            detail = f"not UTF-8 (byte 0x{code - 0xDC00:02x}); convert it with iconv"
        else:  # JSON can spell half of a character: "\ud83d"
            detail = f"{text[error.start]!a} is half of a character"
        raise BadRecordError("invalid_utf8", detail) from None
    return text


def _not_utf8(error: UnicodeDecodeError) -> BadRecordError:
    byte = error.object[error.start]
    return BadRecordError(
        "invalid_utf8", f"not UTF-8 (byte 0x{byte:02x} at {error.start}); convert it with iconv"
    )


# --- text -----------------------------------------------------------------------------------------


def _txt_pieces(stream: BinaryIO, on_bad: OnBad) -> Iterator[str]:
    """Pieces of a text file. Text appended to the file changes only the last piece."""
    rest = stream.read(TEXT_PIECE + len(_BOM)).removeprefix(_BOM)
    number = 1
    while rest:
        if len(rest) <= TEXT_PIECE:
            rest += stream.read(2 * TEXT_PIECE)
        piece = rest[: _piece_end(rest)]
        rest = rest[len(piece) :]
        try:
            yield piece.decode()
        except UnicodeDecodeError:
            yield "".join(_good_lines(piece, number, on_bad))
        number += piece.count(b"\n")


def _piece_end(text: bytes) -> int:
    """Where to cut: after the last blank line in the second half of the first 64 KiB; else after
    their last line; else between two characters.
    """
    if len(text) <= TEXT_PIECE:
        return len(text)
    blank_lines = list(_BLANK_LINE.finditer(text, TEXT_PIECE // 2, TEXT_PIECE))
    if blank_lines:
        return blank_lines[-1].end()
    line_end = text.rfind(b"\n", 0, TEXT_PIECE) + 1
    if line_end:
        return line_end
    end = TEXT_PIECE
    while end > TEXT_PIECE - 3 and text[end] & 0xC0 == 0x80:  # within a character
        end -= 1
    return end


def _good_lines(piece: bytes, first: int, on_bad: OnBad) -> Iterator[str]:
    for number, line in enumerate(io.BytesIO(piece), first):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            on_bad("line", number, _not_utf8(error))


# --- tables ---------------------------------------------------------------------------------------


def _csv_records(
    stream: BinaryIO, delimiter: str | None, fields: Fields, on_bad: OnBad
) -> Iterator[Record]:
    """The texts in a CSV file. A delimiter of None is found from the first row, which names the
    columns; the rows after it are counted from 1.
    """
    with io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="") as text:
        lines = _csv_lines(text)
        first = next(lines, "")
        csv.field_size_limit(LONGEST_LINE)
        rows = csv.reader(
            chain([first], lines),
            delimiter=delimiter or _delimiter(first, fields.text),
            strict=True,
        )
        column: int | None = None
        weight_column = width = number = 0
        for row in _csv_rows(rows):
            if column is None:
                if isinstance(row, csv.Error):
                    raise UnreadableError(f"its first row is not CSV ({row}); mend it")
                _check_columns(row, fields)
                column, width = row.index(fields.text), len(row)
                weight_column = row.index(fields.weight) if fields.weight is not None else 0
                continue
            number += 1
            try:
                if isinstance(row, csv.Error):
                    raise BadRecordError("malformed_csv", f"not CSV ({row})")
                if len(row) != width:
                    raise BadRecordError(
                        "malformed_csv", f"{len(row)} fields, but the first row names {width}"
                    )
                document = encodable_text(row[column])
                if fields.weight is None:
                    yield Record(document)
                else:
                    yield Record(document, _csv_weight(row[weight_column], fields.weight))
            except BadRecordError as problem:
                on_bad("row", number, problem)


def _csv_weight(text: str, name: str) -> float:
    try:
        value: object = float(text) if text.strip() else None
    except ValueError:
        value = text
    return _checked_weight(value, name)


def _csv_lines(text: io.TextIOWrapper) -> Iterator[str]:
    """Lines with their line ends, as csv.reader takes them."""
    number = 0
    while line := text.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise UnreadableError(
                f"its line {number} is longer than {LONGEST_LINE >> 20} MiB; mend it"
            )
        yield line


def _csv_rows(rows: Any) -> Iterator[list[str] | csv.Error]:
    """The rows of a csv.reader without blank lines. For a bad row of one line, its error."""
    while True:
        line = rows.line_num
        try:
            row = next(rows, None)
        except csv.Error as error:
            if rows.line_num > line + 1:  # an open quote: where the row ends is unknown
                raise UnreadableError(
                    f"its row on line {line + 1} is not CSV ({error}); mend it"
                ) from None
            yield error
            continue
        if row is None:
            return
        if row:
            yield row


def _delimiter(line: str, text_field: str) -> str:
    """The delimiter with which the first row has the text's column; a comma if none does."""
    for delimiter in ",;\t|":
        if text_field in next(csv.reader([line], delimiter=delimiter), []):
            return delimiter
    return ","


def _check_columns(names: list[str], fields: Fields) -> None:
    """Check that a table has the columns that are read."""
    for name, option in ((fields.text, "--text-field"), (fields.weight, "--weight-field")):
        if name is not None and name not in names:
            raise UnreadableError(
                f"it has no column {shown(name)}; its columns are {shown_list(names) or 'none'}; "
                f"choose with {option}, or leave the file out"
            )


def _columns(fields: Fields) -> list[str]:
    return [fields.text] if fields.weight is None else [fields.text, fields.weight]


def _parquet_records(
    path: Path | StoreFile, fields: Fields, on_bad: OnBad, on_position: OnPosition
) -> Iterator[Record]:
    arrow, parquet = (
        import_library("pyarrow", ".parquet"),
        import_library("pyarrow.parquet", ".parquet"),
    )
    _check_not_pointer(path)
    size, number = path.stat().st_size, 0
    try:
        # Read page by page: with pre_buffer a row group, which may be gigabytes, is read at once.
        source = path if isinstance(path, Path) else path.open()
        with parquet.ParquetFile(source, buffer_size=BUFFER, pre_buffer=False) as file:
            _check_columns(file.schema_arrow.names, fields)
            num_rows = file.metadata.num_rows
            for batch in file.iter_batches(
                batch_size=_ROWS, columns=_columns(fields), use_threads=False
            ):
                yield from _rows_of(arrow, batch, number, fields, on_bad)
                number += len(batch)
                on_position(size * number // max(num_rows, 1))
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(error) from error


def _arrow_records(
    path: Path | StoreFile, fields: Fields, on_bad: OnBad, on_position: OnPosition
) -> Iterator[Record]:
    """The texts in an Arrow file, in the file format (as Feather 2 is) or the stream format; the
    content decides.
    """
    arrow, ipc = import_library("pyarrow", path.suffix), import_library("pyarrow.ipc", path.suffix)
    head = _check_not_pointer(path)
    if head.startswith(b"FEA1"):
        raise UnreadableError(
            "it is in Feather's first version; convert it with pyarrow.feather.write_feather"
        )
    number = 0
    try:
        local = isinstance(path, Path)
        with arrow.memory_map(str(path)) if local else arrow.PythonFile(path.open()) as source:
            is_file = head.startswith(b"ARROW1")
            with ipc.open_file(source) if is_file else ipc.open_stream(source) as reader:
                names = reader.schema.names
                _check_columns(names, fields)
                indices = [names.index(name) for name in _columns(fields)]
                for batch in _batches(reader) if is_file else reader:
                    columns = batch.select(indices)
                    columns.validate()
                    for start in range(0, len(columns), _ROWS):
                        rows = columns.slice(start, _ROWS)
                        yield from _rows_of(arrow, rows, number + start, fields, on_bad)
                    number += len(batch)
                    on_position(source.tell())
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> Exception:
    """What to raise for an error of pyarrow, which calls damaged content an OSError, but without a
    number.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return UnreadableError(f"{shown(error).rstrip('. ')}; copy or download it again")


def _batches(reader: Any) -> Iterator[Any]:
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _check_not_pointer(path: Path | StoreFile) -> bytes:
    """Check that a file is not a Git LFS pointer; return its first bytes."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version "):
        check_is_text(head)
    return head


def _rows_of(
    arrow: Any, batch: Any, number: int, fields: Fields, on_bad: OnBad
) -> Iterator[Record]:
    """The documents in a batch of rows, `number` rows after the first one. Texts are decoded one by
    one, because in a batch one bad byte would fail them all.
    """
    column = _column(batch, fields.text)
    if fields.of_value is None:
        column = _as_bytes(arrow, column)
    column.validate(full=True)  # in a damaged file its offsets may point outside of memory
    weights = None if fields.weight is None else _weights(arrow, batch, fields.weight)
    for row, value in enumerate(column.to_pylist()):
        try:
            if fields.of_value is not None:
                document = fields.of_value(value)
            elif value is None:
                raise BadRecordError("missing_field", f"the column {shown(fields.text)} is empty")
            else:
                document = value.decode()
            if weights is None or fields.weight is None:
                yield Record(document)
            else:
                yield Record(document, _checked_weight(weights[row], fields.weight))
        except UnicodeDecodeError as error:
            on_bad("row", number + row + 1, _not_utf8(error))
        except BadRecordError as problem:
            on_bad("row", number + row + 1, problem)


def _column(batch: Any, name: str) -> Any:
    """The first column of this name."""
    return batch.column(batch.schema.names.index(name))


def _as_bytes(arrow: Any, column: Any) -> Any:
    """A column of text as one of bytes."""
    if arrow.types.is_dictionary(column.type):
        column.validate(full=True)
        column = column.dictionary_decode()
    kind = str(column.type)
    if kind not in _TEXT_TYPES:
        raise UnreadableError(
            f"the column holds {shown(kind)}, not text; choose another with --text-field"
        )
    is_text = kind.endswith(("string", "string_view"))
    return column.view(kind.replace("string", "binary")) if is_text else column


def _weights(arrow: Any, batch: Any, name: str) -> list[float | None]:
    """The numbers in a column of weights; None where a row has none."""
    column = _column(batch, name)
    kind, types = column.type, arrow.types
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    if not (is_number or types.is_null(kind)):
        raise UnreadableError(
            f"its column {shown(name)} holds {shown(kind)}, not numbers; choose another with "
            "--weight-field"
        )
    column.validate(full=True)
    numbers: list[float | None] = column.cast(arrow.float64()).to_pylist()
    return numbers
