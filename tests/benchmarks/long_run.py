r"""The long run: compares starts by the tokens of `dus heal`, on the same rows in the same order.

    python tests/benchmarks/long_run.py BASE --work DIR --data train.jsonl \
        --eval-data heldout.jsonl [--tokens 524288] [--every 16384] [--arms copies,fade] [--seed 0]
    python tests/benchmarks/long_run.py BASE --work DIR --table

The arms take turns: each trains to its next measurement (`--turn K`: to the K-th), is stopped with
SIGTERM, which saves a checkpoint, and resumes at its next turn. So all arms are about equally far
at any time, and the study can be stopped and resumed: everything is in DIR. The base itself is
trained for as many FLOPs as the copies, and measured at the same shares of its budget. Learning
rates decay only at the end of the whole budget.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

from dus_cli.maps.model_config import decoder_config
from dus_cli.maps.shape import flops_per_token, shape_of
from dus_cli.source.checkpoint import open_checkpoint

SEQUENCE = 512


class Arm(NamedTuple):
    """A training to compare: its options of `dus upscale` (None for the base itself) and of `dus
    heal`.
    """

    upscale: tuple[str, ...] | None
    heal: tuple[str, ...] = ()


ARMS = {
    "copies": Arm(("--trim", "7")),
    "fade": Arm(("--trim", "7", "--start", "fade:linear")),
    "half of 46": Arm(("--double", "7:23", "--start", "half")),
    "half of 57": Arm(("--double", "2:29", "--start", "half")),
    "identities": Arm(("--trim", "7", "--start", "identity")),
    "identities alone": Arm(("--trim", "7", "--start", "identity"), ("--train", "new")),
    "base": Arm(None),
}


def dus(*arguments: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "dus_cli", *map(str, arguments)])


def flops(folder: Path) -> float:
    """FLOPs per token, forward and backward."""
    checkpoint = open_checkpoint(folder)
    decoder = decoder_config(checkpoint.config)
    return flops_per_token(
        shape_of(decoder.fields, checkpoint.num_parameters, decoder.num_layers), SEQUENCE
    )


class Study:
    """The arms, and how far they are."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work

    def model(self, name: str) -> Path:
        """The model that an arm starts from, written if it is missing."""
        arm = ARMS[name]
        if arm.upscale is None:
            return Path(self.options.base)
        folder = (
            self.work
            / "models"
            / "-".join(part.strip("-").replace(":", "_") for part in arm.upscale)
        )
        if (
            not folder.exists()
            and dus("upscale", self.options.base, *arm.upscale, "-o", folder, "-q").wait()
        ):
            raise SystemExit(f"{name}: dus upscale failed")
        return folder

    def healed(self, name: str) -> Path:
        return self.work / "healed" / name.replace(" ", "-")

    def longer(self, name: str) -> float:
        """The factor on an arm's tokens that gives it the copies' FLOPs; above 1 only for the base."""
        return (
            1.0
            if ARMS[name].upscale is not None
            else flops(self.model("copies")) / flops(self.model(name))
        )

    def measured(self, name: str) -> dict[int, float]:
        """Held-out losses by the number of the measurement; 0 is right after scaling."""
        path = self.healed(name) / "metrics.jsonl"
        if not path.exists():
            return {}
        found = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "eval_loss" in row:
                found[row["tokens"] // (self.steps(name) * SEQUENCE)] = row["eval_loss"]
        return found

    def steps(self, name: str) -> int:
        """The steps between two measurements."""
        every: int = self.options.every
        return max(1, round(every * self.longer(name) / SEQUENCE))

    def train(self, name: str, until: int) -> None:
        """Train an arm until its measurement of this number."""
        options, steps = self.options, self.steps(name)
        last = options.tokens // options.every
        command = [
            "--data",
            options.data,
            "--eval-data",
            options.eval_data,
            "--seq-length",
            str(SEQUENCE),
        ]
        command += [
            "--steps",
            str(last * steps),
            "--eval-every",
            str(steps),
            "--eval-tokens",
            str(options.eval_tokens),
        ]
        command += [
            "--seed",
            str(options.seed),
            "--keep",
            "1",
            "--progress",
            "none",
            *ARMS[name].heal,
        ]
        run = dus("heal", self.model(name), *command, "-o", self.healed(name))
        try:
            while run.poll() is None and (until == last or until not in self.measured(name)):
                time.sleep(10)
        finally:
            if run.poll() is None:
                run.send_signal(signal.SIGTERM)
            code = run.wait()
        if code not in {0, 128 + signal.SIGTERM, -signal.SIGTERM}:
            raise SystemExit(f"{name}: dus heal ended with {code}")

    def go(self) -> None:
        last, turn = self.options.tokens // self.options.every, self.options.turn
        for until in [*range(turn, last, turn), last]:
            for name in self.options.arms.split(","):
                if until not in self.measured(name):
                    self.train(name, until)
            self.table()

    def table(self) -> None:
        """The losses by tokens, of every arm that has begun."""
        curves = {name: self.measured(name) for name in ARMS}
        curves = {name: curve for name, curve in curves.items() if curve}
        rows = sorted({number for curve in curves.values() for number in curve})
        print(f"\n| tokens | {' | '.join(curves)} |\n|---|{'---|' * len(curves)}")
        for number in rows:
            cells = (f"{curve[number]:.4f}" if number in curve else "" for curve in curves.values())
            print(f"| {number * self.options.every:,} | {' | '.join(cells)} |", flush=True)


def stop(signum: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--eval-data")
    parser.add_argument("--tokens", type=int, default=524_288)
    parser.add_argument("--every", type=int, default=16_384)
    parser.add_argument("--eval-tokens", type=int, default=10_240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turn", type=int, default=1, help="measurements of an arm in its turn")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)  # an arm in training is stopped, and keeps what it has
    (options.work / "models").mkdir(parents=True, exist_ok=True)
    (options.work / "healed").mkdir(exist_ok=True)
    study = Study(options)
    if options.table:
        study.table()
    else:
        study.go()


if __name__ == "__main__":
    main()
