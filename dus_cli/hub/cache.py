"""Which file or ref of a model huggingface_hub's cache lacks, for errors if the Hub cannot be
reached.

The cache's layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache. A ref names a
commit, its snapshot holds links to blobs, and a blob that is being fetched ends in `.incomplete`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from dus_cli.common.reference import ModelRef
from dus_cli.errors import ModelNotFoundError, shown, shown_list

_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


def not_cached(ref: ModelRef, folder: Path, names: Sequence[str]) -> ModelNotFoundError:
    """The error for files that a snapshot lacks and that cannot be fetched."""
    problem = _broken_links(folder) or f"it lacks {shown_list(list(names))}"
    problem += _cut_off(folder.parent.parent)
    return ModelNotFoundError(f"{ref} is not (wholly) in the cache: {problem}; {way_out()}")


def check_snapshot(ref: ModelRef, folder: Path) -> None:
    """Check that a snapshot's folder is named after a commit: for an empty ref huggingface_hub
    returns the parent folder of all snapshots.

    Raises:
        ModelNotFoundError: it is not.
    """
    if not _COMMIT.fullmatch(folder.name):
        raise ModelNotFoundError(f"{ref} is not (wholly) in the cache: {missing(ref)}; {way_out()}")


def missing(ref: ModelRef) -> str:
    """Which part of a model the cache lacks, by its ref, its snapshot and the list of its files."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    assert ref.repo_id is not None
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    repo = cache / repo_folder_name(repo_id=ref.repo_id, repo_type="model")
    try:
        return _missing(ref, cache, repo)
    except OSError as error:
        return f"{shown(error.filename)} cannot be read ({error.strerror})"


def _missing(ref: ModelRef, cache: Path, repo: Path) -> str:
    if not repo.is_dir():
        return f"nothing of it is in {shown(cache)}"
    revision = ref.revision or "main"
    commit = revision if _COMMIT.fullmatch(revision) else None
    if commit is None:
        path = repo / "refs" / revision
        if not path.is_file():
            commits = sorted(snapshot.name for snapshot in (repo / "snapshots").glob("*"))
            advice = f"; give a commit instead: {ref.repo_id}@{commits[0]}" if commits else ""
            return f"there is no refs/{shown(revision)}, which names the commit{advice}"
        text = path.read_text(encoding="utf-8", errors="replace")
        if text != text.strip() and _COMMIT.fullmatch(text.strip()):
            return (
                f"refs/{shown(revision)} has white space around the commit, which huggingface_hub "
                "takes as part of "
                f"it (correct it: printf %s {text.strip()} > {shlex.quote(str(path))})"
            )
        if not _COMMIT.fullmatch(text):
            return f"refs/{shown(revision)} holds {shown(text)!r}, which is not a commit"
        commit = text
    snapshot = repo / "snapshots" / commit
    if not snapshot.is_dir():
        return f"there is no snapshots/{commit}, the commit of revision {shown(revision)}"
    if (broken := _broken_links(snapshot)) is not None:
        return broken + _cut_off(repo)
    if lacking := _lacking_by_list(ref, commit, snapshot):
        return f"it lacks {shown_list(lacking)}{_cut_off(repo)}"
    return f"snapshots/{commit} lacks files{_cut_off(repo)}"


def _lacking_by_list(ref: ModelRef, commit: str, snapshot: Path) -> list[str]:
    """Files of a commit that its snapshot lacks, by the list in the cache; [] without a list."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    assert ref.repo_id is not None
    try:
        listed = get_cached_repo_tree(ref.repo_id, revision=commit)
    except CachedRepoTreeNotFoundError:
        return []
    return sorted(file.path for file in listed if not (snapshot / file.path).exists())


def _broken_links(snapshot: Path) -> str | None:
    broken = sorted(path for path in snapshot.rglob("*") if path.is_symlink() and not path.exists())
    if not broken:
        return None
    names = [path.relative_to(snapshot).as_posix() for path in broken]
    return f"the blob of {shown_list(names)} is missing (blobs/{shown(broken[0].readlink().name)})"


def _cut_off(repo: Path) -> str:
    """How many bytes of an interrupted download the cache has, in words."""
    sizes = [path.stat().st_size for path in (repo / "blobs").glob("*.incomplete")]
    return f" ({sum(sizes):,} bytes of an interrupted download are there)" if sizes else ""


def way_out(tried: str = "") -> str:
    """What to do if the Hub is not used or does not answer. `tried`: for how long it was tried."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            "HF_HUB_OFFLINE is set, so nothing is fetched: unset it, or `hf download` the model "
            "first"
        )
    return f"the Hub cannot be reached{tried}: check the network and HF_ENDPOINT"
