"""Loss right after scaling, of models that `dus upscale` wrote and transformers loads.

    python tests/benchmarks/loss_after_scaling.py MODEL --data heldout.jsonl --trims 0,4,7,10

Mean cross-entropy in nats over the first ROWS × 512 tokens of the text, with documents joined by
end-of-text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SEQUENCE = 512


def read_tokens(path: Path, tokenizer: Any, rows: int) -> torch.Tensor:
    """The first rows × 512 token ids of a JSONL file with a `text` field. Shape (rows, 512)."""
    ids: list[int] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= rows * SEQUENCE:
            return torch.tensor(ids[: rows * SEQUENCE]).reshape(rows, SEQUENCE)
    raise SystemExit(f"error: {path} has only {len(ids)} tokens; give more text or fewer --rows")


def mean_loss(folder: str, tokens: torch.Tensor) -> float:
    """Mean cross-entropy in nats of the model in `folder`, in fp32, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in tokens]
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--trims", default="0,4,7,10")
    parser.add_argument("--rows", type=int, default=40)
    options = parser.parse_args()
    tokens = read_tokens(options.data, AutoTokenizer.from_pretrained(options.model), options.rows)
    print("| trim | layers | loss |\n|---|---|---|", flush=True)
    print(f"| base | | {mean_loss(options.model, tokens):.3f} |", flush=True)
    for trim in options.trims.split(","):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "dus_cli",
                "upscale",
                options.model,
                "--trim",
                trim,
                "-o",
                f"{folder}/out",
            ]
            done = subprocess.run([*command, "--json"], check=True, capture_output=True)
            layers = json.loads(done.stdout)["num_layers"]["output"]
            print(f"| {trim} | {layers} | {mean_loss(f'{folder}/out', tokens):.3f} |", flush=True)


if __name__ == "__main__":
    main()
