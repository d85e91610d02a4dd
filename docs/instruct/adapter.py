"""A LoRA of the base, laid along the layer map of a model that dus deepened: see docs/instruct.md.

Output layer j gets what base layer σ(j) had. Usage: adapter.py ADAPTER DEEPENED OUT
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def lay_along(adapter: Path, deepened: Path, out: Path) -> None:
    """Write the adapter's weights once for each layer that copies theirs.

    Raises:
        SystemExit: the adapter's config singles out layers by number, which this does not renumber.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    numbered = [
        key for key in ("layers_to_transform", "rank_pattern", "alpha_pattern") if config.get(key)
    ]
    if numbered:
        sys.exit(
            f"error: {', '.join(numbered)} in adapter_config.json may name layers; renumber them "
            "by hand"
        )
    layer_map: list[int] = json.loads((deepened / "dus.json").read_text())["layer_map"]
    found = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        layer = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
        if layer is None:
            found[name] = tensor
            continue
        for j, source in enumerate(layer_map):
            if source == int(layer[1]):
                found[f"{name[: layer.start(1)]}{j}{name[layer.end(1) :]}"] = tensor.clone()
    out.mkdir(parents=True)
    save_file(found, out / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(adapter / "adapter_config.json", out)


if __name__ == "__main__":
    lay_along(*map(Path, sys.argv[1:4]))
