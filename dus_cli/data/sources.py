"""Sources of text: files, folders and globs with their weights."""

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
from dus_cli.common.storage import sync
from dus_cli.data.containers import BUFFER, COMPRESSIONS
from dus_cli.data.remote import RemoteFile, remote_files
from dus_cli.data.texts import is_one_object_without
from dus_cli.errors import DataError, UsageError, shown, shown_list

# The suffixes of files that are read. Upper case is the same.
_MAY_BE_COMPRESSED = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_JSON = (".jsonl", ".ndjson", ".json")
KINDS = (*_MAY_BE_COMPRESSED, ".parquet", ".arrow", ".feather")

# Beside data, and no data itself: what `datasets` and clones of the Hub hold, and what describes
# them.
_BESIDE_DATA = re.compile(
    r"dataset_infos?\.json|dataset_dict\.json|state\.json|(readme|licen[cs]e|notice|copying|changelog)\b.*|_SUCCESS"
    r"|.*(sums|\.sha\d+|\.md5|\.crc|\.py)",
    re.IGNORECASE,
)

_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")

# Names that are kept of files that were not read.
_MOST_NAMES = 20


@dataclass(frozen=True)
class Unread:
    """Files of a folder or pattern that look like data and are not read: how many, and the names
    of the first.
    """

    count: int = 0
    names: tuple[str, ...] = ()

    def __add__(self, other: Unread) -> Unread:
        return Unread(self.count + other.count, (*self.names, *other.names)[:_MOST_NAMES])

    def __str__(self) -> str:
        """What a summary says of them."""
        more = f" and {self.count - 3:,} more" if self.count > 3 else ""
        return f"{self.count:,} file{'s' * (self.count != 1)}: {shown_list(self.names[:3])}{more}"

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "names": list(self.names)}


@dataclass(frozen=True)
class Source:
    """One `--data` argument as typed, its files in reading order, and its weight in the mixture if
    it has one.

    `unread` are those that it finds and that are not read. `name` is of the held-out set that it is
    of, "" where that has none.
    """

    text: str
    paths: tuple[Path | RemoteFile, ...]
    weight: float | None = None
    unread: Unread = field(default_factory=Unread)
    name: str = ""


@dataclass
class _Found:
    """What a file, folder or pattern stands for."""

    paths: list[Path | RemoteFile] = field(default_factory=list)
    unread: dict[Path | RemoteFile | str, str] = field(default_factory=dict)

    @property
    def said_unread(self) -> Unread:
        return Unread(len(self.unread), tuple(self.unread.values())[:_MOST_NAMES])


def kind_of(name: str) -> str | None:
    """The suffix that tells how a file is read, without that of its compression; None where it is
    not read.

    >>> kind_of("part-0.JSONL.gz"), kind_of("a.parquet"), kind_of("a.parquet.gz")
    ('.jsonl', '.parquet', None)
    """
    name = name.lower()
    stem = name.removesuffix(Path(name).suffix) if name.endswith(COMPRESSIONS) else name
    suffix = Path(stem).suffix
    return suffix if suffix in (KINDS if stem == name else _MAY_BE_COMPRESSED) else None


def parse_sources(
    arguments: Sequence[str], spool: Path, text_field: str = "text"
) -> tuple[Source, ...]:
    """The files behind FILE, FOLDER, 'PATTERN', URL or `-`, each with `:WEIGHT` behind it or not.

    `-` is standard input, JSONL; it is copied to stdin.jsonl in the folder `spool`, because data is
    read more than once. A colon that is part of a file's name is no weight. Of folders and
    patterns, a .json of one object without `text_field` is no data but describes them.

    Raises:
        DataError: nothing there, nothing that is data, no permission, standard input empty; weights
            on some arguments only, or not positive; a store that does not answer.
        MissingExtraError: a store's client is not installed.
        OutputError: standard input could not be stored.
    """
    sources = []
    for text in arguments:
        found, weight = _find(_unweighed(text), spool, text_field), None
        if _unweighed(text) != text:
            weight = _weight(text, text.rpartition(":")[2])
        elif not found.paths:
            head, colon, tail = text.rpartition(":")
            found = _find(head, spool, text_field) if colon else _Found()
            if not found.paths:
                raise DataError(_nothing_there(text))
            weight = _weight(text, tail)
        sources.append(Source(text, tuple(dict.fromkeys(found.paths)), weight, found.said_unread))
    without = [source.text for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise DataError(
            f"{shown(without[0])} has no weight but others have; give all of them a weight, or none"
        )
    return tuple(sources)


def parse_heldout(
    arguments: Sequence[str], spool: Path, text_field: str = "text"
) -> tuple[Source, ...]:
    """The files behind FILE or NAME=FILE; of the same name they are one set, and without a name all
    are.

    Raises:
        UsageError: some have names and others none.
        DataError, OutputError: as `parse_sources`.
    """
    pairs = [_named(text) for text in arguments]
    without = [file for name, file in pairs if not name]
    if without and len(without) < len(pairs):
        raise UsageError(
            f"--eval-data {shown(without[0])} has no name but others have; give all of them a name "
            "(NAME=FILE), or none"
        )
    sources = parse_sources([file for _, file in pairs], spool, text_field)
    return tuple(
        replace(source, name=name) for (name, _), source in zip(pairs, sources, strict=True)
    )


def _named(text: str) -> tuple[str, str]:
    """A held-out set's name, and what is behind it; "" where a file is called so.

    >>> _named("code=b.jsonl"), _named("b.jsonl"), _named("https://host/b.jsonl?raw=1")
    (('code', 'b.jsonl'), ('', 'b.jsonl'), ('', 'https://host/b.jsonl?raw=1'))
    """
    match = re.fullmatch(r"(\w[\w.-]{0,63})=(.+)", text, re.ASCII | re.DOTALL)
    if match is None or os.path.lexists(text):
        return "", text
    return match[1], match[2]


def _nothing_there(text: str) -> str:
    """What to say of an argument that is no file: it may be a data set of the Hub."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text, re.ASCII) and kind_of(text) is None:
        return (
            f"{shown(text)} is no file or folder here; a data set of the Hub is "
            f"hf://datasets/{shown(text)}"
        )
    return f"{shown(text)} is no file or folder, and no pattern that fits one; check the path"


def _unweighed(text: str) -> str:
    """A URL without the weight behind it; any other text as it is, for a colon may be a name's.

    >>> [_unweighed(text) for text in ("s3://bucket/a.jsonl:0.7", "https://host:80/a.txt", "a:1")]
    ['s3://bucket/a.jsonl', 'https://host:80/a.txt', 'a:1']
    """
    match = re.fullmatch(r"(\w[\w+.-]*://.+/.+):[\d.e+-]+", text, re.ASCII)
    return text if match is None else match[1]


def _weight(argument: str, text: str) -> float:
    try:
        weight: float = parse_number("weight", text)
    except ValueError as error:
        raise UsageError(f"{shown(argument)}: the weight {error}; write FILE:0.7") from None
    return weight


def _find(text: str, spool: Path, text_field: str) -> _Found:
    """Files of known kinds, absolute and in a fixed order. None where there is nothing by this
    name.
    """
    if text == "-":
        return _Found([_spooled(spool)])
    if re.match(r"\w[\w+.-]*://", text, re.ASCII):
        return _find_remote(text, text_field)
    text = str(user_path(text)) if text.startswith("~") and not os.path.lexists(text) else text
    if os.path.lexists(text) and not Path(text).is_dir():
        path = Path(text).absolute()
        _check_file(path)
        return _Found([path], {} if path.stat().st_size else {path: f"{path.name} (empty)"})
    names = [text] if os.path.lexists(text) else []
    if text and not names:
        names = sorted(glob.glob(text, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
    found = _Found()
    for name in names:
        path = Path(name).absolute()
        for file in _files_below(path) if path.is_dir() else [path]:
            _add(found, file, text_field)
    if names:
        _check_there_is_data(text, found)
    return found


def _find_remote(text: str, text_field: str) -> _Found:
    """Files of known kinds in another store."""
    files, beside = remote_files(text)
    found = _Found()
    if len(files) == 1 and text.endswith(files[0].name):
        _check_kind(files[0])
    for file in files:
        _add(found, file, text_field)
    for name in beside:
        if kind_of(name) is not None and not _BESIDE_DATA.fullmatch(Path(name).name):
            found.unread[name] = name
    _check_there_is_data(text, found)
    return found


def _check_there_is_data(text: str, found: _Found) -> None:
    if found.paths:
        return
    there = f" but {found.said_unread}" if found.unread else ""
    kinds = " ".join(KINDS)
    raise DataError(
        f"{shown(text)} holds no data{there}; --data reads {kinds} and most of them compressed"
    )


def _add(found: _Found, path: Path | RemoteFile, text_field: str) -> None:
    """A file of a folder, pattern or store: to what is read, or to what is not."""
    kind = kind_of(path.name)
    if kind is None:
        if not _BESIDE_DATA.fullmatch(path.name):
            found.unread[path] = path.name
        return
    if _BESIDE_DATA.fullmatch(path.name):
        return
    if isinstance(path, Path):
        _check_file(path)
    try:
        asks = kind in _JSON if isinstance(path, Path) else kind == ".json"  # each is a request
        if asks and is_one_object_without(path, text_field):
            found.unread[path] = f"{path.name} (one object without {shown(text_field)})"
            return
        if not path.stat().st_size:
            found.unread[path] = f"{path.name} (empty)"
        found.paths.append(path)
    except OSError as error:
        raise DataError(
            f"cannot read {shown(path)}: {error.strerror}; check the disk or the network"
        ) from error


def _files_below(folder: Path) -> list[Path]:
    """All files below a folder. Linked folders are followed, each folder once; hidden names are
    not looked at.
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


def _check_kind(path: Path | RemoteFile) -> None:
    if path.name.lower().endswith(_ARCHIVES):
        raise DataError(f"{shown(path)} is an archive; unpack it, and give its folder")
    if kind_of(path.name) is None:
        compressed = f"all but the last three also {' '.join(COMPRESSIONS)}"
        raise DataError(
            f"{shown(path)} is of no known kind; rename it to what it is: {' '.join(KINDS)} "
            f"({compressed})"
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
    """Standard input as a file. Under its name once it is whole."""
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
                if not file.tell():  # also where it was read before: that must not be lost
                    raise DataError(
                        "standard input is empty, or was read already; pipe data in, and give - "
                        "once"
                    )
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path.absolute()
