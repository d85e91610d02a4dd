"""SHA256SUMS, in the format of `sha256sum`: written on request, checked where it is."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from dus_cli.checkpoint import read_small_file
from dus_cli.errors import DusError, shown
from dus_cli.source_files import inside
from dus_cli.staging import staged_files
from dus_cli.workers import PIECE, workers

NAME = "SHA256SUMS"

_MAX_BYTES = 16_000_000


def file_sum(path: Path, stop: threading.Event) -> str:
    """SHA-256 of a file, hexadecimal, in memory that does not grow. Of no use once `stop` is set."""
    digest = hashlib.sha256()
    with path.open("rb", 0) as file:
        while not stop.is_set() and (piece := file.read(PIECE)):
            digest.update(piece)
    return digest.hexdigest()


def checksums(folder: Path, jobs: int) -> str:
    """The content of SHA256SUMS for every file in a folder. `inside` admits no name that needs escaping."""
    names = [name for name in staged_files(folder) if name != NAME]
    with workers(jobs) as (pool, stop):
        sums = pool.map(lambda name: file_sum(folder / name, stop), names)
        return "".join(f"{total}  {name}\n" for total, name in zip(sums, names, strict=True))


def check_sums(folder: Path, jobs: int) -> tuple[int, list[str]]:
    """Hold a folder against its SHA256SUMS, where it has one: the number of files summed, and problems."""
    problems: list[str] = []
    expected: dict[str, str] = {}
    try:
        path = inside(folder, NAME)
        lines = read_small_file(path, NAME, _MAX_BYTES).decode("utf-8", "replace").splitlines() if path.exists() else []
    except DusError as error:
        return 0, [str(error)]
    for line in lines:
        total, separator, name = line.partition("  ")
        if not separator or len(total) != 64:
            problems.append(f"{NAME} has a line that is no sum: {shown(line)}")
        else:
            expected[name] = total
    with workers(jobs) as (pool, stop):
        found = pool.map(lambda item: _problem(folder, item[0], item[1], stop), expected.items())
        problems += [problem for problem in found if problem]
    return len(expected), problems


def _problem(folder: Path, name: str, total: str, stop: threading.Event) -> str | None:
    try:
        actual = file_sum(inside(folder, name), stop)
    except DusError as error:
        return str(error)
    except OSError as error:
        return f"{shown(name)} is in {NAME} and cannot be read: {error.strerror}"
    return None if actual == total else f"{shown(name)} does not match its sum in {NAME}"
