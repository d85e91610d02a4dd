"""The text of a run: found and tokenised, or with `--stream` begun with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_cli.common.reference import user_path
from dus_cli.data.sources import Source, parse_heldout, parse_sources
from dus_cli.errors import HealError
from dus_cli.heal.launch import resolve
from dus_cli.heal.launch.resolve import Model
from dus_cli.heal.options import DEFAULT_CACHE, DataOptions, HealOptions
from dus_cli.heal.run import CACHE_VARIABLE, Run
from dus_cli.heal.watch.views import View

if TYPE_CHECKING:
    from dus_cli.data.shelf import Shelf
    from dus_cli.data.streams import Prepared


@dataclass
class PreparedData:
    """`Prepared` as JSON, and the rows of an epoch; estimated if the text is still tokenised."""

    record: dict[str, Any]
    rows_per_epoch: int


def tokens_folder(options: HealOptions) -> Path:
    """Where the token files are kept: in OUT, or in the cache."""
    cache = options.data.token_cache
    return options.output.resolve() / "tokens" if cache is None else user_path(cache).resolve()


def prepare_data(options: HealOptions, model: Model, folder: Path, view: View) -> PreparedData:
    """Tokenise all data into `folder`, except what is tokenised there already; with `--stream` only
    the beginning of it.

    Raises:
        DataError: the data cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    view.status("tokenising")
    prepared = _prepared(options, model, folder, view)
    if not prepared.num_heldout_tokens:
        raise HealError(
            "the held-out set is empty, and without one nothing is proven; give --eval-data or "
            "--holdout"
        )
    length = resolve.seq_length(options, model)
    return PreparedData(prepared.to_json(), _rows_per_epoch(prepared, folder, length, options))


def _prepared(options: HealOptions, model: Model, folder: Path, view: View) -> Prepared:
    from dus_cli.data.segments import begin
    from dus_cli.data.shelf import prepare

    data, wait = options.data, options.launch.nnodes > 1
    sources, eval_sources = sources_of(data, folder, view.note)
    shelf = open_shelf(data, options.model, folder, model.vocab_size, view.tokenising)
    if not data.stream:
        return prepare(shelf, sources, eval_sources, holdout=data.holdout, wait=wait, say=view.note)
    prepared = begin(
        shelf,
        sources,
        eval_sources,
        holdout=data.holdout,
        window_tokens=data.window_tokens,
        wait=wait,
        say=view.note,
    )
    assert prepared.growing is not None
    cache = None if data.token_cache is None else str(folder)
    return replace(prepared, growing=replace(prepared.growing, cache=cache))


@contextmanager
def room_for(run: Run, data: DataOptions, folder: Path) -> Iterator[None]:
    """Room for the run's tokens in this node's cache `folder`, if it uses one, and its streams
    marked as used. The processes that are started meanwhile use this folder.

    Raises:
        DataError: they do not fit.
    """
    from dus_cli.data.cache import in_use, make_room
    from dus_cli.data.streams import Prepared

    prepared = Prepared.from_json(run.data)
    if prepared.growing is None or prepared.growing.cache is None:
        yield
        return
    keys = prepared.growing.keys
    with in_use(folder, keys), _this_nodes_cache(folder):
        make_room(folder, keys, _limit(data), num_bytes=token_bytes(run, prepared))
        yield


def _limit(data: DataOptions) -> int:
    return data.token_cache_size or DEFAULT_CACHE


@contextmanager
def _this_nodes_cache(folder: Path) -> Iterator[None]:
    """Name the folder in the environment, for `Run.tokens_folder` here and in other processes."""
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = str(folder)
    try:
        yield
    finally:
        del os.environ[CACHE_VARIABLE]
        if before is not None:
            os.environ[CACHE_VARIABLE] = before


def token_bytes(run: Run, prepared: Prepared) -> int:
    """About how many bytes the token files of a run take that tokenises while it trains."""
    from dus_cli.data.growing import GrowingRows

    rows = GrowingRows(prepared, run.tokens_folder, run.seq_length, run.recipe.seed)
    return rows.num_bytes(run.num_steps * run.rows_per_step)


def _rows_per_epoch(prepared: Prepared, folder: Path, length: int, options: HealOptions) -> int:
    from dus_cli.data.growing import GrowingRows, open_rows

    rows = open_rows(prepared, folder, length, options.recipe.seed)
    if isinstance(rows, GrowingRows):
        rows.check_not_empty()
    return rows.rows_per_epoch


def sources_of(
    data: DataOptions, folder: Path, say: Callable[[str], object] = lambda _: None
) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """The training data and the evaluation data; standard input is copied into `folder`. `say` is
    called with a line of text for a person.

    Raises:
        DataError: a file is missing, or cannot be read.
    """
    name, _ = data.field
    return (
        parse_sources(data.files, folder, name, say=say),
        parse_heldout(data.eval_files, folder, name, say=say),
    )


def open_shelf(
    data: DataOptions,
    model: Path,
    folder: Path,
    vocab_size: int | None,
    on_progress: Callable[[int, int], object] = lambda _done, _total: None,
) -> Shelf:
    """The token files of a run, and how they are made. `on_progress` is called with bytes done and
    bytes in all.

    Raises:
        DataError: the model has no tokenizer.
    """
    from dus_cli.data.cache import make_room
    from dus_cli.data.documents import Reading
    from dus_cli.data.shelf import Shelf

    def keep_bound(keys: Sequence[str]) -> None:
        if data.token_cache is not None:
            make_room(folder, keys, _limit(data))

    name, column = data.field
    return Shelf(
        folder,
        model,
        vocab_size,
        reading=Reading(name, data.on_bad_line, data.weight_field),
        on_progress=on_progress,
        special_tokens=data.special_tokens,
        column=column,
        make_room=keep_bound,
    )
