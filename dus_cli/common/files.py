"""Opening and syncing files that are written."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from dus_cli.common.storage import sync
from dus_cli.errors import OutputError, shown

CLEARED = "nothing was left behind"


@contextlib.contextmanager
def writing(name: str, left: str = CLEARED) -> Iterator[None]:
    """Turn an OSError while writing `name` into one line, which ends with `left`: what remains of
    the bytes written so far.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "; free some space or choose another place, ",
            errno.EDQUOT: "; raise the quota or choose another place, ",
        }.get(error.errno or 0, "; ")
        raise OutputError(
            f"cannot write {shown(name)}: {error.strerror or error}{advice}{left}"
        ) from error


def sync_file(path: Path) -> None:
    """Flush a file to the disk (fsync).

    Raises:
        OutputError: the disk failed, or turned out to be full.
    """
    with writing(path.name):
        file = os.open(path, os.O_RDONLY)
        try:
            sync(file)
        finally:
            os.close(file)
