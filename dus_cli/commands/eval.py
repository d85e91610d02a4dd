"""The command `dus eval`: parse, call, print."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

import typer

from dus_cli import api
from dus_cli.commands.options import AsJson, Quiet, ShowProgress, path_parser, progress_for
from dus_cli.commands.signature import takes_options
from dus_cli.common.reference import ModelRef
from dus_cli.console.terminal import fitted
from dus_cli.errors import GateError
from dus_cli.evaluation.options import ScoringOptions, TaskOptions, TextOptions
from dus_cli.evaluation.picture import eval_svg
from dus_cli.evaluation.report import EvalReport, Gates
from dus_cli.hub.options import Token
from dus_cli.pictures.files import check_picture, write_pictures
from dus_cli.progress import ProgressMode


# --help lists all options about the text together, although two dataclasses hold them.
@takes_options(
    "models",
    *(
        "data",
        "text_field",
        "on_bad_line",
        "special_tokens",
        "max_documents",
        "max_tokens",
        "seq_length",
        "stride",
    ),
)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Directories or Hub ids; the others are compared with the first.",
        ),
    ],
    *,
    text: TextOptions,
    tasks: TaskOptions,
    baseline: Annotated[
        Optional[str],  # noqa: UP045  (typer reads the annotation at run time, also on Python 3.10)
        typer.Option(
            "--baseline",
            metavar="MODEL",
            help="Compare the models with this one instead of the first.",
        ),
    ] = None,
    with_base: Annotated[
        bool,
        typer.Option(
            "--with-base",
            help="Also evaluate the base inside the first MODEL, an up-scaled one, and take it as "
            "the baseline.",
        ),
    ] = False,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--plot",
            metavar="FILE.svg",
            parser=path_parser,
            help="Also draw the figures; FILE-dark.svg for dark pages.",
        ),
    ] = None,
    update_card: Annotated[
        bool,
        typer.Option(
            "--update-card",
            help="Write the results into README.md of each directory but the baseline's, as the "
            "Hub's model-index.",
        ),
    ] = False,
    gates: Gates,
    scoring: ScoringOptions,
    token: Token = None,
    progress: ShowProgress = ProgressMode.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare models on the same held-out text: loss, perplexity, bits per byte, paired intervals.

    Directories or Hub ids side by side: a base, the model scaled up from it, the healed one.
    """
    refs = _in_order(models, baseline, token)
    misfit = gates.misfit(
        len(refs) + with_base, has_data=bool(text.data), has_tasks=bool(tasks.tasks)
    )
    if misfit is not None:
        raise typer.BadParameter(misfit[1], param_hint=misfit[0])
    if with_base and (baseline is not None or not text.data):
        raise typer.BadParameter(
            "it is the baseline of --data; leave out --baseline", param_hint="--with-base"
        )
    judged = refs if len(refs) == 1 or with_base else refs[1:]
    if update_card:
        from dus_cli.evaluation import card

        for ref in judged:
            card.check_card(ref)
    if plot is not None:
        check_picture(plot)
    prints_text = not (quiet or as_json)
    with progress_for(progress, quiet=not prints_text) as view:
        report = api.evaluate(
            [ref.text for ref in refs],
            text=text,
            tasks=tasks,
            scoring=scoring,
            gates=gates,
            with_base=with_base,
            token=token,
            progress=view,
        )
    if plot is not None:
        write_pictures(plot, lambda dark: eval_svg(report, dark=dark))
    if update_card:
        report = replace(report, cards=_updated_cards(report, judged))
    if as_json:
        sys.stdout.write(json.dumps(report.to_json()) + "\n")
    elif prints_text:
        sys.stdout.write(fitted(report.text(shutil.get_terminal_size().columns)) + "\n")
    sys.stdout.flush()
    if report.missed:
        raise GateError("; ".join(report.missed))


def _updated_cards(report: EvalReport, refs: list[ModelRef]) -> tuple[str, ...]:
    """Write the results into the cards of the models; return their paths."""
    from dus_cli.evaluation import card

    paths = []
    for ref in refs:
        assert ref.path is not None
        card.update_card(ref.path, ref.name, card.results_of(report, ref))
        paths.append(str(ref.path / card.NAME))
    return tuple(paths)


def _in_order(models: list[str], baseline: str | None, token: str | None) -> list[ModelRef]:
    """The models with the baseline first: one of them, or another one."""
    if baseline is not None:
        models = [baseline, *(text for text in models if text != baseline)]
    return [ModelRef.parse(text, token=token) for text in models]
