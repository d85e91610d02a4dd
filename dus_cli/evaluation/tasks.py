"""Tasks of lm-evaluation-harness, run by the harness itself on the models loaded for losses."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_cli.common.libraries import require
from dus_cli.data.tokeniser import load_tokenizer
from dus_cli.errors import EvaluationError, reason_of, shown
from dus_cli.evaluation import h6
from dus_cli.evaluation.h6 import TaskPlan
from dus_cli.evaluation.options import ScoringOptions, TaskOptions
from dus_cli.progress import Progress

if TYPE_CHECKING:
    from dus_cli.evaluation.candidates import EvaluationCandidate

# The metric of a task whose plan names none is the first of these that the task has.
_METRICS = ("acc_norm", "acc", "exact_match", "mc2", "f1", "em")

# Metrics that are shares of 1, shown in percent.
SHARES = frozenset([*_METRICS, "mc1", "pass@1"])


@dataclass(frozen=True)
class TaskScore:
    """A model's score in a task and its standard error, as the harness reports them; usually a
    share of 1.
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
    """A model's scores, in the order of the tasks."""

    name: str
    model: str
    commit: str | None
    scores: tuple[TaskScore, ...]

    @property
    def h6(self) -> float | None:
        """The mean of H6 in percent; None if one of the six was not run."""
        by_task = {score.label: 100 * score.value for score in self.scores}
        if not all(plan.label in by_task for plan in h6.PLANS):
            return None
        return h6.average(tuple(by_task[plan.label] for plan in h6.PLANS))


@dataclass(frozen=True)
class TaskReport:
    """The scores of all models in all tasks; the first model is the baseline."""

    options: TaskOptions
    harness: str
    models: tuple[TaskResult, ...]

    def to_json(self) -> dict[str, Any]:
        """The report's fields about tasks, except the scores; docs/layout.md describes each."""
        has_h6 = set(h6.PLANS) <= set(self.options.plans)
        return {
            "tasks": [plan.task for plan in self.options.plans],
            "limit": self.options.limit,
            "lm_eval": self.harness,
            "published": {name: list(scores) for name, scores in h6.PUBLISHED.items()}
            if has_h6
            else None,
        }


def open_harness(options: TaskOptions, progress: Progress, *, option: str = "--tasks") -> Harness:
    """Find the tasks and load their data sets, which the harness downloads from the Hub if they
    are not local.

    Raises:
        MissingExtraError: the harness is not installed.
        EvaluationError: there is no such task, or its data cannot be loaded.
    """
    require(option, "lm_eval")
    import lm_eval
    from lm_eval.models import huggingface
    from lm_eval.tasks import TaskManager

    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars that `_progress_bars` does not show
    for name in ("lm_eval", "datasets", "huggingface_hub", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with _harness_errors(option), _silent():
        path = None if options.include_path is None else str(options.include_path)
        manager = TaskManager(include_path=path, include_defaults=path is None)
        if path is not None and not all(_is_whole(manager, plan.task) for plan in options.plans):
            # with the harness's own tasks it reads 14,000 files, which takes ten seconds
            manager = TaskManager(include_path=path)
    loaded = [_load(manager, plan) for plan in options.plans]
    return Harness(
        options, progress, library=lm_eval, models=huggingface, manager=manager, loaded=loaded
    )


def _is_whole(manager: Any, name: str) -> bool:
    """Whether a task is known and, if it is a group, all of its members are."""
    entry = manager.task_index.get(name)
    members = [] if entry is None else entry.cfg.get("task") if "group" in entry.cfg else []
    return entry is not None and all(
        isinstance(member, str) and _is_whole(manager, member) for member in members
    )


def _load(manager: Any, plan: TaskPlan) -> list[Any]:
    """Load the task or group of the plan's name, or the tasks of the tag of this name."""
    if plan.task not in manager.task_index:
        raise EvaluationError(
            f"lm-evaluation-harness has no task {shown(plan.task)!r}; `lm-eval ls tasks` lists "
            "them, --include-path adds your own"
        )
    with _harness_errors(f"task {shown(plan.task)}"), _silent():
        loaded = manager.load([plan.task])
    group = loaded.get("groups", {}).get(plan.task)
    return [group] if group is not None else list(loaded["tasks"].values())


class Harness:
    """lm-evaluation-harness with its tasks and their data loaded, before a model is.

    Args:
        options: the tasks, and how they are run.
        progress: told of the requests.
        library: the module lm_eval.
        models: its module of transformers' models.
        manager: its TaskManager.
        loaded: for each plan of the options its group, or its tasks.
    """

    def __init__(
        self,
        options: TaskOptions,
        progress: Progress,
        *,
        library: Any,
        models: Any,
        manager: Any,
        loaded: Sequence[list[Any]],
    ) -> None:
        self._options, self._progress = options, progress
        self._lm_eval, self._models = library, models
        self._manager, self._loaded = manager, loaded
        self.version = str(library.__version__)

    def run(
        self, model: Any, candidate: EvaluationCandidate, options: ScoringOptions
    ) -> TaskResult:
        """Run all tasks on a candidate's loaded model.

        Raises:
            EvaluationError: the harness fails on one of them.
        """
        assert options.batch_tokens is not None
        assert options.seq_length is not None
        scores = self.scores(
            model,
            candidate.folder,
            candidate.name,
            rows_at_once=max(1, options.batch_tokens // options.seq_length),
            special_tokens=options.special_tokens,
        )
        return TaskResult(candidate.name, candidate.ref.text, candidate.commit, scores)

    def scores(
        self, model: Any, folder: Path, name: str, *, rows_at_once: int, special_tokens: bool
    ) -> tuple[TaskScore, ...]:
        """The scores of a loaded model in all tasks.

        Args:
            model: the model.
            folder: has its tokenizer.
            name: of the model, for progress and errors.
            rows_at_once: requests in a forward pass.
            special_tokens: put those of the tokenizer before a prompt.

        Raises:
            EvaluationError: the harness fails on one of them.
        """
        tokenizer = load_tokenizer(folder)
        scores: list[TaskScore] = []
        with _silent(), _harness_errors(f"{shown(name)}"):
            lm = self._models.HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=rows_at_once,
                # None: as the tokenizer does
                add_bos_token=None if special_tokens else False,
                trust_remote_code=False,
            )
        for plan, loaded in zip(self._options.plans, self._loaded, strict=True):
            what = f"{shown(name)} in task {shown(plan.task)}"
            with self._progress_bars(f"{what}:"), _harness_errors(what), _as_first_process():
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
        return tuple(scores)

    def num_tokens(self, folder: Path) -> int:
        """The tokens of all requests, by the tokenizer in `folder`, special tokens aside.

        Raises:
            EvaluationError: a task generates text, or the harness fails.
        """
        tokenizer, total = load_tokenizer(folder), 0
        for plan, loaded in zip(self._options.plans, self._loaded, strict=True):
            for task in _leaf_tasks(loaded):
                if task.OUTPUT_TYPE == "generate_until":
                    raise EvaluationError(
                        f"task {shown(plan.task)} generates text, for which a model under training "
                        "is not fit; choose tasks that compare answers, or run it with dus eval"
                    )
                with _harness_errors(f"task {shown(plan.task)}"), _silent():
                    if plan.num_fewshot is not None:
                        task.set_config(key="num_fewshot", value=plan.num_fewshot)
                    task.build_all_requests(limit=self._options.limit)
                texts = ["".join(map(str, request.args)) for request in task.instances]
                total += sum(len(ids) for ids in tokenizer(texts)["input_ids"])
        return total

    @contextlib.contextmanager
    def _progress_bars(self, what: str) -> Iterator[None]:
        """Show the harness's bars as stages of our progress, and drop what it prints."""
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


def _leaf_tasks(loaded: Sequence[Any]) -> Iterator[Any]:
    """The tasks, those of groups included."""
    for item in loaded:
        yield from item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]


class _Bar:
    """The parts of tqdm that the harness uses. Only its bars without items are shown: they count
    requests, while loops over documents are short.
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
        """Do nothing; tqdm has this method."""


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop what libraries print: stdout is for results, and what matters is an error."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _scores(plan: TaskPlan, results: dict[str, Any]) -> list[TaskScore]:
    """The score of a task or group, or those of a tag's tasks."""
    by_name = results["results"]
    names = [plan.task] if plan.task in by_name else list(by_name)
    return [_score(plan, name, results) for name in names]


def _score(plan: TaskPlan, name: str, results: dict[str, Any]) -> TaskScore:
    entry: dict[str, Any] = results["results"][name]
    metrics = {
        key: float(value)
        for key, value in entry.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }
    key = f"{plan.metric},{plan.filter}"
    if plan.metric is None:
        preferred = [
            each for metric in _METRICS for each in metrics if each.split(",")[0] == metric
        ]
        key = next(iter([*preferred, *metrics]), key)
    if key not in metrics:
        has = ", ".join(metrics) or "none"
        raise EvaluationError(
            f"task {shown(name)} has no metric {key}, only {shown(has)}; its definition has "
            "changed, so use the harness's release that has it"
        )
    metric, _, chosen = key.partition(",")
    stderr = entry.get(f"{metric}_stderr,{chosen}")
    # For a group the harness reports shots and sample counts of its tasks only.
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
        value=metrics[key],
        stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
        higher_is_better=better is not False,
        num_fewshot=next(iter(shots)) if len(shots) == 1 else None,
        samples=sum(samples) or None,
        version=None if version is None else str(version),
        dataset=config.get("dataset_path"),
        metrics=metrics,
    )


def _leaves(names: Sequence[str], results: dict[str, Any]) -> list[str]:
    """The tasks below a group's members, which may be groups themselves."""
    groups = results.get("group_subtasks", {})
    return [
        leaf
        for name in names
        for leaf in (_leaves(groups[name], results) if groups.get(name) else [name])
    ]


@contextlib.contextmanager
def _as_first_process() -> Iterator[None]:
    """Hide the LOCAL_RANK of a job or of torchrun from the harness: where it is not 0, the harness
    returns None instead of results (findings/lm-eval-no-results-by-local-rank.sh).
    """
    rank = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank


@contextlib.contextmanager
def _harness_errors(what: str) -> Iterator[None]:
    """Translate any error of the harness and its data sets into one line; they have no exceptions
    of their own.
    """
    import torch

    try:
        yield
    except (EvaluationError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise EvaluationError(
            f"{what}: lm-evaluation-harness fails with {type(error).__name__}: {reason_of(error)}; "
            "DUS_DEBUG=1 shows where (a data set that is not on this machine is downloaded from "
            "the Hub, unless HF_DATASETS_OFFLINE=1)"
        ) from error
