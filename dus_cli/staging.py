"""The output directory: whole or not there. Work happens beside it, one rename publishes it.

`.<name>.partial` beside OUT holds the work. A run locks it (flock, released by the kernel however the
process ends), so a second run with the same OUT is told at once, and what a killed run left is
recognised and cleared.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dus_cli.errors import OutputError, shown
from dus_cli.transfer import sync_file, writing

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

# Linux's renameat2(2): exchange two names in one step.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def check_output(output: Path, *, overwrite: bool) -> Path:
    """The real path of OUT, once everything that can be known before planning is in order.

    Raises:
        OutputError: taken, the current directory, no parent directory, or no permission.
    """
    real = output.resolve()
    if Path.cwd().is_relative_to(real):
        raise OutputError(f"the output {shown(output)} is the directory you stand in; name a new one, such as -o out")
    parent = real.parent
    if not parent.is_dir():
        raise OutputError(f"{shown(parent)} is not a directory; create it first (mkdir -p {shown(parent)})")
    if not os.access(parent, os.W_OK | os.X_OK) or _is_read_only(parent):
        raise OutputError(f"{shown(parent)} cannot be written to; choose another place for -o")
    _check_free_name(real, overwrite=overwrite)
    return real


def check_apart(output: Path, source: Path) -> None:
    """Hold that neither of the two directories lies in the other.

    Raises:
        OutputError: one does.
    """
    real, base = output.resolve(), source.resolve()
    if real.is_relative_to(base) or base.is_relative_to(real):
        raise OutputError(f"the output {shown(output)} and the model {shown(source)} contain each other; choose apart")


def _is_read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def _check_free_name(output: Path, *, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"{shown(output)} exists and is not a directory; choose another name for -o")
    if not overwrite and any(output.iterdir()):
        raise OutputError(f"{shown(output)} exists and is not empty; choose another name, or --overwrite to replace it")


class Staging:
    """The locked directory beside OUT in which an output is made. Use as a context manager.

    `folder` is gone when the context ends, unless `publish` gave it the final name.
    """

    def __init__(self, output: Path, *, overwrite: bool) -> None:
        self.output = output
        self.overwrite = overwrite
        self.folder = output.parent / f".{output.name}.partial"
        self._aside = output.parent / f".{output.name}.replaced"
        self._locks: list[int] = []
        self._is_ours = False

    def __enter__(self) -> Self:
        try:
            self._claim()
        except Exception:
            self.__exit__()
            raise
        except BaseException:  # a signal, perhaps between making the folder and locking it
            self.__exit__()
            self._drop_unclaimed()
            raise
        return self

    def _drop_unclaimed(self) -> None:
        """Remove the folder if it is empty and nobody's: a run that was about to take it makes it anew."""
        with contextlib.suppress(OSError, OutputError):
            self._lock(self.folder)
            if self._bears_the_name():
                self.folder.rmdir()
        while self._locks:
            os.close(self._locks.pop())

    def _claim(self) -> None:
        while True:
            with writing(self.folder.name):
                self.folder.mkdir(exist_ok=True)
                try:
                    self._lock(self.folder)
                except FileNotFoundError:
                    continue  # the run that had it just ended
            if self._bears_the_name():
                break
        self._is_ours = True
        if self._aside.exists():  # a killed run was replacing OUT on a file system that cannot exchange names
            if self.output.exists():
                _remove(self._aside)
            else:
                self._aside.rename(self.output)
        _check_free_name(self.output, overwrite=self.overwrite)  # the run that had the lock may have published
        for left in self.folder.iterdir():
            _remove(left)

    def _lock(self, folder: Path) -> None:
        self._locks.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
        try:
            fcntl.flock(self._locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another run is writing {shown(self.output)} at this moment; wait for it, or choose another -o"
            ) from None
        except OSError:
            pass  # no locks on this file system: a second run is then noticed only when it publishes

    def _bears_the_name(self) -> bool:
        """Whether the locked directory is still the one at `folder`; the lock is released where it is not."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self.folder.stat(), os.fstat(self._locks[-1])):
                return True
        os.close(self._locks.pop())
        return False

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            _remove(self.folder)
        while self._locks:
            os.close(self._locks.pop())

    def write_text(self, name: str, text: str) -> None:
        with writing(name):
            (self.folder / name).write_text(text, encoding="utf-8")
        sync_file(self.folder / name)

    def copy_file(self, name: str, source: Path) -> None:
        """Copy a small file. Its mode follows the umask, not the source's."""
        target = self.folder / name
        with writing(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        sync_file(target)

    def publish(self) -> None:
        """Give the finished directory its final name, in one step.

        Raises:
            OutputError: the name was taken meanwhile, or the file system refuses the rename.
        """
        with writing(self.folder.name):
            for root, _, _ in os.walk(self.folder):
                _sync_folder(Path(root))
        try:
            if not (self.overwrite and self.output.exists()):
                self.folder.rename(self.output)
                self._is_ours = False
            else:
                self._lock(self.output)  # it is about to bear our name: nobody may take it before it is gone
                if not _exchange(self.folder, self.output):
                    self._replace()
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise OutputError(
                    f"{shown(self.output)} was made by someone else meanwhile; nothing of it was changed"
                ) from error
            raise OutputError(f"cannot rename the output to {shown(self.output)}: {error.strerror}") from error
        with contextlib.suppress(OSError):
            _sync_folder(self.output.parent)

    def _replace(self) -> None:
        """Two renames where names cannot be exchanged; a run killed between them is undone by the next."""
        self.output.rename(self._aside)
        try:
            self.folder.rename(self.output)
        except OSError:
            self._aside.rename(self.output)
            raise
        self._is_ours = False
        _remove(self._aside)


def _exchange(new: Path, old: Path) -> bool:
    """Swap two directories' names in one step; False where the kernel or file system cannot."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        return bool(libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0)
    return False


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot sync a directory
            os.fsync(file)
    finally:
        os.close(file)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write to the file system of this folder."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def staged_files(folder: Path) -> Iterator[str]:
    """The files below a folder, as sorted paths with "/"."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix()
