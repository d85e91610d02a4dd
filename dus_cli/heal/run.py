"""`run.json`: everything that the launcher passes to the workers, with every option resolved.

It is written once, before torchrun starts, and read by each worker. A worker needs nothing else, so
it can be started by hand, by Slurm or by Kubernetes with the command that `--print-command` prints.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dus_cli.common.options import option_fields
from dus_cli.errors import HealError, shown, shown_list
from dus_cli.evaluation.options import TaskOptions
from dus_cli.heal.options import GROUPS, DataOptions, Span, typed_options
from dus_cli.release.within import BasePlan
from dus_cli.source.json_objects import parse_json_object
from dus_cli.source.reading import open_regular

NAME = "run.json"

# The environment variable with this node's folder for --token-cache, which each node may have
# elsewhere, while run.json is one for all nodes and names that of the first.
CACHE_VARIABLE = "DUS_TOKEN_CACHE"

# Files that a worker writes beside it: a failure in one line, and the report at the end of the run.
FAILURE = "failure.json"
REPORT = "report.json"

# The run of wandb or trackio in which a resumed run goes on.
TRACKED = "tracking.json"

# Files and folders that an unfinished run writes, besides checkpoints/ (see `is_of_a_run`).
_FILES = (NAME, FAILURE, REPORT, TRACKED, "metrics.jsonl")
_FOLDERS = ("tokens", "logs", "tensorboard")

# What a kill in the middle of writing one of them leaves.
_PARTIAL = re.compile(r"run\.json\.\d+\.partial|metrics\.jsonl\.partial", re.ASCII)

SCHEMA = 1

# Options that may change when a run is resumed: they change what is learned by rounding at most.
# Data are compared by content instead of by name.
_FREE = frozenset(
    "fit.micro_batch fit.activation_checkpointing fit.compile fit.sharding fit.offload "
    "keeping.eval_every keeping.save_every keeping.keep keeping.export_every keeping.average "
    "keeping.push_every keeping.push_to keeping.eval_tasks keeping.eval_tasks_every "
    "keeping.eval_tasks_limit keeping.include_path "
    "keeping.track keeping.track_project keeping.track_run keeping.track_group "
    "data.files data.eval_files data.token_cache data.token_cache_size".split()
)

_T = TypeVar("_T")


@dataclass(frozen=True)
class RatesPlan:
    """Factors of the learning rates: for each output layer, for parameters outside of the layers,
    and for all norms (None: the factor of the layer, or of what is outside). 0 freezes.
    """

    layers: tuple[float, ...]
    outside: float
    norms: float | None


@dataclass(frozen=True)
class RecipePlan:
    """How the model is trained, with lengths in steps.

    Attributes:
        warmup_steps, decay_steps: lengths of the warm-up and of the decay.
        train_layers: the output layers that are trained; None is the whole model.
        distill_weight: the KL term's weight at the start.
        distill_steps: the step at which the KL term's weight has fallen to 0.
        max_skipped: bad steps in a row that end the run.
        rates: factors of `lr` and `gain_lr`; None is 1 for all.
    """

    lr: float
    gain_lr: float
    schedule: str
    warmup_steps: int
    decay_steps: int
    weight_decay: float
    betas: tuple[float, float]
    grad_clip: float
    seed: int
    train_layers: tuple[int, ...] | None
    distill_weight: float
    distill_steps: int
    max_skipped: int
    rates: RatesPlan | None = None

    def learning_layers(self, num_layers: int) -> tuple[int, ...]:
        """The output layers of which more than the norms is trained."""
        layers = range(num_layers) if self.train_layers is None else self.train_layers
        return tuple(i for i in layers if self.rates is None or self.rates.layers[i])

    @property
    def embeddings_learn(self) -> bool:
        return self.train_layers is None and (self.rates is None or self.rates.outside > 0)


@dataclass(frozen=True)
class FitPlan:
    """How the run fits the devices. If it is None, the worker chooses `micro_batch_rows`, and
    compiles where that works.
    """

    micro_batch_rows: int | None
    precision: str
    master_weights: str
    activation_checkpointing: str
    compile: bool | None
    sharding: str
    offload: bool


@dataclass(frozen=True)
class TasksPlan:
    """Tasks of lm-evaluation-harness, run after every `every` held-out measurements. `num_tokens`
    are those of all requests.
    """

    names: tuple[str, ...]
    every: int
    limit: int | None
    include_path: str | None
    num_tokens: int = 0

    @property
    def options(self) -> TaskOptions:
        path = None if self.include_path is None else Path(self.include_path)
        return TaskOptions(tasks=self.names, include_path=path, limit=self.limit)

    def num_runs(self, num_measurements: int) -> int:
        """How often they are run: at the start, after every `every` measurements and at the end."""
        return 1 + -(-num_measurements // self.every)


@dataclass(frozen=True)
class SavingPlan:
    """What is measured and saved during the run. `average` is the number of checkpoints whose mean
    is written at the end; None writes none.
    """

    eval_every: int
    eval_tokens: int
    save_every_steps: int | None
    save_every_seconds: float | None
    keep: int
    track: str
    export_every: int | None = None
    average: int | None = None
    track_project: str | None = None
    track_run: str | None = None
    track_group: str | None = None
    push_every: int | None = None
    push_to: str | None = None
    push_branch: str | None = None
    push_private: bool = False
    tasks: TasksPlan | None = None

    def is_exported(self, step: int) -> bool:
        """Whether the model is exported after a step."""
        return any(every and step % every == 0 for every in (self.export_every, self.push_every))

    def num_exports(self, steps: int) -> int:
        """The number of exports in so many steps."""
        everies = [every for every in (self.export_every, self.push_every) if every]
        both = steps // math.lcm(*everies) if len(everies) == 2 else 0
        return sum(steps // every for every in everies) - both


@dataclass(frozen=True)
class Run:
    """A whole run; docs/layout.md describes run.json.

    Attributes:
        model_key: a digest of the model's config and weights; a resumed run must have the same.
        options: the options as given, by group and name; a resumed run must have the same.
        data: `data.streams.Prepared` as JSON; the parts lie in `tokens/` beside run.json.
        rows_per_step: rows of `seq_length` tokens in a step, over all workers.
        keeping: measuring and saving; the group's name in run.json.
        epochs: how often the run reads the training data.
        heldout_documents, heldout_tokens: what each measurement predicts.
        heldout_sets: `documents` and `tokens` of each held-out set that has a name.
        notes: warnings about the model and its base.
        pilot_seconds: how long a pilot trains; None for a run to its end.
    """

    schema: int
    version: str
    model: str
    model_key: str
    output: str
    options: dict[str, Any]
    num_layers: int
    num_parameters: int
    base: BasePlan | None
    data: dict[str, Any]
    seq_length: int
    document_mask: bool
    rows_per_step: int
    num_steps: int
    until: str | None
    recipe: RecipePlan
    fit: FitPlan
    keeping: SavingPlan
    epochs: float = 0.0
    heldout_documents: int = 0
    heldout_tokens: int = 0
    notes: tuple[str, ...] = ()
    heldout_sets: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    pilot_seconds: float | None = None

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.seq_length

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @property
    def tokens_folder(self) -> Path:
        """The folder of the token files: below OUT, or that of --token-cache on this node."""
        cache = self.data.get("growing", {}).get("cache")
        if cache is not None:
            cache = os.environ.get(CACHE_VARIABLE, cache)
        return self.folder / "tokens" if cache is None else Path(cache)

    @property
    def checkpoints_folder(self) -> Path:
        return self.folder / "checkpoints"

    def export_folder(self, step: int) -> Path:
        """The folder of the model exported after a step, beside the run's."""
        return self.folder.with_name(f"{self.folder.name}-step-{step}")

    @property
    def average_folder(self) -> Path:
        """The folder of the mean of the last checkpoints."""
        return average_folder(self.folder)

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def write(self, node_rank: int = 0) -> None:
        """Write run.json in one step. Nodes that start together may all write it."""
        path = self.folder / NAME
        partial = path.with_name(f"{NAME}.{node_rank}.partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


def average_folder(output: Path) -> Path:
    """The folder of the mean of a run's checkpoints, beside the healed model's folder `output`."""
    return output.with_name(f"{output.name}-average")


def is_of_a_run(relative: str) -> bool:
    """Whether dus writes a file of this name while it heals. `relative` is a path in the run's
    folder, with "/".
    """
    first, _, rest = relative.partition("/")
    if first == "checkpoints":
        return not rest or rest.lstrip(".").startswith("step-")
    if rest or relative.endswith("/"):
        return first in _FOLDERS
    return relative in _FILES or is_partial(relative)


def is_partial(name: str) -> bool:
    """Whether dus leaves a file of this name in a run's folder if it is killed.

    >>> is_partial("run.json.1.partial"), is_partial("run.json")
    (True, False)
    """
    return _PARTIAL.fullmatch(name) is not None


def read_run(path: Path) -> Run:
    """Read a run.json. The run's output becomes the folder that holds the file, because it may have
    been moved.

    Raises:
        HealError: the file is missing, damaged, or written by a newer dus.
    """
    try:
        record = parse_json_object(_content(path), NAME)
    except OSError as error:
        raise HealError(
            f"{shown(path)} cannot be read ({error.strerror}); give the run.json of a `dus heal`"
        ) from None
    if record.get("schema") != SCHEMA:
        raise HealError(
            f"{shown(path)} has a schema that this dus does not know; update dus (pip install -U "
            "dus-cli)"
        )
    try:
        run: Run = _build(Run, _without_phases(record))
    except (TypeError, KeyError, ValueError) as error:
        raise HealError(
            f"{shown(path)} is damaged or was edited ({error}); remove it to start again"
        ) from None
    return dataclasses.replace(run, output=str(path.resolve().parent))


def _content(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()


def _without_phases(record: dict[str, Any]) -> dict[str, Any]:
    """The present form of a record that an older dus wrote, with a list of training phases.

    Raises:
        ValueError: it has more than one phase.
    """
    recipe, options = record["recipe"], record["options"]
    if "phases" not in recipe:
        return record
    if len(recipe["phases"]) > 1:
        raise ValueError("it has several training phases, which dus heal no longer supports")
    recipe = recipe | {"train_layers": recipe["phases"][0]["layers"]}
    options = options | {"recipe.train": options["recipe.phases"][0]["train"]}
    del recipe["phases"], options["recipe.phases"]
    return record | {"recipe": recipe, "options": options}


def _build(kind: type[_T], record: dict[str, Any]) -> _T:
    """Build a dataclass from JSON: nested ones from objects, tuples from lists."""
    nested: dict[str, Any] = {
        "recipe": RecipePlan,
        "rates": RatesPlan,
        "fit": FitPlan,
        "keeping": SavingPlan,
        "tasks": TasksPlan,
        "base": BasePlan,
    }
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        missing = field.default is field.default_factory is dataclasses.MISSING
        if field.name not in record and not missing:
            continue  # the record is of an older dus
        value = record[field.name]
        if field.name in nested and value is not None:
            value = _build(nested[field.name], value)
        elif isinstance(value, list):
            value = tuple(value)
        values[field.name] = value
    return kind(**values)


def check_same(old: Run, new: Run) -> None:
    """Check that a resumed run has the same options, model and data, except options that may
    change.

    Raises:
        HealError: something changed; the message names each change.
    """
    changed = changed_options(old, new.options)
    if old.model_key != new.model_key:
        changed.append("the model")
    if old.data["content_key"] != new.data["content_key"]:
        changed.append("the data")
    elif _weights(old) != _weights(new):
        changed.append("the weights of --data")
    if changed:
        raise other_options(old, changed)


def _weights(run: Run) -> list[float | None]:
    return [source["weight"] for source in run.data["sources"]]


def changed_options(old: Run, options: dict[str, Any]) -> list[str]:
    """The options that must not change and did, each as "lr 0.0001 → 0.0003"."""
    names = [name for name in {**old.options, **options} if name not in _FREE]
    return [
        f"{name.split('.')[1].replace('_', '-')} {json.dumps(old.options.get(name))} → "
        f"{json.dumps(options.get(name))}"
        for name in names
        if old.options.get(name) != options.get(name)
    ]


def other_options(old: Run, changed: list[str]) -> HealError:
    """The error for resuming a run with other options, model or data."""
    return HealError(
        f"{shown(old.folder)} holds a run with other options ({shown_list(changed)}); "
        "give the same ones to go on, or another -o to start a new run"
    )


def options_of_run(record: dict[str, Any]) -> dict[str, Any] | None:
    """The options in a run.json, as they are typed, with the model but without the output and the
    workers' options; None if the record is not a run.json.

    Raises:
        HealError: the record is damaged, or was written by a newer dus.
    """
    if not {"schema", "options", "recipe"} <= record.keys():
        return None
    try:
        options = _without_phases(record)["options"]
        by_group: dict[str, dict[str, Any]] = {}
        for name, value in options.items():
            group, _, field = name.partition(".")
            by_group.setdefault(group, {})[field] = value
        values: list[Any] = [_restored(GROUPS[group], fields) for group, fields in by_group.items()]
        return {"model": str(record["model"]), **typed_options(*values)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HealError(
            f"its options are damaged or of another version of dus ({error}); give another file"
        ) from None


def data_options(run: Run) -> DataOptions:
    """The options about data that a run was started with."""
    fields = {
        name.removeprefix("data."): value
        for name, value in run.options.items()
        if name.startswith("data.")
    }
    return _restored(DataOptions, fields)


def _restored(kind: type[_T], fields: dict[str, Any]) -> _T:
    """Build a group of options from the JSON of its fields."""
    values = dict(fields)
    for option in option_fields(kind):
        value = fields.get(option.field)
        if isinstance(value, dict):
            parts = {
                key: Span(**part) if isinstance(part, dict) else part for key, part in value.items()
            }
            values[option.field] = option.kind(**parts)
        elif isinstance(value, list):
            values[option.field] = tuple(value)
        elif isinstance(value, str):
            values[option.field] = option.kind(value)  # an enum or str
    return kind(**values)
