"""The command `dus heal`: parse, call, print."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

from dus_cli.commands.options import (
    DATA_KINDS,
    AsJson,
    MoreData,
    OnBadLine,
    Quiet,
    ShowProgress,
    SpecialTokens,
    TextField,
    effective_mode,
    path_parser,
)
from dus_cli.commands.options import number as _number
from dus_cli.commands.options import parser as _parser
from dus_cli.common.libraries import require
from dus_cli.common.units import parse_count
from dus_cli.console.terminal import fitted
from dus_cli.data.documents import BadLine
from dus_cli.data.holdout import parse_holdout
from dus_cli.heal import options as opt
from dus_cli.models.precision import Precision
from dus_cli.progress import ProgressMode


def _or_auto(name: str) -> Callable[[str], int | None]:
    """A typer parser of an option's number, or of `auto`, which is None."""
    parse = _number(name)
    return lambda text: None if text == "auto" else parse(text)


# The groups in which --help lists the options.
_DATA, _BUDGET, _RECIPE, _FIT = "Data", "Budget", "Recipe", "Memory and speed"
_LAUNCH, _KEEP = "Workers", "Measuring and saving"


def heal(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", parser=path_parser, help="The directory of the model to heal.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="FILE",
            help=f"Text: {DATA_KINDS}; files, globs, folders, - for standard input; FILE:0.7 weighs a mixture. "
            "Repeat for more.",
            rich_help_panel=_DATA,
        ),
    ],
    more_data: MoreData = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads the annotation at run time, also on Python 3.10)
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            parser=path_parser,
            help="Where the healed model goes. Default: MODEL-healed.",
        ),
    ] = None,
    text_field: TextField = "text",
    on_bad_line: OnBadLine = BadLine.error,
    eval_data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--eval-data", metavar="FILE", help="Held-out text of its own.", rich_help_panel=_DATA),
    ] = None,
    holdout: Annotated[
        float,
        typer.Option(
            "--holdout",
            metavar="SHARE",
            parser=_number("holdout", parse_holdout),
            help="Share of documents held out, by a hash of their text.",
            rich_help_panel=_DATA,
        ),
    ] = "0.5%",  # type: ignore[assignment]  # the parser makes it a float
    seq_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--seq-length",
            parser=_number("seq-length"),
            metavar="T",
            help="Tokens of a row. Default: min(4096, the model's).",
            rich_help_panel=_DATA,
        ),
    ] = None,
    document_mask: Annotated[
        bool,
        typer.Option(
            "--document-mask/--no-document-mask",
            help="Attention stays within a document, or runs over the whole packed row.",
            rich_help_panel=_DATA,
        ),
    ] = True,
    special_tokens: SpecialTokens = True,
    tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--tokens",
            metavar="N",
            parser=_number("tokens", parse_count),
            help="Budget in tokens (10M, 1B). Default: one epoch.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--steps", parser=_number("steps"), metavar="N", help="Budget in steps.", rich_help_panel=_BUDGET),
    ] = None,
    epochs: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--epochs", parser=_number("epochs"), metavar="E", help="Budget in epochs.", rich_help_panel=_BUDGET
        ),
    ] = None,
    until: Annotated[
        Optional[opt.Until],  # noqa: UP045
        typer.Option(
            "--until",
            metavar="base",
            help="base: end once the held-out loss is at or under the base's, twice in a row.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    batch_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--batch-tokens",
            metavar="N",
            parser=_number("batch-tokens", parse_count),
            help="Tokens of a step over all workers. Default: 512 below 1B parameters, else 262,144; at least a row.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    lr: Annotated[
        float,
        typer.Option(
            "--lr", parser=_number("lr"), metavar="LR", help="Highest learning rate.", rich_help_panel=_RECIPE
        ),
    ] = opt.Recipe.lr,
    gain_lr: Annotated[
        float,
        typer.Option(
            "--gain-lr",
            parser=_number("gain-lr"),
            metavar="LR",
            help="Rate of the residual gains, one factor for each output projection; 0 is none.",
            rich_help_panel=_RECIPE,
        ),
    ] = opt.Recipe.gain_lr,
    schedule: Annotated[
        opt.Schedule,
        typer.Option(
            "--schedule", help="Warm-up, stable, decay to 0; or constant after the warm-up.", rich_help_panel=_RECIPE
        ),
    ] = opt.Recipe.schedule,
    warmup: Annotated[
        opt.Span,
        typer.Option(
            "--warmup",
            metavar="N",
            parser=_parser(opt.parse_span),
            help="Steps, or share of the run.",
            rich_help_panel=_RECIPE,
        ),
    ] = "2%",  # type: ignore[assignment]
    decay: Annotated[
        opt.Span,
        typer.Option(
            "--decay",
            metavar="N",
            parser=_parser(opt.parse_span),
            help="Of wsd: steps, or share of the run.",
            rich_help_panel=_RECIPE,
        ),
    ] = "20%",  # type: ignore[assignment]
    weight_decay: Annotated[
        float,
        typer.Option(
            "--weight-decay",
            parser=_number("weight-decay"),
            metavar="W",
            help="Of AdamW, for matrices.",
            rich_help_panel=_RECIPE,
        ),
    ] = opt.Recipe.weight_decay,
    betas: Annotated[
        str, typer.Option("--betas", metavar="B1,B2", help="Of AdamW.", rich_help_panel=_RECIPE)
    ] = "0.9,0.95",
    grad_clip: Annotated[
        float,
        typer.Option(
            "--grad-clip",
            parser=_number("grad-clip"),
            metavar="G",
            help="Largest gradient norm; 0 is none.",
            rich_help_panel=_RECIPE,
        ),
    ] = opt.Recipe.grad_clip,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", parser=_number("seed"), metavar="S", help="Of the data's order.", rich_help_panel=_RECIPE
        ),
    ] = opt.Recipe.seed,
    train: Annotated[
        opt.Train,
        typer.Option(
            "--train",
            help="Which layers learn: all, or new (those that are not the base's own).",
            rich_help_panel=_RECIPE,
        ),
    ] = opt.Recipe.train,
    distill: Annotated[
        Optional[opt.Distill],  # noqa: UP045
        typer.Option(
            "--distill",
            metavar="W[:UNTIL]",
            parser=_parser(opt.parse_distill),
            help="Weight of the KL term towards the base, falling to 0 at UNTIL (80%, 10M). Default: 0.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    max_skipped: Annotated[
        int,
        typer.Option(
            "--max-skipped",
            parser=_number("max-skipped"),
            metavar="N",
            help="Bad steps in a row (NaN, spikes) that end a run.",
            rich_help_panel=_RECIPE,
        ),
    ] = opt.Recipe.max_skipped,
    micro_batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--micro-batch",
            metavar="ROWS",
            parser=_or_auto("micro-batch"),
            help="Rows at once on a worker; auto tries a GPU's memory.",
            rich_help_panel=_FIT,
        ),
    ] = "auto",  # type: ignore[assignment]
    precision: Annotated[
        Precision,
        typer.Option(
            "--precision",
            metavar="[auto|bf16|fp32]",
            parser=_parser(Precision.parse),
            help="Of weights and activations; auto is bf16, and fp32 on a CPU that has no instructions for bf16.",
            rich_help_panel=_FIT,
        ),
    ] = Precision.auto,
    master_weights: Annotated[
        opt.MasterWeights,
        typer.Option(
            "--master-weights",
            metavar="[fp32|bf16]",
            parser=_parser(opt.MasterWeights.parse),
            help="fp32 copies, or bf16 alone with stochastic rounding.",
            rich_help_panel=_FIT,
        ),
    ] = opt.MasterWeights.fp32,
    activation_checkpointing: Annotated[
        opt.Checkpointing,
        typer.Option("--activation-checkpointing", help="What is computed again to save memory.", rich_help_panel=_FIT),
    ] = opt.Checkpointing.none,
    compile_layers: Annotated[
        bool, typer.Option("--compile", help="torch.compile each layer.", rich_help_panel=_FIT)
    ] = False,
    sharding: Annotated[
        opt.Sharding,
        typer.Option(
            "--sharding", help="Weights over all workers (fsdp), those of a node (hsdp), none.", rich_help_panel=_FIT
        ),
    ] = opt.Sharding.auto,
    offload: Annotated[
        bool, typer.Option("--offload", help="Weights and optimizer in the CPU's memory.", rich_help_panel=_FIT)
    ] = False,
    nproc_per_node: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--nproc-per-node",
            metavar="N",
            parser=_or_auto("nproc-per-node"),
            help="Workers of this node; auto is one for each GPU.",
            rich_help_panel=_LAUNCH,
        ),
    ] = "auto",  # type: ignore[assignment]
    nnodes: Annotated[
        int, typer.Option("--nnodes", parser=_number("nnodes"), metavar="N", help="Nodes.", rich_help_panel=_LAUNCH)
    ] = 1,
    node_rank: Annotated[
        int,
        typer.Option(
            "--node-rank", parser=_number("node-rank"), metavar="R", help="This node's number.", rich_help_panel=_LAUNCH
        ),
    ] = 0,
    rdzv_endpoint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--rdzv-endpoint",
            parser=_parser(opt.parse_endpoint),
            metavar="HOST:PORT",
            help="Where nodes meet.",
            rich_help_panel=_LAUNCH,
        ),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            "--max-restarts",
            parser=_number("max-restarts"),
            metavar="N",
            help="Restarts after a worker's death.",
            rich_help_panel=_LAUNCH,
        ),
    ] = 3,
    print_command: Annotated[
        bool,
        typer.Option("--print-command", help="Print the workers' command line and exit.", rich_help_panel=_LAUNCH),
    ] = False,
    eval_every: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--eval-every",
            parser=_number("eval-every"),
            metavar="STEPS",
            help="Steps between held-out measurements. Default: a 20th of the run, or more: see --eval-tokens.",
            rich_help_panel=_KEEP,
        ),
    ] = None,
    eval_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--eval-tokens",
            metavar="N",
            parser=_number("eval-tokens", parse_count),
            help="Held-out tokens of a measurement, at most. Default: 250K, or what takes a tenth of the run's time.",
            rich_help_panel=_KEEP,
        ),
    ] = None,
    save_every: Annotated[
        opt.Every,
        typer.Option(
            "--save-every",
            metavar="N",
            parser=_parser(opt.parse_every),
            help="Checkpoint interval in steps (500) or time (15m).",
            rich_help_panel=_KEEP,
        ),
    ] = "15m",  # type: ignore[assignment]
    keep: Annotated[
        int,
        typer.Option(
            "--keep", parser=_number("keep"), metavar="N", help="Checkpoints kept while it runs.", rich_help_panel=_KEEP
        ),
    ] = 2,
    track: Annotated[
        opt.Track, typer.Option("--track", help="A tracker besides metrics.jsonl.", rich_help_panel=_KEEP)
    ] = opt.Track.none,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count tokens and steps, estimate memory and FLOPs; write nothing.")
    ] = False,
    progress: ShowProgress = ProgressMode.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Heal an up-scaled model by continued pretraining, and prove that it healed.

    Example: dus heal out/ --data corpus.jsonl --until base -o healed/

    Most need five options: --data (the text), -o (where the model goes), --tokens (how long; one epoch if left out),
    --until base (or until it is as good as its base) and --dry-run (what that takes).

    Measures the base's loss and the scaled model's, trains under torchrun, and ends with a directory like any other,
    with its loss curve. The same command run again goes on where it was.
    """
    adam_betas = _parser(opt.parse_betas, "--betas")(betas)
    # Imported here, like torch below it: what `dus --help` and `dus upscale` do not need.
    require("dus heal", "numpy", "torch", "transformers")
    from dus_cli.heal.launch import verb as launcher
    from dus_cli.heal.launch.report import command_json, dry_run_json, dry_run_text, heal_text
    from dus_cli.heal.launch.resolve import Wishes
    from dus_cli.heal.watch.views import view_for

    wishes = Wishes(
        model=model,
        output=output or model.resolve().with_name(f"{model.resolve().name}-healed"),
        data=opt.DataOptions(
            (*data, *(more_data or ())),
            text_field,
            on_bad_line.value,
            holdout,
            tuple(eval_data or ()),
            seq_length,
            document_mask,
            special_tokens,
        ),
        budget=opt.Budget(tokens, steps, epochs, until),
        recipe=opt.Recipe(
            batch_tokens,
            lr,
            gain_lr,
            schedule,
            warmup,
            decay,
            weight_decay,
            adam_betas,
            grad_clip,
            seed,
            train,
            distill,
            max_skipped,
        ),
        fit=opt.Fit(
            micro_batch, precision, master_weights, activation_checkpointing, compile_layers, sharding, offload
        ),
        launch=opt.Launch(nproc_per_node, nnodes, node_rank, rdzv_endpoint, max_restarts),
        keeping=opt.Keeping(eval_every, eval_tokens, save_every, keep, track),
    )
    says = not (quiet or as_json)
    with view_for(effective_mode(progress, quiet=not says)) as view:
        if dry_run:
            run, model_shape = launcher.preview(wishes, view)
            shown = (
                json.dumps(dry_run_json(run, model_shape, wishes))
                if as_json
                else dry_run_text(run, model_shape, wishes)
            )
        elif print_command:
            command = launcher.prepared_command(wishes, view)
            shown = json.dumps(command_json(command, wishes)) if as_json else shlex.join(command)
        else:
            report = launcher.heal(wishes, view)
            shown = json.dumps(report) if as_json else heal_text(report)
    if as_json or says or print_command:
        is_exact = as_json or (print_command and not dry_run)
        sys.stdout.write((shown if is_exact else fitted(shown)) + "\n")
