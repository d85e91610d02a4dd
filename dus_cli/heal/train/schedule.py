"""What changes with the step: learning rates and the weight of the KL term. Pure functions of
run.json.
"""

from __future__ import annotations

from dus_cli.heal.run import RecipePlan

_GAIN_STEPS = 32


def rate_share(recipe: RecipePlan, step: int, num_steps: int) -> float:
    """The share of the recipe's learning rates at step `step`, counting from 0, of `num_steps`.

    Warm-up is linear from 1 / warmup_steps. WSD (arXiv:2404.06395) then stays at 1 and falls
    linearly to 0 over the last decay_steps; constant stays.
    """
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return 1.0
    return min(1.0, (num_steps - step) / (recipe.decay_steps + 1))


def gain_rate(recipe: RecipePlan, step: int) -> float:
    """The rate of the residual gains at a step, before the schedule's share.

    It stays for 32 steps, in which the repair is done, and then falls as 1 / step: enough to go on
    learning, and noise that stays finite however long the run (Robbins and Monro 1951).
    """
    return recipe.gain_lr * min(1.0, _GAIN_STEPS / (step + 1))


def distill_weight(recipe: RecipePlan, step: int) -> float:
    """The weight of the KL term at a step: from distill_weight linearly to 0 at distill_steps."""
    if recipe.distill_weight == 0.0 or step >= recipe.distill_steps:
        return 0.0
    return recipe.distill_weight * (1 - step / recipe.distill_steps)
