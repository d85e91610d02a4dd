"""The verb push: upload a verified output with huggingface_hub, and compare what the Hub holds.

Every file is summed before the upload, and the Hub's list of files (one request) is compared with
these sums afterwards: what was pushed is what was verified. The same command continues an
interrupted push: files of the branch, and objects that were uploaded without a commit, are not sent
again.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from dus_cli import __version__
from dus_cli.common.units import human_bytes
from dus_cli.common.workers import workers
from dus_cli.errors import PushError, StoppedError, VerificationError, shown, shown_list
from dus_cli.hub import fetching
from dus_cli.planning.plan import UpscalePlan
from dus_cli.progress import NoProgress, Progress
from dus_cli.push.report import PushReport
from dus_cli.push.target import Remote, Target, client, listed, look, patiently, push_errors
from dus_cli.release import checksums
from dus_cli.release.texts import written_texts
from dus_cli.source.belonging import indexed_weights, model_files, read_record
from dus_cli.source.checkpoint import Fingerprint, fingerprint
from dus_cli.source.files import OF_A_HEALING, WRITTEN_ANEW, inside
from dus_cli.source.incomplete import is_unfinished_healing
from dus_cli.source.reading import file_pieces, reading
from dus_cli.verification.verb import verify
from dus_cli.writing.staging import staged_files
from dus_cli.writing.transfer import DEFAULT_JOBS

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

# The Hub's limit for one file (huggingface.co/docs/hub/storage-limits).
LARGEST_FILE = 50_000_000_000

# Weights of an earlier push that would be loaded beside this model's, or instead of them
# (transformers prefers model.safetensors to an index).
_OF_A_MODEL = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")

_Result = TypeVar("_Result")


def preview(
    plan: UpscalePlan, target: Target, remote: Remote, *, with_checksums: bool = False
) -> PushReport:
    """The report of what `--push-to` would do with the output of a plan. Creates nothing.

    Raises:
        PushError: a shard is too large.
    """
    sizes = {name: layout.num_bytes for name, layout in plan.shards.items()}
    sizes |= {name: path.stat().st_size for name, path in plan.files}
    sizes |= {name: len(text.encode()) for name, text in written_texts(plan).items()}
    if with_checksums:
        sizes[checksums.NAME] = len(checksums.sums_text(dict.fromkeys(sizes, "0" * 64)))
    _check_sizes(sizes)
    return PushReport(target, "planned", remote, len(sizes), sum(sizes.values()))


def preview_folder(output: Path, target: Target) -> PushReport:
    """Verify a directory, and report what `dus push` would do with it. Creates nothing.

    Raises:
        PushError: as `look`.
        VerificationError: the directory is not sound.
    """
    started = time.monotonic()
    _verify(output)
    sizes = _sizes(output)
    return PushReport(
        target,
        "planned",
        look(target),
        len(sizes),
        sum(sizes.values()),
        left_out=tuple(_left_here(output)),
        seconds=time.monotonic() - started,
    )


# --- the push -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Push:
    """A push that is ready to run.

    Attributes:
        output: the directory.
        target: the repo and branch.
        remote: what the Hub held when it was checked.
        sizes: bytes of each file.
        sums: SHA-256 of each file, hexadecimal.
        fingerprints: size and times of each file when it was summed.
        differing: files that the branch does not hold, or holds with other bytes.
        stale: files of an earlier model on the branch.
        started: `time.monotonic()` at the start.
    """

    output: Path
    target: Target
    remote: Remote
    sizes: dict[str, int]
    sums: dict[str, str]
    fingerprints: dict[str, Fingerprint | None]
    differing: list[str]
    stale: list[str]
    started: float

    @property
    def num_lacking_bytes(self) -> int:
        """Bytes of the files that are to be uploaded."""
        return sum(self.sizes[name] for name in self.differing)

    @property
    def is_done(self) -> bool:
        """Whether the branch holds every file, and none of an earlier model."""
        return self.remote.head is not None and not (self.differing or self.stale)

    def run(self) -> PushReport:
        """Upload what the branch lacks, and compare what the Hub then holds with the sums.

        Raises:
            PushError: the upload or the comparison failed; what was uploaded stays, and the same
                push continues.
            StoppedError: a signal came during the upload.
        """
        target, commit, remarks = self.target, self.remote.head, list[str]()
        with push_errors(target):
            if commit is None or not self.is_done:
                commit, remarks = _until_signalled(lambda: patiently(self._upload))
            remote_files = listed(target, commit)
        current = _fingerprints(self.output)
        if changed := sorted(
            name
            for name in current | self.fingerprints
            if current.get(name) != self.fingerprints.get(name)
        ):
            raise PushError(
                f"{shown_list(changed)} changed during the push: commit {commit[:12]} of "
                f"{target.repo_id} is not "
                "what was verified; let nothing write to the folder, and push again"
            )
        if lacking := _differences(self.output, self.sums, remote_files):
            raise PushError(
                f"the Hub holds other bytes of {shown_list(lacking)} in commit {commit[:12]} of "
                f"{target.repo_id} than "
                "were verified here; push again, and report it to the Hub if that does not help"
            )
        return PushReport(
            target,
            "unchanged" if commit == self.remote.head else "pushed",
            self.remote,
            num_files=len(self.sizes),
            num_bytes=sum(self.sizes.values()),
            commit=commit,
            uploaded=len(self.differing),
            removed=tuple(self.stale),
            left_out=tuple(_left_here(self.output)),
            warnings=tuple(remarks),
            seconds=time.monotonic() - self.started,
        )

    def _upload(self) -> tuple[str, list[str]]:
        """Create the repo and branch if needed, upload and commit.

        Returns:
            The commit, and the Hub's remarks.
        """
        target, api = self.target, client(self.target)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if not self.remote.exists:
                api.create_repo(target.repo_id, private=target.private or None, exist_ok=True)
            if target.branch != "main" and self.remote.head is None:
                api.create_branch(target.repo_id, branch=target.branch, exist_ok=True)
            if self.remote.parent is not None and not (self.differing or self.stale):
                return self.remote.parent, []  # the new branch holds what main does
            commit = api.upload_folder(
                repo_id=target.repo_id,
                folder_path=self.output,
                revision=target.branch,
                allow_patterns=[escape(name) for name in self.sums],
                delete_patterns=[escape(name) for name in self.stale] or None,
                commit_message=f"Upload {self.output.resolve().name} with dus {__version__}",
            )
        # UserWarnings are huggingface_hub's messages to users; other classes come from libraries.
        remarks = [str(warning.message) for warning in caught if warning.category is UserWarning]
        return commit.oid, [shown(" ".join(remark.split())) for remark in remarks]


def send(
    output: Path,
    target: Target,
    *,
    jobs: int = DEFAULT_JOBS,
    progress: Progress,
    is_verified: bool = False,
) -> PushReport:
    """Verify, sum and upload a directory.

    If `progress` is live, huggingface_hub draws the upload; else the upload is a stage of
    `progress`.

    Args:
        output: a directory that dus upscale or dus heal wrote, or any checkpoint.
        target: the repo and branch.
        jobs: parallel reads.
        progress: receives the progress.
        is_verified: the directory was verified just now.

    Raises:
        DusError: as `prepare` and `Push.run`.
    """
    ready = prepare(
        output,
        target,
        jobs=jobs,
        progress=progress,
        quiet=not progress.is_live,
        is_verified=is_verified,
    )
    progress.rest()
    if progress.is_live or ready.is_done:
        return ready.run()
    progress.start("uploading", ready.num_lacking_bytes)
    report = ready.run()
    progress.advance(ready.num_lacking_bytes)
    return report


def prepare(
    output: Path,
    target: Target,
    *,
    jobs: int = DEFAULT_JOBS,
    progress: Progress | None = None,
    quiet: bool = True,
    is_verified: bool = False,
) -> Push:
    """Check the target, verify and sum the directory; change nothing, here or on the Hub.

    Args:
        output: a directory that dus upscale or dus heal wrote, or any checkpoint.
        target: the repo and branch.
        jobs: parallel reads.
        progress: receives the progress of summing.
        quiet: no progress bars from huggingface_hub.
        is_verified: the directory was verified just now.

    Raises:
        VerificationError: the directory is not sound.
        PushError: as `look`; the directory holds no model, or a file is too large.
    """
    started = time.monotonic()
    progress = progress or NoProgress()
    fetching.silence(quiet=quiet)
    remote = look(target)
    if not is_verified:
        _verify(output)
    sizes, fingerprints = _sizes(output), _fingerprints(output)
    sums = _sums(output, sizes, jobs, progress)
    with push_errors(target):
        remote_files = {} if remote.parent is None else listed(target, remote.parent)
    differing, stale = _differences(output, sums, remote_files), _stale(sums, remote_files)
    return Push(
        output,
        target,
        remote,
        sizes=sizes,
        sums=sums,
        fingerprints=fingerprints,
        differing=differing,
        stale=stale,
        started=started,
    )


def _verify(output: Path) -> None:
    if not output.is_dir():
        raise PushError(
            f"{shown(output)} is not a directory; give the one that dus upscale or dus heal wrote"
        )
    if is_unfinished_healing(output):
        raise PushError(
            f"{shown(output)} is an unfinished run of dus heal, not a model; the same dus heal "
            "command continues it"
        )
    result = verify(output, deep=False)
    if not result.is_sound:
        more = len(result.problems) - 1
        rest = f" (and {more} more: dus verify lists them)" if more else ""
        raise VerificationError(
            f"{shown(output)} does not verify: {result.problems[0]}{rest}; nothing was pushed"
        )


def _files(output: Path) -> list[str]:
    """The files to push: those that dus.json lists; without it, the files of a checkpoint."""
    ours = {*model_files(output, read_record(output)), *indexed_weights(output), checksums.NAME}
    return [name for name in staged_files(output) if name in ours and inside(output, name)]


def _left_here(output: Path) -> list[str]:
    """The files that are not pushed; a folder without any pushed file is one entry, with "/"."""
    pushed = _files(output)
    folders = {name.split("/")[0] for name in pushed if "/" in name}
    others = (name for name in staged_files(output) if name not in pushed)
    cut = (
        name if "/" not in name or name.split("/")[0] in folders else f"{name.split('/')[0]}/"
        for name in others
    )
    return list(dict.fromkeys(cut))


def _sizes(output: Path) -> dict[str, int]:
    sizes = {name: (output / name).stat().st_size for name in _files(output)}
    _check_sizes(sizes)
    return sizes


def _check_sizes(sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if size > LARGEST_FILE:
            raise PushError(
                f"{shown(name)} has {human_bytes(size)}, and the Hub's limit is "
                f"{human_bytes(LARGEST_FILE)}; "
                "make the model again with a smaller --max-shard-size, such as 5GB"
            )


def _fingerprints(output: Path) -> dict[str, Fingerprint | None]:
    return {name: fingerprint(output / name) for name in _files(output)}


def _sums(output: Path, sizes: Mapping[str, int], jobs: int, progress: Progress) -> dict[str, str]:
    """SHA-256 of every file, hexadecimal.

    Raises:
        VerificationError: SHA256SUMS, if there is one, has other sums or lacks a file.
    """
    progress.start("summing", sum(sizes.values()))
    with workers(jobs) as (pool, stop):

        def sum_of(name: str) -> str:
            with reading(name):
                return checksums.file_sum(output / name, stop, progress.advance)

        sums = dict(zip(sizes, pool.map(sum_of, sizes), strict=True))
    expected, problems = checksums.expected_sums(output)
    expected = {
        name: total
        for name, total in expected.items()
        if name in sums or not (output / name).is_file()
    }
    uncovered = sorted(name for name in sums if name not in expected and name != checksums.NAME)
    if checksums.are_in(output) and uncovered:
        problems.append(checksums.lacking(uncovered))
    wrong = [name for name, total in expected.items() if sums.get(name) != total]
    if wrong or problems:
        problem = (
            f"{shown_list(wrong)} does not match its sum in {checksums.NAME}"
            if wrong
            else problems[0]
        )
        raise VerificationError(f"{shown(output)} does not verify: {problem}; nothing was pushed")
    return sums


# --- what the Hub has ----------------------------------------------------------------------------


def _differences(
    output: Path, sums: Mapping[str, str], remote_files: Mapping[str, RepoFile]
) -> list[str]:
    """The files that the Hub does not hold, or holds with other bytes.

    The Hub gives the SHA-256 of a large file, and git's SHA-1 of a small one.
    """

    def is_held(name: str) -> bool:
        entry = remote_files.get(name)
        if entry is None:
            return False
        return (
            entry.blob_id == _git_sum(output / name)
            if entry.lfs is None
            else entry.lfs.sha256 == sums[name]
        )

    return [name for name in sums if not is_held(name)]


def _git_sum(path: Path) -> str:
    """Git's id of a file's content: a SHA-1 over its length and bytes (git-hash-object(1))."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    for piece in file_pieces(path, path.name):
        digest.update(piece)
    return digest.hexdigest()


def _stale(sums: Mapping[str, str], remote_files: Mapping[str, RepoFile]) -> list[str]:
    """Files of an earlier model on the branch: its weights, records and pictures. Files that dus
    did not write are left alone.
    """
    ours = (*_OF_A_MODEL, *WRITTEN_ANEW, *OF_A_HEALING)

    def is_ours(name: str) -> bool:
        return any(fnmatch(PurePosixPath(name).parts[0], pattern) for pattern in ours)

    return sorted(name for name in remote_files if name not in sums and is_ours(name))


def _until_signalled(work: Callable[[], _Result]) -> _Result:
    """Call `work` in a thread and return its result. A signal ends the wait at once, whatever the
    library's threads are doing.

    Raises:
        StoppedError: a signal came. What was uploaded stays on the Hub.
    """
    results: list[_Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  (raised again below)
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        # in short waits: a signal that another thread receives would not end a long one
        while thread.is_alive():
            thread.join(0.1)
    except BaseException as error:
        signum = getattr(error, "signum", None)
        if signum is None:
            raise
        raise StoppedError(
            f"ended by {signal.Signals(signum).name}; what was sent stays on the Hub, and the "
            "same command continues",
            signum,
        ) from None
    if failures:
        raise failures[0]
    return results[0]
