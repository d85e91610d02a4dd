"""The output directory is whole or does not exist: it is written beside OUT, and one rename
publishes it.

The work is in `.<name>.partial` beside OUT. A run locks that folder (flock, which the kernel
releases however the process ends), so a second run with the same OUT fails at once. What a killed
run left there is recognised by a mark file, and removed. If the file system cannot rename folders
(`common.storage`), the work is done in OUT itself: see `in_place`. If only OUT cannot be renamed,
because it is a mount point or its parent is not writable, the work is done in a folder within OUT,
and the files move up at the end, config.json last.

Files that dus did not write are not deleted: see `replacing`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dus_cli.common.files import sync_file, writing
from dus_cli.common.locks import holder
from dus_cli.common.storage import Storage, is_mount_point, known, not_removed, remove, try_storage
from dus_cli.errors import (
    CheckpointError,
    OutputError,
    VerificationError,
    encodable,
    shown,
    shown_list,
)
from dus_cli.source import incomplete
from dus_cli.source.reading import file_pieces
from dus_cli.writing import journal
from dus_cli.writing.in_place import (
    LAST,
    WITHIN,
    InPlace,
    check_empty,
    clear_left,
    holds_something,
    in_place_warning,
)
from dus_cli.writing.replacing import (
    Claim,
    check_replaceable,
    claim_model,
    move_others,
    others,
    remove_claimed,
)

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

# Attempts to lock the folder, if each time it is another folder once the lock is held. After that
# many, its inode number must change by itself, as in some object stores.
_ATTEMPTS = 20

# Linux's renameat2(2): exchange two names in one step.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


# The file that marks a folder in which a run works: everything in it is dus's.
MARK = ".dus-partial"

# Files of `storage.try_storage` and `transfer.can_clone` that a kill may leave.
_PROBES = {
    ".dus-probe",
    *(
        f"{folder}/{file}"
        for folder in ("probe", "renamed")
        for file in ("", "in-order", "anywhere")
    ),
}


def check_output(output: Path, *, overwrite: bool) -> Path:
    """Check everything about OUT that can be checked before planning, and return its real path.

    Raises:
        OutputError: OUT exists, is or holds the current or home directory, has no parent directory,
            is not writable, or holds something that may not be deleted.
    """
    real = output.resolve()
    for folder, description in (
        (Path.cwd(), "the current directory"),
        (_home(), "your home directory"),
    ):
        if folder is not None and folder.is_relative_to(real):
            raise OutputError(
                f"the output {shown(output)} is or holds {description}; give a new one, such as "
                "-o out"
            )
    parent = real.parent
    if not parent.is_dir():
        raise OutputError(
            f"{shown(parent)} is not a directory; create it first (mkdir -p {shown(parent)})"
        )
    if not _is_writable(parent) and not (real.is_dir() and _is_writable(real)):
        raise OutputError(f"{shown(parent)} cannot be written to; choose another place for -o")
    _check_free_name(real, overwrite=overwrite)
    return real


def check_apart(output: Path, source: Path) -> None:
    """Check that two directories are different, and that neither is inside the other.

    Raises:
        OutputError: they are not.
    """
    real, base = output.resolve(), source.resolve()
    if (
        real.is_relative_to(base)
        or base.is_relative_to(real)
        or (real.exists() and real.samefile(base))
    ):
        raise OutputError(
            f"the output {shown(output)} and the model {shown(source)} contain each other; choose "
            "another -o"
        )


def why_within(output: Path) -> str | None:
    """Why a run must work within OUT and not beside it; None if OUT can be renamed."""
    if not output.is_dir():
        return None
    if is_mount_point(output):
        return "it is a mount point, and those cannot be renamed"
    return None if _is_writable(output.parent) else f"{shown(output.parent)} cannot be written to"


def partial_folder(output: Path) -> Path:
    """The folder in which a run works until its output is whole. `output` is resolved."""
    return (
        output / WITHIN
        if why_within(output) is not None
        else output.parent / f".{output.name}.partial"
    )


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except RuntimeError:  # this user has none
        return None


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK) and not os.statvfs(folder).f_flag & os.ST_RDONLY


def _check_free_name(output: Path, *, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(
            f"{shown(output)} exists and is not a directory; choose another name for -o"
        )
    if incomplete.owner(output) is not None:
        return  # under the lock, `clear_left` decides whether it may be cleared
    why = within = why_within(output)
    storage = known(output if within is not None else output.parent)
    if storage is not None and storage.no_rename is not None:
        why = storage.no_rename
    if holds_something(output) if within is not None else any(output.iterdir()):
        if not overwrite:
            raise OutputError(
                f"{shown(output)} exists and is not empty; choose another name, or --overwrite to "
                "replace it"
            )
        if why is not None:
            check_empty(output, why)
        check_replaceable(output)


class Staging:
    """The locked directory beside OUT in which an output is written. Use as a context manager.

    Attributes:
        output: OUT, resolved.
        overwrite: an existing OUT is replaced. It must hold only a model (`replacing`), unless
            there is a `claim`.
        key: digest of what is written. A half-written OUT of another key is cleared only with
            `overwrite`.
        resumes: what a run with a journal of the same key left is kept.
        files: names of everything that will be written; None if not known.
        claim: which files of a replaced OUT may be deleted; the others move to the new one.
        keeps: what this run writes stays when the context ends without `publish`.
        folder: where the files are written; removed when the context ends, unless it was published
            or `keeps` is set. On a file system that cannot rename folders it is OUT itself.
        storage: what the file system can do.
        held: texts that are written last, if `folder` is OUT itself.
        warnings: what a person should know of this output.
    """

    def __init__(
        self,
        output: Path,
        *,
        overwrite: bool,
        key: str = "",
        resumes: bool = False,
        files: Collection[str] | None = None,
        claim: Claim | None = None,
    ) -> None:
        self.output = output
        self.overwrite = overwrite
        self.key = key
        self.resumes = resumes
        self.files = files
        self.claim = claim
        self.keeps = False
        self.folder = partial_folder(output)
        self.storage = Storage()
        self.held: dict[str, str] = {}
        self.warnings: list[str] = []
        self._partial = self.folder
        self._why_within = why_within(output)
        self._aside = output.parent / f".{output.name}.replaced"
        self._in_place: InPlace | None = None
        self._locks: list[int] = []
        self._is_ours = False

    @property
    def published(self) -> str:
        """How the output is published: by "rename", or, if it is written under its final name,
        "index last".
        """
        return "rename" if self._in_place is None and self._why_within is None else "index last"

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
        """Remove the folder if it is empty and not locked; a run that is about to lock it will
        create it again.
        """
        with contextlib.suppress(OSError, OutputError):
            self._lock(self._partial)
            if self._is_locked_folder():
                self._partial.rmdir()
        while self._locks:
            os.close(self._locks.pop())

    def _claim(self) -> None:
        for _ in range(_ATTEMPTS):
            with writing(self.folder.name):
                self.folder.mkdir(exist_ok=True)
                try:
                    self._lock(self.folder)
                except FileNotFoundError:
                    continue  # the run that had locked it just ended
            if self._is_locked_folder():
                break
        else:
            with writing(self.folder.name):
                self.folder.mkdir(exist_ok=True)
                self._lock(self.folder)
        self._is_ours = True
        # left by a killed run that replaced OUT on a file system that cannot exchange names
        if self._aside.exists():
            if self.output.exists():
                self._clear_aside()
            else:
                self._aside.rename(self.output)
        self.keeps = self.resumes and journal.belongs(self.folder, self.key)
        if not self.keeps:
            self._clear_partial()
        if not (self.folder / MARK).exists():
            with writing(self.folder.name):
                (self.folder / MARK).touch()
        note = clear_left(self.output, self.key, overwrite=self.overwrite)
        self.warnings += [] if note is None else [note]
        if self.claim is None:
            # a run that held the lock may have published meanwhile
            _check_free_name(self.output, overwrite=self.overwrite)
        self.storage = try_storage(self.folder)
        if self.storage.no_rename is not None:
            self._go_in_place(self.storage.no_rename)
        elif self._why_within is not None:
            self.warnings.append(in_place_warning(self.output, self._why_within))

    def _clear_aside(self) -> None:
        """Remove the old output that a killed run had already replaced."""
        if left := remove_claimed(self._aside, self._claim_of(self._aside)):
            raise OutputError(
                f"{shown(self._aside)} holds {shown_list(left)}, which dus did not write, or "
                "cannot remove; move it away, or choose another -o"
            )

    def _clear_partial(self) -> None:
        """Remove what a killed run left in the folder, if it is dus's."""
        entries = list(self.folder.iterdir())
        if entries and not (self.folder / MARK).exists() and not journal.is_in(self.folder):
            of_model, of_caller = claim_model(self.folder), self.claim or (lambda _: False)
            if foreign := others(
                self.folder,
                lambda name: (
                    name in _PROBES or name == ".dus-probe" or of_model(name) or of_caller(name)
                ),
            ):
                self._is_ours = False
                raise OutputError(
                    f"{shown(self.folder)}, in which {shown(self.output)} is prepared, holds "
                    f"{shown_list(foreign)}, which dus did not write; move it away, or choose "
                    "another -o"
                )
        for entry in entries:
            if entry.name == MARK and entry.is_file() and not entry.is_symlink():
                continue  # if this run is killed now, the mark shows that the rest is dus's
            try:
                remove(entry)
            except OSError as error:
                raise not_removed(entry, error.errno or errno.EIO) from error

    def _claim_of(self, folder: Path) -> Claim:
        return claim_model(folder) if self.claim is None else self.claim

    def _go_in_place(self, why: str) -> None:
        # OUT is the mount point of a store: a folder within it cannot be renamed either
        if self._why_within is not None:
            remove(self._partial)
            self._is_ours = False
        self._in_place = InPlace(self.output, self.key, self.files)
        self._in_place.claim(why)
        self.folder = self.output
        self.warnings.append(in_place_warning(self.output, why))

    def _lock(self, folder: Path) -> None:
        self._locks.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW))
        try:
            fcntl.flock(self._locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            run = holder(self._locks[-1])
            raise OutputError(
                f"another run is writing {shown(self.output)} at this moment ({run}); wait for "
                "it, or choose another -o"
            ) from None
        except OSError:
            # this file system has no locks: a second run is noticed only when it publishes
            pass

    def _is_locked_folder(self) -> bool:
        """Whether the locked directory is still the one at `folder`; if not, release the lock."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self._partial.stat(), os.fstat(self._locks[-1])):
                return True
        os.close(self._locks.pop())
        return False

    def __exit__(
        self, _kind: object = None, error: BaseException | None = None, *_: object
    ) -> None:
        if isinstance(error, (CheckpointError, VerificationError)):
            self.keeps = False  # continuing from these bytes would fail again
        if self._in_place is not None:
            self._in_place.abandon()
        if self._is_ours and not self.keeps:
            remove(self._partial)
        while self._locks:
            os.close(self._locks.pop())

    def check_ours(self) -> None:
        """Check that no run on another host has taken OUT; that can happen only in place.

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
        """Give the finished directory its final name in one step; in place, write its last files.

        Raises:
            OutputError: OUT was created meanwhile, or the file system refuses the rename.
        """
        if self._in_place is not None:
            self._in_place.finish(self.held)
            return
        with writing(self.folder.name):
            for root, _, _ in os.walk(self.folder):
                _sync_folder(Path(root))
        if self._why_within is not None:
            self._move_up()
            return
        try:
            if not (self.overwrite and self.output.exists()):
                (self._partial / MARK).unlink(missing_ok=True)
                self.folder.rename(self.output)
                self._is_ours = False
            else:
                self._replace()
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise OutputError(
                    f"{shown(self.output)} was created by another program meanwhile; it was not "
                    "changed"
                ) from error
            raise OutputError(
                f"cannot rename the output to {shown(self.output)}: {error.strerror}"
            ) from error
        with contextlib.suppress(OSError):
            _sync_folder(self.output.parent)

    def _move_up(self) -> None:
        """Move the files from the folder within OUT to OUT, config.json last. Meanwhile OUT is
        marked as incomplete.
        """
        place = InPlace(self.output, self.key, self.files or list(staged_files(self.folder)))
        place.claim(self._why_within or "")
        try:
            names = [path.name for path in self.folder.iterdir() if path.name != MARK]
            for name in sorted(
                names, key=lambda name: (*LAST, name).index(name) if name in LAST else -1
            ):
                with writing(name):
                    (self.folder / name).rename(self.output / name)
            remove(self._partial)
            _sync_folder(self.output)
            place.finish({})
        except BaseException:
            place.abandon()
            raise
        self._is_ours = False

    def _replace(self) -> None:
        """Exchange the new output with the old one, and remove the old one's files.

        Raises:
            OutputError: the old output now holds a file that dus did not write, or cannot be
                removed.
        """
        if self.claim is None and holds_something(self.output):
            check_replaceable(self.output)
        # the old output is about to be at `folder`: no other run may lock it before it is removed
        self._lock(self.output)
        (self._partial / MARK).unlink(missing_ok=True)
        old = self._partial
        if not _exchange(self.folder, self.output):
            old = self._aside
            self._rename_twice()
        self.keeps = self._is_ours = False  # from here on the folder is the old output
        claim = self._claim_of(old)
        if self.claim is not None:
            move_others(old, self.output, claim)
        elif foreign := others(old, claim):
            self._restore(old)
            raise OutputError(
                f"{shown_list(foreign)} appeared in {shown(self.output)} meanwhile; nothing was "
                "replaced"
            )
        if old == self._partial:
            # if this run is killed now, the mark shows the next one that the rest is dus's
            (old / MARK).touch()
        if left := remove_claimed(old, lambda name: name == MARK or claim(name)):
            raise OutputError(
                f"{shown(self.output)} is the new model, but {shown_list(left)} of the old one "
                f"cannot be removed; it is in {shown(old)}, remove that folder"
            )

    def _rename_twice(self) -> None:
        """Replace the old output without an exchange. If this run is killed between the renames,
        the next one undoes the first.
        """
        self.output.rename(self._aside)
        try:
            self.folder.rename(self.output)
        except OSError:
            self._aside.rename(self.output)
            raise

    def _restore(self, old: Path) -> None:
        """Give the old output its name again, and remove the new one."""
        if not _exchange(old, self.output):
            self.output.rename(self._partial)
            old.rename(self.output)
        remove(self._partial)


def _exchange(new: Path, old: Path) -> bool:
    """Exchange the names of two directories in one step; False if the system cannot."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        return bool(
            libc.renameat2(
                _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE
            )
            == 0
        )
    return False


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot sync a directory
            os.fsync(file)
    finally:
        os.close(file)


def has_kept(output: Path) -> bool:
    """Whether a streamed run has left bytes from which the same command continues."""
    return journal.is_in(partial_folder(output.resolve()))


def staged_files(folder: Path) -> Iterator[str]:
    """The files of an output in a folder, as sorted paths with "/", without the run's own files."""
    of_the_run = (folder / journal.NAME, folder / MARK)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in of_the_run:
            yield path.relative_to(folder).as_posix()
