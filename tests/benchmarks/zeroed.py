r"""A control: the same deeper model, with its inserted layers silenced.

    python tests/benchmarks/zeroed.py MODEL OUT

The inserted layers are those between the base's own first n - m and last m. Their output
projections become 0, so the model computes exactly its base; what it then gains by `dus heal` is
the corpus's domain, not repair.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dus_cli.heal.train.gains import matrices_of_the_stream


def main() -> None:
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    shutil.copytree(model, out)
    lineage = json.loads((model / "dus.json").read_text())
    base, deeper, trim = (
        lineage["num_layers"]["base"],
        lineage["num_layers"]["output"],
        lineage["trim"],
    )
    inserted = range(base - trim, deeper - trim)
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        for name in matrices_of_the_stream(tensors):
            layer = re.search(r"layers\.(\d+)\.", name)
            if layer and int(layer[1]) in inserted:
                tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})
    print(f"layers {inserted.start} to {inserted.stop - 1} are silent")


if __name__ == "__main__":
    main()
