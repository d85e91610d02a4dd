"""`dus eval`: parse, call, print."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

import typer

from dus_cli.commands.options import (
    DATA_KINDS,
    AsJson,
    OnBadLine,
    Quiet,
    ShowProgress,
    SpecialTokens,
    TextField,
    Token,
    number,
    parser,
    path_parser,
    progress_for,
)
from dus_cli.common.libraries import require
from dus_cli.common.reference import ModelRef
from dus_cli.common.units import parse_count
from dus_cli.console.terminal import fitted
from dus_cli.data.documents import BadLine
from dus_cli.errors import GateError
from dus_cli.evaluation.h6 import plans_of
from dus_cli.evaluation.options import ScoringOptions, TextOptions
from dus_cli.evaluation.picture import eval_svg
from dus_cli.evaluation.report import EvalReport, Gates, LossReport
from dus_cli.evaluation.tasks import TaskOptions, TaskReport
from dus_cli.models.precision import Precision
from dus_cli.pictures.files import check_picture, write_pictures
from dus_cli.progress import ProgressMode

# The groups in which --help lists the options.
_TEXT, _TASKS, _RUN, _GATES = "Data", "Tasks", "Running", "What must hold"


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Directories or Hub ids; the first is what the others are held against."
        ),
    ],
    data: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads the annotation at run time, also on Python 3.10)
        typer.Option(
            "--data",
            metavar="FILE",
            help=f"Held-out text: {DATA_KINDS}; files, globs, folders, - for standard input. Repeat for more.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    text_field: TextField = "text",
    on_bad_line: OnBadLine = BadLine.error,
    special_tokens: SpecialTokens = True,
    max_documents: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--max-documents",
            parser=number("max-documents"),
            metavar="N",
            help="The first N documents.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--tokens",
            metavar="N",
            parser=number("tokens", parse_count),
            help="Documents up to the one with which N tokens of the baseline's tokenizer are reached (100K, 1M).",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    seq_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--seq-length",
            parser=number("seq-length"),
            metavar="T",
            help="Tokens of a window. Default: 2048, or what every MODEL can see.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    stride: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--stride",
            parser=number("stride"),
            metavar="S",
            help="Tokens between two windows of a long document; T − S tokens of context at least. Default: T / 2.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    tasks: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Tasks of lm-evaluation-harness (eval extra), by commas; h6 is SOLAR's six.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    include_path: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--include-path",
            metavar="DIR",
            parser=path_parser,
            help="Tasks of your own: YAML files of the harness. A !function in them is run.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    num_fewshot: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--num-fewshot",
            parser=number("num-fewshot"),
            metavar="N",
            help="Shots. Default: the task's; h6 has its own.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--limit",
            parser=number("limit"),
            metavar="N",
            help="The first N examples of a task.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    baseline: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--baseline", metavar="MODEL", help="Hold the others against this one instead of the first."),
    ] = None,
    with_base: Annotated[
        bool,
        typer.Option("--with-base", help="Also the base inside the first MODEL, an up-scaled one, as the baseline."),
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
            help="Write the results into README.md of each directory but the baseline's, as the Hub's model-index.",
        ),
    ] = False,
    min_improvement: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--min-improvement",
            parser=number("min-improvement"),
            metavar="X",
            help="Exit 1 unless each loss is at least X nats per token under the baseline's; -0.05 lets it be above.",
            rich_help_panel=_GATES,
        ),
    ] = None,
    max_loss: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--max-loss",
            parser=number("max-loss"),
            metavar="Y",
            help="Exit 1 where a loss is above Y nats per token (the baseline's aside).",
            rich_help_panel=_GATES,
        ),
    ] = None,
    max_drop: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--max-drop",
            parser=number("max-drop"),
            metavar="P",
            help="Exit 1 where a task's score is more than P points of 100 below the baseline's.",
            rich_help_panel=_GATES,
        ),
    ] = None,
    confident: Annotated[
        bool,
        typer.Option(
            "--confident", help="Ask it of the whole 95% interval, not of the measured value.", rich_help_panel=_GATES
        ),
    ] = False,
    batch_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--batch-tokens",
            metavar="N",
            parser=number("batch-tokens", parse_count),
            help="Tokens run at once. Default: 2,048 on a CPU, else 16,384; at least a window.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(
            "--precision",
            metavar="[auto|bf16|fp32]",
            parser=parser(Precision.parse),
            help="Of weights and activations: auto is bf16, or fp32 on a CPU that is slow at bf16.",
            rich_help_panel=_RUN,
        ),
    ] = Precision.auto,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="cpu, cuda:0, …; auto is a GPU's.", rich_help_panel=_RUN)
    ] = "auto",
    token: Token = None,
    progress: ShowProgress = ProgressMode.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare models on the same held-out text: loss, perplexity, bits per byte, paired intervals.

    Directories or Hub ids side by side: a base, the model scaled up from it, the healed one.
    """
    refs = _in_order(models, baseline, token)
    gates = Gates(min_improvement, max_loss, max_drop, confident)
    _check_combination(len(refs) + with_base, gates, has_data=bool(data), has_tasks=bool(tasks))
    if with_base and (baseline is not None or not data):
        raise typer.BadParameter("it is the baseline of --data; leave out --baseline", param_hint="--with-base")
    judged = refs if len(refs) == 1 or with_base else refs[1:]
    if update_card:
        from dus_cli.evaluation import card

        for ref in judged:
            card.check_card(ref)
    if plot is not None:
        check_picture(plot)
    says = not (quiet or as_json)
    with progress_for(progress, quiet=not says) as told:
        losses, scores = _verb()(
            refs,
            TextOptions(tuple(data), text_field, on_bad_line, max_documents, tokens) if data else None,
            ScoringOptions(seq_length, stride, batch_tokens, precision, device, special_tokens),
            told,
            tasks=TaskOptions(plans_of(tasks), include_path, num_fewshot, limit) if tasks else None,
            with_base=with_base,
            quiet=not told.is_live,
        )
    report = EvalReport(losses, scores, gates)
    if plot is not None:
        write_pictures(plot, lambda dark: eval_svg(report, dark=dark))
    if update_card:
        report = replace(report, cards=_updated_cards(report, judged))
    if as_json:
        sys.stdout.write(json.dumps(report.to_json()) + "\n")
    elif says:
        sys.stdout.write(fitted(report.text(shutil.get_terminal_size().columns)) + "\n")
    sys.stdout.flush()
    if report.missed:
        raise GateError("; ".join(report.missed))


def _updated_cards(report: EvalReport, refs: list[ModelRef]) -> tuple[str, ...]:
    """The cards that have the results now."""
    from dus_cli.evaluation import card

    paths = []
    for ref in refs:
        assert ref.path is not None
        card.update_card(ref.path, ref.name, card.results_of(report, ref))
        paths.append(str(ref.path / card.NAME))
    return tuple(paths)


def _verb() -> Callable[..., tuple[LossReport | None, TaskReport | None]]:
    """`evaluate`, with numpy and torch below it.

    Raises:
        MissingExtraError: they are not there.
    """
    require("dus eval", "numpy", "torch", "transformers")
    from dus_cli.evaluation.verb import evaluate as verb

    return verb


def _in_order(models: list[str], baseline: str | None, token: str | None) -> list[ModelRef]:
    """The baseline first: one of the models, or one more."""
    if baseline is not None:
        models = [baseline, *(text for text in models if text != baseline)]
    return [ModelRef.parse(text, token=token) for text in models]


def _check_combination(num_models: int, gates: Gates, *, has_data: bool, has_tasks: bool) -> None:
    """Hold that the options make sense together.

    Raises:
        typer.BadParameter: they do not.
    """
    if not has_data and not has_tasks:
        raise typer.BadParameter("there is nothing to evaluate on; give --data or --tasks", param_hint="--data")
    for value, hint, needed in (
        (gates.min_improvement, "--min-improvement", has_data),
        (gates.max_loss, "--max-loss", has_data),
        (gates.max_drop, "--max-drop", has_tasks),
    ):
        if value is None:
            continue
        if not needed:
            option = "--tasks" if hint == "--max-drop" else "--data"
            raise typer.BadParameter(f"it judges figures of {option}, which is missing", param_hint=hint)
        if num_models == 1 and hint != "--max-loss":
            raise typer.BadParameter(
                "one model has nothing to be held against; give its base as the first MODEL, or --with-base",
                param_hint=hint,
            )
    if gates.is_confident and gates.min_improvement is None and gates.max_loss is None:
        raise typer.BadParameter(
            "it is about --min-improvement and --max-loss; give one of them", param_hint="--confident"
        )
