"""Write results into a model card: README.md's metadata, as the Hub's `model-index` (hub-docs,
modelcard.md).

Only the lines of `model-index` change; every other byte of the card stays. A result replaces an
earlier result of `dus eval` for the same task and data. All other results stay.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dus_cli.common.files import sync_file, writing
from dus_cli.common.reference import ModelRef
from dus_cli.errors import EvaluationError, shown
from dus_cli.evaluation.report import EvalReport, ModelResult
from dus_cli.evaluation.tasks import TaskScore
from dus_cli.release import checksums
from dus_cli.release.front_matter import FRONT, RESULTS, field_span
from dus_cli.source.reading import open_regular

NAME = "README.md"

# Marks results of `dus eval`, on the Hub and for a later update.
_SOURCE = {"name": "dus eval", "url": "https://pypi.org/project/dus-cli/"}

# The type of a data set that is not on the Hub: the loader in `datasets` for its files.
_LOADERS = {".jsonl": "json", ".parquet": "parquet", ".txt": "text"}

_MAX_BYTES = 16_000_000


# --- the results ----------------------------------------------------------------------------------


def results_of(report: EvalReport, ref: ModelRef) -> list[dict[str, Any]]:
    """A model's results as entries of model-index."""
    entries = []
    if report.losses is not None:
        model = next(
            model for model in report.losses.models if model.model == ref.text and not model.is_base
        )
        options, text = report.losses.options, report.losses.text_name
        data = {
            "name": text,
            "type": next((loader for suffix, loader in _LOADERS.items() if suffix in text), "text"),
            "args": {
                "documents": report.losses.num_documents,
                "bytes": report.losses.num_bytes,
                "seq_length": options.seq_length,
                "stride": options.stride,
            },
        }
        entries.append(_entry(data, _loss_metrics(model)))
    if report.tasks is not None:
        scores = next(model.scores for model in report.tasks.models if model.model == ref.text)
        entries += [
            _entry(_task_data(score, report.tasks.options.limit), [_task_metric(score)])
            for score in scores
        ]
    return entries


def _entry(data: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    task = {"type": "text-generation", "name": "Text Generation"}
    return {"task": task, "dataset": data, "metrics": metrics, "source": dict(_SOURCE)}


def _loss_metrics(model: ModelResult) -> list[dict[str, Any]]:
    return [
        {"type": "loss", "value": round(model.loss.value, 4), "name": "loss (nats per token)"},
        {"type": "perplexity", "value": float(f"{model.perplexity:.6g}"), "name": "perplexity"},
        {
            "type": "bits_per_byte",
            "value": round(model.bits_per_byte.value, 4),
            "name": "bits per byte",
        },
    ]


def _task_data(score: TaskScore, limit: int | None) -> dict[str, Any]:
    args = {"num_few_shot": score.num_fewshot, "limit": limit}
    kept = {key: value for key, value in args.items() if value is not None}
    return {"name": score.label, "type": score.dataset or score.task} | (
        {"args": kept} if kept else {}
    )


def _task_metric(score: TaskScore) -> dict[str, Any]:
    value = round(100 * score.value, 2) if score.is_share else round(score.value, 6)
    return {"type": score.metric, "value": value, "name": score.metric.replace("_", " ")}


def _identity(entry: Any) -> Any:
    """Equal for entries of the same measurement: task, data, shots, and the tool that measured."""
    task, data, source = (_fields(entry, key) for key in ("task", "dataset", "source"))
    shots = _fields(data, "args").get("num_few_shot")
    return task.get("type"), data.get("type"), data.get("name"), shots, source.get("name")


def _fields(entry: Any, key: str) -> dict[str, Any]:
    fields = entry.get(key) if isinstance(entry, dict) else None
    return fields if isinstance(fields, dict) else {}


# --- the text of a card ---------------------------------------------------------------------------


def updated(card: str, name: str, results: Sequence[dict[str, Any]]) -> str:
    """The card's text with these results; `name` is the model's name in a new index.

    Raises:
        EvaluationError: its metadata is not YAML, or not in the Hub's format.
    """
    match = FRONT.match(card)
    if match is None:
        newline = "\r\n" if "\r\n" in card else "\n"
        mark = "\ufeff" if card.startswith("\ufeff") else ""
        block = _block(_merged(None, name, results), newline)
        return f"{mark}---{newline}{block}---{newline}{card.removeprefix(mark)}"
    opening, newline, front = match.group(1, 2, 3)
    before = _parsed(front)
    index = _merged(before.get(RESULTS), name, results)
    if index == before.get(RESULTS):
        return card
    start, end = field_span(front, RESULTS)
    gap = newline if front[:start] and not front[:start].endswith("\n") else ""
    changed = front[:start] + gap + _block(index, newline) + front[end:]
    try:
        is_right = _parsed(changed) == before | {RESULTS: index}
    except EvaluationError:
        is_right = False
    if not is_right:
        raise EvaluationError(
            f"{NAME}: its metadata cannot be changed in one place (it is one line, or has "
            "references); write it plainly"
        )
    return opening + changed + card[match.end(3) :]


def _parsed(front: str) -> dict[str, Any]:
    try:
        metadata = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise EvaluationError(
            f"{NAME}: the metadata at its beginning is not YAML "
            f"({shown(' '.join(str(error).split()))}); mend it"
        ) from error
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise EvaluationError(
            f"{NAME}: the metadata at its beginning is not a list of fields; mend it"
        )
    return metadata


def _merged(index: Any, name: str, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The index with the results: each replaces its predecessor or is appended."""
    if index is None:
        return [{"name": name, "results": list(results)}]
    is_known = isinstance(index, list) and index and isinstance(index[0], dict)
    if not is_known or not isinstance(index[0].get("results", []), list):
        raise EvaluationError(
            f"{NAME}: its {RESULTS} is not in the Hub's format, a list of models with results; "
            "mend it"
        )
    entries = list(index[0].get("results", []))
    for result in results:
        same = [k for k, entry in enumerate(entries) if _identity(entry) == _identity(result)]
        if same:
            entries[same[0]] = result
        else:
            entries.append(result)
    return [index[0] | {"results": entries}, *index[1:]]


def _block(index: list[dict[str, Any]], newline: str) -> str:
    text: str = yaml.safe_dump({RESULTS: index}, sort_keys=False, allow_unicode=True, width=10_000)
    return text.replace("\n", newline)


# --- the file -------------------------------------------------------------------------------------


def check_card(ref: ModelRef) -> None:
    """Check that results can be written into a model's card, before anything is measured.

    Raises:
        EvaluationError: the model is on the Hub, or its card is missing or cannot be read.
    """
    if ref.path is None:
        raise EvaluationError(
            f"--update-card: {shown(ref)} is on the Hub; give a directory, or leave the option out"
        )
    updated(_read(ref.path), ref.name, [])


def update_card(folder: Path, name: str, results: Sequence[dict[str, Any]]) -> bool:
    """Write results into a directory's README.md, and its sum into SHA256SUMS; return whether
    anything changed.

    Each of the two files is replaced in one step. Concurrent updates of the card wait.

    Raises:
        EvaluationError: the card is missing, or its metadata cannot be read.
        OutputError: writing failed.
    """
    with _locked(folder):
        card = _read(folder)
        changed = updated(card, name, results)
        if changed != card:
            _replace(folder / NAME, changed)
        return _refresh_sum(folder) or changed != card


def _read(folder: Path) -> str:
    path = folder / NAME
    try:
        if path.is_symlink():
            raise EvaluationError(
                f"{shown(path)} is a symbolic link, whose target would not change; copy the file "
                "here"
            )
        with open_regular(path) as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise EvaluationError(
            f"{shown(folder)} has no {NAME} for the results; write a card first, or leave out "
            "--update-card"
        ) from None
    except OSError as error:
        raise EvaluationError(
            f"cannot read {shown(path)}: {error.strerror}; check the file"
        ) from error
    if len(content) > _MAX_BYTES:
        raise EvaluationError(
            f"{shown(path)} is larger than {_MAX_BYTES:,} bytes, too large for a card; shorten it"
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{shown(path)} is not UTF-8 (byte {error.start}); convert it with iconv"
        ) from error


def _refresh_sum(folder: Path) -> bool:
    """Update the card's sum in SHA256SUMS, if it is listed; return whether it changed."""
    path = folder / checksums.NAME
    if not path.is_file():
        return False
    total = hashlib.sha256((folder / NAME).read_bytes()).hexdigest()
    sums = path.read_text(encoding="utf-8", errors="surrogateescape")
    line = re.compile(rf"^[0-9a-fA-F]{{64}}(?=[ ][ *](?:\./)?{re.escape(NAME)}\r?$)", re.MULTILINE)
    changed = line.sub(total, sums)
    if changed == sums:
        return False
    _replace(path, changed)
    return True


def _replace(path: Path, text: str) -> None:
    """Replace a file's content in one step and keep its mode."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path.name):
            partial.write_bytes(text.encode(errors="surrogateescape"))
            shutil.copymode(path, partial)
        sync_file(partial)
        with writing(path.name):
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # held until the file is closed
        yield
    finally:
        os.close(file)
