"""The demo: deepen a real model, verify it, heal it a little, and let all three write.

Usage: demo.py MODEL OUT
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics

PROMPT = "The capital of France is"


def say(text: str) -> None:
    print(f"\n\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def run(*arguments: str) -> None:
    say("$ dus " + " ".join(arguments))
    subprocess.run([sys.executable, "-m", "dus_cli", *arguments], check=True)


def generate(folder: str) -> str:
    """What the model writes after the prompt, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    text = str(tokenizer.decode(tokens[0], skip_special_tokens=True))
    layers = model.config.num_hidden_layers
    parameters = sum(p.numel() for p in model.parameters())
    print(f"  {layers} layers, {parameters:,} parameters, {time.monotonic() - started:.1f} s")
    return text


def write_corpus(path: Path) -> None:
    """Real English text that every Python has: the pages of its language reference that `help()`
    shows.
    """
    lines = [json.dumps({"id": name, "text": text}) for name, text in sorted(topics.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(model: str, out: str) -> None:
    # The demo is about the two models' words, not about the libraries' progress.
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    run("upscale", model, "-o", out, "--trim", "7", "--overwrite")
    run("verify", out, "--base", model)
    healed, corpus = f"{out}-healed", Path(out).with_name("corpus.jsonl")
    write_corpus(corpus)
    # Small, so that a slow machine is done in a minute or two: a real healing takes a thousand
    # times the text.
    size = [
        "--steps",
        "8",
        "--seq-length",
        "256",
        "--batch-tokens",
        "512",
        "--eval-tokens",
        "2K",
        "--eval-every",
        "2",
    ]
    shutil.rmtree(healed, ignore_errors=True)
    run("heal", out, "--data", str(corpus), *size, "--holdout", "5%", "-o", healed)
    run("verify", healed)
    for name, folder in (
        ("base", model),
        ("up-scaled, not healed", out),
        ("healed a little", healed),
    ):
        say(f"{name}: {folder}")
        print("  " + " ".join(generate(folder).split()))
    say("The up-scaled model loads like any other and is worse than its base until it is healed.")
    print(f"See docs/concepts.md and docs/healing.md; {healed}/README.md has the loss curve.")


if __name__ == "__main__":
    main(*sys.argv[1:3])
