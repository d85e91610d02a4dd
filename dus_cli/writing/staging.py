"""The output directory: whole or not there. Work happens beside it, one rename publishes it.

`.<name>.partial` beside OUT holds the work. A run locks it (flock, released by the kernel however the
process ends), so a second run with the same OUT is told at once, and what a killed run left is
recognised and cleared. Where no folder can be renamed (`storage`) the work is done in OUT itself: see `in_place`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dus_cli.errors import CheckpointError, OutputError, VerificationError, encodable, shown
from dus_cli.locks import holder
from dus_cli.source import incomplete
from dus_cli.source.reading import file_pieces
from dus_cli.storage import Storage, ask, known, remove
from dus_cli.writing import journal
from dus_cli.writing.in_place import LAST, InPlace, check_empty, clear_left, in_place_warning
from dus_cli.writing.outputs import sync_file, writing

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

# Tries to lock a folder that is another one by the time it is locked. After that many its inode numbers change by
# themselves, as in some object stores.
_TRIES = 20

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
    if incomplete.owner(output) is not None:
        return  # whether it may be cleared is decided under the lock
    if not overwrite and any(output.iterdir()):
        raise OutputError(f"{shown(output)} exists and is not empty; choose another name, or --overwrite to replace it")
    if (storage := known(output.parent)) is not None and storage.no_rename is not None:
        check_empty(output, storage.no_rename)


class Staging:
    """The locked directory beside OUT in which an output is made. Use as a context manager.

    `folder` is gone when the context ends, unless `publish` gave it the final name. It is OUT itself where no folder
    can be renamed; then `held` has the texts that are to be written last, and `warnings` says what that means.
    `key` is a digest of what is written: only for the same one is a half-written OUT cleared without `overwrite`.
    Where `resumes`, what a run with a journal of that key has left is not cleared; and while `keeps` is set, what this
    one has written stays when the context ends.
    """

    def __init__(self, output: Path, *, overwrite: bool, key: str = "", resumes: bool = False) -> None:
        self.output = output
        self.overwrite = overwrite
        self.key = key
        self.resumes = resumes
        self.keeps = False
        self.folder = output.parent / f".{output.name}.partial"
        self.storage = Storage()
        self.held: dict[str, str] = {}
        self.warnings: list[str] = []
        self._partial = self.folder
        self._aside = output.parent / f".{output.name}.replaced"
        self._in_place: InPlace | None = None
        self._locks: list[int] = []
        self._is_ours = False

    @property
    def published(self) -> str:
        """How the output gets its final name: "rename", or "index last" where it has it from the start."""
        return "rename" if self._in_place is None else "index last"

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
            self._lock(self._partial)
            if self._bears_the_name():
                self._partial.rmdir()
        while self._locks:
            os.close(self._locks.pop())

    def _claim(self) -> None:
        for _ in range(_TRIES):
            with writing(self.folder.name):
                self.folder.mkdir(exist_ok=True)
                try:
                    self._lock(self.folder)
                except FileNotFoundError:
                    continue  # the run that had it just ended
            if self._bears_the_name():
                break
        else:
            with writing(self.folder.name):
                self.folder.mkdir(exist_ok=True)
                self._lock(self.folder)
        self._is_ours = True
        if self._aside.exists():  # a killed run was replacing OUT on a file system that cannot exchange names
            if self.output.exists():
                remove(self._aside)
            else:
                self._aside.rename(self.output)
        self.keeps = self.resumes and journal.belongs(self.folder, self.key)
        if not self.keeps:
            for left in self.folder.iterdir():
                remove(left)
        note = clear_left(self.output, self.key, overwrite=self.overwrite)
        self.warnings += [] if note is None else [note]
        _check_free_name(self.output, overwrite=self.overwrite)  # the run that had the lock may have published
        self.storage = ask(self.folder)
        if self.storage.no_rename is not None:
            self._go_in_place(self.storage.no_rename)

    def _go_in_place(self, why: str) -> None:
        self._in_place = InPlace(self.output, self.key)
        self._in_place.claim(why)
        self.folder = self.output
        self.warnings.append(in_place_warning(self.output, why))

    def _lock(self, folder: Path) -> None:
        self._locks.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
        try:
            fcntl.flock(self._locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = holder(self._locks[-1])
            raise OutputError(
                f"another run is writing {shown(self.output)} at this moment ({who}); wait for it, or choose another -o"
            ) from None
        except OSError:
            pass  # no locks on this file system: a second run is then noticed only when it publishes

    def _bears_the_name(self) -> bool:
        """Whether the locked directory is still the one at `folder`; the lock is released where it is not."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self._partial.stat(), os.fstat(self._locks[-1])):
                return True
        os.close(self._locks.pop())
        return False

    def __exit__(self, _kind: object = None, error: BaseException | None = None, *_: object) -> None:
        if isinstance(error, (CheckpointError, VerificationError)):
            self.keeps = False  # it would be as wrong the next time
        if self._in_place is not None:
            self._in_place.abandon()
        if self._is_ours and not self.keeps:
            remove(self._partial)
        while self._locks:
            os.close(self._locks.pop())

    def check_ours(self) -> None:
        """Hold that no run on another host has taken OUT, which only a run in place need ask.

        Raises:
            OutputError: one has.
        """
        if self._in_place is not None:
            self._in_place.check_ours()

    def write_text(self, name: str, text: str) -> None:
        if self._in_place is not None and name in LAST:
            self.held[name] = text
            return
        with writing(name):
            (self.folder / name).write_text(encodable(text), encoding="utf-8")
        sync_file(self.folder / name)

    def copy_file(self, name: str, source: Path) -> None:
        """Copy a small file. Its mode follows the umask, not the source's.

        Raises:
            CheckpointError: it cannot be read.
            OutputError: it cannot be written.
        """
        target = self.folder / name
        with writing(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                for piece in file_pieces(source, name):
                    file.write(piece)
        sync_file(target)

    def publish(self) -> None:
        """Give the finished directory its final name, in one step; in place, write what makes it a model.

        Raises:
            OutputError: the name was taken meanwhile, or the file system refuses the rename.
        """
        if self._in_place is not None:
            self._in_place.finish(self.held)
            return
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
                self.keeps = False  # from here on the folder is the old output
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
        remove(self._aside)


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


def has_kept(output: Path) -> bool:
    """Whether a streamed run has left something with which the same command goes on."""
    real = output.resolve()
    return journal.is_in(real.parent / f".{real.name}.partial")


def staged_files(folder: Path) -> Iterator[str]:
    """The files below a folder, as sorted paths with "/"; a journal is none of the output's."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / journal.NAME:
            yield path.relative_to(folder).as_posix()
