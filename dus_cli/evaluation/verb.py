"""The verb: every model over the same text, one after the other, in memory that does not grow
with the text.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from dus_cli.common.reference import ModelRef
from dus_cli.data.tokeniser import pieces_of
from dus_cli.errors import DataError, EvaluationError, shown
from dus_cli.evaluation.candidates import Candidate, base_layers, check_there, find_candidates
from dus_cli.evaluation.options import ScoringOptions, TaskOptions, TextOptions
from dus_cli.evaluation.report import LossReport, ModelResult
from dus_cli.evaluation.scores import Scores
from dus_cli.evaluation.tasks import Harness, TaskReport, TaskResult
from dus_cli.evaluation.text import Text, open_text
from dus_cli.evaluation.windows import Window, batches, windows
from dus_cli.progress import Progress

_LONGEST_WINDOW = 2048

# Tokens run at once, where nothing was asked for.
_BATCH_TOKENS = {"cpu": 2048}
_BATCH_TOKENS_ELSEWHERE = 16_384


def evaluate(
    refs: Sequence[ModelRef],
    text_options: TextOptions | None,
    options: ScoringOptions,
    progress: Progress,
    *,
    tasks: TaskOptions | None = None,
    with_base: bool = False,
    quiet: bool = True,
) -> tuple[LossReport | None, TaskReport | None]:
    """Losses on the text, and scores in the tasks, of each model; the first is what the others are
    held against.

    Models are loaded one after the other, each once. With `with_base` the first is an up-scaled
    model, and the base inside it comes before it among the losses.

    Raises:
        DusError: any known failure; see `errors`.
    """
    check_there(refs)  # what is known without torch is said before it is loaded
    with tempfile.TemporaryDirectory(prefix="dus-eval-") as spool:
        text = None if text_options is None else open_text(text_options, Path(spool))
        model = import_model()
        device = model.device_of(options.device)
        candidates = find_candidates(
            refs, progress, special_tokens=options.special_tokens, quiet=quiet
        )
        options = resolved(options, candidates, device.type)
        harness = None if tasks is None else Harness(tasks, progress)
        inner = base_layers(candidates[0]) if with_base else None
        passes = (
            None
            if text is None or text_options is None
            else Passes(text, text_options, options, progress)
        )
        scored: list[TaskResult] = []
        for candidate in candidates:
            with model.out_of_memory(candidate.name):
                loaded = model.load(
                    candidate.folder, candidate.name, options.precision.value, device
                )
                if passes is not None:
                    scorer = model.Scorer(loaded, candidate.num_layers, candidate.tokeniser.before)
                    if inner is not None and candidate is candidates[0]:
                        with scorer.only(inner):
                            passes.run(scorer, candidate, is_base=True)
                    passes.run(scorer, candidate)
                    del scorer
                if harness is not None:
                    scored.append(harness.run(loaded, candidate, options))
                del loaded  # before the next one is there
    losses = None if passes is None else passes.report(str(device))
    return losses, None if tasks is None or harness is None else TaskReport(
        tasks, harness.version, tuple(scored)
    )


def import_model() -> Any:
    """`dus_cli.evaluation.scorer`, with torch below it: imported once it is needed."""
    model = import_module("dus_cli.evaluation.scorer")
    model.quiet_libraries()
    return model


def resolved(
    options: ScoringOptions, candidates: Sequence[Candidate], device_type: str
) -> ScoringOptions:
    """The options with every number filled in: one window for all models, which each of them can
    see.

    Raises:
        EvaluationError: a window longer than a model knows positions, or a stride longer than the
            window.
    """
    known = [
        (candidate.max_length, candidate.name)
        for candidate in candidates
        if candidate.max_length is not None
    ]
    shortest, name = min(known, default=(_LONGEST_WINDOW, ""))
    length = options.seq_length or min(_LONGEST_WINDOW, shortest)
    if known and length > shortest:
        raise EvaluationError(
            f"--seq-length {length} is longer than the {shortest} positions that {shown(name)} "
            "knows"
        )
    for candidate in candidates:
        if len(candidate.tokeniser.before) > length:
            raise EvaluationError(
                f"--seq-length {length} has no place behind the {len(candidate.tokeniser.before)} "
                f"tokens with which {shown(candidate.name)} begins a text; choose a larger one, or "
                "--no-special-tokens"
            )
    stride = options.stride or max(1, length // 2)
    if stride > length:
        raise EvaluationError(
            f"--stride {stride} is longer than the window of {length} tokens, and would skip text"
        )
    batch = options.batch_tokens or _BATCH_TOKENS.get(device_type, _BATCH_TOKENS_ELSEWHERE)
    precision = options.precision.on(device_type)
    return replace(
        options, seq_length=length, stride=stride, batch_tokens=batch, precision=precision
    )


class Passes:
    """The passes over the text, of one model after the other."""

    def __init__(
        self, text: Text, text_options: TextOptions, options: ScoringOptions, progress: Progress
    ) -> None:
        self._text, self._text_options = text, text_options
        self._options, self._progress = options, progress
        self._first: Scores | None = None
        self._results: list[ModelResult] = []

    def run(self, scorer: Any, candidate: Candidate, *, is_base: bool = False) -> None:
        """One more model. The first decides by its tokens how many documents there are for all."""
        name = f"base of {candidate.name}" if is_base else candidate.name
        budget = self._text_options.max_tokens if self._first is None else None
        scores = _pass(
            scorer,
            candidate,
            name,
            text=self._text,
            options=self._options,
            budget=budget,
            progress=self._progress,
        )
        first, self._first = self._first, self._first or scores
        if first is None:
            self._text = replace(self._text, max_documents=scores.num_documents)
        elif first.text_digest.digest() != scores.text_digest.digest():
            raise DataError(
                "--data changed while it was read, so the models saw different text; run it again"
            )
        self._results.append(ModelResult.of(candidate, name, scores, first, is_base=is_base))

    def report(self, device: str) -> LossReport:
        first = self._first
        assert first is not None
        return LossReport(
            self._text.name,
            self._text_options.data,
            first.num_documents,
            num_bytes=int(first.text_bytes.total),
            skipped=first.skipped,
            num_units=len(first.text_bytes),
            options=self._options,
            device=device,
            models=tuple(self._results),
            unread=self._text.unread,
        )


def _pass(
    scorer: Any,
    candidate: Candidate,
    name: str,
    text: Text,
    options: ScoringOptions,
    budget: int | None,
    progress: Progress,
) -> Scores:
    """One model over the text."""
    assert options.batch_tokens is not None
    scores, started = Scores(scorer.vocab_size), time.monotonic()
    progress.start(f"evaluating {shown(name)}", text.num_file_bytes)
    cut = _windows(scores, candidate, text, options, budget, progress.advance)
    for batch in batches(cut, options.batch_tokens):
        for window, nats in zip(batch, scorer.losses(batch), strict=True):
            if not math.isfinite(nats):
                raise EvaluationError(
                    f"{shown(name)}: its loss on document {window.document + 1} is {nats}; the "
                    "weights are damaged, or overflow in bf16 (--precision fp32); dus verify "
                    "--base finds tensors that differ from a base's"
                )
            scores.nats.add(window.document, nats)
    if not scores.tokens.total:
        what = "no document of two tokens" if scores.guessed.total else "no text"
        raise DataError(f"--data holds {what}; check the files, and --text-field")
    scores.seconds = time.monotonic() - started
    return scores


def _windows(
    scores: Scores,
    candidate: Candidate,
    text: Text,
    options: ScoringOptions,
    budget: int | None,
    on_bytes: Callable[[int], object],
) -> Iterator[Window]:
    """The windows of all documents, up to the document with which the budget of tokens is
    reached.
    """
    assert options.seq_length is not None
    assert options.stride is not None
    num_tokens, tokeniser = 0, candidate.tokeniser
    is_behind = bool(tokeniser.before)
    span = options.seq_length + 1 - len(tokeniser.before)  # the last token of a window is no input
    stride = min(options.stride, span)
    for documents in text.batches(scores.skipped, on_bytes):
        parts = [[piece for piece, _ in pieces_of(document)] for document in documents]
        encoded = tokeniser.encode([piece for document in parts for piece in document])
        for document, own in zip(documents, parts, strict=True):
            ids = [token for _ in own for token in next(encoded)]
            tokeniser.check_ids(max(ids, default=0))
            number = scores.add_document(
                document.encode(), ids, tokeniser.unknown, is_first_scored=is_behind
            )
            yield from windows(number, ids, span, stride, is_first_scored=is_behind)
            num_tokens += len(ids)
            if budget is not None and num_tokens >= budget:
                return
