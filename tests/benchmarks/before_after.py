r"""Held-out loss before and after the same healing, a row for each model, as SVG.

    python tests/benchmarks/before_after.py results.jsonl --title "Six ways to 46 layers" \
        --plot docs/ways-healed.svg

results.jsonl is written by heal_recovery.py. Also prints the table beside the picture in Markdown:
for each model the mean loss right after scaling and after healing, and the loss of each seed. In
the picture a hollow dot is before healing, a full dot after it, for each seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_cli.pictures.axes import Axis, columns
from dus_cli.pictures.files import write_pictures
from dus_cli.pictures.svg import COLOURS, DASHED, SERIES, document, heading, text_at

_LEFT, _RIGHT, _TOP, _ROW = 216, 664, 92, 30


@dataclass(frozen=True)
class Row:
    """A model: its loss right after scaling, and after healing for each seed."""

    name: str
    before: float
    after: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.after)


def rows_of(results: list[dict[str, Any]]) -> list[Row]:
    """The models in the order of their first results; ": default", the recipe, is removed from
    labels.
    """
    names = dict.fromkeys(result["name"] for result in results)
    rows = []
    for name in names:
        runs = sorted(
            (result for result in results if result["name"] == name), key=lambda run: run["seed"]
        )
        before = statistics.fmean(run["curve"][0][1] for run in runs)
        rows.append(
            Row(name.removesuffix(": default"), before, tuple(run["curve"][-1][1] for run in runs))
        )
    return rows


def table(rows: list[Row], base: float) -> str:
    lines = [
        "| | right after scaling | healed, each seed | mean | above the base |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        seeds = ", ".join(f"{loss:.3f}" for loss in row.after)
        lines.append(
            f"| {row.name} | {row.before:.3f} | {seeds} | {row.mean:.3f} | {row.mean - base:+.3f} |"
        )
    return "\n".join(lines)


def picture(rows: list[Row], base: float, title: str, *, dark: bool) -> str:
    colour, (late, early, *_) = COLOURS[dark], SERIES[dark]
    losses = [base, *(loss for row in rows for loss in (row.before, *row.after))]
    spread = max(losses) - min(losses)
    scale = Axis(min(losses) - 0.05 * spread, max(losses) + 0.05 * spread, _LEFT, _RIGHT)
    x, bottom = scale.at, _TOP + _ROW * len(rows)
    parts = [heading(28, title)]
    parts.append(
        f'<circle cx="26" cy="48" r="4" fill="{colour["page"]}" stroke="{early}" stroke-width="2"/>'
    )
    parts.append(text_at(36, 52, "right after scaling", colour["axis"]))
    parts.append(f'<circle cx="212" cy="48" r="4" fill="{late}"/>')
    parts.append(text_at(222, 52, "healed, each seed", colour["axis"]))
    parts += columns(scale.ticks(7, name="{:g}".format), _TOP, bottom, 20, colour)
    parts.append(
        f'<path d="M{x(base):.1f} {_TOP - 8}V{bottom}" stroke="{colour["base"]}" {DASHED}/>'
    )
    parts.append(text_at(x(base), _TOP - 12, f"base {base:.3f}", colour["base"], anchor="start"))
    for number, row in enumerate(rows):
        y = _TOP + _ROW * (number + 0.5)
        parts.append(text_at(_LEFT - 14, y + 4.5, row.name, colour["text"], anchor="end"))
        parts.append(
            f'<path d="M{x(row.before):.1f} {y}H{x(row.mean):.1f}" stroke="{colour["training"]}"/>'
        )
        parts.append(
            f'<circle cx="{x(row.before):.1f}" cy="{y}" r="4" fill="{colour["page"]}" stroke="{early}" '
            'stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{x(loss):.1f}" cy="{y}" r="4" fill="{late}" opacity="0.75"/>'
            for loss in row.after
        ]
    parts.append(
        text_at(_RIGHT, bottom + 40, "held-out loss (nats per token)", colour["axis"], anchor="end")
    )
    said = "; ".join(f"{row.name}: {row.before:.3f}, then {row.mean:.3f}" for row in rows)
    return document(parts, title, f"Base {base:.3f}. {said}.", bottom + 56, colour)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--title", default="Before and after the same healing")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    results = [json.loads(line) for line in options.results.read_text().splitlines()]
    # Of the first model: what a second scaling measures as its base is the healed model that it
    # grew from.
    base = results[0]["base"]
    rows = rows_of(results)
    print(f"base {base:.4f}\n\n{table(rows, base)}")
    if options.plot is not None:
        write_pictures(options.plot, lambda dark: picture(rows, base, options.title, dark=dark))


if __name__ == "__main__":
    main()
