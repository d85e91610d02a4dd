"""The output directory: whole or not there. Work happens beside it, one rename publishes it.

`.<name>.partial` beside OUT holds the work. A run locks it (flock, released by the kernel however
the process ends), so a second run with the same OUT is told at once, and what a killed run left is
recognised, by a file that marks it as dus's own, and cleared. Where no folder can be renamed
(`storage`) the work is done in OUT itself: see `in_place`. Where OUT alone can have no new name,
for something is mounted there or the folder above it cannot be written to, it is done in a folder
within OUT, and its files move up at the end, config.json last.

Nothing is deleted that dus did not write: see `replacing`.
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
from dus_cli.common.storage import Storage, ask, is_mount_point, known, not_removed, remove
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

# Tries to lock a folder that is another one by the time it is locked. After that many its inode
# numbers change by themselves, as in some object stores.
_TRIES = 20

# Linux's renameat2(2): exchange two names in one step.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


# In the folder in which a run works: all that is in there is dus's.
MARK = ".dus-partial"

# Of `storage.ask` and `transfer.can_clone`, which a kill may leave.
_PROBES = {
    ".dus-probe",
    *(
        f"{folder}/{file}"
        for folder in ("probe", "renamed")
        for file in ("", "in-order", "anywhere")
    ),
}


def check_output(output: Path, *, overwrite: bool) -> Path:
    """The real path of OUT, once everything that can be known before planning is in order.

    Raises:
        OutputError: taken, the current or home directory, no parent directory, no permission, or
            something in it that may not be deleted.
    """
    real = output.resolve()
    for folder, what in (
        (Path.cwd(), "the directory you stand in"),
        (_home(), "your home directory"),
    ):
        if folder is not None and folder.is_relative_to(real):
            raise OutputError(
                f"the output {shown(output)} is or holds {what}; name a new one, such as -o out"
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
    """Check that neither of the two directories lies in the other, nor is the other by another
    name.

    Raises:
        OutputError: one does.
    """
    real, base = output.resolve(), source.resolve()
    if (
        real.is_relative_to(base)
        or base.is_relative_to(real)
        or (real.exists() and real.samefile(base))
    ):
        raise OutputError(
            f"the output {shown(output)} and the model {shown(source)} contain each other; choose "
            "apart"
        )


def why_within(output: Path) -> str | None:
    """Why a run works within OUT and not beside it; None where OUT can be given its name by one
    rename.
    """
    if not output.is_dir():
        return None
    if is_mount_point(output):
        return "it is a mount point, and those cannot be renamed"
    return None if _is_writable(output.parent) else f"{shown(output.parent)} cannot be written to"


def partial_folder(output: Path) -> Path:
    """Where a run works until its output is whole. `output` is resolved."""
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
        return  # whether it may be cleared is decided under the lock
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
    """The locked directory beside OUT in which an output is made. Use as a context manager.

    `folder` is gone when the context ends, unless `publish` gave it the final name. It is OUT
    itself where no folder can be renamed; then `held` has the texts that are to be written last,
    and `warnings` says what that means. `key` is a digest of what is written: only for the same one
    is a half-written OUT cleared without `overwrite`. Where `resumes`, what a run with a journal of
    that key has left is not cleared; and while `keeps` is set, what this one has written stays when
    the context ends. `files` names all that will be written, where that is known.

    An output that is replaced must hold nothing but a model (`replacing`). Where another `claim` is
    given, that tells what of it may be deleted, and whatever else is found there moves to the new
    one.
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
        """How the output gets its final name: "rename", or "index last" where it has it from the
        start.
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
        """Remove the folder if it is empty and nobody's: a run that was about to take it makes
        it anew.
        """
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
        # a killed run was replacing OUT on a file system that cannot exchange names
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
            # the run that had the lock may have published
            _check_free_name(self.output, overwrite=self.overwrite)
        self.storage = ask(self.folder)
        if self.storage.no_rename is not None:
            self._go_in_place(self.storage.no_rename)
        elif self._why_within is not None:
            self.warnings.append(in_place_warning(self.output, self._why_within))

    def _clear_aside(self) -> None:
        """Remove what a killed run has replaced already."""
        if left := remove_claimed(self._aside, self._claim_of(self._aside)):
            raise OutputError(
                f"{shown(self._aside)} holds {shown_list(left)}, which dus did not write, or "
                "cannot remove; move it away, or choose another -o"
            )

    def _clear_partial(self) -> None:
        """Remove what a killed run has left in the folder, if it is dus's own."""
        entries = list(self.folder.iterdir())
        if entries and not (self.folder / MARK).exists() and not journal.is_in(self.folder):
            of_model, of_caller = claim_model(self.folder), self.claim or (lambda _: False)
            if found := others(
                self.folder,
                lambda name: (
                    name in _PROBES or name == ".dus-probe" or of_model(name) or of_caller(name)
                ),
            ):
                self._is_ours = False
                raise OutputError(
                    f"{shown(self.folder)}, where the work for {shown(self.output)} is done, holds "
                    f"{shown_list(found)}, which dus did not write; move it away, or choose "
                    "another -o"
                )
        for left in entries:
            if left.name == MARK and left.is_file() and not left.is_symlink():
                continue  # it is needed again at once, and says whose the rest is meanwhile
            try:
                remove(left)
            except OSError as error:
                raise not_removed(left, error.errno or errno.EIO) from error

    def _claim_of(self, folder: Path) -> Claim:
        return claim_model(folder) if self.claim is None else self.claim

    def _go_in_place(self, why: str) -> None:
        # OUT is a store's own mount: no folder within it is of use
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
            who = holder(self._locks[-1])
            raise OutputError(
                f"another run is writing {shown(self.output)} at this moment ({who}); wait for "
                "it, or choose another -o"
            ) from None
        except OSError:
            # no locks on this file system: a second run is then noticed only when it publishes
            pass

    def _bears_the_name(self) -> bool:
        """Whether the locked directory is still the one at `folder`; the lock is released where
        it is not.
        """
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self._partial.stat(), os.fstat(self._locks[-1])):
                return True
        os.close(self._locks.pop())
        return False

    def __exit__(
        self, _kind: object = None, error: BaseException | None = None, *_: object
    ) -> None:
        if isinstance(error, (CheckpointError, VerificationError)):
            self.keeps = False  # it would be as wrong the next time
        if self._in_place is not None:
            self._in_place.abandon()
        if self._is_ours and not self.keeps:
            remove(self._partial)
        while self._locks:
            os.close(self._locks.pop())

    def check_ours(self) -> None:
        """Check that no run on another host has taken OUT, which only a run in place need ask.

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
        """Give the finished directory its final name, in one step; in place, write what makes it a
        model.

        Raises:
            OutputError: the name was taken meanwhile, or the file system refuses the rename.
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
                    f"{shown(self.output)} was made by someone else meanwhile; nothing of it was "
                    "changed"
                ) from error
            raise OutputError(
                f"cannot rename the output to {shown(self.output)}: {error.strerror}"
            ) from error
        with contextlib.suppress(OSError):
            _sync_folder(self.output.parent)

    def _move_up(self) -> None:
        """Out of the folder within OUT, config.json last; marked as incomplete meanwhile."""
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
        """Let the new output and the old one change places, and remove the old one's files.

        Raises:
            OutputError: something came into the old one that is not dus's, or it cannot be removed.
        """
        if self.claim is None and holds_something(self.output):
            check_replaceable(self.output)
        # it is about to bear our name: nobody may take it before it is gone
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
        elif found := others(old, claim):
            self._restore(old)
            raise OutputError(
                f"{shown(self.output)} has {shown_list(found)} since a moment ago; nothing was "
                "replaced"
            )
        if old == self._partial:
            (
                old / MARK
            ).touch()  # were this run killed now, the next one would know whose the rest is
        if left := remove_claimed(old, lambda name: name == MARK or claim(name)):
            raise OutputError(
                f"{shown(self.output)} is the new model, but {shown_list(left)} of the old one "
                f"cannot be removed; it is in {shown(old)}, remove that folder"
            )

    def _rename_twice(self) -> None:
        """Where names cannot be exchanged. A run killed between the two is undone by the next."""
        self.output.rename(self._aside)
        try:
            self.folder.rename(self.output)
        except OSError:
            self._aside.rename(self.output)
            raise

    def _restore(self, old: Path) -> None:
        """Give the old output its name back, and remove the new one."""
        if not _exchange(old, self.output):
            self.output.rename(self._partial)
            old.rename(self.output)
        remove(self._partial)


def _exchange(new: Path, old: Path) -> bool:
    """Swap two directories' names in one step; False where the kernel or file system cannot."""
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
    """Whether a streamed run has left something with which the same command goes on."""
    return journal.is_in(partial_folder(output.resolve()))


def staged_files(folder: Path) -> Iterator[str]:
    """The files below a folder, as sorted paths with "/"; what a run needs while it works is
    none of the output's.
    """
    of_the_run = (folder / journal.NAME, folder / MARK)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in of_the_run:
            yield path.relative_to(folder).as_posix()
