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
    """Turn a failure to write into one line. `left` says what becomes of what was written so
    far.
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
    """See a file's content on the disk.

    Raises:
        OutputError: the disk failed, or was full after all.
    """
    with writing(path.name):
        file = os.open(path, os.O_RDONLY)
        try:
            sync(file)
        finally:
            os.close(file)
