"""`dus eval`: parse, call, print."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Annotated, Optional

import typer

from dus_cli.errors import GateError, MissingExtraError
from dus_cli.evaluation.options import Precision, ScoringOptions, TextOptions
from dus_cli.heal.corpus import BadLine
from dus_cli.heal.options import parse_count
from dus_cli.options import AsJson, OnBadLine, Quiet, ShowProgress, TextField, Token, progress_for
from dus_cli.progress import ProgressMode
from dus_cli.reference import ModelRef

# The groups in which --help lists the options.
_TEXT, _RUN, _GATES = "Data", "Running", "What must hold"


def _count(text: str) -> int:
    try:
        return parse_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


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
            help="Held-out text: .jsonl (.gz, .zst), .txt, .parquet; files, globs, folders, - for standard input. "
            "Repeat for more.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    text_field: TextField = "text",
    on_bad_line: OnBadLine = BadLine.error,
    max_documents: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--max-documents", min=1, metavar="N", help="The first N documents.", rich_help_panel=_TEXT),
    ] = None,
    tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--tokens",
            metavar="N",
            parser=_count,
            help="Documents up to the one with which N tokens of the baseline's tokenizer are reached (100K, 1M).",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    seq_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--seq-length",
            min=2,
            metavar="T",
            help="Tokens of a window. Default: 2048, or what every MODEL can see.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    stride: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--stride",
            min=1,
            metavar="S",
            help="Tokens between two windows of a long document; T − S tokens of context at least. Default: T / 2.",
            rich_help_panel=_TEXT,
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
    min_improvement: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--min-improvement",
            metavar="X",
            help="Exit 1 unless each loss is at least X nats per token under the baseline's; -0.05 lets it be above.",
            rich_help_panel=_GATES,
        ),
    ] = None,
    max_loss: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--max-loss",
            metavar="Y",
            help="Exit 1 where a loss is above Y nats per token (the baseline's aside).",
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
            parser=_count,
            help="Tokens run at once. Default: 2,048 on a CPU, else 16,384; at least a window.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(
            "--precision",
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
    if not data:
        raise typer.BadParameter("there is nothing to evaluate on; give --data heldout.jsonl", param_hint="--data")
    _check_gates(refs, min_improvement, max_loss, baseline, with_base=with_base, confident=confident)
    # Imported here, like torch below it: what `dus --help` and `dus upscale` do not need.
    from dus_cli.evaluation.report import EvalReport, Gates, losses_text

    try:
        from dus_cli.evaluation.evaluating import losses
    except ImportError as error:  # numpy
        raise MissingExtraError("dus eval needs torch and transformers; pip install 'dus-cli[heal]'") from error

    says = not (quiet or as_json)
    text = TextOptions(tuple(data), text_field, on_bad_line, max_documents, tokens)
    scoring = ScoringOptions(seq_length, stride, batch_tokens, precision, device)
    with progress_for(progress, quiet=not says) as told:
        found = losses(refs, text, scoring, told, with_base=with_base, quiet=not told.is_live)
    report = EvalReport(found, Gates(min_improvement, max_loss, confident))
    if as_json:
        sys.stdout.write(json.dumps(report.to_json()) + "\n")
    elif says:
        sys.stdout.write(losses_text(found, shutil.get_terminal_size().columns) + "\n")
    sys.stdout.flush()
    if report.missed:
        raise GateError("; ".join(report.missed))


def _in_order(models: list[str], baseline: str | None, token: str | None) -> list[ModelRef]:
    """The baseline first: one of the models, or one more."""
    if baseline is not None:
        models = [baseline, *(text for text in models if text != baseline)]
    return [ModelRef.parse(text, token=token) for text in models]


def _check_gates(
    refs: list[ModelRef],
    min_improvement: float | None,
    max_loss: float | None,
    baseline: str | None,
    *,
    with_base: bool,
    confident: bool,
) -> None:
    if with_base and baseline is not None:
        raise typer.BadParameter(
            "the base inside MODEL is the baseline then; leave out --baseline", param_hint="--with-base"
        )
    if min_improvement is not None and len(refs) + with_base == 1:
        raise typer.BadParameter(
            "one model has nothing to improve on; give its base as the first MODEL, or --with-base",
            param_hint="--min-improvement",
        )
    if confident and min_improvement is None and max_loss is None:
        raise typer.BadParameter(
            "it is about --min-improvement and --max-loss; give one of them", param_hint="--confident"
        )
