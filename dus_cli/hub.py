"""Fetch a model from the Hub with huggingface_hub, into its own cache.

huggingface_hub is imported here only, and only when a Hub id is used: it takes longer to import than
a reflinked upscale takes to run. It reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE itself.
"""

from __future__ import annotations

import errno
import logging
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dus_cli.checkpoint import INDEX_NAME, SINGLE_NAME, HeaderReader, read_config, read_index
from dus_cli.errors import CheckpointError, ModelNotFoundError, shown
from dus_cli.headers import Header, header_length, parse_header
from dus_cli.reference import ModelRef
from dus_cli.source_files import OTHER_FORMAT_FOLDERS, WEIGHT_PATTERNS

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

# Most headers fit: one request then gives the length and the JSON (huggingface_hub does the same).
_FIRST_BYTES = 100_000


def fetch_small_files(ref: ModelRef, *, quiet: bool = False) -> tuple[Path, str]:
    """Everything but weights, and the index of the safetensors: the snapshot's folder and its commit.

    The revision is resolved here, once; the snapshot's folder is named after the commit.

    Raises:
        ModelNotFoundError: the Hub cannot serve it; one line for each reason.
    """
    from huggingface_hub import snapshot_download

    _silence(quiet)
    ignored = [case for p in WEIGHT_PATTERNS if p != "*.safetensors.index.json" for case in (p, p.upper())]
    ignored += [f"{folder}/*" for folder in OTHER_FORMAT_FOLDERS]
    assert ref.repo_id is not None
    with _hub_errors(ref):
        folder = Path(snapshot_download(ref.repo_id, revision=ref.revision, ignore_patterns=ignored))
    return folder, folder.name


def fetch_weights(ref: ModelRef, folder: Path, commit: str) -> None:
    """The safetensors shards that the index names, or model.safetensors. Cached ones are not fetched again.

    Raises:
        ModelNotFoundError: the Hub cannot serve them.
        CheckpointError: the repo has no safetensors.
    """
    from huggingface_hub import snapshot_download

    read_config(folder)  # says what it is where it is no decoder, before gigabytes are moved
    names = _shard_names(folder)
    assert ref.repo_id is not None
    with _hub_errors(ref):
        snapshot_download(ref.repo_id, revision=commit, allow_patterns=names)
    for name in names:
        if not (folder / name).exists():
            raise _not_there(ref, name)


def _not_there(ref: ModelRef, name: str) -> CheckpointError:
    if name != SINGLE_NAME:
        return CheckpointError(f"{ref} has no {shown(name)} on the Hub, which its {INDEX_NAME} names; tell its owner")
    return CheckpointError(
        f"{ref} has no {SINGLE_NAME} and no {INDEX_NAME} on the Hub; dus reads safetensors only, look for a "
        "conversion (the repo's refs/pr branches often hold one)"
    )


def _shard_names(folder: Path) -> list[str]:
    if not (folder / INDEX_NAME).exists():
        return [SINGLE_NAME]
    return read_index(folder).shard_names


def remote_headers(ref: ModelRef, commit: str) -> HeaderReader:
    """A reader of shard headers that fetches just those, by range request: at most some 100 kB a shard."""
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem()

    def read(name: str) -> Header:
        with _hub_errors(ref):
            return _read_remote(hub, ref, commit, name)

    return read


def _read_remote(hub: HfFileSystem, ref: ModelRef, commit: str, name: str) -> Header:
    remote = f"{ref.repo_id}@{commit}/{name}"
    try:
        size = int(hub.info(remote)["size"])
    except FileNotFoundError:
        raise _not_there(ref, name) from None
    first = _read_range(hub, remote, 0, min(size, _FIRST_BYTES))
    length = header_length(first[:8], size, shown(name))
    raw = first[8 : 8 + length]
    if len(raw) < length:
        raw += _read_range(hub, remote, len(first), 8 + length)
    if len(raw) != length:
        raise CheckpointError(f"the Hub gave {len(raw)} bytes of {shown(name)}'s header of {length}; try again")
    return parse_header(raw, size, shown(name))


def _read_range(hub: HfFileSystem, remote: str, start: int, end: int) -> bytes:
    raw = hub.cat_file(remote, start=start, end=end, cache_type="none")  # its default reads 5 MiB further
    assert isinstance(raw, bytes)
    return raw


def _silence(quiet: bool) -> None:
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@contextmanager
def _hub_errors(ref: ModelRef) -> Iterator[None]:
    """Turn huggingface_hub's errors into one line each."""
    from huggingface_hub import errors

    here = f"; a directory of that name exists here: write ./{ref} for it" if Path(ref.text).is_dir() else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{ref.repo_id} is gated: ask for access on its page, then set HF_TOKEN or run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{ref.repo_id} is not on the Hub, or is private (then set HF_TOKEN or run `hf auth login`){here}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{ref.repo_id} has no revision {shown(ref.revision)}; see its branches") from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{shown(ref)} is not a valid Hub id: {shown(error)}{here}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError) as error:
        # After a bad answer snapshot_download looks into the cache, and then says only that it is not there.
        answer = error if isinstance(error, errors.HfHubHTTPError) else error.__cause__
        if not isinstance(answer, errors.HfHubHTTPError):
            raise ModelNotFoundError(
                f"{ref} is not (wholly) in the cache and the Hub cannot be reached; check the network, HF_ENDPOINT "
                f"and HF_HUB_OFFLINE{here}"
            ) from error
        status = answer.response.status_code
        advice = "renew the token: HF_TOKEN or `hf auth login`" if status == 401 else "try again later"
        raise ModelNotFoundError(f"the Hub answered {status} for {ref}; {advice}{here}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelNotFoundError(
                f"the disk of the Hub's cache is full while fetching {ref}; free some space or set HF_HOME elsewhere"
            ) from error
        raise ModelNotFoundError(f"cannot fetch {ref} from the Hub: {shown(error)}{here}") from error
    except (errors.HTTPError, RuntimeError) as error:  # type: ignore[attr-defined]  # httpx's; hf_xet's
        raise ModelNotFoundError(
            f"the connection to the Hub failed for {ref}: {shown(error).rstrip('.')}; try again, or check "
            f"HF_ENDPOINT{here}"
        ) from error
    except (struct.error, ValueError) as error:
        raise ModelNotFoundError(f"the Hub's answer for {ref} makes no sense: {shown(error)}{here}") from error
