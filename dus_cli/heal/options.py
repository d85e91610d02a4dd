"""The options of `dus heal` in groups, without torch, so that `dus heal --help` is quick."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from dus_cli.common.bounds import BOUNDS
from dus_cli.common.options import Option, option_fields
from dus_cli.common.units import parse_count, parse_share, parse_size, share_text, size_text
from dus_cli.data.documents import BadLine, Column
from dus_cli.data.holdout import parse_holdout
from dus_cli.data.options import DATA, DATA_KINDS, OnBadLine, TextField, UseSpecialTokens
from dus_cli.models.precision import Precision, precision_option
from dus_cli.planning.dtypes import DtypeChoice


class Until(str, Enum):
    """A goal that ends the run before its budget does."""

    base = "base"


class Schedule(str, Enum):
    """The learning-rate schedule: warm-up, stable, decay (WSD, arXiv:2404.06395); or constant after
    the warm-up.
    """

    wsd = "wsd"
    constant = "constant"


class MasterWeights(DtypeChoice):
    """What the optimizer updates: an fp32 copy of the weights, or the bf16 weights themselves with
    stochastic rounding.
    """

    fp32 = "fp32"
    bf16 = "bf16"


class Checkpointing(str, Enum):
    """Which activations are kept for the backward pass: all (none is recomputed), the results of
    matrix products (selective), or each layer's input only (full).
    """

    none = "none"
    selective = "selective"
    full = "full"


class Sharding(str, Enum):
    """Which workers the weights are split over: all (FSDP), those of a node (HSDP), or none. auto
    is HSDP on several nodes, else FSDP.
    """

    auto = "auto"
    fsdp = "fsdp"
    hsdp = "hsdp"
    none = "none"


class Train(str, Enum):
    """What is trained: all parameters, or only the layers that are not the base's own."""

    all = "all"
    new = "new"


class Track(str, Enum):
    """The tracker that gets the figures of metrics.jsonl, too."""

    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"
    trackio = "trackio"


@dataclass(frozen=True)
class Span:
    """A part of the run: a number of steps, a number of tokens, or a share. One of the three is
    set.
    """

    steps: int | None = None
    tokens: int | None = None
    share: float | None = None

    def in_steps(self, total_steps: int, tokens_per_step: int) -> int:
        """The length in steps, at most the run's; at least one step for a positive length."""
        if self.steps is not None:
            steps = self.steps
        elif self.tokens is not None:
            steps = -(-self.tokens // tokens_per_step)
        else:
            assert self.share is not None
            steps = round(self.share * total_steps) or int(self.share > 0)
        return min(steps, total_steps)

    def __str__(self) -> str:
        """As typed on the command line.

        >>> str(Span(steps=100)), str(Span(share=0.02)), str(Span(tokens=10_000_000))
        ('100', '2%', '10000000')
        """
        return (
            share_text(self.share)
            if self.share is not None
            else str(self.steps or self.tokens or 0)
        )


@dataclass(frozen=True)
class Distill:
    """The weight of the KL term at the start, which falls linearly to 0 at `until` (None: at the
    end of the run).
    """

    weight: float
    until: Span | None = None

    def __str__(self) -> str:
        """As typed on the command line.

        >>> str(Distill(0.5)), str(Distill(0.5, Span(share=0.8)))
        ('50%', '50%:80%')
        >>> str(Distill(0.25, Span(tokens=10_000_000)))
        '25%:10000000'
        """
        return (
            share_text(self.weight)
            if self.until is None
            else f"{share_text(self.weight)}:{self.until}"
        )


@dataclass(frozen=True)
class Every:
    """An interval in steps or in seconds."""

    steps: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        """As typed on the command line.

        >>> str(Every(steps=500)), str(Every(seconds=900.0))
        ('500', '15m')
        >>> str(Every(seconds=0.25)), str(Every(seconds=7200.0))
        ('0.25s', '2h')
        """
        if self.seconds is None:
            return str(self.steps)
        for unit, size in (("h", 3600), ("m", 60)):
            if self.seconds % size == 0:
                return f"{self.seconds / size:.0f}{unit}"
        return f"{self.seconds:.9f}".rstrip("0").rstrip(".") + "s"


def parse_span(text: str) -> Span:
    """Parse a number of steps, or a share of the run.

    >>> parse_span("100"), parse_span("10%")
    (Span(steps=100, tokens=None, share=None), Span(steps=None, tokens=None, share=0.1))

    Raises:
        ValueError: the text is neither.
    """
    if re.fullmatch(r"\d{1,12}", text.strip(), re.ASCII):
        return Span(steps=int(text))
    try:
        return Span(share=parse_share(text))
    except ValueError:
        raise ValueError(
            f"{text!r} is not a length; write steps (100) or a share of the run (10%)"
        ) from None


def parse_every(text: str) -> Every:
    """Parse an interval: a number of steps, or a time with a unit.

    >>> parse_every("500"), parse_every("15m")
    (Every(steps=500, seconds=None), Every(steps=None, seconds=900.0))

    Raises:
        ValueError: the text is neither, or out of bounds.
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)\s*([smh]?)", text.strip().lower(), re.ASCII)
    if match is None or not (match[2] or match[1].isdigit()):
        raise ValueError(f"{text!r} is not an interval; write steps (500) or a time (30s, 15m, 2h)")
    number = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
    if not BOUNDS["interval"].holds(number):
        raise ValueError(f"{text!r} is not {BOUNDS['interval']}, in steps or in seconds")
    return Every(seconds=number) if match[2] else Every(steps=int(number))


def parse_time(text: str) -> float:
    """Parse a time with a unit; seconds.

    >>> parse_time("2m"), parse_time("30s")
    (120.0, 30.0)

    Raises:
        ValueError: the text is not a time, or out of bounds.
    """
    seconds = None
    with contextlib.suppress(ValueError):
        seconds = parse_every(text).seconds
    if seconds is None:
        raise ValueError(f"{text!r} is not a time of 1s or more; write 30s, 2m or 1h")
    return seconds


def parse_distill(text: str) -> Distill:
    """Parse the KL term's weight in 0…1, with or without the point at which it has fallen to 0: a
    share of the run or tokens (0.5, 0.5:80%, 0.5:10M).

    Raises:
        ValueError: the text is not of this form.
    """
    weight, colon, until = text.partition(":")
    try:
        value = parse_share(weight)
        if not colon:
            return Distill(value)
        try:
            span = Span(share=parse_share(until))
        except ValueError:
            span = Span(tokens=parse_count(until))
    except ValueError:
        raise ValueError(
            f"{text!r} is not a weight; write 0.5, or 0.5:80% or 0.5:10M for when it is 0"
        ) from None
    return Distill(value, span)


def parse_endpoint(text: str) -> str:
    """Check the address of torchrun's rendezvous: a host with or without a port.

    >>> parse_endpoint("node-1:29500"), parse_endpoint("[fe80::1]:29500"), parse_endpoint("node-1")
    ('node-1:29500', '[fe80::1]:29500', 'node-1')

    Raises:
        ValueError: there is no host, or the port is out of range.
    """
    match = re.fullmatch(r"([^\s:/]+|\[[^\s\]]+\])(?::(\d{1,5}))?", text, re.ASCII)
    if match is None or not 0 < int(match[2] or 1) < 1 << 16:
        raise ValueError(f"{text!r} is not HOST:PORT with a port from 1 to 65,535")
    return text


def parse_betas(text: str) -> tuple[float, float]:
    """Parse AdamW's two betas.

    >>> parse_betas("0.9,0.95")
    (0.9, 0.95)

    Raises:
        ValueError: these are not two numbers from 0 to below 1.
    """
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        first = second = -1.0
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ValueError(f"{text!r} is not a pair of betas; write them like 0.9,0.95")
    return first, second


def betas_text(betas: tuple[float, float]) -> str:
    """AdamW's betas as typed on the command line.

    >>> betas_text((0.9, 0.95))
    '0.9,0.95'
    """
    return ",".join(map(str, betas))


@dataclass(frozen=True)
class RateScales:
    """Factors of the learning rates by group; 0 freezes.

    Attributes:
        new: new layers.
        base: the base's own layers.
        embeddings: parameters outside of the layers (embeddings, head, final norm).
        norms: all norms; None is the factor of the layer, or of what is outside.
    """

    new: float = 1.0
    base: float = 1.0
    embeddings: float = 1.0
    norms: float | None = None

    def __str__(self) -> str:
        """As typed on the command line.

        >>> str(RateScales(base=0.1, norms=1.0))
        'new=1,base=0.1,embeddings=1,norms=1'
        """
        values = dataclasses.asdict(self).items()
        return ",".join(f"{name}={value:g}" for name, value in values if value is not None)


_RATE_GROUPS = tuple(group.name for group in dataclasses.fields(RateScales))
_HIGHEST_SCALE = 1000.0


def parse_rate_scales(text: str) -> RateScales:
    """Parse factors of the learning rates by group; groups that are not named keep the default.

    >>> parse_rate_scales("base=0.1,embeddings=0")
    RateScales(new=1.0, base=0.1, embeddings=0.0, norms=None)

    Raises:
        ValueError: there is no such group, a group occurs twice, or a factor is not a number from 0
            to 1,000.
    """
    scales: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (word.strip() for word in part.partition("="))
        if name not in _RATE_GROUPS or not equals:
            raise ValueError(
                f"{part!r} is not GROUP=FACTOR; write new=1,base=0.1,embeddings=0,norms=1, or some "
                "of these"
            )
        if name in scales:
            raise ValueError(f"{text!r} names {name} twice; leave one out")
        try:
            scales[name] = float(number)
        except ValueError:
            scales[name] = -1.0
        if not 0 <= scales[name] <= _HIGHEST_SCALE:
            raise ValueError(
                f"{part!r}: the factor is not a number from 0 to {_HIGHEST_SCALE:,.0f}"
            )
    return RateScales(**scales)


# Tokens within which rows are shuffled while the text is tokenised, without --shuffle-window.
DEFAULT_WINDOW = 32_000_000

# The most bytes in a token cache without --token-cache-size.
DEFAULT_CACHE = 100 * 10**9

# Fields of `DataOptions` that only --stream uses.
_OF_STREAM = ("stream", "shuffle_window", "token_cache", "token_cache_size")

# The panels of --help.
_BUDGET, _RECIPE, _FIT = "Budget", "Recipe", "Memory and speed"
_LAUNCH, _KEEP = "Workers", "Measuring and saving"


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The data, and how they are packed. `seq_length` is in tokens; None is 4,096, or the model's
    context length if that is less.
    """

    files: Annotated[
        tuple[str, ...],
        Option(
            f"Text: {DATA_KINDS}; files, globs, folders, hf://datasets/ORG/NAME, https://, s3://, "
            "gs://, - for standard input; FILE:0.7 gives a weight in a mixture. Repeat for more.",
            name="data",
            metavar="FILE",
            panel=DATA,
        ),
    ]
    text_field: TextField = "text"
    chat_field: Annotated[
        str | None,
        Option(
            "The field or column with a chat's messages, written by the model's own chat template.",
            metavar="NAME",
            panel=DATA,
        ),
    ] = None
    token_field: Annotated[
        str | None,
        Option("The field or column with token ids.", metavar="NAME", panel=DATA),
    ] = None
    weight_field: Annotated[
        str | None,
        Option(
            "The field or column with each document's weight: a document of weight 2.5 occurs "
            "twice or three times in an epoch, and one of weight 0 not at all.",
            metavar="NAME",
            panel=DATA,
        ),
    ] = None
    on_bad_line: OnBadLine = BadLine.error
    holdout: Annotated[
        float,
        Option(
            "Share of the documents to hold out of training, chosen by a hash of their text.",
            metavar="SHARE",
            panel=DATA,
            parse=parse_holdout,
            show=share_text,
        ),
    ] = 0.005
    eval_files: Annotated[
        tuple[str, ...],
        Option(
            "Held-out text of its own, instead of a share of --data. NAME=FILE makes a held-out "
            "set of that name; --until base compares the first set.",
            name="eval-data",
            metavar="[NAME=]FILE",
            panel=DATA,
        ),
    ] = ()
    seq_length: Annotated[
        int | None,
        Option(
            "Tokens in a row. Default: 4096, or the model's context length if that is less.",
            metavar="T",
            panel=DATA,
        ),
    ] = None
    document_mask: Annotated[
        bool,
        Option(
            "Keep attention within a document, or let it run over the whole packed row.", panel=DATA
        ),
    ] = True
    special_tokens: UseSpecialTokens = True
    stream: Annotated[
        bool,
        Option(
            "Train while the text is still tokenised. Rows are then shuffled within windows, and "
            "the budget is --tokens or --steps.",
            panel=DATA,
        ),
    ] = False
    shuffle_window: Annotated[
        int | None,
        Option(
            "Tokens within which --stream shuffles rows, at most. Default: 32M.",
            metavar="N",
            panel=DATA,
            parse=parse_count,
        ),
    ] = None
    token_cache: Annotated[
        str | None,
        Option(
            "Folder for the token files of --stream, which later runs find there. Default: within "
            "OUT.",
            metavar="DIR",
            panel=DATA,
        ),
    ] = None

    token_cache_size: Annotated[
        int | None,
        Option(
            "The most bytes in --token-cache (50GB): what was least recently used is removed. "
            "Default: 100GB.",
            metavar="SIZE",
            panel=DATA,
            parse=parse_size,
            show=size_text,
        ),
    ] = None

    @property
    def window_tokens(self) -> int:
        """The tokens within which rows are shuffled while the text is tokenised."""
        return self.shuffle_window or DEFAULT_WINDOW

    @property
    def field(self) -> tuple[str, Column]:
        """The name of the field that is read, and what the field holds."""
        if self.chat_field is not None:
            return self.chat_field, Column.chat
        if self.token_field is not None:
            return self.token_field, Column.tokens
        return self.text_field, Column.text


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """The length of the run: at most one of tokens, steps and epochs. The default is one epoch."""

    tokens: Annotated[
        int | None,
        Option(
            "Budget in tokens (10M, 1B). Default: one epoch.",
            metavar="N",
            panel=_BUDGET,
            parse=parse_count,
        ),
    ] = None
    steps: Annotated[int | None, Option("Budget in steps.", metavar="N", panel=_BUDGET)] = None
    epochs: Annotated[float | None, Option("Budget in epochs.", metavar="E", panel=_BUDGET)] = None
    until: Annotated[
        Until | None,
        Option(
            "Stop once the held-out loss is at most the base's in two measurements in a row.",
            metavar="base",
            panel=_BUDGET,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """How the model is trained. docs/healing.md has the measurements behind the defaults."""

    batch_tokens: Annotated[
        int | None,
        Option(
            "Tokens in a step, over all workers; at least one row. Default: 512 below 1B "
            "parameters, else 262,144.",
            metavar="N",
            panel=_RECIPE,
            parse=parse_count,
        ),
    ] = None
    lr: Annotated[float, Option("Peak learning rate.", metavar="LR", panel=_RECIPE)] = 1e-4
    gain_lr: Annotated[
        float,
        Option(
            "Learning rate of the residual gains, one factor for each output projection; 0 trains "
            "without them.",
            metavar="LR",
            panel=_RECIPE,
        ),
    ] = 0.06
    schedule: Annotated[
        Schedule,
        Option(
            "Learning-rate schedule: warm-up, stable, decay to 0 (wsd); or constant after the "
            "warm-up.",
            panel=_RECIPE,
        ),
    ] = Schedule.wsd
    warmup: Annotated[
        Span,
        Option(
            "Length of the warm-up: steps, or a share of the run.",
            metavar="N",
            panel=_RECIPE,
            parse=parse_span,
        ),
    ] = Span(share=0.02)
    decay: Annotated[
        Span,
        Option(
            "Length of wsd's decay to 0: steps, or a share of the run.",
            metavar="N",
            panel=_RECIPE,
            parse=parse_span,
        ),
    ] = Span(share=0.2)
    weight_decay: Annotated[
        float,
        Option("AdamW's weight decay; applies to matrices only.", metavar="W", panel=_RECIPE),
    ] = 0.0
    betas: Annotated[
        tuple[float, float],
        Option(
            "AdamW's betas.", metavar="B1,B2", panel=_RECIPE, parse=parse_betas, show=betas_text
        ),
    ] = (0.9, 0.95)
    grad_clip: Annotated[
        float, Option("Clip gradients to this norm; 0: no clipping.", metavar="G", panel=_RECIPE)
    ] = 1.0
    seed: Annotated[int, Option("Seed of the data order.", metavar="S", panel=_RECIPE)] = 0
    train: Annotated[
        Train,
        Option(
            "What to train: all parameters, or the new layers only (those that are not the base's "
            "own).",
            panel=_RECIPE,
        ),
    ] = Train.all
    lr_scale: Annotated[
        RateScales | None,
        Option(
            "Factors of --lr and --gain-lr by group: new (layers), base (the base's own layers), "
            "embeddings (everything outside of the layers), norms; 0 freezes. Default: 1 each.",
            metavar="GROUP=X,…",
            panel=_RECIPE,
            parse=parse_rate_scales,
            once="give all groups in one, with commas",
        ),
    ] = None
    distill: Annotated[
        Distill | None,
        Option(
            "Weight of the KL term towards the base, falling to 0 at UNTIL (80%, 10M). Default: 0.",
            metavar="W[:UNTIL]",
            panel=_RECIPE,
            parse=parse_distill,
        ),
    ] = None
    max_skipped: Annotated[
        int,
        Option(
            "End the run after this many bad steps (NaN, spikes) in a row.",
            metavar="N",
            panel=_RECIPE,
        ),
    ] = 10


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How the run fits the devices. These change what is learned by rounding at most."""

    micro_batch: Annotated[
        int | None,
        Option(
            "Rows that a worker runs at once; auto fits them to the GPU's memory.",
            metavar="ROWS",
            panel=_FIT,
            auto=True,
        ),
    ] = None
    precision: Annotated[Precision, precision_option(_FIT)] = Precision.auto
    master_weights: Annotated[
        MasterWeights,
        Option(
            "Keep fp32 master weights, or only bf16 weights, updated with stochastic rounding.",
            metavar="[fp32|bf16]",
            panel=_FIT,
            parse=MasterWeights.parse,
        ),
    ] = MasterWeights.fp32
    activation_checkpointing: Annotated[
        Checkpointing,
        Option("Which activations to recompute in the backward pass, to save memory.", panel=_FIT),
    ] = Checkpointing.none
    compile: Annotated[
        bool | None,
        Option(
            "Compile the layers with torch.compile. Default: in a long run on a CPU where a C++ "
            "compiler is there, and the compiled layers learn the same.",
            panel=_FIT,
        ),
    ] = None
    sharding: Annotated[
        Sharding,
        Option(
            "Split the weights over all workers (fsdp), over the workers of a node (hsdp), or not "
            "at all.",
            panel=_FIT,
        ),
    ] = Sharding.auto
    offload: Annotated[
        bool, Option("Keep weights and optimizer state in CPU memory.", panel=_FIT)
    ] = False


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """How torchrun starts the workers. `nproc_per_node` None is one for each accelerator, or one if
    there is none.
    """

    nproc_per_node: Annotated[
        int | None,
        Option(
            "Workers on this node; auto is one for each GPU.", metavar="N", panel=_LAUNCH, auto=True
        ),
    ] = None
    nnodes: Annotated[int, Option("Number of nodes.", metavar="N", panel=_LAUNCH)] = 1
    node_rank: Annotated[int, Option("Rank of this node.", metavar="R", panel=_LAUNCH)] = 0
    rdzv_endpoint: Annotated[
        str | None,
        Option(
            "Address of node 0, by which the nodes find each other; the same on every node.",
            metavar="HOST:PORT",
            panel=_LAUNCH,
            parse=parse_endpoint,
        ),
    ] = None
    max_restarts: Annotated[
        int,
        Option("How often to restart the workers after one dies.", metavar="N", panel=_LAUNCH),
    ] = 3


@dataclass(frozen=True, kw_only=True)
class SavingOptions:
    """What is measured and saved during the run. By default measurements take at most a tenth of
    the run's time.
    """

    eval_every: Annotated[
        int | None,
        Option(
            "Steps between two held-out measurements. Default: a 20th of the run or more, see "
            "--eval-tokens.",
            metavar="STEPS",
            panel=_KEEP,
        ),
    ] = None
    eval_tokens: Annotated[
        int | None,
        Option(
            "The most held-out tokens in a measurement. Default: 250K, or fewer, so that all "
            "measurements take at most a tenth of the run's time.",
            metavar="N",
            panel=_KEEP,
            parse=parse_count,
        ),
    ] = None
    eval_tasks: Annotated[
        tuple[str, ...],
        Option(
            "Tasks of lm-evaluation-harness (eval extra) to run on the model at the start, after "
            "every --eval-tasks-every measurements and at the end; separated by commas.",
            metavar="NAMES",
            panel=_KEEP,
        ),
    ] = ()
    eval_tasks_every: Annotated[
        int,
        Option(
            "Held-out measurements from one run of the tasks to the next.", metavar="K", panel=_KEEP
        ),
    ] = 5
    eval_tasks_limit: Annotated[
        int | None,
        Option("Run only the first N examples of a task.", metavar="N", panel=_KEEP),
    ] = None
    include_path: Annotated[
        Path | None,
        Option(
            "Folder of your own tasks, as YAML files of the harness. A !function in them is run.",
            metavar="DIR",
            panel=_KEEP,
        ),
    ] = None
    save_every: Annotated[
        Every,
        Option(
            "Checkpoint interval in steps (500) or time (15m).",
            metavar="N",
            panel=_KEEP,
            parse=parse_every,
        ),
    ] = Every(seconds=900.0)
    keep: Annotated[
        int, Option("How many checkpoints to keep during the run.", metavar="N", panel=_KEEP)
    ] = 2
    export_every: Annotated[
        int | None,
        Option(
            "Every N steps, also write the whole model beside the output, to OUT-step-N.",
            metavar="N",
            panel=_KEEP,
        ),
    ] = None
    push_every: Annotated[
        int | None,
        Option(
            "Every N steps, also export the model as --export-every does, and push it to "
            "--push-to.",
            metavar="N",
            panel=_KEEP,
        ),
    ] = None
    push_to: Annotated[
        str | None,
        Option(
            "A repo on the Hub for --push-every, created as a private one if it does not exist. "
            "Default branch: healing.",
            metavar="ORG/NAME[@BRANCH]",
            panel=_KEEP,
        ),
    ] = None
    average: Annotated[
        int | None,
        Option(
            "Also write the mean of the last N checkpoints (with --save-every STEPS) as a model to "
            "OUT-average.",
            metavar="N",
            panel=_KEEP,
        ),
    ] = None
    track: Annotated[Track, Option("Also log the metrics to this tracker.", panel=_KEEP)] = (
        Track.none
    )
    track_project: Annotated[
        str | None,
        Option("The project of wandb or trackio. Default: dus-heal.", metavar="NAME", panel=_KEEP),
    ] = None
    track_run: Annotated[
        str | None,
        Option("The run's name there. Default: that of OUT.", metavar="NAME", panel=_KEEP),
    ] = None
    track_group: Annotated[
        str | None,
        Option("The group of runs to which it belongs there.", metavar="NAME", panel=_KEEP),
    ] = None


@dataclass(frozen=True, kw_only=True)
class HealOptions:
    """A model to heal, its output, and all options in their groups."""

    model: Path
    output: Path
    data: DataOptions
    budget: BudgetOptions = field(default_factory=BudgetOptions)
    recipe: RecipeOptions = field(default_factory=RecipeOptions)
    fit: FitOptions = field(default_factory=FitOptions)
    launch: LaunchOptions = field(default_factory=LaunchOptions)
    saving: SavingOptions = field(default_factory=SavingOptions)

    def to_json(self) -> dict[str, Any]:
        """The options for run.json: all but those of the workers' launch, which may change when a
        run is resumed.
        """
        data = self.data
        groups: dict[str, Any] = {
            "data": data,
            "budget": self.budget,
            "recipe": self.recipe,
            "fit": self.fit,
            "keeping": self.saving,
        }
        return {
            f"{name}.{key}": value
            for name, group in groups.items()
            for key, value in json.loads(json.dumps(dataclasses.asdict(group), default=str)).items()
            if key not in _OF_STREAM or data.stream  # else as an earlier dus wrote them
        }


# The groups by their names in run.json.
GROUPS = {
    "data": DataOptions,
    "budget": BudgetOptions,
    "recipe": RecipeOptions,
    "fit": FitOptions,
    "launch": LaunchOptions,
    "keeping": SavingOptions,
}


def typed_options(*groups: Any) -> dict[str, Any]:
    """Every option that has a value, by its name, with the value as typed.

    >>> typed_options(BudgetOptions(tokens=1000, until=Until.base))
    {'tokens': 1000, 'until': 'base'}
    """
    pairs = [
        (option, getattr(group, option.field))
        for group in groups
        for option in option_fields(type(group))
    ]
    typed = {option.name: option.typed(value) for option, value in pairs}
    return {name: value for name, value in typed.items() if value is not None and value != []}
