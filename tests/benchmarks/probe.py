"""The cost of a sweep of all trims against running each stacked model, and the memory of streamed
layers.

    python tests/benchmarks/probe.py MODEL --data heldout.jsonl [--tokens 20480] [--precision fp32]
    python tests/benchmarks/probe.py --seven-billion FOLDER [--trims 0:16] [--tokens 2048]
    [--precision fp32]

The comparison is with transformers: the loaded model's layers are stacked for each trim, and its
own forward with labels is run row by row, on the same rows in the same dtype and process. Its time
is that of the forward passes only; the time of dus probe is that of the whole verb, from opening
the model to the recommendation. CPU time is printed beside wall time, because other work may share
the cores. --seven-billion writes a model of Mistral-7B's shape (14.5 GB) and probes trims of it (by
default one) with layers streamed from the disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from checkpoints import write_mistral
from transformers import AutoModelForCausalLM

from dus_cli.common.reference import ModelRef
from dus_cli.data.sample import Packed, read_sample
from dus_cli.data.tokeniser import open_tokeniser
from dus_cli.maps.layers import largest_trim, source_layers
from dus_cli.models.precision import Precision
from dus_cli.probe.options import ProbeOptions
from dus_cli.probe.verb import probe
from dus_cli.progress import NoProgress

SEQUENCE = 512

Times = tuple[float, float]  # wall and CPU, in seconds


def clock() -> Times:
    return time.perf_counter(), time.process_time()


def since(start: Times) -> Times:
    now = clock()
    return now[0] - start[0], now[1] - start[1]


def theirs(
    model: Any, layers: Any, trims: range, rows: list[torch.Tensor]
) -> tuple[dict[int, float], Times]:
    """The mean loss of each stacked model, by its own forward."""
    losses = {}
    start = clock()
    for trim in trims:
        sources = source_layers(len(layers), trim)
        model.model.layers = torch.nn.ModuleList([layers[layer] for layer in sources])
        model.config.num_hidden_layers = len(sources)
        with torch.no_grad():
            found = [float(model(input_ids=row, labels=row, use_cache=False).loss) for row in rows]
        losses[trim] = sum(found) / len(found)
    spent = since(start)
    model.model.layers = layers
    model.config.num_hidden_layers = len(layers)
    return losses, spent


def compare(folder: str, data: str, tokens: int, precision: Precision) -> None:
    dtype = torch.bfloat16 if precision.on() is Precision.bf16 else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    layers = model.model.layers
    tokeniser = open_tokeniser(Path(folder), model.config.vocab_size)
    packed = Packed(
        read_sample([data], tokeniser, tokens).texts, tokeniser, SEQUENCE, document_mask=False
    )
    rows = [torch.from_numpy(row.input_ids)[None] for row in packed]
    trims = range(largest_trim(len(layers)) + 1)
    theirs(model, layers, trims[-1:], rows[:1])  # warm
    losses, peer = theirs(model, layers, trims, rows)
    del model, layers
    start = clock()
    options = ProbeOptions(data=(data,), tokens=tokens, seq_length=SEQUENCE, precision=precision)
    found = probe(ModelRef.parse(folder), options, NoProgress(), quiet=True)
    mine = since(start)
    print("| trim | loss: dus probe | transformers |\n|---|---|---|")
    for trim, measured in zip(trims, found.maps, strict=True):
        print(f"| {trim} | {measured.loss:.4f} | {losses[trim]:.4f} |")
    print("\n| | wall, s | CPU, s |\n|---|---|---|")
    print(f"| dus probe, {found.layer_passes} layer passes a row | {mine[0]:.1f} | {mine[1]:.1f} |")
    full = sum(2 * (found.plan.num_layers - trim) for trim in trims)
    print(f"| transformers, {full} layer passes a row | {peer[0]:.1f} | {peer[1]:.1f} |")
    print(f"| ratio | {mine[0] / peer[0]:.2f} | {mine[1] / peer[1]:.2f} |")
    print(
        f"\n{len(rows)} rows of {SEQUENCE} tokens, {found.plan.precision}, {torch.get_num_threads()} "
        "thread(s)"
    )


def fill(_name: str, size: int, block: bytes = b"") -> bytes:
    """Small random bf16 numbers."""
    if not block:
        numbers = torch.from_numpy(
            np.random.default_rng(0).standard_normal(1 << 20, np.float32) * 0.02
        )
        fill.__defaults__ = (numbers.bfloat16().view(torch.uint8).numpy().tobytes(),)
        block = fill.__defaults__[0]
    return (block * -(-size // len(block)))[:size]


def seven_billion(folder: Path, tokens: int, precision: Precision, trims: str) -> None:
    model = folder / "model"
    if not model.exists():
        write_mistral(model, fill=fill)
        tiny.write_tokenizer(model)
    data = tiny.write_corpus(folder / "text.jsonl")
    command = [
        sys.executable,
        "-m",
        "dus_cli",
        "probe",
        str(model),
        "--data",
        str(data),
        "--stream-layers",
        "--json",
    ]
    command += ["--trims", trims, "--precision", precision.value]
    command += ["--tokens", str(tokens), "--seq-length", str(min(tokens, SEQUENCE))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(
        json.dumps(
            {key: report[key] for key in ("base", "layer_passes", "memory", "seconds")}, indent=1
        )
    )
    print(f"peak RSS {peak / 1e9:.2f} GB")
    shutil.rmtree(model)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data")
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--precision", type=Precision, default=Precision.auto)
    parser.add_argument("--seven-billion", type=Path, metavar="FOLDER")
    parser.add_argument("--trims", default="8", help="with --seven-billion")
    options = parser.parse_args()
    if options.seven_billion:
        seven_billion(options.seven_billion, options.tokens, options.precision, options.trims)
    else:
        compare(options.model, options.data, options.tokens, options.precision)


if __name__ == "__main__":
    main()
