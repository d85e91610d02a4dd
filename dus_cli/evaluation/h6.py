"""H6: the six tasks of SOLAR's table, and SOLAR's published scores.

Tasks, shots and metrics are those of the Open LLM Leaderboard of 2023, which the paper follows
(arXiv:2312.15166, section 4.1 and table 2); the names are lm-evaluation-harness's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NAME = "h6"


@dataclass(frozen=True)
class TaskPlan:
    """How a task of the harness is run: its name in a table, the shots, the metric and its filter.
    None leaves the choice to the task's definition.
    """

    label: str
    task: str
    num_fewshot: int | None = None
    metric: str | None = None
    filter: str = "none"


PLANS = (
    TaskPlan("ARC-Challenge", "arc_challenge", 25, "acc_norm"),
    TaskPlan("HellaSwag", "hellaswag", 10, "acc_norm"),
    TaskPlan("MMLU", "mmlu", 5, "acc"),
    TaskPlan("TruthfulQA", "truthfulqa_mc2", 0, "acc"),  # its acc is MC2
    TaskPlan("Winogrande", "winogrande", 5, "acc"),
    TaskPlan("GSM8K", "gsm8k", 5, "exact_match", "strict-match"),
)

# Scores by model, in percent, in the order of PLANS.
PUBLISHED = {
    "SOLAR 10.7B": (61.95, 84.60, 65.48, 45.04, 83.66, 55.50),
    "SOLAR 10.7B-Instruct": (71.08, 88.16, 66.21, 71.43, 83.58, 64.75),
}


def average(scores: tuple[float, ...]) -> float:
    """The mean of the six scores, by which the paper ranks models.

    >>> [round(average(scores), 2) for scores in PUBLISHED.values()]
    [66.04, 74.2]
    """
    assert len(scores) == len(PLANS)
    return sum(scores) / len(scores)


def plans_of(names: Sequence[str]) -> tuple[TaskPlan, ...]:
    """The plans of the values of --tasks: `h6` stands for its six tasks, any other name for the
    harness's task of that name.

    >>> [plan.task for plan in plans_of(["h6,piqa"])][-2:]
    ['gsm8k', 'piqa']
    """
    tasks = [task.strip() for name in names for task in name.split(",") if task.strip()]
    plans: list[TaskPlan] = []
    for task in tasks:
        plans += PLANS if task == NAME else [TaskPlan(task, task)]
    return tuple(dict.fromkeys(plans))
