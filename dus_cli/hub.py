"""Fetch a model from the Hub with huggingface_hub, into its own cache.

huggingface_hub is imported only when a Hub id is used: it takes longer to import than a reflinked upscale
takes to run. It reads HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE itself.
"""

from __future__ import annotations

import errno
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_cli import __version__
from dus_cli.checkpoint import (
    INDEX_NAME,
    PICKLED_INDEX_NAME,
    PICKLED_NAME,
    SINGLE_NAME,
    HeaderReader,
    Index,
    find_weights,
    is_pickled,
    read_config,
)
from dus_cli.errors import CheckpointError, ModelNotFoundError, shown
from dus_cli.headers import Header, header_length, parse_header
from dus_cli.pickles import parse_pickled
from dus_cli.reference import ModelRef
from dus_cli.source_files import OTHER_FORMAT_FOLDERS, WEIGHT_PATTERNS

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

# Most headers fit: one request then gives the length and the JSON (huggingface_hub does the same).
_FIRST_BYTES = 100_000

# What an HTTP client waits for, by the names in httpx's requests.
_WAITS = ("connect", "read", "write", "pool")

LIBRARY = "dus"  # who asks, in the Hub's logs


def fetch_small_files(ref: ModelRef, *, quiet: bool = False) -> tuple[Path, str]:
    """Everything but weights, and the weights' index: the snapshot's folder and its commit.

    The index of pickled weights comes only where there are no safetensors.

    The revision is resolved here, once; the snapshot's folder is named after the commit.

    Raises:
        ModelNotFoundError: the Hub cannot serve it; one line for each reason.
    """
    silence(quiet=quiet)
    ignored = [case for p in WEIGHT_PATTERNS if p != "*.safetensors.index.json" for case in (p, p.upper())]
    ignored += [f"{folder}/*" for folder in OTHER_FORMAT_FOLDERS]
    folder = _snapshot(ref, ref.revision, ignored=ignored)
    if find_weights(folder) is None:
        _fetch_pickled_index(ref, folder.name)
    return folder, folder.name


def _snapshot(
    ref: ModelRef, revision: str | None, *, only: list[str] | None = None, ignored: list[str] | None = None
) -> Path:
    """Bring the files that match into the cache; the snapshot's folder."""
    from huggingface_hub import snapshot_download

    assert ref.repo_id is not None
    with _hub_errors(ref):
        _prepare(ref)
        folder = snapshot_download(
            ref.repo_id,
            revision=revision,
            allow_patterns=only,
            ignore_patterns=ignored,
            token=ref.token,
            library_name=LIBRARY,
            library_version=__version__,
        )
    return Path(folder)


def _fetch_pickled_index(ref: ModelRef, commit: str) -> None:
    from huggingface_hub import HfApi

    assert ref.repo_id is not None
    # A Hub that cannot be reached is no failure yet: whoever needs the weights says so.
    with suppress(ModelNotFoundError), _hub_errors(ref):
        if not HfApi(token=ref.token).file_exists(ref.repo_id, SINGLE_NAME, revision=commit):
            _snapshot(ref, commit, only=[PICKLED_INDEX_NAME])


def fetch_weights(ref: ModelRef, folder: Path, commit: str) -> None:
    """The shards that the index names, or the one file of weights. Cached ones are not fetched again.

    No other pickle is fetched: not training_args.bin, not the optimizer's state.

    Raises:
        ModelNotFoundError: the Hub cannot serve them.
        CheckpointError: the repo has neither safetensors nor pickled weights.
    """
    read_config(folder)  # says what it is where it is no decoder, before gigabytes are moved
    weights = find_weights(folder)
    if isinstance(weights, Index):
        names = weights.shard_names
        _snapshot(ref, commit, only=names)
        for name in names:
            if not (folder / name).exists():
                raise _not_there(ref, name, weights.name)
        return
    for name in (SINGLE_NAME, PICKLED_NAME) if weights is None else (weights,):
        _snapshot(ref, commit, only=[name])
        if (folder / name).exists():
            return
    raise _no_weights(ref)


def _not_there(ref: ModelRef, name: str, index_name: str) -> CheckpointError:
    return CheckpointError(f"{ref} has no {shown(name)} on the Hub, which its {index_name} names; tell its owner")


def _no_weights(ref: ModelRef) -> CheckpointError:
    return CheckpointError(
        f"{ref} has neither {SINGLE_NAME} nor {PICKLED_NAME} nor an index of either on the Hub; dus reads no other "
        "weights, look for a conversion (the repo's refs/pr branches often hold one)"
    )


def remote_headers(ref: ModelRef, commit: str) -> HeaderReader:
    """A reader of shard headers that fetches just those, by range request: at most some 100 kB a shard.

    Of a pickled shard it fetches the zip's directory and the pickle, about as much.
    """
    from huggingface_hub import HfFileSystem

    def read(name: str) -> Header | None:
        with _hub_errors(ref):
            _prepare(ref)
            hub = HfFileSystem(token=ref.token)
            header = (_read_remote_pickle if is_pickled(name) else _read_remote)(hub, ref, commit, name)
        if header is None and name == PICKLED_NAME:
            raise _no_weights(ref)
        if header is None and name != SINGLE_NAME:
            raise _not_there(ref, name, PICKLED_INDEX_NAME if is_pickled(name) else INDEX_NAME)
        return header

    return read


def _read_remote(hub: HfFileSystem, ref: ModelRef, commit: str, name: str) -> Header | None:
    remote = f"{ref.repo_id}@{commit}/{name}"
    try:
        size = int(hub.info(remote)["size"])
    except FileNotFoundError:
        return None
    first = _read_range(hub, remote, 0, min(size, _FIRST_BYTES))
    length = header_length(first[:8], size, shown(name))
    raw = first[8 : 8 + length]
    if len(raw) < length:
        raw += _read_range(hub, remote, len(first), 8 + length)
    if len(raw) != length:
        raise CheckpointError(f"the Hub gave {len(raw)} bytes of {shown(name)}'s header of {length}; try again")
    return parse_header(raw, size, shown(name))


def _read_remote_pickle(hub: HfFileSystem, ref: ModelRef, commit: str, name: str) -> Header | None:
    try:
        file = hub.open(f"{ref.repo_id}@{commit}/{name}", "rb", block_size=_FIRST_BYTES)
    except FileNotFoundError:
        return None
    with file:
        return parse_pickled(file, shown(name), at_hand=False)


def _read_range(hub: HfFileSystem, remote: str, start: int, end: int) -> bytes:
    raw = hub.cat_file(remote, start=start, end=end, cache_type="none")  # its default reads 5 MiB further
    assert isinstance(raw, bytes)
    return raw


def silence(*, quiet: bool) -> None:
    """No chatter from huggingface_hub; its progress bars only for a person who did not ask for quiet."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _prepare(ref: ModelRef) -> None:
    """Before a request: refuse a token whose text an HTTP library would show in its own error; limit the time.

    Raises:
        ModelNotFoundError: the token of the environment, or the stored one, is damaged.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # it exports lazily

    token = build_hf_headers(token=ref.token).get("authorization", "").removeprefix("Bearer ")
    if not (token.isascii() and token.isprintable()):
        raise ModelNotFoundError("the Hub's token has characters that no token has: set HF_TOKEN, or log in, again")
    hooks = get_session().event_hooks["request"]
    if limit_time not in hooks:
        hooks.append(limit_time)


def limit_time(request: Any, seconds: float | None = None) -> None:
    """Let no request wait for ever, as huggingface_hub's for a commit and for a list of files would."""
    from huggingface_hub import constants

    limit = constants.HF_HUB_ETAG_TIMEOUT if seconds is None else seconds
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {what: limit if limits.get(what) is None else limits[what] for what in _WAITS}


def tried(started: float) -> str:
    """How long it was tried, where that was more than a moment."""
    seconds = time.monotonic() - started
    return f" (tried for {seconds:.0f} s)" if seconds > 2 else ""


@contextmanager
def _hub_errors(ref: ModelRef) -> Iterator[None]:
    """Turn huggingface_hub's errors into one line each."""
    from huggingface_hub import constants, errors

    started = time.monotonic()
    here = f"; a directory of that name exists here: write ./{ref.repo_id} for it" if Path(str(ref)).is_dir() else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{ref.repo_id} is gated: ask for access at {constants.ENDPOINT}/{ref.repo_id}, then give --token, set "
            "HF_TOKEN or run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{ref.repo_id} is not on the Hub, or is private and the token, if there is one, may not read it: give "
            f"--token, set HF_TOKEN or run `hf auth login`{here}"
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
                f"{ref} is not (wholly) in the cache and the Hub cannot be reached{tried(started)}; check the "
                f"network, HF_ENDPOINT and HF_HUB_OFFLINE{here}"
            ) from error
        status = answer.response.status_code
        advice = "renew the token: --token, HF_TOKEN or `hf auth login`" if status == 401 else "try again later"
        raise ModelNotFoundError(f"the Hub answered {status} for {ref}{tried(started)}; {advice}{here}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelNotFoundError(
                f"the disk of the Hub's cache is full while fetching {ref}; free some space or set HF_HOME elsewhere"
            ) from error
        raise ModelNotFoundError(f"cannot fetch {ref} from the Hub: {shown(error)}{here}") from error
    except (errors.HTTPError, RuntimeError) as error:  # type: ignore[attr-defined]  # httpx's; hf_xet's
        raise ModelNotFoundError(
            f"the connection to the Hub failed for {ref}{tried(started)}: {shown(error).rstrip('.')}; try again, or "
            f"check HF_ENDPOINT{here}"
        ) from error
    except (struct.error, ValueError) as error:
        raise ModelNotFoundError(f"the Hub's answer for {ref} makes no sense: {shown(error)}{here}") from error
