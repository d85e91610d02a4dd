r"""Held-out loss against tokens: `dus heal` with several recipes, and transformers' Trainer, on the
same rows.

    python tests/benchmarks/heal_recovery.py MODEL --data train.jsonl --eval-data heldout.jsonl \
        --tokens 12288 --seeds 0,1,2 --results results.jsonl [--only default,plain] \
        [--trainer-tokens 24576] [--other docstrings.jsonl licences.jsonl] [--label control]

Each run appends a line of JSON to --results when it ends, so a sweep can be stopped and resumed.
--table prints the results as a table and draws them to --plot. --other also measures the model on
texts of other domains (see other_text.py), before healing (as "start") and after; --label is put
before the recipe's name, for a run on another MODEL (see zeroed.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from heal_speed import HERE, run_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from dus_cli.pictures.curves import compare_curves

SEQUENCE = 512

# Options beyond --seq-length 512; the empty one is what a user gets who gives none.
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "plain": ["--gain-lr", "0"],
    "batch 4096": ["--batch-tokens", "4096"],
    "batch 4096 plain": ["--batch-tokens", "4096", "--gain-lr", "0"],
    "distill": ["--distill", "0.5"],
    "distill plain": ["--distill", "0.5", "--gain-lr", "0"],
    "constant": ["--schedule", "constant"],
    "lr 3e-5": ["--lr", "3e-5"],
    "lr 3e-4": ["--lr", "3e-4"],
    "no document mask": ["--no-document-mask"],
    "distill + constant": ["--distill", "0.5", "--schedule", "constant"],
    # For checkpoints whose new layers start as identities: only those learn.
    "new layers": ["--train", "new"],
}


def heal(options: argparse.Namespace, extra: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """Run the command once; its held-out losses as (tokens, loss)."""
    rows = 8 if "4096" in extra else 1
    every = max(1, options.every // (rows * SEQUENCE))
    command = [
        sys.executable,
        "-m",
        "dus_cli",
        "heal",
        options.model,
        "--data",
        options.data,
        "-o",
        str(folder / "out"),
    ]
    command += [
        "--eval-data",
        options.eval_data,
        "--seq-length",
        str(SEQUENCE),
        "--tokens",
        str(options.tokens),
    ]
    command += [
        "--eval-tokens",
        str(options.eval_tokens),
        "--eval-every",
        str(every),
        "--seed",
        str(seed),
        "--json",
    ]
    report = json.loads(subprocess.run([*command, *extra], check=True, capture_output=True).stdout)
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    curve = [
        (row["tokens"], row["eval_loss"]) for row in map(json.loads, lines) if "eval_loss" in row
    ]
    found = {
        "base": report["base_loss"],
        "curve": curve,
        "tokens_per_second": report["tokens_per_second"],
    }
    if options.other:
        found["other"] = {
            "start": other_losses(Path(options.model), options),
            "end": other_losses(folder / "out", options),
        }
    return found


def other_losses(model: Path, options: argparse.Namespace) -> dict[str, float]:
    """A model's mean loss on the first tokens of each of the other texts; documents are cut to a
    row.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    losses = {}
    for path in options.other:
        total, count = 0.0, 0
        for line in path.read_text(encoding="utf-8").splitlines():
            ids = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids[:, :SEQUENCE]
            with torch.no_grad():
                logits = decoder(input_ids=ids).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
            if count >= options.eval_tokens:
                break
        losses[path.stem] = total / count
    return losses


def trainer(options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """The same by transformers' Trainer, with a constant 1e-4 and 4,096 tokens a step."""
    extra = [
        "--eval-data",
        options.eval_data,
        "--eval-tokens",
        str(options.eval_tokens),
        "--seed",
        str(seed),
    ]
    run = run_json(options.model, options.data, folder, "--seq-length", str(SEQUENCE), *extra)
    steps = options.trainer_tokens // 4096
    command = [sys.executable, str(HERE / "trainer.py"), str(run), "--steps", str(steps)]
    command += ["--eval-every", str(max(1, options.every // 4096))]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    curve = [(row["tokens"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    return {"base": None, "curve": curve, "tokens_per_second": rows[-1]["tokens_per_second"]}


def tokens_to(base: float, curve: list[tuple[int, float]]) -> float | None:
    """The tokens at which the curve first comes down to the base's loss, interpolated between
    measurements.
    """
    for (before, high), (after, low) in pairwise(curve):
        if low <= base:
            return before + (after - before) * (high - base) / (high - low)
    return None


def table(results: list[dict[str, Any]], plot: Path | None) -> None:
    base = next(result["base"] for result in results if result["base"] is not None)
    print(
        f"base {base:.4f}\n\n| recipe | seeds | tokens to the base | held-out at the end | tokens "
        "| tokens/s |"
    )
    print("|---|---|---|---|---|---|")
    series: dict[str, list[tuple[int, float]]] = {}
    for name in dict.fromkeys(result["name"] for result in results):
        runs = [result for result in results if result["name"] == name]
        reached = [tokens_to(base, run["curve"]) for run in runs]
        said = ", ".join(
            "not reached" if tokens is None else f"{tokens:,.0f}" for tokens in reached
        )
        ends = ", ".join(f"{run['curve'][-1][1]:.3f}" for run in runs)
        speed = statistics.median(run["tokens_per_second"] for run in runs)
        print(
            f"| {name} | {len(runs)} | {said} | {ends} | {runs[0]['curve'][-1][0]:,} | "
            f"{speed:.0f} |"
        )
        points = zip(*(run["curve"] for run in runs), strict=False)
        series[name] = [
            (point[0][0], statistics.fmean(loss for _, loss in point)) for point in points
        ]
    if plot is not None:
        for dark, suffix in ((False, "light"), (True, "dark")):
            picture = compare_curves(
                series, base_loss=base, title="Held-out loss against tokens", dark=dark
            )
            plot.with_name(f"{plot.name}-{suffix}.svg").write_text(picture)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data")
    parser.add_argument("--eval-data")
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--trainer-tokens", type=int, default=24_576)
    parser.add_argument("--eval-tokens", type=int, default=10_240)
    parser.add_argument("--every", type=int, default=2048)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(["trainer", *VARIANTS]))
    parser.add_argument("--other", type=Path, nargs="*", default=[])
    parser.add_argument("--label", default="")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    done = (
        [json.loads(line) for line in options.results.read_text().splitlines()]
        if options.results.exists()
        else []
    )
    if options.table:
        table(done, options.plot)
        return
    for seed in map(int, options.seeds.split(",")):
        for name in options.only.split(","):
            label = f"{options.label}{name}"
            if any((result["name"], result["seed"]) == (label, seed) for result in done):
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = (
                    trainer(options, seed, Path(folder))
                    if name == "trainer"
                    else heal(options, VARIANTS[name], seed, Path(folder))
                )
            with options.results.open("a") as file:
                file.write(json.dumps({"name": label, "seed": seed, **found}) + "\n")
            print(label, seed, found["curve"][-1], flush=True)


if __name__ == "__main__":
    main()
