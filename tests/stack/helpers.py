"""Commands run as a user runs them, and what a checkpoint holds and computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent

# The text that every program continues, and by how much.
PROMPT = "The capital of France is"
NUM_TOKENS = 12


def run(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Run a command; what it wrote to stdout. A failure shows both of its streams."""
    done = subprocess.run(
        [*map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def dus(*arguments: str | Path) -> str:
    return run(sys.executable, "-m", "dus_cli", *arguments)


def tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def logits(folder: Path, ids: list[int], **options: Any) -> Any:
    """What transformers' model computes in fp32, tokens x vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]
