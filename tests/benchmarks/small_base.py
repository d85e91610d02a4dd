r"""Growth before and after the base's learning rate has decayed, on a base trained here from
scratch.

    python tests/benchmarks/small_base.py --work DIR --data train.jsonl --eval-data heldout.jsonl \
        [--pretrain 2000000] [--tokens 300000] [--seeds 0,1] [--hidden 128] [--layers 10] \
        [--arms copies,base]
    python tests/benchmarks/small_base.py --work DIR --data … --eval-data … --table

`dus heal` trains a random Llama with a constant rate (*stable*), then on with a rate that falls to
0 (*decayed*). Each of the two is deepened in every way and trained on for the same tokens; the base
itself is trained on for as many FLOPs. All have the same rows in the same order, the same rate and
decay at the end, and a new optimizer. The study can be stopped and resumed: what is in DIR is not
made again, and an arm that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from long_run import SEQUENCE, flops, stop

BATCH, VOCABULARY = 4096, 2048
LR = "2e-3"
DECAY_OF_THE_BASE = 0.2  # of the tokens before: the usual share of a warm-up, stable, decay run
POINTS = 16  # held-out measurements of an arm


def random_base(folder: Path, data: Path, options: argparse.Namespace) -> None:
    """Write a Llama with random weights, and a byte-level BPE of VOCABULARY tokens trained on
    `data`.
    """
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def texts() -> Iterator[str]:
        with data.open(encoding="utf-8") as file:
            yield from (json.loads(line)["text"] for line in file)

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts(), VOCABULARY, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 32,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def dus(*arguments: object) -> None:
    """Run the command to its end; it resumes if it was stopped before."""
    process = subprocess.Popen([sys.executable, "-m", "dus_cli", *map(str, arguments)])
    try:
        code = process.wait()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    if code:
        raise SystemExit(f"dus {arguments[0]} ended with {code}")


def curve(folder: Path) -> dict[int, float]:
    """Held-out losses by tokens trained."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["tokens"]: row["eval_loss"] for row in rows if "eval_loss" in row}


ARMS = ("copies", "fade", "half", "identities", "identities alone", "base")


class Study:
    """The base before and after its decay, and the models made from it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        layers, trim = options.layers, options.layers // 5
        double = f"{trim}:{layers - trim}"
        self.starts: dict[str, tuple[str, ...]] = {
            "copies": ("--trim", str(trim)),
            "fade": ("--trim", str(trim), "--start", "fade:linear"),
            "half": ("--double", double, "--start", "half"),
            "identities": ("--trim", str(trim), "--start", "identity"),
        }
        self.arms = options.arms.split(",")

    def heal(self, model: Path, out: Path, tokens: int, *more: str) -> None:
        steps = max(1, round(tokens / BATCH))
        if (out / "config.json").exists():
            return
        options = self.options
        dus(
            *("heal", model, "-o", out, "--data", options.data, "--eval-data", options.eval_data),
            *("--seq-length", SEQUENCE, "--batch-tokens", BATCH, "--steps", steps, "--lr", LR),
            *("--eval-every", max(1, steps // POINTS), "--eval-tokens", options.eval_tokens),
            *("--weight-decay", "0.1", "--keep", "1", "--progress", "none", *more),
        )

    def bases(self) -> dict[str, Path]:
        """*stable* and *decayed*, trained if they are missing."""
        random, options = self.work / "random", self.options
        if not (random / "config.json").exists():
            random_base(random, Path(options.data), options)
        stable, decayed = self.work / "stable", self.work / "decayed"
        plain: tuple[str, ...] = ("--gain-lr", "0", "--seed", "100")
        self.heal(random, stable, options.pretrain, "--schedule", "constant", *plain)
        decay = int(options.pretrain * DECAY_OF_THE_BASE)
        plain = ("--gain-lr", "0", "--seed", "101", "--warmup", "0", "--decay", "100%")
        self.heal(stable, decayed, decay, *plain)
        return {"stable": stable, "decayed": decayed}

    def out(self, base: str, arm: str, seed: int) -> Path:
        return self.work / f"{base}-{arm.replace(' ', '-')}-{seed}"

    def train(self, base: Path, arm: str, seed: int) -> None:
        more = ("--seed", str(seed), *(("--train", "new") if arm.endswith("alone") else ()))
        if arm == "base":
            deeper = self.deeper(base, "copies")
            tokens = int(self.options.tokens * flops(deeper) / flops(base))
            self.heal(base, self.out(base.name, arm, seed), tokens, *more)
        else:
            model = self.deeper(base, arm.removesuffix(" alone"))
            self.heal(model, self.out(base.name, arm, seed), self.options.tokens, *more)

    def deeper(self, base: Path, start: str) -> Path:
        folder = self.work / f"{base.name}-{start}"
        if not folder.exists():
            dus("upscale", base, *self.starts[start], "-o", folder, "--quiet")
        return folder

    def go(self) -> None:
        bases = self.bases()
        for seed in self.seeds:
            for base in bases.values():
                for arm in self.arms:
                    self.train(base, arm, seed)
                self.table()

    @property
    def seeds(self) -> list[int]:
        return [int(seed) for seed in self.options.seeds.split(",")]

    def table(self) -> None:
        """Held-out losses right after scaling, at each quarter and at the end of every arm."""
        for name in ("stable", "decayed"):
            losses = curve(self.work / name)
            if losses:
                print(f"\n{name}: {losses[max(losses)]:.4f} after {max(losses):,} tokens more")
        print(
            "\n| base | arm | seed | at once | 1/4 | 1/2 | 3/4 | end |\n|---|---|---|---|---|---|---|---|"
        )
        for base in ("stable", "decayed"):
            for arm in self.arms:
                for seed in self.seeds:
                    losses = curve(self.out(base, arm, seed))
                    if losses:
                        ends = max(losses)
                        at = [min(losses, key=lambda n: abs(n - ends * k / 4)) for k in range(5)]
                        cells = " | ".join(f"{losses[n]:.4f}" for n in at)
                        print(f"| {base} | {arm} | {seed} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--pretrain", type=int, default=2_000_000)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--eval-tokens", type=int, default=40_960)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)  # an arm in training is stopped, and keeps what it has
    options.work.mkdir(parents=True, exist_ok=True)
    study = Study(options)
    if options.table:
        study.table()
    else:
        study.go()


if __name__ == "__main__":
    main()
