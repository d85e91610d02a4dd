"""CPU time and memory of per-layer embeddings: the table and projection of Gemma 3n E4B, 35 layers to
40, with layers of a tiny Llama.

    python tests/benchmarks/tables.py FOLDER

The base is a hole of 4.7 GB in its file system, the output 5.4 GB of zeros.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoints import Tensor, llama_config, llama_tensors, write_checkpoint
from many_layers import measured

NUM_LAYERS, WIDTH, VOCABULARY, HIDDEN = 35, 256, 262_144, 2048


def main() -> None:
    folder = Path(sys.argv[1])
    tables: list[Tensor] = [
        ("model.embed_tokens_per_layer.weight", "BF16", (VOCABULARY, NUM_LAYERS * WIDTH)),
        ("model.per_layer_model_projection.weight", "BF16", (NUM_LAYERS * WIDTH, HIDDEN)),
    ]
    config = llama_config(NUM_LAYERS) | {
        "model_type": "gemma3n_text",
        "num_kv_shared_layers": 15,
        "hidden_size_per_layer_input": WIDTH,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    }
    base = write_checkpoint(folder / "base", llama_tensors(NUM_LAYERS) + tables, config, fill=None)
    out = folder / "out"
    given = ("upscale", base, "--trim", "15", "-o", out, "-q")
    print(f"dry run  {measured(*given, '--dry-run')}", flush=True)
    print(f"write    {measured(*given)}", flush=True)
    print(f"verify   {measured('verify', out, '--base', base, '-q')}", flush=True)
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
