"""Whether a pilot foretells a run's tokens to the base's loss: `python tests/benchmarks/pilot.py`.

A pilot is a run's beginning: T tokens, after which the share f of the gap between the scaled
model's loss and the base's is closed. The run is at the base's loss after N tokens. Laws without a
dimension, fitted on the other runs:

- power: log(N / T) = b log(1 / f)
- line: log(N / T) = a + b log(1 / f)
- slope: log(N / T) = b log(1 / f) / s, with s the pilot's own slope of log f over log T
- no loss: log(N / T) = a, for comparison: what is known of the other runs alone

Each run is left out once, and each model with all of its runs once. Residuals are taken to grow
with log(1 / f), so the 80% interval does too (Student's t). All pilots have about the same tokens:
if they had the same share of N, which is to be foretold, even `no loss` would be right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# Tokens of a pilot, and how near to them a measurement must be, as a factor.
TOKENS = (2048, 4096)
NEAR = 1.5

# The two-sided 80% quantiles of Student's t by degrees of freedom; 1.282 is the normal one.
QUANTILES = (3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372)
MANY = 1.36


class Curve(NamedTuple):
    """A run: its base model, the base's loss, and held-out losses by tokens from 0 on."""

    model: str
    base: float
    losses: dict[int, float]

    @property
    def crossing(self) -> float:
        """The tokens at the base's loss, by a straight line between two measurements."""
        points = list(self.losses.items())
        for (t0, l0), (t1, l1) in pairwise(points):
            if l1 <= self.base:
                return t0 + (t1 - t0) * (l0 - self.base) / (l0 - l1)
        raise ValueError("the run was never at its base's loss")

    def closed(self, tokens: int) -> float:
        """The share of the gap that is closed after so many tokens."""
        return (self.losses[0] - self.losses[tokens]) / (self.losses[0] - self.base)


SMOLLM2, SMALL = "SmolLM2-135M-Instruct", "a Llama of 1M"
CURVES: dict[str, Curve] = {
    # of docs/healing.md, a mean of three seeds each
    "trim 7": Curve(SMOLLM2, 2.332, {0: 2.869, 4096: 2.419, 8192: 2.338, 8470: 2.332}),
    "trim 7, `--distill 0.5`": Curve(SMOLLM2, 2.332, {0: 2.869, 4096: 2.389, 6987: 2.332}),
    # single runs of the prototype
    "prototype, no gains": Curve(SMOLLM2, 2.324, {0: 2.858, 4096: 2.522, 15720: 2.324}),
    "prototype, gain lr 0.01": Curve(SMOLLM2, 2.324, {0: 2.858, 4096: 2.454, 10620: 2.324}),
    "prototype, gain lr 0.03": Curve(SMOLLM2, 2.324, {0: 2.858, 4096: 2.418, 8070: 2.324}),
    "prototype, KL 0.5": Curve(SMOLLM2, 2.324, {0: 2.858, 4096: 2.407, 7500: 2.324}),
    # one seed each, --until base
    "trim 5, Python source": Curve(
        SMOLLM2,
        2.1362,
        {
            0: 4.3886,
            1024: 3.2709,
            2048: 2.8748,
            3072: 2.6138,
            4096: 2.4324,
            5120: 2.3372,
            6144: 2.2378,
            7168: 2.1790,
            8192: 2.1511,
            9216: 2.1101,
        },
    ),
    "trim 9, C++ headers, no gains": Curve(
        SMOLLM2,
        1.2412,
        {0: 1.5563, 1024: 1.5048, 2048: 1.2924, 3072: 1.2375},
    ),
    "small, trim 2": Curve(
        SMALL,
        4.3349,
        {
            0: 4.3953,
            3072: 4.3491,
            6144: 4.3505,
            9216: 4.3435,
            12288: 4.3398,
            15360: 4.3367,
            18432: 4.3357,
            21504: 4.3395,
            24576: 4.3367,
            27648: 4.3334,
        },
    ),
    "small, trim 0, lr 3e-4": Curve(
        SMALL,
        4.3349,
        {
            0: 4.4715,
            2048: 4.3869,
            4096: 4.3931,
            6144: 4.3878,
            8192: 4.3694,
            10240: 4.3615,
            12288: 4.3526,
            14336: 4.3476,
            16384: 4.3457,
            18432: 4.3480,
            20480: 4.3488,
            22528: 4.3458,
            24576: 4.3406,
            26624: 4.3366,
            28672: 4.3323,
        },
    ),
    # CURVES#
    "small, trim 1, lr 1e-3, no gains": Curve(
        SMALL,
        4.3349,
        {
            0: 4.4012,
            2048: 4.4069,
            4096: 4.4472,
            6144: 4.4283,
            8192: 4.4290,
            10240: 4.4332,
            12288: 4.4158,
            14336: 4.4121,
            16384: 4.4128,
            18432: 4.4170,
            20480: 4.4121,
            22528: 4.4068,
            24576: 4.4033,
            26624: 4.3901,
            28672: 4.3842,
            30720: 4.3754,
            32768: 4.3778,
            34816: 4.3833,
            36864: 4.3795,
            38912: 4.3871,
            40960: 4.3875,
            43008: 4.3805,
            45056: 4.3802,
            47104: 4.3775,
            49152: 4.3695,
            51200: 4.3681,
            53248: 4.3742,
            55296: 4.3809,
            57344: 4.3764,
            59392: 4.3772,
            61440: 4.3747,
            63488: 4.3631,
            65536: 4.3640,
            67584: 4.3699,
            69632: 4.3748,
            71680: 4.3719,
            73728: 4.3712,
            75776: 4.3648,
            77824: 4.3668,
            79872: 4.3678,
            81920: 4.3638,
            83968: 4.3670,
            86016: 4.3598,
            88064: 4.3575,
            90112: 4.3571,
            92160: 4.3494,
            94208: 4.3384,
            96256: 4.3327,
        },
    ),
}


class Pilot(NamedTuple):
    """The beginning of a run: `closed` is f after `tokens`; `slope` is None without a measurement
    at half of them.
    """

    run: str
    tokens: int
    closed: float
    slope: float | None

    @property
    def missing(self) -> float:
        """log(1 / f)."""
        return -math.log(self.closed)

    @property
    def factor(self) -> float:
        """log(N / T)."""
        return math.log(CURVES[self.run].crossing / self.tokens)


def pilot_of(run: str, wanted: int) -> Pilot | None:
    """The pilot of a run that has about so many tokens; None if it was not measured there, or was
    at the base's loss already.
    """
    curve = CURVES[run]
    near = [t for t in curve.losses if wanted / NEAR <= t <= wanted * NEAR]
    if not near:
        return None
    tokens = min(near, key=lambda t: abs(math.log(t / wanted)))
    closed = curve.closed(tokens)
    if not 0 < closed < 1:
        return None
    before = [t for t in curve.losses if 0 < t <= 0.6 * tokens and 0 < curve.closed(t) < closed]
    slope = None
    if before:
        slope = math.log(closed / curve.closed(before[-1])) / math.log(tokens / before[-1])
    return Pilot(run, tokens, closed, slope)


LAWS: dict[str, Callable[[Pilot], list[float]]] = {
    "power": lambda pilot: [pilot.missing],
    "line": lambda pilot: [pilot.missing, 1.0],
    "slope": lambda pilot: [pilot.missing / (pilot.slope or math.nan)],
    "no loss": lambda _: [1.0],
}


def foretold(law: str, pilot: Pilot, others: list[Pilot]) -> tuple[float, float]:
    """log(N / T) of a pilot by a law that is fitted on others, and half of its 80% interval."""
    features = np.array([LAWS[law](other) for other in others])
    spreads = np.array([1.0 if law == "no loss" else each.missing for each in (*others, pilot)])
    weights = 1 / spreads[:-1]
    factors = np.array([other.factor for other in others])
    fit = np.linalg.lstsq(features * weights[:, None], factors * weights, rcond=None)[0]
    residuals = (factors - features @ fit) * weights
    freedom = len(others) - len(fit)
    spread = math.sqrt(residuals @ residuals / freedom * (1 + 1 / len(others)))
    quantile = QUANTILES[freedom - 1] if freedom <= len(QUANTILES) else MANY
    middle = float(np.array(LAWS[law](pilot)) @ fit)
    return middle, float(quantile * spread * spreads[-1])


def judged(law: str, pilots: list[Pilot], *, by_model: bool) -> str:
    """The median error of a law and how many intervals cover, each run or model left out."""
    errors, covered = [], 0
    for pilot in pilots:
        model = CURVES[pilot.run].model
        others = [
            other
            for other in pilots
            if (CURVES[other.run].model != model if by_model else other.run != pilot.run)
        ]
        if len(others) < 3:
            continue
        middle, half = foretold(law, pilot, others)
        errors.append(abs(math.exp(middle - pilot.factor) - 1))
        covered += abs(middle - pilot.factor) <= half
    return f"{np.median(errors):.0%}, {covered} of {len(errors)}" if errors else "too few"


def main() -> None:
    print("| pilot | law | runs | one run left out | one model left out |\n|---|---|---|---|---|")
    for tokens in TOKENS:
        all_pilots = [pilot for run in CURVES if (pilot := pilot_of(run, tokens))]
        for law in LAWS:
            pilots = [each for each in all_pilots if law != "slope" or each.slope]
            results = " | ".join(judged(law, pilots, by_model=by) for by in (False, True))
            print(f"| {tokens:,} | {law} | {len(pilots)} | {results} |")
    print("\n| run | model | tokens to the base | pilot | of them | closed | power |")
    print("|---|---|---|---|---|---|---|")
    for run, curve in CURVES.items():
        for pilot in dict.fromkeys(pilot_of(run, tokens) for tokens in TOKENS):
            if pilot is not None:
                closed, share = f"{pilot.closed:.0%}", f"{pilot.tokens / curve.crossing:.0%}"
                figures = f"{curve.crossing:,.0f} | {pilot.tokens:,} | {share} | {closed}"
                power = pilot.factor / pilot.missing
                print(f"| {run} | {curve.model} | {figures} | {power:.1f} |")


if __name__ == "__main__":
    main()
