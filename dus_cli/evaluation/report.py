"""The report of `dus eval`: as JSON, as a table, and the limits that a model misses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from dus_cli import __version__
from dus_cli.common.options import Option
from dus_cli.common.units import counted
from dus_cli.data.sources import Unread
from dus_cli.errors import shown
from dus_cli.evaluation import h6
from dus_cli.evaluation.intervals import LEVEL, Estimate, ratio
from dus_cli.evaluation.options import ScoringOptions
from dus_cli.evaluation.scores import Scores
from dus_cli.evaluation.tasks import TaskReport, TaskResult

if TYPE_CHECKING:
    from dus_cli.evaluation.candidates import EvaluationCandidate

SCHEMA = 1

_NATS_PER_BIT = math.log(2)


@dataclass(frozen=True)
class ModelResult:
    """A model's figures on the text, with the ids `before` before each document.

    `difference` is to the baseline (None for itself), in nats on the same bytes per token of the
    baseline's tokenizer. If both models have the same tokens, it is the difference of their losses.
    """

    name: str
    model: str
    commit: str | None
    is_base: bool
    tokens: int
    unknown_tokens: int
    loss: Estimate
    bits_per_byte: Estimate
    difference: Estimate | None
    difference_bits: Estimate | None
    has_same_tokens: bool
    seconds: float
    before: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        candidate: EvaluationCandidate,
        name: str,
        scores: Scores,
        first: Scores | None,
        *,
        is_base: bool,
    ) -> ModelResult:
        """The result of a pass; `first` is the baseline's, None if this is the baseline."""
        code, difference, bits = scores.code_length, None, None
        if first is not None:
            paired = [a - b for a, b in zip(code, first.code_length, strict=True)]
            difference = ratio(paired, list(first.tokens))
            bits = ratio(paired, list(first.text_bytes)).times(1 / _NATS_PER_BIT)
        return cls(
            name,
            candidate.ref.text,
            candidate.commit,
            is_base=is_base,
            tokens=int(scores.tokens.total),
            unknown_tokens=scores.unknown_tokens,
            loss=ratio(list(scores.nats), list(scores.tokens)),
            bits_per_byte=ratio(code, list(scores.text_bytes)).times(1 / _NATS_PER_BIT),
            difference=difference,
            difference_bits=bits,
            has_same_tokens=first is None
            or scores.token_digest.digest() == first.token_digest.digest(),
            seconds=scores.seconds,
            before=candidate.tokeniser.before,
        )

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if a float cannot hold it."""
        return math.exp(self.loss.value) if self.loss.value < 700 else math.inf

    def to_json(self) -> dict[str, Any]:
        """An entry of `models`; docs/layout.md describes each field."""
        return {
            "name": self.name,
            "model": self.model,
            "commit": self.commit,
            "is_base_within": self.is_base,
            "tokens": self.tokens,
            "unknown_tokens": self.unknown_tokens,
            "before": list(self.before),
            "same_tokens": self.has_same_tokens,
            **_with_interval("loss", self.loss),
            "perplexity": None if math.isinf(self.perplexity) else self.perplexity,
            **_with_interval("bits_per_byte", self.bits_per_byte),
            **_with_interval("difference", self.difference),
            **_with_interval("difference_bits_per_byte", self.difference_bits),
            "seconds": round(self.seconds, 3),
        }


def _with_interval(name: str, estimate: Estimate | None) -> dict[str, Any]:
    interval = None if estimate is None or estimate.interval is None else list(estimate.interval)
    return {name: None if estimate is None else estimate.value, f"{name}_interval": interval}


@dataclass(frozen=True)
class LossReport:
    """The losses of all models on the same text; the first model is the baseline.

    `num_units` is the number of observations of the intervals: documents, or blocks of them.
    """

    text_name: str
    data: tuple[str, ...]
    num_documents: int
    num_bytes: int
    skipped: dict[str, int]
    num_units: int
    options: ScoringOptions
    device: str
    models: tuple[ModelResult, ...]
    unread: Unread = field(default_factory=Unread)

    def to_json(self) -> dict[str, Any]:
        """The fields of the report about losses; docs/layout.md describes each."""
        return {
            "data": list(self.data),
            "documents": self.num_documents,
            "bytes": self.num_bytes,
            "skipped_lines": self.skipped,
            "unread_files": self.unread.to_json(),
            "units": self.num_units,
            "level": LEVEL,
            "seq_length": self.options.seq_length,
            "stride": self.options.stride,
            "precision": self.options.precision.value,
            "special_tokens": self.options.special_tokens,
            "device": self.device,
            "baseline": self.models[0].name,
        }


# --- limits ---------------------------------------------------------------------------------------


_GATES = "Limits"


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Limits that every model but the baseline must meet, or a single model. None is no limit.

    With `is_confident` the whole interval must meet them, not only the measured value.
    """

    min_improvement: Annotated[
        float | None,
        Option(
            "Exit 1 unless each loss is at least X nats per token under the baseline's; -0.05 "
            "lets it be above.",
            metavar="X",
            panel=_GATES,
        ),
    ] = None
    max_loss: Annotated[
        float | None,
        Option(
            "Exit 1 if a loss other than the baseline's is above Y nats per token.",
            metavar="Y",
            panel=_GATES,
        ),
    ] = None
    max_drop: Annotated[
        float | None,
        Option(
            "Exit 1 if a task's score is more than P points of 100 below the baseline's.",
            metavar="P",
            panel=_GATES,
        ),
    ] = None
    is_confident: Annotated[
        bool,
        Option(
            "Apply these limits to the whole 95% interval, not to the measured value.",
            name="confident",
            panel=_GATES,
        ),
    ] = False

    def to_json(self) -> dict[str, Any]:
        return {
            "min_improvement": self.min_improvement,
            "max_loss": self.max_loss,
            "max_drop": self.max_drop,
            "confident": self.is_confident,
        }

    def misfit(self, num_models: int, *, has_data: bool, has_tasks: bool) -> tuple[str, str] | None:
        """An option that does not fit what is evaluated, and why; None if all fit. `num_models`
        includes the base of --with-base.
        """
        if not has_data and not has_tasks:
            return "--data", "there is nothing to evaluate on; give --data or --tasks"
        for value, option, needed in (
            (self.min_improvement, "--min-improvement", has_data),
            (self.max_loss, "--max-loss", has_data),
            (self.max_drop, "--max-drop", has_tasks),
        ):
            if value is None:
                continue
            if not needed:
                missing = "--tasks" if option == "--max-drop" else "--data"
                return option, f"it is a limit on figures of {missing}; give {missing} too"
            if num_models == 1 and option != "--max-loss":
                return (
                    option,
                    (
                        "a single model has no baseline; give its base as the first MODEL, or "
                        "--with-base"
                    ),
                )
        if self.is_confident and self.min_improvement is None and self.max_loss is None:
            return "--confident", "it is about --min-improvement and --max-loss; give one of them"
        return None

    def missed(self, report: LossReport) -> list[str]:
        """The limits on losses that models miss, a sentence for each."""
        judged = report.models[1:] or report.models
        return [
            text
            for model in judged
            for text in (self._loss(model), self._improvement(model, report))
            if text
        ]

    def missed_tasks(self, report: TaskReport) -> list[str]:
        """A sentence for each task in which a model is more than `max_drop` points of 100 below
        the baseline.
        """
        first = {score.label: score for score in report.models[0].scores}
        return [
            f"{shown(model.name)}: {score.label} {100 * score.value:.2f} is more than --max-drop "
            f"{self.max_drop:g} "
            f"points below {shown(report.models[0].name)}'s {100 * first[score.label].value:.2f}"
            for model in report.models[1:]
            for score in model.scores
            if self.max_drop is not None
            and score.is_share
            and 100 * (first[score.label].value - score.value) > self.max_drop
        ]

    def _loss(self, model: ModelResult) -> str | None:
        worst = self._worst(model.loss)
        if self.max_loss is None or worst <= self.max_loss:
            return None
        return (
            f"{shown(model.name)}: loss {_number(model.loss, worst)} is above --max-loss "
            f"{self.max_loss:g}"
        )

    def _improvement(self, model: ModelResult, report: LossReport) -> str | None:
        if self.min_improvement is None or model.difference is None:
            return None
        worst = self._worst(model.difference)
        if -worst >= self.min_improvement:
            return None
        return (
            f"{shown(model.name)}: improvement {_number(model.difference.times(-1), -worst)} over "
            f"{shown(report.models[0].name)} is below --min-improvement {self.min_improvement:g}"
        )

    def _worst(self, estimate: Estimate) -> float:
        """The value that is compared with a limit: with --confident the worse end of the interval,
        infinite if there is none.
        """
        if not self.is_confident:
            return estimate.value
        return math.inf if estimate.margin is None else estimate.value + estimate.margin


def _number(estimate: Estimate, judged: float) -> str:
    """The measured value and, if another value was judged, that end of the interval."""
    if judged == estimate.value:
        return f"{estimate.value:.4f}"
    return f"{estimate.value:.4f} (by its interval {judged:.4f})"


# --- for a person ---------------------------------------------------------------------------------


def losses_text(report: LossReport, width: int = 80) -> str:
    """A row for each model, at most `width` wide."""
    options, first = report.options, report.models[0]
    lines = [
        (
            f"{shown(report.text_name)}: {counted(report.num_documents, 'document')}, "
            f"{counted(report.num_bytes, 'byte')}"
        ),
        (
            f"windows of {options.seq_length} tokens every {options.stride}, "
            f"{options.precision.value} on {report.device}"
        ),
        "",
    ]
    rows = [_row(model, is_alone=len(report.models) == 1) for model in report.models]
    header = [
        "",
        "tokens",
        "loss",
        "perplexity",
        "bits/byte",
        *(["difference"] if len(report.models) > 1 else []),
    ]
    lines += table([header, *rows], width)
    lines.append("")
    if len(report.models) > 1:
        lines.append(
            f"difference: to {shown(first.name)}, nats per token of its tokenizer on the same "
            "bytes;"
        )
        lines.append(f"±: {_interval_text(report)}")
    else:
        loss = first.loss
        margin = (
            "" if loss.margin is None else f"loss ± {loss.margin:.4f}: {_interval_text(report)}"
        )
        lines += [margin] if margin else []
    others = [shown(model.name) for model in report.models if not model.has_same_tokens]
    if others:
        lines.append(
            f"other tokens than {shown(first.name)}: {', '.join(others)}; compare bits per byte"
        )
    lines += [
        f"warning: {counted(model.unknown_tokens, 'token')} of {shown(model.name)} stand for text "
        "that its tokenizer cannot encode; its figures are better than it is"
        for model in report.models
        if model.unknown_tokens
    ]
    if report.skipped:
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in report.skipped.items())
        lines.append(f"left out of the text: {left_out}")
    if report.unread.count:
        lines.append(f"not read: {report.unread}")
    return "\n".join(lines).rstrip()


def _interval_text(report: LossReport) -> str:
    if report.num_units < 2:
        return "none: a single document has no interval"
    each = "documents" if report.num_units == report.num_documents else "blocks of documents"
    paired = ", paired" * (len(report.models) > 1)
    return f"{LEVEL:.0%} interval over {report.num_units:,} {each}{paired}"


def _row(model: ModelResult, *, is_alone: bool) -> list[str]:
    perplexity = f"{model.perplexity:,.2f}" if model.perplexity < 1e7 else f"{model.perplexity:.2e}"
    row = [
        model.name,
        f"{model.tokens:,}",
        f"{model.loss.value:.4f}",
        perplexity,
        f"{model.bits_per_byte.value:.4f}",
    ]
    return (
        row
        if is_alone
        else [*row, "baseline" if model.difference is None else signed(model.difference)]
    )


def signed(estimate: Estimate) -> str:
    """A difference with its sign.

    >>> signed(Estimate(-0.0123, 0.004))
    '-0.0123 ± 0.0040'
    """
    return f"{estimate.value:+.4f}" + (
        "" if estimate.margin is None else f" ± {estimate.margin:.4f}"
    )


def table(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Lines of a table with columns two spaces apart and numbers right-aligned. The first column is
    shortened if a line would be too long.
    """
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    room = max(8, width - sum(widths[1:]) - 2 * (len(widths) - 1))
    widths[0] = min(widths[0], room)
    return [
        "  ".join(
            [
                _fitted(row[0], room).ljust(widths[0]),
                *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]


def _fitted(name: str, width: int) -> str:
    """A model's name shortened in the middle, because either end may tell models apart.

    >>> _fitted("SmolLM2-135M-Instruct", 12)
    'SmolLM…truct'
    """
    text = shown(name)
    left = width // 2
    return text if len(text) <= width else f"{text[:left]}…{text[len(text) - (width - left - 1) :]}"


def tasks_text(report: TaskReport, width: int = 80) -> str:
    """A row for each task and a column for each model, and for H6 the published scores; columns
    that do not fit go into further blocks.
    """
    columns = [(result.name, _score_cells(result)) for result in report.models]
    if len(report.models[0].scores) and report.models[0].h6 is not None:
        for name, scores in h6.PUBLISHED.items():
            cells = {
                plan.label: f"{score:.2f}" for plan, score in zip(h6.PLANS, scores, strict=True)
            }
            columns.append((f"{name} *", cells | {_H6: f"{h6.average(scores):.2f}"}))
    labels = list(columns[0][1])
    heads = [_fitted(name, 22) for name, _ in columns]
    widths = [
        max(len(head), *map(len, cells.values()))
        for head, (_, cells) in zip(heads, columns, strict=True)
    ]
    first = max(map(len, labels))
    blocks: list[list[int]] = [[]]
    for k, size in enumerate(widths):
        if blocks[-1] and first + sum(widths[j] + 2 for j in blocks[-1]) + size + 2 > width:
            blocks.append([])
        blocks[-1].append(k)
    lines: list[str] = []
    for block in blocks:
        rows = [["", *(heads[k] for k in block)]]
        rows += [[label, *(columns[k][1].get(label, "–") for k in block)] for label in labels]
        lines += [*table(rows, width), ""]
    notes = [f"lm-evaluation-harness {report.harness}, ± one standard error"]
    if report.options.limit is not None:
        examples = counted(report.options.limit, "example")
        notes.append(f"only the first {examples} of each task: not comparable with full scores")
    if len(columns) > len(report.models):
        notes.append("* as published (arXiv:2312.15166, table 2), with the harness of 2023")
    return "\n".join([*lines, *notes])


_H6 = "H6"


def _score_cells(result: TaskResult) -> dict[str, str]:
    cells = {}
    for score in result.scores:
        factor, digits = (100, 2) if score.is_share else (1, 4)
        error = "" if score.stderr is None else f" ± {factor * score.stderr:.{digits}f}"
        cells[score.label] = f"{factor * score.value:.{digits}f}{error}"
    return cells if result.h6 is None else cells | {_H6: f"{result.h6:.2f}"}


@dataclass(frozen=True)
class EvalReport:
    """All results of a command: losses, tasks, or both."""

    losses: LossReport | None
    tasks: TaskReport | None = None
    gates: Gates = field(default_factory=Gates)
    cards: tuple[str, ...] = ()

    @property
    def missed(self) -> list[str]:
        missed = [] if self.losses is None else self.gates.missed(self.losses)
        return missed if self.tasks is None else [*missed, *self.gates.missed_tasks(self.tasks)]

    def to_json(self) -> dict[str, Any]:
        """The report of `--json`; docs/layout.md describes each field."""
        record: dict[str, Any] = {"schema": SCHEMA, "version": __version__}
        models: dict[str, dict[str, Any]] = {}
        if self.losses is not None:
            record |= self.losses.to_json()
            models = {model.name: model.to_json() for model in self.losses.models}
        if self.tasks is not None:
            record |= self.tasks.to_json() | {
                "baseline": record.get("baseline", self.tasks.models[0].name)
            }
            for result in self.tasks.models:
                entry = models.setdefault(
                    result.name,
                    {"name": result.name, "model": result.model, "commit": result.commit},
                )
                entry |= {"scores": [score.to_json() for score in result.scores], "h6": result.h6}
        last = {"gates": self.gates.to_json(), "missed": self.missed, "cards": list(self.cards)}
        return record | {"models": list(models.values())} | last

    def text(self, width: int) -> str:
        """The report for a person, in lines of at most `width` characters."""
        parts = [] if self.losses is None else [losses_text(self.losses, width)]
        if self.tasks is not None:
            parts.append(tasks_text(self.tasks, width))
        if self.cards:
            parts.append("\n".join(f"results written into {shown(path)}" for path in self.cards))
        return "\n\n".join(parts)
