"""What a user asks of `dus heal`, parsed and grouped. Pure: `dus heal --help` imports no torch for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from dus_cli.common.bounds import BOUNDS
from dus_cli.common.units import parse_count, parse_share
from dus_cli.models.precision import Precision
from dus_cli.planning.dtypes import DtypeChoice


class Until(str, Enum):
    """A goal that ends the run before its budget does."""

    base = "base"


class Schedule(str, Enum):
    """How the learning rate goes: warm-up, stable, decay (WSD, arXiv:2404.06395); or constant."""

    wsd = "wsd"
    constant = "constant"


class MasterWeights(DtypeChoice):
    """What the optimizer updates: an fp32 copy, or the bf16 weights themselves by stochastic rounding."""

    fp32 = "fp32"
    bf16 = "bf16"


class Checkpointing(str, Enum):
    """Which activations are kept for the backward pass: all, the matrix products', or each layer's input."""

    none = "none"
    selective = "selective"
    full = "full"


class Sharding(str, Enum):
    """Over which workers the weights are split: auto, all of them, those of a node (HSDP), or nobody."""

    auto = "auto"
    fsdp = "fsdp"
    hsdp = "hsdp"
    none = "none"


class Train(str, Enum):
    """Which layers learn: all, embeddings and norm included, or those alone that are not the base's own."""

    all = "all"
    new = "new"


class Track(str, Enum):
    """Where figures go besides metrics.jsonl."""

    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"
    trackio = "trackio"


@dataclass(frozen=True)
class Span:
    """A length of the run: a number of steps, of tokens, or a share of the whole. One of the three is set."""

    steps: int | None = None
    tokens: int | None = None
    share: float | None = None

    def in_steps(self, total_steps: int, tokens_per_step: int) -> int:
        """Steps, at most the whole run's. A positive share or number of tokens is at least one step."""
        if self.steps is not None:
            steps = self.steps
        elif self.tokens is not None:
            steps = -(-self.tokens // tokens_per_step)
        else:
            assert self.share is not None
            steps = round(self.share * total_steps) or int(self.share > 0)
        return min(steps, total_steps)


@dataclass(frozen=True)
class Distill:
    """The weight of the KL term at the start, falling linearly to 0 at `until`; None is the end of the run."""

    weight: float
    until: Span | None = None


@dataclass(frozen=True)
class Every:
    """An interval in steps or in seconds."""

    steps: int | None = None
    seconds: float | None = None


def parse_span(text: str) -> Span:
    """Steps, or a share of the run.

    >>> parse_span("100"), parse_span("10%")
    (Span(steps=100, tokens=None, share=None), Span(steps=None, tokens=None, share=0.1))

    Raises:
        ValueError: neither.
    """
    if re.fullmatch(r"\d{1,12}", text.strip(), re.ASCII):
        return Span(steps=int(text))
    try:
        return Span(share=parse_share(text))
    except ValueError:
        raise ValueError(f"{text!r} is not a length; write steps (100) or a share of the run (10%)") from None


def parse_every(text: str) -> Every:
    """An interval: steps, or a time with a unit.

    >>> parse_every("500"), parse_every("15m")
    (Every(steps=500, seconds=None), Every(steps=None, seconds=900.0))

    Raises:
        ValueError: neither.
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)\s*([smh]?)", text.strip().lower(), re.ASCII)
    if match is None or not (match[2] or match[1].isdigit()):
        raise ValueError(f"{text!r} is not an interval; write steps (500) or a time (30s, 15m, 2h)")
    number = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
    if not BOUNDS["interval"].holds(number):
        raise ValueError(f"{text!r} is not {BOUNDS['interval']}, in steps or in seconds")
    return Every(seconds=number) if match[2] else Every(steps=int(number))


def parse_distill(text: str) -> Distill:
    """A weight in 0…1, and after a colon when it has fallen to 0: 0.5, 0.5:80%, 0.5:10M (tokens).

    Raises:
        ValueError: not understood.
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
        raise ValueError(f"{text!r} is not a weight; write 0.5, or 0.5:80% or 0.5:10M for when it is 0") from None
    return Distill(value, span)


def parse_endpoint(text: str) -> str:
    """A host with or without a port, as torchrun takes it.

    >>> parse_endpoint("node-1:29500"), parse_endpoint("[fe80::1]:29500"), parse_endpoint("node-1")
    ('node-1:29500', '[fe80::1]:29500', 'node-1')

    Raises:
        ValueError: no host, or a port that none can have.
    """
    match = re.fullmatch(r"([^\s:/]+|\[[^\s\]]+\])(?::(\d{1,5}))?", text, re.ASCII)
    if match is None or not 0 < int(match[2] or 1) < 1 << 16:
        raise ValueError(f"{text!r} is not HOST:PORT with a port from 1 to 65,535")
    return text


def parse_betas(text: str) -> tuple[float, float]:
    """AdamW's two decay rates.

    >>> parse_betas("0.9,0.95")
    (0.9, 0.95)

    Raises:
        ValueError: not two numbers in 0…1.
    """
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        first = second = -1.0
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ValueError(f"{text!r} is not a pair of betas; write them like 0.9,0.95")
    return first, second


@dataclass(frozen=True)
class DataOptions:
    """What is read and how it is packed. `seq_length` in tokens; None is min(4096, the model's)."""

    files: tuple[str, ...]
    text_field: str = "text"
    on_bad_line: str = "error"
    holdout: float = 0.005
    eval_files: tuple[str, ...] = ()
    seq_length: int | None = None
    document_mask: bool = True
    special_tokens: bool = True


@dataclass(frozen=True)
class Budget:
    """How long. At most one of tokens, steps and epochs; none is one epoch."""

    tokens: int | None = None
    steps: int | None = None
    epochs: float | None = None
    until: Until | None = None


@dataclass(frozen=True)
class Recipe:
    """How it learns. The defaults are those that docs/healing.md has measured."""

    batch_tokens: int | None = None
    lr: float = 1e-4
    gain_lr: float = 0.06
    schedule: Schedule = Schedule.wsd
    warmup: Span = Span(share=0.02)
    decay: Span = Span(share=0.2)
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    seed: int = 0
    train: Train = Train.all
    distill: Distill | None = None
    max_skipped: int = 10


@dataclass(frozen=True)
class Fit:
    """How it fits the devices. None of these changes what is learned, rounding aside."""

    micro_batch: int | None = None
    precision: Precision = Precision.auto
    master_weights: MasterWeights = MasterWeights.fp32
    activation_checkpointing: Checkpointing = Checkpointing.none
    compile: bool = False
    sharding: Sharding = Sharding.auto
    offload: bool = False


@dataclass(frozen=True)
class Launch:
    """torchrun. `nproc_per_node` None is one for each accelerator, or one where there is none."""

    nproc_per_node: int | None = None
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str | None = None
    max_restarts: int = 3


@dataclass(frozen=True)
class Keeping:
    """What is measured and kept on the way. None is as often and as much as a tenth of the run's time allows."""

    eval_every: int | None = None
    eval_tokens: int | None = None
    save_every: Every = Every(seconds=900.0)
    keep: int = 2
    track: Track = Track.none
