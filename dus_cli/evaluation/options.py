"""The options of `dus eval`, without torch, so that `dus eval --help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dus_cli.common.options import Option
from dus_cli.common.units import parse_count
from dus_cli.data.documents import BadLine
from dus_cli.data.options import DATA, DATA_KINDS, OnBadLine, TextField, UseSpecialTokens
from dus_cli.evaluation.h6 import TaskPlan, plans_of
from dus_cli.models.precision import Precision, precision_option

_TASKS, _RUN = "Tasks", "Running"


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The held-out text, and how much of it is read."""

    data: Annotated[
        tuple[str, ...],
        Option(
            f"Held-out text: {DATA_KINDS}; files, globs, folders, - for standard input. Repeat "
            "for more.",
            metavar="FILE",
            panel=DATA,
        ),
    ] = ()
    text_field: TextField = "text"
    on_bad_line: OnBadLine = BadLine.error
    max_documents: Annotated[
        int | None, Option("Read only the first N documents.", metavar="N", panel=DATA)
    ] = None
    max_tokens: Annotated[
        int | None,
        Option(
            "Read documents until they have N tokens, by the baseline's tokenizer (100K, 1M).",
            name="tokens",
            metavar="N",
            panel=DATA,
            parse=parse_count,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How text is cut and run. None means a value that fits the models and the device."""

    seq_length: Annotated[
        int | None,
        Option(
            "Tokens in a window. Default: 2048, or the smallest context length of the models if "
            "that is less.",
            metavar="T",
            panel=DATA,
        ),
    ] = None
    stride: Annotated[
        int | None,
        Option(
            "Tokens from one window of a long document to the next, so that a token has at least "
            "T − S tokens of context. Default: T / 2.",
            metavar="S",
            panel=DATA,
        ),
    ] = None
    batch_tokens: Annotated[
        int | None,
        Option(
            "Tokens to run at once; at least one window. Default: 2,048 on a CPU, else 16,384.",
            metavar="N",
            panel=_RUN,
            parse=parse_count,
        ),
    ] = None
    precision: Annotated[Precision, precision_option(_RUN)] = Precision.auto
    device: Annotated[
        str,
        Option(
            "Device to run on: cpu, cuda:0, …; auto is the GPU if there is one.",
            metavar="NAME",
            panel=_RUN,
        ),
    ] = "auto"
    special_tokens: UseSpecialTokens = True


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The tasks, and how they are run. None means all examples, and the task's own shots."""

    tasks: Annotated[
        tuple[str, ...],
        Option(
            "Tasks of lm-evaluation-harness (eval extra), separated by commas; h6 is SOLAR's six.",
            metavar="NAMES",
            panel=_TASKS,
        ),
    ] = ()
    include_path: Annotated[
        Path | None,
        Option(
            "Folder of your own tasks, as YAML files of the harness. A !function in them is run.",
            metavar="DIR",
            panel=_TASKS,
        ),
    ] = None
    num_fewshot: Annotated[
        int | None,
        Option(
            "Number of examples in the prompt. Default: the task's own; h6 has fixed ones.",
            metavar="N",
            panel=_TASKS,
        ),
    ] = None
    limit: Annotated[
        int | None, Option("Run only the first N examples of a task.", metavar="N", panel=_TASKS)
    ] = None

    @property
    def plans(self) -> tuple[TaskPlan, ...]:
        """The tasks with their shots and metrics."""
        return plans_of(self.tasks)
