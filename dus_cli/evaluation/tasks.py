"""Tasks of lm-evaluation-harness, run by the harness itself on models that are loaded as for the
losses.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dus_cli.common.libraries import require
from dus_cli.errors import EvaluationError, reason_of, shown
from dus_cli.evaluation import h6
from dus_cli.evaluation.h6 import Plan
from dus_cli.evaluation.options import ScoringOptions, TaskOptions
from dus_cli.progress import Progress

if TYPE_CHECKING:
    from dus_cli.evaluation.candidates import Candidate

# Metrics by which a task is judged where nothing says another, the first that it has.
_METRICS = ("acc_norm", "acc", "exact_match", "mc2", "f1", "em")

# Shares of the whole, told in percent.
SHARES = frozenset([*_METRICS, "mc1", "pass@1"])


@dataclass(frozen=True)
class TaskScore:
    """A model's score in a task, as the harness gives it: a share, mostly, and its standard
    error.
    """

    label: str
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool
    num_fewshot: int | None
    samples: int | None
    version: str | None
    dataset: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def is_share(self) -> bool:
        return self.metric in SHARES

    def to_json(self) -> dict[str, Any]:
        return vars(self)


@dataclass(frozen=True)
class TaskResult:
    """What a model scored, in the order of the tasks."""

    name: str
    model: str
    commit: str | None
    scores: tuple[TaskScore, ...]

    @property
    def h6(self) -> float | None:
        """The mean of H6 in percent; None where one of the six was not run."""
        by_task = {score.label: score.value for score in self.scores}
        wanted = [by_task.get(plan.label) for plan in h6.PLANS]
        found = tuple(100 * value for value in wanted if value is not None)
        return h6.average(found) if len(found) == len(wanted) else None


@dataclass(frozen=True)
class TaskReport:
    """All models in all tasks; the first model is the baseline of the others."""

    options: TaskOptions
    harness: str
    models: tuple[TaskResult, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields that the tasks have in the report, but for the scores; docs/layout.md
        describes each.
        """
        has_h6 = set(h6.PLANS) <= set(self.options.plans)
        return {
            "tasks": [plan.task for plan in self.options.plans],
            "limit": self.options.limit,
            "lm_eval": self.harness,
            "published": {name: list(scores) for name, scores in h6.PUBLISHED.items()}
            if has_h6
            else None,
        }


class Harness:
    """lm-evaluation-harness with its tasks found and their data at hand, before a model is
    loaded.
    """

    def __init__(self, options: TaskOptions, progress: Progress) -> None:
        """Find the tasks and load their data sets, which the harness takes from the Hub where they
        are not local.

        Raises:
            MissingExtraError: the harness is not installed.
            EvaluationError: there is no such task, or its data cannot be had.
        """
        require("--tasks", "lm_eval")
        import lm_eval
        from lm_eval.models import huggingface
        from lm_eval.tasks import TaskManager

        self._lm_eval, self._models = lm_eval, huggingface
        self._options, self._progress = options, progress
        self.version = str(lm_eval.__version__)
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars that are not turned into ours
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        for name in ("datasets", "huggingface_hub", "evaluate"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with _harness_errors("--tasks"), _silent():
            path = None if options.include_path is None else str(options.include_path)
            self._manager = TaskManager(include_path=path, include_defaults=path is None)
            if path is not None and not all(self._is_whole(plan.task) for plan in options.plans):
                # takes ten seconds: it reads 14,000 files
                self._manager = TaskManager(include_path=path)
        self._loaded = [self._load(plan) for plan in options.plans]

    def _is_whole(self, name: str) -> bool:
        """Whether a task is known, and all that a group is made of."""
        entry = self._manager.task_index.get(name)
        members = [] if entry is None else entry.cfg.get("task") if "group" in entry.cfg else []
        return entry is not None and all(
            isinstance(member, str) and self._is_whole(member) for member in members
        )

    def _load(self, plan: Plan) -> list[Any]:
        """The task, the group or the tasks of a tag by this name."""
        if plan.task not in self._manager.task_index:
            raise EvaluationError(
                f"lm-evaluation-harness has no task {shown(plan.task)!r}; `lm-eval ls tasks` lists "
                "them, --include-path adds your own"
            )
        with _harness_errors(f"task {shown(plan.task)}"), _silent():
            found = self._manager.load([plan.task])
        group = found.get("groups", {}).get(plan.task)
        return [group] if group is not None else list(found["tasks"].values())

    def run(self, model: Any, candidate: Candidate, options: ScoringOptions) -> TaskResult:
        """All tasks on a loaded model.

        Raises:
            EvaluationError: the harness fails on one of them.
        """
        from transformers import AutoTokenizer

        assert options.batch_tokens is not None
        assert options.seq_length is not None
        tokenizer = AutoTokenizer.from_pretrained(
            candidate.folder, local_files_only=True, trust_remote_code=False
        )
        scores: list[TaskScore] = []
        with _silent(), _harness_errors(f"{shown(candidate.name)}"):
            lm = self._models.HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=max(1, options.batch_tokens // options.seq_length),
                add_bos_token=None
                if options.special_tokens
                else False,  # None is as the tokenizer has it
                trust_remote_code=False,
            )
        for plan, loaded in zip(self._options.plans, self._loaded, strict=True):
            what = f"{shown(candidate.name)} in task {shown(plan.task)}"
            with self._told(f"{what}:"), _harness_errors(what):
                results = self._lm_eval.simple_evaluate(
                    model=lm,
                    tasks=loaded,
                    task_manager=self._manager,
                    num_fewshot=self._options.num_fewshot
                    if plan.num_fewshot is None
                    else plan.num_fewshot,
                    limit=self._options.limit,
                    log_samples=False,
                    confirm_run_unsafe_code=False,
                )
            scores += _scores(plan, results)
        return TaskResult(candidate.name, candidate.ref.text, candidate.commit, tuple(scores))

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """The harness's own bars as stages of our progress, and nothing of its on stdout."""
        from lm_eval.api import model, task

        def bar(items: Iterable[Any] = (), *, total: int | None = None, **_: Any) -> _Bar:
            return _Bar(self._progress, what, items, total)

        usual = model.tqdm
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            try:
                model.tqdm = task.tqdm = self._models.tqdm = bar
                yield
            finally:
                model.tqdm = task.tqdm = self._models.tqdm = usual


class _Bar:
    """What the harness uses of tqdm. Its loops over documents are short; what it counts by hand
    are the requests.
    """

    def __init__(
        self, progress: Progress, what: str, items: Iterable[Any], total: int | None
    ) -> None:
        self._progress, self._items = progress, items
        if total is not None and items == ():
            progress.start(what, total, "requests")

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def update(self, amount: int = 1) -> None:
        self._progress.advance(amount)

    def close(self) -> None:
        """There is nothing to close."""


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What libraries print goes nowhere: stdout is for results, and what matters in it is an
    error.
    """
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _scores(plan: Plan, results: dict[str, Any]) -> list[TaskScore]:
    """The score of a task or group; of a tag those of its tasks."""
    found = results["results"]
    names = [plan.task] if plan.task in found else list(found)
    return [_score(plan, name, results) for name in names]


def _score(plan: Plan, name: str, results: dict[str, Any]) -> TaskScore:
    entry: dict[str, Any] = results["results"][name]
    metrics = {
        key: float(value)
        for key, value in entry.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }
    wanted = f"{plan.metric},{plan.filter}"
    if plan.metric is None:
        preferred = [key for metric in _METRICS for key in metrics if key.split(",")[0] == metric]
        wanted = next(iter([*preferred, *metrics]), wanted)
    if wanted not in metrics:
        has = ", ".join(metrics) or "none"
        raise EvaluationError(
            f"task {shown(name)} gives no {wanted} but {shown(has)}; its definition was changed"
        )
    metric, _, chosen = wanted.partition(",")
    stderr = entry.get(f"{metric}_stderr,{chosen}")
    # Of a group the harness tells shots and numbers of its tasks.
    members = results.get("group_subtasks", {}).get(name) or [name]
    samples = [results["n-samples"][task]["effective"] for task in _leaves(members, results)]
    shots = {results["n-shot"].get(task) for task in _leaves(members, results)}
    better = results.get("higher_is_better", {}).get(name, {}).get(metric)
    version = results.get("versions", {}).get(name)
    config = results.get("configs", {}).get(_leaves(members, results)[0], {})
    return TaskScore(
        plan.label if name == plan.task else name,
        name,
        metric,
        filter=chosen,
        value=metrics[wanted],
        stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
        higher_is_better=better is not False,
        num_fewshot=next(iter(shots)) if len(shots) == 1 else None,
        samples=sum(samples) or None,
        version=None if version is None else str(version),
        dataset=config.get("dataset_path"),
        metrics=metrics,
    )


def _leaves(names: Sequence[str], results: dict[str, Any]) -> list[str]:
    """The tasks below a group's members, which may be groups."""
    groups = results.get("group_subtasks", {})
    return [
        leaf
        for name in names
        for leaf in (_leaves(groups[name], results) if groups.get(name) else [name])
    ]


@contextlib.contextmanager
def _harness_errors(what: str) -> Iterator[None]:
    """Turn whatever the harness and its data sets raise into one line: they have no errors of
    their own.
    """
    import torch

    try:
        yield
    except (EvaluationError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise EvaluationError(
            f"{what}: lm-evaluation-harness fails with {type(error).__name__}: {reason_of(error)}; "
            "DUS_DEBUG=1 shows where (a data set that is not on this machine comes from the Hub, "
            "unless HF_DATASETS_OFFLINE=1)"
        ) from error
