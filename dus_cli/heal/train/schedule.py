"""What changes with the step: learning rate, weight of the KL term, layers that learn. Pure functions of run.json."""

from __future__ import annotations

import math

from dus_cli.heal.run import PhasePlan, RecipePlan

_GAIN_STEPS = 32


def rate_share(recipe: RecipePlan, step: int, num_steps: int) -> float:
    """The share of the recipe's learning rates at step `step`, counting from 0, of `num_steps`.

    Warm-up is linear from 1 / warmup_steps. WSD (arXiv:2404.06395) then stays at 1 and falls linearly to 0
    over the last decay_steps; cosine falls to a tenth, as SOLAR's peers do; constant stays.
    """
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "cosine":
        progress = (step - recipe.warmup_steps) / max(1, num_steps - recipe.warmup_steps)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
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


def phase_at(recipe: RecipePlan, step: int) -> int:
    """The index of the phase that a step belongs to."""
    return max(index for index, phase in enumerate(recipe.phases) if phase.start <= step)


def layers_at(recipe: RecipePlan, step: int) -> tuple[int, ...] | None:
    """The output layers that learn at a step; None is everything."""
    phase: PhasePlan = recipe.phases[phase_at(recipe, step)]
    return phase.layers
