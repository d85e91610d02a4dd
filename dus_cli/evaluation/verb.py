"""The verb: evaluate every model on the same text, one after the other, in memory that does not
grow with the text.
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
from dus_cli.evaluation.candidates import (
    EvaluationCandidate,
    base_layers,
    check_there,
    find_candidates,
)
from dus_cli.evaluation.options import ScoringOptions, TaskOptions, TextOptions
from dus_cli.evaluation.report import LossReport, ModelResult
from dus_cli.evaluation.scores import Scores
from dus_cli.evaluation.tasks import TaskReport, TaskResult, open_harness
from dus_cli.evaluation.text import EvaluationText, open_text
from dus_cli.evaluation.windows import Window, batches, windows
from dus_cli.progress import Progress

_LONGEST_WINDOW = 2048

# Tokens run at once without --batch-tokens, by device type.
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
    """Measure each model's losses on the text and its scores in the tasks; the first model is the
    baseline.

    Models are loaded one after the other, each once. With `with_base` the first is an up-scaled
    model, and the base inside it comes before it in the losses.

    Raises:
        DusError: any known failure; see `errors`.
    """
    check_there(refs)  # errors that need no torch come before torch is imported
    with tempfile.TemporaryDirectory(prefix="dus-eval-") as spool:
        text = None if text_options is None else open_text(text_options, Path(spool), progress.note)
        model = import_model()
        device = model.device_of(options.device)
        candidates = find_candidates(
            refs, progress, special_tokens=options.special_tokens, quiet=quiet
        )
        options = resolved(options, candidates, device.type)
        harness = None if tasks is None else open_harness(tasks, progress)
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
                    scorer = model.scorer_of(
                        loaded, candidate.num_layers, candidate.tokeniser.before
                    )
                    if inner is not None and candidate is candidates[0]:
                        with scorer.only(inner):
                            passes.run(scorer, candidate, is_base=True)
                    passes.run(scorer, candidate)
                    del scorer
                if harness is not None:
                    scored.append(harness.run(loaded, candidate, options))
                del loaded  # free it before the next one is loaded
    losses = None if passes is None else passes.report(str(device))
    return losses, None if tasks is None or harness is None else TaskReport(
        tasks, harness.version, tuple(scored)
    )


def import_model() -> Any:
    """Import `dus_cli.evaluation.scorer`, which imports torch, once it is needed."""
    model = import_module("dus_cli.evaluation.scorer")
    model.quiet_libraries()
    return model


def resolved(
    options: ScoringOptions, candidates: Sequence[EvaluationCandidate], device_type: str
) -> ScoringOptions:
    """The options with every default filled in. All models have the same window, which fits the
    context length of each.

    Raises:
        EvaluationError: the window is longer than a model's context length, or the stride longer
            than the window.
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
            f"--seq-length {length} is longer than the context length of {shown(name)}, "
            f"{shortest}; choose at most that"
        )
    for candidate in candidates:
        if len(candidate.tokeniser.before) > length:
            raise EvaluationError(
                f"--seq-length {length} has no place after the {len(candidate.tokeniser.before)} "
                f"tokens with which {shown(candidate.name)} begins a text; choose a larger one, or "
                "--no-special-tokens"
            )
    stride = options.stride or max(1, length // 2)
    if stride > length:
        raise EvaluationError(
            f"--stride {stride} is longer than the window of {length} tokens and would skip text; "
            "choose at most the window's length"
        )
    batch = options.batch_tokens or _BATCH_TOKENS.get(device_type, _BATCH_TOKENS_ELSEWHERE)
    precision = options.precision.on(device_type)
    return replace(
        options, seq_length=length, stride=stride, batch_tokens=batch, precision=precision
    )


class Passes:
    """The passes over the text, for one model after the other."""

    def __init__(
        self,
        text: EvaluationText,
        text_options: TextOptions,
        options: ScoringOptions,
        progress: Progress,
    ) -> None:
        self._text, self._text_options = text, text_options
        self._options, self._progress = options, progress
        self._first: Scores | None = None
        self._results: list[ModelResult] = []

    def run(self, scorer: Any, candidate: EvaluationCandidate, *, is_base: bool = False) -> None:
        """Evaluate one more model. The first decides by its tokens how many documents all read."""
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
    candidate: EvaluationCandidate,
    name: str,
    text: EvaluationText,
    options: ScoringOptions,
    budget: int | None,
    progress: Progress,
) -> Scores:
    """Evaluate one model on the text."""
    assert options.batch_tokens is not None
    scores, started = Scores(scorer.vocab_size), time.monotonic()
    progress.start(f"evaluating {shown(name)}", text.num_file_bytes)
    cut = _windows(scores, candidate, text, options, budget, progress.advance)
    for batch in batches(cut, options.batch_tokens):
        for window, nats in zip(batch, scorer.losses(batch), strict=True):
            if not math.isfinite(nats):
                raise EvaluationError(
                    f"{shown(name)}: its loss on document {window.document + 1} is {nats}; its "
                    "weights are damaged (dus verify --base finds tensors that differ from the "
                    "base's) or it overflows in bf16 (try --precision fp32)"
                )
            scores.nats.add(window.document, nats)
    if not scores.tokens.total:
        what = "no document of two or more tokens" if scores.guessed.total else "no text"
        raise DataError(f"--data holds {what}; check the files, and --text-field")
    scores.seconds = time.monotonic() - started
    return scores


def _windows(
    scores: Scores,
    candidate: EvaluationCandidate,
    text: EvaluationText,
    options: ScoringOptions,
    budget: int | None,
    on_bytes: Callable[[int], object],
) -> Iterator[Window]:
    """The windows of all documents, up to the one with which the token budget is reached."""
    assert options.seq_length is not None
    assert options.stride is not None
    num_tokens, tokeniser = 0, candidate.tokeniser
    is_first_scored = bool(tokeniser.before)
    # the last token of a window is a label only, not an input
    span = options.seq_length + 1 - len(tokeniser.before)
    stride = min(options.stride, span)
    for documents in text.batches(scores.skipped, on_bytes):
        parts = [[piece for piece, _ in pieces_of(document)] for document in documents]
        encoded = tokeniser.encode([piece for document in parts for piece in document])
        for document, own in zip(documents, parts, strict=True):
            ids = [token for _ in own for token in next(encoded)]
            tokeniser.check_ids(max(ids, default=0))
            number = scores.add_document(
                document.encode(), ids, tokeniser.unknown, is_first_scored=is_first_scored
            )
            yield from windows(number, ids, span, stride, is_first_scored=is_first_scored)
            num_tokens += len(ids)
            if budget is not None and num_tokens >= budget:
                return
