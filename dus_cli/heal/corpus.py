"""Training text: which files there are, and the documents in them, one at a time.

- `.jsonl`: an object a line, the text in one of its fields; blank lines are nothing.
- `.parquet`: a row is a document, the text in one of its columns.
- `.txt`: cut at blank lines into pieces of at most 64 KiB, each a document.
- the first and the last also as `.gz` and `.zst`.

Memory is the longest document, whatever the size of a file. Text is UTF-8; a byte order mark at the
start of a file is dropped.
"""

from __future__ import annotations

import glob
import gzip
import importlib
import io
import json
import math
import os
import re
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

from dus_cli.errors import DusError, shown, shown_list
from dus_cli.heal.options import parse_share
from dus_cli.storage import sync
from dus_cli.writing.outputs import writing

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst", ".parquet")

# A longer line is garbage: what a disk full of zeros or a binary file by a wrong name looks like.
LONGEST_LINE = 64 << 20

# A piece of a .txt file, in bytes.
TEXT_PIECE = 64 << 10

# Up to 1,000-fold where text is all alike, so that a hostile file takes megabytes and not the machine.
_COMPRESSED_PIECE = 16 << 10

_BUFFER = 1 << 20
_BOM = b"\xef\xbb\xbf"
# Arrow's names of what can hold text; a column without a value is "null".
_TEXT_TYPES = {"string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null"}
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


class DataError(DusError):
    """Training data that cannot be found, read or used."""


class BadLine(str, Enum):
    """What to do with a line or row that holds no text: stop there, or count it and go on."""

    error = "error"
    skip = "skip"


@dataclass(frozen=True)
class Source:
    """One `--data` argument as typed, its files in reading order, and its weight in the mixture if it has one."""

    text: str
    paths: tuple[Path, ...]
    weight: float | None = None


@dataclass
class Tally:
    """What was read: documents, how many lines were left out for which reason, bytes of the current file."""

    documents: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    position: int = 0

    def skip(self, reason: str, count: int = 1) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + count


# --- which files -----------------------------------------------------------------------------------


def parse_holdout(text: str) -> float:
    """The share of documents to hold out, 0…0.5.

    >>> parse_holdout("0.5%"), parse_holdout("0.005"), parse_holdout("0")
    (0.005, 0.005, 0.0)

    Raises:
        DataError: not a share, or more than half.
    """
    try:
        share = parse_share(text)
    except ValueError:
        share = 1.0
    if share > 0.5:
        raise DataError(f"{shown(text)} is no share of documents to hold out; give 0% to 50%, such as 0.5% or 0.005")
    return share


def parse_sources(arguments: Sequence[str], spool: Path) -> tuple[Source, ...]:
    """The files behind FILE, FOLDER, 'PATTERN' or `-`, each with `:WEIGHT` behind it or not.

    `-` is standard input, JSONL; it is copied to stdin.jsonl in the folder `spool`, because data is read
    more than once. A colon that is part of a file's name is no weight.

    Raises:
        DataError: nothing there, nothing that is data, no permission, standard input empty; weights on some
            arguments only, or not positive.
        OutputError: standard input could not be stored.
    """
    sources = []
    for text in arguments:
        paths, weight = _find(text, spool), None
        if not paths:
            head, colon, tail = text.rpartition(":")
            paths = _find(head, spool) if colon else []
            if not paths:
                raise DataError(f"{shown(text)} is no file or folder, and no pattern that fits one; check the path")
            weight = _weight(text, tail)
        sources.append(Source(text, tuple(dict.fromkeys(paths)), weight))
    without = [source.text for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise DataError(f"{shown(without[0])} has no weight but others have; give all of them a weight, or none")
    return tuple(sources)


def _weight(argument: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (weight > 0 and math.isfinite(weight)):
        raise DataError(f"{shown(argument)}: the weight {shown(text)} is not a positive number; write FILE:0.7")
    return weight


def _find(text: str, spool: Path) -> list[Path]:
    """Files of known kinds, absolute and in a fixed order. None where there is nothing by this name."""
    if text == "-":
        return [_spooled(spool)]
    if os.path.lexists(text):
        found = [text]
    elif text:
        found = sorted(glob.glob(text, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
    else:
        found = []
    is_pattern = found != [text]
    paths: list[Path] = []
    for name in found:
        path = Path(name).absolute()
        if path.is_dir():
            paths += _files_below(path)
        elif not is_pattern or name.endswith(SUFFIXES):
            _check_file(path)
            paths.append(path)
    if found and not paths:
        raise DataError(f"{shown(text)} holds none of {', '.join(SUFFIXES)}; choose the files yourself")
    return paths


def _files_below(folder: Path) -> list[Path]:
    """All data files below a folder. Linked folders are followed, each folder once; hidden names are not looked at."""
    paths, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(root, name) for name in names if name.endswith(SUFFIXES) and not name.startswith(".")]
    for path in paths:
        _check_file(path)
    return sorted(paths)


def _check_file(path: Path) -> None:
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{shown(path)} is of no known kind; rename it to what it is: {', '.join(SUFFIXES)}")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"cannot read {shown(path)}: {error.strerror}; check the path") from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{shown(path)} is not a regular file; pipe it in with --data -")
    if not os.access(path, os.R_OK):
        raise DataError(f"cannot read {shown(path)}: Permission denied; ask its owner (chmod +r)")


def _spooled(spool: Path) -> Path:
    """Standard input as a file. Under its name once it is whole."""
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError("--data - reads standard input, which is a terminal; pipe the data in: zcat … | dus heal …")
    path, partial = spool / "stdin.jsonl", spool / ".stdin.jsonl.partial"
    try:
        with writing(path.name):
            spool.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file, _BUFFER)
                file.flush()
                sync(file.fileno())
                if not file.tell():  # also where it was read before: that must not be lost
                    raise DataError("standard input is empty, or was read already; pipe data in, and give - once")
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path.absolute()


# --- the documents in a file -------------------------------------------------------------------------


class _UnusableError(Exception):
    """A line without a text: the reason as it is counted, and in words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


# Told the number of a line or row, and what is wrong with it.
_OnBad = Callable[[int, _UnusableError], None]


def documents(path: Path, text_field: str, on_bad_line: BadLine, tally: Tally) -> Iterator[str]:
    """The texts in a file, in order. Texts of nothing but white space are counted as `empty` and left out.

    Reasons in `tally.skipped`: malformed_json, missing_field, not_a_string, invalid_utf8, too_long, empty.

    Raises:
        DataError: the file cannot be read, ends too early, lacks the column; or with `error`, the first bad
            line, by its number from 1.
    """

    def on_bad(number: int, problem: _UnusableError) -> None:
        if on_bad_line is BadLine.error:
            unit = "row" if path.suffix == ".parquet" else "line"
            raise DataError(
                f"{shown(path)}, {unit} {number}: {problem.detail}; mend it, or leave such {unit}s out with"
                " --on-bad-line skip"
            )
        tally.skip(problem.reason)

    kind = path.name.removesuffix(".gz").removesuffix(".zst")
    with ExitStack() as closing:
        try:
            if kind.endswith(".parquet"):
                texts = _parquet_texts(path, text_field, on_bad, tally, closing)
            else:
                raw, stream = closing.enter_context(_opened(path))
                if kind.endswith(".jsonl"):
                    texts = _jsonl_texts(stream, text_field, on_bad)
                else:
                    texts = _txt_pieces(stream, on_bad)
                texts = _watched(texts, raw, tally)
            for text in texts:
                if not text or text.isspace():
                    tally.skip("empty")
                else:
                    tally.documents += 1
                    yield text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"cannot read {shown(path)}: {shown(error)}; copy or download it again") from error
        except OSError as error:
            reason = error.strerror or shown(error)
            raise DataError(f"cannot read {shown(path)}: {reason}; check the disk or the network mount") from error


def _watched(texts: Iterator[str], raw: BinaryIO, tally: Tally) -> Iterator[str]:
    for text in texts:
        tally.position = raw.tell()
        yield text


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file as it lies on the disk, and what is in it."""
    with open(path, "rb", buffering=_BUFFER) as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as inner, io.BufferedReader(inner, _BUFFER) as stream:
                yield raw, stream
        elif path.suffix == ".zst":
            with io.BufferedReader(_ZstdFile(raw), _BUFFER) as stream:
                yield raw, stream
        else:
            yield raw, raw


class _ZstdFile(io.RawIOBase):
    """Zstandard frames, decompressed. zstandard's own stream_reader takes a file cut short for one that ends there."""

    def __init__(self, raw: BinaryIO) -> None:
        self._zstd = _import("zstandard", ".zst")
        self._raw = raw
        # Windows up to 2 GiB, as `zstd --long=31` writes them.
        self._decompressor = self._zstd.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._raw.read(_COMPRESSED_PIECE)
                if not self._input:
                    if self._frame is not None:
                        raise EOFError("Compressed file ended before the end of a frame")
                    return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._zstd.ZstdError as error:
                raise EOFError(str(error)) from error
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(target), len(self._output))
        target[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


def _import(module: str, suffix: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"{suffix} files need {package}; install it: pip install {package}") from error


def _jsonl_texts(stream: BinaryIO, text_field: str, on_bad: _OnBad) -> Iterator[str]:
    number = 0
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        try:
            if len(line) > LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(_BUFFER)
                raise _UnusableError("too_long", f"longer than {LONGEST_LINE >> 20} MiB")
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield _text_in(line, text_field)
        except _UnusableError as problem:
            on_bad(number, problem)


def _text_in(line: bytes, text_field: str) -> str:
    """The text in a line of JSON."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from None
    except json.JSONDecodeError as error:
        raise _UnusableError("malformed_json", f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets a thousand deep
        raise _UnusableError("malformed_json", "no JSON that can be read") from None
    if not isinstance(record, dict) or text_field not in record:
        holds = f"an object with {shown_list(list(record)) or 'nothing'}" if isinstance(record, dict) else "no object"
        raise _UnusableError("missing_field", f"no field {shown(text_field)} but {holds} (--text-field)")
    text = record[text_field]
    if not isinstance(text, str):
        raise _UnusableError(
            "not_a_string", f"the field {shown(text_field)} is no string but {shown(json.dumps(text))}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can say half of a character: "\ud83d"
        raise _UnusableError("invalid_utf8", f"{text[error.start]!a} is half of a character") from None
    return text


def _not_utf8(error: UnicodeDecodeError) -> _UnusableError:
    byte = error.object[error.start]
    return _UnusableError("invalid_utf8", f"not UTF-8 (byte 0x{byte:02x} at {error.start}); convert it with iconv")


def _txt_pieces(stream: BinaryIO, on_bad: _OnBad) -> Iterator[str]:
    """Pieces that depend on what is in them alone, so that text added behind changes but the last."""
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
    """Behind the last blank line of the first 64 KiB; without one in their second half a line's end; else anywhere."""
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


def _good_lines(piece: bytes, first: int, on_bad: _OnBad) -> Iterator[str]:
    for number, line in enumerate(io.BytesIO(piece), first):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            on_bad(number, _not_utf8(error))


def _parquet_texts(path: Path, text_field: str, on_bad: _OnBad, tally: Tally, closing: ExitStack) -> Iterator[str]:
    arrow, parquet = _import("pyarrow", ".parquet"), _import("pyarrow.parquet", ".parquet")
    size, number = path.stat().st_size, 0
    try:
        # Pages as they come: otherwise a row group, which may be gigabytes, is read at once.
        file = closing.enter_context(parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False))
        if text_field not in file.schema_arrow.names:
            names = shown_list(file.schema_arrow.names)
            raise DataError(f"{shown(path)} has no column {shown(text_field)} but {names}; choose with --text-field")
        num_rows = file.metadata.num_rows
        for batch in file.iter_batches(batch_size=64, columns=[text_field], use_threads=False):
            for value in _as_bytes(arrow, batch.column(0), path):
                number += 1
                try:
                    if value is None:
                        raise _UnusableError("missing_field", f"nothing in the column {shown(text_field)}")
                    yield value.decode()
                except UnicodeDecodeError as error:
                    on_bad(number, _not_utf8(error))
                except _UnusableError as problem:
                    on_bad(number, problem)
            tally.position = size * number // max(num_rows, 1)
    except arrow.ArrowException as error:
        raise DataError(f"cannot read {shown(path)}: {shown(error)}; copy or download it again") from error


def _as_bytes(arrow: Any, column: Any, path: Path) -> list[bytes | None]:
    """Undecoded, because one bad character would fail a whole batch."""
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if str(column.type) not in _TEXT_TYPES:
        raise DataError(
            f"{shown(path)}: the column is no text but {shown(column.type)}; choose another with --text-field"
        )
    values: list[bytes | None] = column.cast(arrow.large_binary()).to_pylist()
    return values
