"""Whether a pilot foretells a run's tokens to the base's loss: `python tests/benchmarks/pilot.py`.

The runs of docs/healing.md whose loss after 4,096 tokens is known. Each is left out once: from the
others the logarithm of the tokens to the base is fitted as a line over that of the share of the gap
that was left to close, and the one left out is predicted with an 80% interval.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PILOT = 4096  # tokens
# The two-sided 80% quantile of Student's t with 4 degrees of freedom: five runs, two coefficients.
QUANTILE = 1.533

# The base's loss, the losses at the start and after 4,096 tokens, and the tokens to the base.
RUNS = {
    "`dus heal`, mean of 3 seeds": (2.332, 2.869, 2.419, 8470),
    "`--distill 0.5`, mean of 3 seeds": (2.332, 2.869, 2.389, 6987),
    "prototype, no gains": (2.324, 2.858, 2.522, 15720),
    "prototype, gain lr 0.01": (2.324, 2.858, 2.454, 10620),
    "prototype, gain lr 0.03": (2.324, 2.858, 2.418, 8070),
    "prototype, gain lr 0.03, KL 0.5": (2.324, 2.858, 2.407, 7500),
}

Vector = npt.NDArray[np.float64]


def left_out(x: Vector, y: Vector, index: int) -> tuple[float, float, float]:
    """The prediction for run `index` by a line through the others, with its interval; tokens."""
    others = np.arange(len(x)) != index
    design = np.stack([np.ones(others.sum()), x[others]], axis=1)
    line = np.linalg.lstsq(design, y[others], rcond=None)[0]
    place = np.array([1.0, x[index]])
    residuals = y[others] - design @ line
    variance = residuals @ residuals / (len(residuals) - 2)
    spread = variance * (1 + place @ np.linalg.inv(design.T @ design) @ place)
    middle, half = place @ line, QUANTILE * spread**0.5
    return float(np.exp(middle)), float(np.exp(middle - half)), float(np.exp(middle + half))


def main() -> None:
    base, start, pilot, tokens = np.array(list(RUNS.values())).T
    x, y = np.log((start - base) / (start - pilot)), np.log(tokens)
    print("| run | after 4,096 tokens | tokens to the base | predicted | 80% interval | error |")
    print("|---|---|---|---|---|---|")
    errors, covered = [], 0
    for index, name in enumerate(RUNS):
        middle, low, high = left_out(x, y, index)
        errors.append(abs(middle / tokens[index] - 1))
        covered += low <= tokens[index] <= high
        interval = f"{low:,.0f} to {high:,.0f}"
        figures = f"{pilot[index]:.3f} | {tokens[index]:,.0f} | {middle:,.0f} | {interval}"
        print(f"| {name} | {figures} | {errors[-1]:.0%} |")
    straight = PILOT * (start - base) / (start - pilot)
    print(f"\nmedian error {np.median(errors):.0%}, {covered} of {len(RUNS)} intervals cover")
    print(f"a straight line through the pilot: {np.median(straight / tokens - 1):+.0%} (median)")
    line = np.polynomial.Polynomial.fit(x, y, 1)
    of_trainer = np.exp(line(np.log((2.869 - 2.332) / (2.869 - 2.673)))) * 8192 / PILOT
    print(f"the Trainer, by all six, from its loss after 8,192 tokens: {of_trainer:,.0f}")


if __name__ == "__main__":
    main()
