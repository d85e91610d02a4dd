"""An evaluation as SVG: each model's loss with its interval, and below it the scores by task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dus_cli.evaluation.intervals import Estimate
from dus_cli.evaluation.report import EvalReport, LossReport, ModelResult
from dus_cli.evaluation.tasks import TaskReport
from dus_cli.release.svg import (
    CHARACTER,
    COLOURS,
    DASHED,
    SERIES,
    cut,
    document,
    escaped,
    nice_step,
    text_at,
    ticks,
)

# The edges of the plot between names and figures, and the height of a row, in pixels.
_LEFT, _RIGHT = 190, 500
_ROW, _SCORE_ROW = 44, 24

# Of the normal distribution: how many standard errors of the harness make a 95% interval.
_NORMAL = 1.96


@dataclass(frozen=True)
class _Scale:
    """Values from left to right, and the rows from `top` to `bottom` below which they are named."""

    low: float
    high: float
    top: float
    bottom: float

    def x(self, value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (value - self.low) / (self.high - self.low)

    def axis(self, label: str, colour: dict[str, str]) -> Iterable[str]:
        step = nice_step(self.high - self.low, 5)
        decimals = len(f"{step:.6f}".rstrip("0").partition(".")[2])
        for value in ticks(self.low, self.high, step):
            x = self.x(value)
            yield f'<path d="M{x:.1f} {self.top:g}V{self.bottom:g}" stroke="{colour["grid"]}"/>'
            yield text_at(x, self.bottom + 18, f"{value:.{decimals}f}", colour["axis"], anchor="middle")
        yield text_at(_LEFT, self.bottom + 38, label, colour["axis"])

    def whisker(self, y: float, estimate: Estimate, dot: str, stroke: str) -> str:
        """A value, and a line over its interval."""
        line = ""
        if estimate.interval is not None:
            low, high = (self.x(min(max(end, self.low), self.high)) for end in estimate.interval)
            line = f'<path d="M{low:.1f} {y:g}H{high:.1f}M{low:.1f} {y - 4:g}v8M{high:.1f} {y - 4:g}v8" {stroke}/>'
        return line + f'<circle cx="{self.x(estimate.value):.1f}" cy="{y:g}" {dot}/>'


def eval_svg(report: EvalReport, *, dark: bool = False) -> str:
    """The picture of what was found on the text, in the tasks, or both."""
    colour = COLOURS[dark]
    text = report.losses.text_name if report.losses is not None else "tasks"
    title = f"Evaluation on {text}" if report.losses is not None else "Evaluation by tasks"
    parts = [f'<text x="20" y="28" font-size="15" font-weight="600">{escaped(cut(title, 70))}</text>']
    bottom, said = 40.0, []
    if report.losses is not None:
        drawn, bottom, description = _losses(report.losses, bottom, colour)
        parts += drawn
        said.append(description)
    if report.tasks is not None:
        drawn, bottom, description = _scores(report.tasks, bottom, colour, SERIES[dark])
        parts += drawn
        said.append(description)
    return document(parts, title, " ".join(said), round(bottom), colour)


def _losses(report: LossReport, top: float, colour: dict[str, str]) -> tuple[list[str], float, str]:
    """A row for each model: loss, or bits per byte where tokenizers differ. The parts, where they end, and in words."""
    same = all(model.has_same_tokens for model in report.models)
    figures = [model.loss if same else model.bits_per_byte for model in report.models]
    ends = [end for figure in figures for end in (figure.interval or (figure.value, figure.value))]
    air = 0.06 * max(max(ends) - min(ends), 0.02 * max(ends), 1e-3)
    scale = _Scale(min(ends) - air, max(ends) + air, top, top + _ROW * len(figures))
    label = "loss (nats per token)" if same else "bits per byte"
    interval = ", with its 95% interval" if report.num_units > 1 else ""
    parts = list(scale.axis(label + interval, colour))
    first = scale.x(figures[0].value)
    parts.append(f'<path d="M{first:.1f} {scale.top:g}V{scale.bottom:g}" stroke="{colour["base"]}" {DASHED}/>')
    words = []
    for k, (model, figure) in enumerate(zip(report.models, figures, strict=True)):
        y, ink = top + _ROW * (k + 0.5), colour["heldout" if k else "base"]
        parts.append(text_at(20, y + 4.5, cut(model.name, int((_LEFT - 30) / CHARACTER)), colour["text"]))
        parts.append(scale.whisker(y, figure, f'r="5" fill="{ink}"', f'stroke="{ink}" stroke-width="2" fill="none"'))
        difference = _difference(model, same=same)
        parts.append(text_at(_RIGHT + 14, y - 3.5 if difference else y + 4.5, f"{figure.value:.4f}", colour["text"]))
        if difference:
            parts.append(text_at(_RIGHT + 14, y + 13, difference, colour["axis"]))
        words.append(f"{model.name} {figure.value:.4f}{f' ({difference})' * bool(difference)}")
    return parts, scale.bottom + 56, f"{label.capitalize()}: {', '.join(words)}."


def _difference(model: ModelResult, *, same: bool) -> str:
    """To the baseline, in the figure that is drawn; its interval is of the pairs, and so much narrower."""
    found = model.difference if same else model.difference_bits
    if found is None:
        return ""
    return f"{found.value:+.4f}" + ("" if found.margin is None else f" ± {found.margin:.4f}")


def _scores(
    report: TaskReport, top: float, colour: dict[str, str], series: Sequence[str]
) -> tuple[list[str], float, str]:
    """A row for each task, a dot for each model. Scores that are no shares have no place on this axis."""
    labels = [score.label for score in report.models[0].scores if score.is_share]
    scale = _Scale(0, 100, top + 8, top + 8 + _SCORE_ROW * len(labels))
    parts = list(scale.axis("score in percent, with its 95% interval", colour))
    words = []
    for row, label in enumerate(labels):
        y = scale.top + _SCORE_ROW * (row + 0.5)
        parts.append(text_at(20, y + 4.5, cut(label, int((_LEFT - 30) / CHARACTER)), colour["text"]))
        values = []
        for k, result in enumerate(report.models):
            score = next(score for score in result.scores if score.label == label)
            error = None if score.stderr is None else 100 * _NORMAL * score.stderr
            parts.append(scale.whisker(y, Estimate(100 * score.value, error), *_look(k, colour, series)))
            values.append(f"{100 * score.value:.1f}")
        parts.append(text_at(_RIGHT + 14, y + 4.5, cut("  ".join(values), 21), colour["text"]))
        words.append(f"{label} {', '.join(values)}")
    y = scale.bottom + 64
    for k, result in enumerate(report.models):
        dot, stroke = _look(k, colour, series)
        parts.append(f'<path d="M20 {y - 4:g}h26" {stroke}/><circle cx="33" cy="{y - 4:g}" {dot}/>')
        parts.append(text_at(54, y, cut(result.name, 70), colour["text"]))
        y += 20
    return parts, y, f"Scores in percent of {', '.join(r.name for r in report.models)}: {'; '.join(words)}."


def _look(k: int, colour: dict[str, str], series: Sequence[str]) -> tuple[str, str]:
    """Dot and line of a model; those that share a colour differ in their dots."""
    ink = series[k % len(series)]
    fill = ink if k < len(series) else colour["page"]
    return f'r="4" fill="{fill}" stroke="{ink}" stroke-width="1.5"', f'stroke="{ink}" stroke-width="1.5" fill="none"'
