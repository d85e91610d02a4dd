"""H6: the six tasks of SOLAR's table, and what was published of SOLAR on them. Pure.

Tasks, shots and metrics are those of the Open LLM Leaderboard of 2023, which the paper follows
(arXiv:2312.15166, section 4.1 and table 2); the names are lm-evaluation-harness's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NAME = "h6"


@dataclass(frozen=True)
class Plan:
    """A task of the harness: what it is called in a table, its shots and the metric that counts;
    None as it says.
    """

    label: str
    task: str
    num_fewshot: int | None = None
    metric: str | None = None
    filter: str = "none"


PLANS = (
    Plan("ARC-Challenge", "arc_challenge", 25, "acc_norm"),
    Plan("HellaSwag", "hellaswag", 10, "acc_norm"),
    Plan("MMLU", "mmlu", 5, "acc"),
    Plan("TruthfulQA", "truthfulqa_mc2", 0, "acc"),  # its acc is MC2
    Plan("Winogrande", "winogrande", 5, "acc"),
    Plan("GSM8K", "gsm8k", 5, "exact_match", "strict-match"),
)

# By model, in the order of PLANS, in percent.
PUBLISHED = {
    "SOLAR 10.7B": (61.95, 84.60, 65.48, 45.04, 83.66, 55.50),
    "SOLAR 10.7B-Instruct": (71.08, 88.16, 66.21, 71.43, 83.58, 64.75),
}


def average(scores: tuple[float, ...]) -> float:
    """The mean of the six, by which the paper ranks models.

    >>> [round(average(scores), 2) for scores in PUBLISHED.values()]
    [66.04, 74.2]
    """
    assert len(scores) == len(PLANS)
    return sum(scores) / len(scores)


def plans_of(names: Sequence[str]) -> tuple[Plan, ...]:
    """The plans of what was typed: `h6` stands for its six, anything else for the harness's task of
    that name.

    >>> [plan.task for plan in plans_of(["h6,piqa"])][-2:]
    ['gsm8k', 'piqa']
    """
    tasks = [task.strip() for name in names for task in name.split(",") if task.strip()]
    found = [plan for task in tasks for plan in (PLANS if task == NAME else (Plan(task, task),))]
    return tuple(dict.fromkeys(found))
