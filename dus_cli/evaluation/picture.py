"""An evaluation as SVG: each model's loss with its interval, and below it the scores by task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dus_cli.evaluation.intervals import Estimate
from dus_cli.evaluation.report import EvalReport, LossReport, ModelResult, signed
from dus_cli.evaluation.tasks import TaskReport
from dus_cli.pictures.axes import Axis, columns
from dus_cli.pictures.svg import (
    CHARACTER,
    COLOURS,
    DASHED,
    SERIES,
    WIDTH,
    document,
    heading,
    text_at,
    wrapped,
)

# In pixels: the plot's left and right edge, and the heights of a row, a row of scores and a line of
# text.
_LEFT, _RIGHT = 190, 500
_ROW, _SCORE_ROW, _LINE = 44, 24, 18

# The longest name beside its row, line of a name above its row, and line of a title, in characters;
# and the most scores in a line.
_BESIDE, _ABOVE, _TITLE, _IN_A_LINE = (
    int((_LEFT - 30) / CHARACTER),
    int((WIDTH - 40) / CHARACTER),
    70,
    3,
)

# Standard errors in half a 95% interval of the normal distribution.
_NORMAL = 1.96


@dataclass(frozen=True)
class _RowPlot:
    """A horizontal scale of the rows between `top` and `bottom`; its axis is below them."""

    values: Axis
    top: float
    bottom: float

    def axis(self, label: str, colour: dict[str, str]) -> Iterable[str]:
        yield from columns(self.values.ticks(5), self.top, self.bottom, 18, colour)
        yield text_at(self.values.start, self.bottom + 38, label, colour["axis"])

    def x(self, value: float) -> float:
        """The pixel of a value, which stops at the edge of the plot."""
        return self.values.at(min(max(value, self.values.low), self.values.high))

    def whisker(self, y: float, estimate: Estimate, dot: str, stroke: str) -> str:
        """A dot at the value, and a line over its interval."""
        line = ""
        if estimate.interval is not None:
            low, high = (self.x(end) for end in estimate.interval)
            line = f'<path d="M{low:.1f} {y:g}H{high:.1f}M{low:.1f} {y - 4:g}v8M{high:.1f} {y - 4:g}v8" {stroke}/>'
        return line + f'<circle cx="{self.values.at(estimate.value):.1f}" cy="{y:g}" {dot}/>'


@dataclass(frozen=True)
class _Rows:
    """The rows of a plot. If a name does not fit beside its row, all names are above their rows, so
    that none is cut.
    """

    names: tuple[tuple[str, ...], ...]
    tops: tuple[float, ...]
    height: float
    bottom: float
    is_above: bool

    @classmethod
    def of(cls, names: Sequence[str], top: float, height: float) -> _Rows:
        is_above = any(len(name) > _BESIDE for name in names)
        lines = tuple(tuple(wrapped(name, _ABOVE if is_above else _BESIDE)) for name in names)
        tops = []
        for name in lines:
            top += _LINE * len(name) if is_above else 0
            tops.append(top)
            top += height
        return cls(lines, tuple(tops), height, top, is_above)

    @property
    def left(self) -> float:
        return 34 if self.is_above else _LEFT

    def middle(self, k: int) -> float:
        return self.tops[k] + self.height / 2

    def name(self, k: int, colour: dict[str, str]) -> Iterable[str]:
        """The name of row k."""
        first = (
            self.tops[k] - _LINE * len(self.names[k]) + 14
            if self.is_above
            else self.middle(k) + 4.5
        )
        for number, line in enumerate(self.names[k]):
            yield text_at(20, first + _LINE * number, line, colour["text"], halo=colour["page"])


def eval_svg(report: EvalReport, *, dark: bool = False) -> str:
    """The picture of the losses, the tasks' scores, or both."""
    colour = COLOURS[dark]
    title = (
        "Evaluation by tasks"
        if report.losses is None
        else f"Evaluation on {report.losses.text_name}"
    )
    parts, bottom, descriptions = [], 28.0, []
    for line in wrapped(title, _TITLE):
        parts.append(heading(bottom, line))
        bottom += 20
    bottom -= 8
    if report.losses is not None:
        drawn, bottom, description = _losses(report.losses, bottom, colour)
        parts += drawn
        descriptions.append(description)
    if report.tasks is not None:
        drawn, bottom, description = _scores(report.tasks, bottom, colour, SERIES[dark])
        parts += drawn
        descriptions.append(description)
    return document(parts, title, " ".join(descriptions), round(bottom), colour)


def _losses(report: LossReport, top: float, colour: dict[str, str]) -> tuple[list[str], float, str]:
    """Draw a row for each model: its loss, or bits per byte if tokenizers differ. Returns the SVG
    parts, their bottom edge and a description.
    """
    same = all(model.has_same_tokens for model in report.models)
    figures = [model.loss if same else model.bits_per_byte for model in report.models]
    ends = [end for figure in figures for end in (figure.interval or (figure.value, figure.value))]
    air = 0.06 * max(max(ends) - min(ends), 0.02 * max(ends), 1e-3)
    rows = _Rows.of([model.name for model in report.models], top, _ROW)
    values = Axis(min(ends) - air, max(ends) + air, rows.left, _RIGHT)
    plot = _RowPlot(values, top, rows.bottom)
    label = "loss (nats per token)" if same else "bits per byte"
    interval = ", with its 95% interval" if report.num_units > 1 else ""
    parts = list(plot.axis(label + interval, colour))
    first = values.at(figures[0].value)
    parts.append(
        f'<path d="M{first:.1f} {plot.top:g}V{plot.bottom:g}" stroke="{colour["base"]}" {DASHED}/>'
    )
    words = []
    for k, (model, figure) in enumerate(zip(report.models, figures, strict=True)):
        y, ink = rows.middle(k), colour["heldout" if k else "base"]
        parts += rows.name(k, colour)
        parts.append(
            plot.whisker(
                y, figure, f'r="5" fill="{ink}"', f'stroke="{ink}" stroke-width="2" fill="none"'
            )
        )
        difference = _difference(model, same=same)
        parts.append(
            text_at(
                _RIGHT + 14,
                y - 3.5 if difference else y + 4.5,
                f"{figure.value:.4f}",
                colour["text"],
            )
        )
        if difference:
            parts.append(text_at(_RIGHT + 14, y + 13, difference, colour["axis"]))
        words.append(f"{model.name} {figure.value:.4f}{f' ({difference})' * bool(difference)}")
    return parts, plot.bottom + 56, f"{label.capitalize()}: {', '.join(words)}."


def _difference(model: ModelResult, *, same: bool) -> str:
    """The difference to the baseline. Its interval is of paired documents, so it is much narrower
    than the loss's.
    """
    difference = model.difference if same else model.difference_bits
    return "" if difference is None else signed(difference)


def _scores(
    report: TaskReport, top: float, colour: dict[str, str], series: Sequence[str]
) -> tuple[list[str], float, str]:
    """Draw a row for each task, with a dot for each model. Scores that are not shares of 100 are
    left out. Returns the SVG parts, their bottom edge and a description.
    """
    labels = [score.label for score in report.models[0].scores if score.is_share]
    lines = -(-len(report.models) // _IN_A_LINE)  # lines of scores in a row
    rows = _Rows.of(labels, top + 8, max(_SCORE_ROW, _LINE * lines + 6))
    plot = _RowPlot(Axis(0, 100, rows.left, _RIGHT), top + 8, rows.bottom)
    parts = list(plot.axis("score in percent, with its 95% interval", colour))
    words = []
    for row, label in enumerate(labels):
        y = rows.middle(row)
        parts += rows.name(row, colour)
        values = []
        for k, result in enumerate(report.models):
            score = next(score for score in result.scores if score.label == label)
            error = None if score.stderr is None else 100 * _NORMAL * score.stderr
            parts.append(
                plot.whisker(y, Estimate(100 * score.value, error), *_look(k, colour, series))
            )
            values.append(f"{100 * score.value:.1f}")
        for number in range(lines):
            line = "  ".join(values[number * _IN_A_LINE : (number + 1) * _IN_A_LINE])
            parts.append(
                text_at(
                    _RIGHT + 14, y + 4.5 + _LINE * (number - (lines - 1) / 2), line, colour["text"]
                )
            )
        words.append(f"{label} {', '.join(values)}")
    y = plot.bottom + 64
    for k, result in enumerate(report.models):
        dot, stroke = _look(k, colour, series)
        parts.append(f'<path d="M20 {y - 4:g}h26" {stroke}/><circle cx="33" cy="{y - 4:g}" {dot}/>')
        for line in wrapped(result.name, _TITLE):
            parts.append(text_at(54, y, line, colour["text"]))
            y += 20
    return (
        parts,
        y,
        f"Scores in percent of {', '.join(r.name for r in report.models)}: {'; '.join(words)}.",
    )


def _look(k: int, colour: dict[str, str], series: Sequence[str]) -> tuple[str, str]:
    """The dot and line of model `k`. Models that share a colour have filled and hollow dots."""
    ink = series[k % len(series)]
    fill = ink if k < len(series) else colour["page"]
    return (
        f'r="4" fill="{fill}" stroke="{ink}" stroke-width="1.5"',
        f'stroke="{ink}" stroke-width="1.5" fill="none"',
    )
