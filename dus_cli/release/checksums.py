"""SHA256SUMS, in the format of `sha256sum`: written on request, and checked if it exists."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from dus_cli.common.workers import PIECE, workers
from dus_cli.errors import DusError, shown, shown_list
from dus_cli.source import incomplete
from dus_cli.source.files import LEFT_BEHIND, inside
from dus_cli.source.reading import open_regular, read_small_file, reading
from dus_cli.writing.staging import staged_files

NAME = "SHA256SUMS"

_MAX_BYTES = 16_000_000

_LINE = re.compile(r"(?P<sum>[0-9a-fA-F]{64}) [ *](?P<name>.+?)\r?")
_TAGGED_LINE = re.compile(r"SHA256 \((?P<name>.+)\) = (?P<sum>[0-9a-fA-F]{64})\r?")


def file_sum(
    path: Path, stop: threading.Event, on_bytes: Callable[[int], object] = lambda _: None
) -> str:
    """SHA-256 of a file, hexadecimal; not valid once `stop` is set. Memory does not grow with the
    file.
    """
    digest = hashlib.sha256()
    with open_regular(path, 0) as file:
        while not stop.is_set() and (piece := file.read(PIECE)):
            digest.update(piece)
            on_bytes(len(piece))
    return digest.hexdigest()


def folder_sums(
    folder: Path,
    jobs: int,
    held: Mapping[str, str] | None = None,
    known: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The SHA-256 of every file in a folder but SHA256SUMS, by its path with "/".

    Args:
        folder: the directory.
        jobs: number of threads.
        held: texts by file name that are not written yet.
        known: sums by file name that were computed while the files were written.
    """
    sums = known or {}
    texts = held or {}
    files = [name for name in staged_files(folder) if name not in (NAME, incomplete.NAME)]
    names = sorted({*files, *texts}, key=PurePosixPath)

    def sum_of(name: str) -> str:
        if name in sums:
            return sums[name]
        if name in texts:
            return hashlib.sha256(texts[name].encode()).hexdigest()
        with reading(name):
            return file_sum(folder / name, stop)

    with workers(jobs) as (pool, stop):
        return dict(zip(names, pool.map(sum_of, names), strict=True))


def sums_text(sums: Mapping[str, str]) -> str:
    """The content of SHA256SUMS. No name needs escaping: `source.files.inside` refuses such."""
    return "".join(f"{total}  {name}\n" for name, total in sums.items())


def expected_sums(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The sums in a folder's SHA256SUMS by file name, and its problems; both empty without the
    file.

    It is read as sha256sum reads it: with "*" before a name, Windows' line ends, upper case, "./",
    and the lines of `sha256sum --tag`.
    """
    problems: list[str] = []
    expected: dict[str, str] = {}
    try:
        path = inside(folder, NAME)
        raw = read_small_file(path, NAME, _MAX_BYTES) if os.path.lexists(path) else b""
    except DusError as error:
        return {}, [str(error)]
    for line in raw.decode("utf-8", "replace").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line) or _TAGGED_LINE.fullmatch(line)
        if match is None:
            problems.append(f"{NAME} has a line that is not a sum: {shown(line)}")
            continue
        name, total = match["name"].removeprefix("./"), match["sum"].lower()
        if expected.setdefault(name, total) != total:
            problems.append(f"{NAME} has two sums of {shown(name)}")
    return expected, problems


def are_in(folder: Path) -> bool:
    """Whether a folder has a SHA256SUMS, even an empty one."""
    return os.path.lexists(folder / NAME)


def not_covered(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """The files of a folder that are not in its SHA256SUMS, except those that git and the Hub's
    tools leave there.
    """

    def is_left(name: str) -> bool:
        return any(
            fnmatch(part, pattern) for part in PurePosixPath(name).parts for pattern in LEFT_BEHIND
        )

    ours = (NAME, incomplete.NAME)
    return [
        name
        for name in staged_files(folder)
        if name not in expected and name not in ours and not is_left(name)
    ]


def lacking(names: list[str]) -> str:
    """The problem if files have no sum."""
    return f"{NAME} has no sum of {shown_list(names)}"


def different_files(sums: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """The files whose sums are not the expected ones, and those that only one of the two has."""
    return sorted(
        name for name in sums.keys() | expected.keys() if sums.get(name) != expected.get(name)
    )


def check_sums(folder: Path, jobs: int) -> tuple[int, list[str]]:
    """Compare the files of a folder with its SHA256SUMS, if it has one.

    A file that is not in SHA256SUMS is a problem too.

    Returns:
        The number of files summed, and problems.
    """
    expected, problems = expected_sums(folder)
    with workers(jobs) as (pool, stop):
        results = pool.map(lambda item: _problem(folder, item[0], item[1], stop), expected.items())
        problems += [problem for problem in results if problem]
    if are_in(folder) and (uncovered := not_covered(folder, expected)):
        problems.append(lacking(uncovered))
    return len(expected), problems


def _problem(folder: Path, name: str, total: str, stop: threading.Event) -> str | None:
    try:
        actual = file_sum(inside(folder, name), stop)
    except DusError as error:
        return str(error)
    except OSError as error:
        return f"{shown(name)} is in {NAME} and cannot be read: {error.strerror}"
    return None if actual == total else f"{shown(name)} does not match its sum in {NAME}"
