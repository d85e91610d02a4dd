"""Sources of text: files, folders, patterns and URLs, with their weights."""

from __future__ import annotations

import glob
import os
import re
import shutil
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dus_cli.common.bounds import parse_number
from dus_cli.common.files import writing
from dus_cli.common.reference import user_path
from dus_cli.common.reports import shown_address
from dus_cli.common.storage import sync
from dus_cli.common.units import counted
from dus_cli.data.containers import BUFFER, COMPRESSIONS
from dus_cli.data.remote import Say, StoreFile, remote_files
from dus_cli.data.texts import is_one_object_without
from dus_cli.errors import DataError, UsageError, shown, shown_list

# The suffixes of files that are read, in lower or upper case.
_MAY_BE_COMPRESSED = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_JSON = (".jsonl", ".ndjson", ".json")
KINDS = (*_MAY_BE_COMPRESSED, ".parquet", ".arrow", ".feather")

# Files that lie beside data and are not data: metadata of `datasets`, checksums, licences.
_BESIDE_DATA = re.compile(
    r"dataset_infos?\.json|dataset_dict\.json|state\.json|(readme|licen[cs]e|notice|copying|changelog)\b.*|_SUCCESS"
    r"|.*(sums|\.sha\d+|\.md5|\.crc|\.py)",
    re.IGNORECASE,
)

_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")

# Of the files that were not read, this many names are kept.
_MOST_NAMES = 20


@dataclass(frozen=True)
class Unread:
    """Files of a folder or pattern that look like data and are not read: their number, and the
    first names.
    """

    count: int = 0
    names: tuple[str, ...] = ()

    def __add__(self, other: Unread) -> Unread:
        return Unread(self.count + other.count, (*self.names, *other.names)[:_MOST_NAMES])

    def __str__(self) -> str:
        """Such as "5 files: a.xml, b.xml, c.xml and 2 more"."""
        more = f" and {self.count - 3:,} more" if self.count > 3 else ""
        return f"{counted(self.count, 'file')}: {shown_list(self.names[:3])}{more}"

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "names": list(self.names)}


@dataclass(frozen=True)
class Source:
    """One argument of `--data` or `--eval-data`.

    Attributes:
        text: the argument as typed.
        paths: its files in reading order.
        weight: its weight in the mixture; None if it has none.
        unread: files that it matches and that are not read.
        name: the held-out set that it belongs to; "" if that has no name.
    """

    text: str
    paths: tuple[Path | StoreFile, ...]
    weight: float | None = None
    unread: Unread = field(default_factory=Unread)
    name: str = ""


@dataclass
class _Files:
    """The files that an argument matches: those to read, and those that are not read."""

    paths: list[Path | StoreFile] = field(default_factory=list)
    unread: dict[Path | StoreFile | str, str] = field(default_factory=dict)

    @property
    def unread_files(self) -> Unread:
        return Unread(len(self.unread), tuple(self.unread.values())[:_MOST_NAMES])


def kind_of(name: str) -> str | None:
    """The suffix that says how a file is read, without that of its compression; None if the file is
    not read.

    >>> kind_of("part-0.JSONL.gz"), kind_of("a.parquet"), kind_of("a.parquet.gz")
    ('.jsonl', '.parquet', None)
    """
    name = name.lower()
    stem = name.removesuffix(Path(name).suffix) if name.endswith(COMPRESSIONS) else name
    suffix = Path(stem).suffix
    return suffix if suffix in (KINDS if stem == name else _MAY_BE_COMPRESSED) else None


def parse_sources(
    arguments: Sequence[str],
    spool: Path,
    text_field: str = "text",
    *,
    say: Say = lambda _: None,
) -> tuple[Source, ...]:
    """The files of each FILE, FOLDER, 'PATTERN', URL or `-`, with or without `:WEIGHT`.

    `-` is standard input, JSONL; it is copied to stdin.jsonl in the folder `spool`, because data is
    read more than once. A colon may be part of an existing file's name. In folders and patterns, a
    .json file of one object without `text_field` is taken for a description, not for data. `say` is
    called with a line for a person if a store does not answer and is tried again.

    Raises:
        DataError: there is no file, no data or no permission; standard input is empty; some
            arguments have weights and others none; a store does not answer.
        UsageError: a weight is not a positive number.
        MissingExtraError: a store's client is not installed.
        OutputError: standard input could not be stored.
    """
    sources = []
    for text in arguments:
        files, weight = _find(_without_weight(text), spool, text_field, say), None
        if _without_weight(text) != text:
            weight = _weight(text, text.rpartition(":")[2])
        elif not files.paths:
            head, colon, tail = text.rpartition(":")
            files = _find(head, spool, text_field, say) if colon else _Files()
            if not files.paths:
                raise DataError(_no_such_file(text))
            weight = _weight(text, tail)
        sources.append(Source(text, tuple(dict.fromkeys(files.paths)), weight, files.unread_files))
    without = [source.text for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise DataError(
            f"{shown_address(without[0])} has no weight but others have; give all of them a "
            "weight, or none"
        )
    return tuple(sources)


def parse_heldout(
    arguments: Sequence[str],
    spool: Path,
    text_field: str = "text",
    *,
    say: Say = lambda _: None,
) -> tuple[Source, ...]:
    """The files of each FILE or NAME=FILE. Files of the same name are one held-out set; files
    without a name are one set.

    Raises:
        UsageError: some have names and others none.
        DataError, OutputError: as `parse_sources`.
    """
    pairs = [_named(text) for text in arguments]
    without = [file for name, file in pairs if not name]
    if without and len(without) < len(pairs):
        raise UsageError(
            f"--eval-data {shown_address(without[0])} has no name but others have; give all of "
            "them a name (NAME=FILE), or none"
        )
    sources = parse_sources([file for _, file in pairs], spool, text_field, say=say)
    return tuple(
        replace(source, name=name) for (name, _), source in zip(pairs, sources, strict=True)
    )


def _named(text: str) -> tuple[str, str]:
    """Split NAME=FILE; the name is "" if there is none, or if a file has the whole text as name.

    >>> _named("code=b.jsonl"), _named("b.jsonl"), _named("https://host/b.jsonl?raw=1")
    (('code', 'b.jsonl'), ('', 'b.jsonl'), ('', 'https://host/b.jsonl?raw=1'))
    """
    match = re.fullmatch(r"(\w[\w.-]{0,63})=(.+)", text, re.ASCII | re.DOTALL)
    if match is None or os.path.lexists(text):
        return "", text
    return match[1], match[2]


def _no_such_file(text: str) -> str:
    """Say that an argument matches no file; it may be meant as a data set of the Hub."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text, re.ASCII) and kind_of(text) is None:
        return (
            f"{shown(text)} is not a file or folder here; a data set of the Hub is "
            f"hf://datasets/{shown(text)}"
        )
    return f"{shown(text)} is not a file, a folder or a pattern that matches one; check the path"


def _without_weight(text: str) -> str:
    """A URL without its weight. Other text stays, because a colon may be part of a file's name.

    >>> urls = ("s3://bucket/a.jsonl:0.7", "https://host:80/a.txt", "a:1")
    >>> [_without_weight(text) for text in urls]
    ['s3://bucket/a.jsonl', 'https://host:80/a.txt', 'a:1']
    """
    match = re.fullmatch(r"(\w[\w+.-]*://.+/.+):[\d.e+-]+", text, re.ASCII)
    return text if match is None else match[1]


def _weight(argument: str, text: str) -> float:
    try:
        weight: float = parse_number("weight", text)
    except ValueError as error:
        raise UsageError(f"{shown_address(argument)}: the weight {error}; write FILE:0.7") from None
    return weight


def _find(text: str, spool: Path, text_field: str, say: Say) -> _Files:
    """The files that `text` matches, absolute and in a fixed order; empty if nothing has this
    name.
    """
    if text == "-":
        return _Files([_spooled(spool)])
    if re.match(r"\w[\w+.-]*://", text, re.ASCII):
        return _find_remote(text, text_field, say)
    text = str(user_path(text)) if text.startswith("~") and not os.path.lexists(text) else text
    if os.path.lexists(text) and not Path(text).is_dir():
        path = Path(text).absolute()
        _check_file(path)
        return _Files([path], {} if path.stat().st_size else {path: f"{path.name} (empty)"})
    names = [text] if os.path.lexists(text) else []
    if text and not names:
        names = sorted(glob.glob(text, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
    files = _Files()
    for name in names:
        path = Path(name).absolute()
        for file in _files_below(path) if path.is_dir() else [path]:
            _add(files, file, text_field)
    if names:
        _check_there_is_data(text, files)
    return files


def _find_remote(text: str, text_field: str, say: Say) -> _Files:
    """The files that a URL matches."""
    listed, others = remote_files(text, say)
    files = _Files()
    if len(listed) == 1 and text.endswith(listed[0].name):
        _check_kind(listed[0])
    for file in listed:
        _add(files, file, text_field)
    for name in others:
        if kind_of(name) is not None and not _BESIDE_DATA.fullmatch(Path(name).name):
            files.unread[name] = name
    _check_there_is_data(text, files)
    return files


def _check_there_is_data(text: str, files: _Files) -> None:
    if files.paths:
        return
    there = f" but {files.unread_files}" if files.unread else ""
    kinds = " ".join(KINDS)
    raise DataError(
        f"{shown_address(text)} holds no data{there}; --data reads {kinds} and most of them "
        "compressed"
    )


def _add(files: _Files, path: Path | StoreFile, text_field: str) -> None:
    """Add a file of a folder, pattern or store to those to read, or to those that are not read."""
    kind = kind_of(path.name)
    if kind is None:
        if not _BESIDE_DATA.fullmatch(path.name):
            files.unread[path] = path.name
        return
    if _BESIDE_DATA.fullmatch(path.name):
        return
    if isinstance(path, Path):
        _check_file(path)
    try:
        # looking into a remote file takes a request, so only .json files are looked into
        look = kind in _JSON if isinstance(path, Path) else kind == ".json"
        if look and is_one_object_without(path, text_field):
            files.unread[path] = f"{path.name} (one object without {shown(text_field)})"
            return
        if not path.stat().st_size:
            files.unread[path] = f"{path.name} (empty)"
        files.paths.append(path)
    except OSError as error:
        raise DataError(
            f"cannot read {shown(path)}: {error.strerror}; check the disk or the network"
        ) from error


def _files_below(folder: Path) -> list[Path]:
    """All files below a folder, without hidden ones. Symbolic links are followed, each folder is
    visited once.
    """
    paths, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(paths)


def _check_kind(path: Path | StoreFile) -> None:
    if path.name.lower().endswith(_ARCHIVES):
        raise DataError(f"{shown(path)} is an archive; unpack it, and give its folder")
    if kind_of(path.name) is None:
        compressed = f"all but the last three also {' '.join(COMPRESSIONS)}"
        raise DataError(
            f"{shown(path)} has no suffix that --data reads; rename it by its content: "
            f"{' '.join(KINDS)} ({compressed})"
        )


def _check_file(path: Path) -> None:
    _check_kind(path)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"cannot read {shown(path)}: {error.strerror}; check the path") from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{shown(path)} is not a regular file; pipe it in with --data -")
    if not os.access(path, os.R_OK):
        raise DataError(f"cannot read {shown(path)}: Permission denied; ask its owner (chmod +r)")


def _spooled(spool: Path) -> Path:
    """Standard input, copied to a file that gets its name when it is complete."""
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError(
            "--data - reads standard input, which is a terminal; pipe the data in: zcat … | dus "
            "heal …"
        )
    path, partial = spool / "stdin.jsonl", spool / ".stdin.jsonl.partial"
    try:
        with writing(path.name):
            spool.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file, BUFFER)
                file.flush()
                sync(file.fileno())
                if not file.tell():  # a second `-` must not overwrite what the first one read
                    raise DataError(
                        "standard input is empty, or was read already; pipe data in, and give - "
                        "once"
                    )
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path.absolute()
