"""The demo: deepen a real model, verify it, and let base and result write.

Usage: demo.py MODEL OUT
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import warnings

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


def main(model: str, out: str) -> None:
    # The demo is about the two models' words, not about the libraries' progress.
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    run("upscale", model, "-o", out, "--trim", "7", "--overwrite")
    run("verify", out, "--base", model)
    for name, folder in (("base", model), ("up-scaled, not healed", out)):
        say(f"{name}: {folder}")
        print("  " + " ".join(generate(folder).split()))
    say("The up-scaled model loads like any other, and writes worse: its seam must be healed first.")
    print("See docs/concepts.md.")


if __name__ == "__main__":
    main(*sys.argv[1:3])
