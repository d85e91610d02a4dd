"""The part of the output that a file system with reflinks shares with the base, by the model's shape.

    PYTHONPATH=.:tests python tests/benchmarks/clonable.py

Plans only: the checkpoints have real headers, and holes for data.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from checkpoints import llama_config, llama_tensors, write_checkpoint

from dus_cli.common.reference import ModelRef
from dus_cli.planning.plan import Base, MapRequest, make_plan
from dus_cli.source.checkpoint import open_checkpoint

SHAPES = [  # hidden, intermediate, key/value and vocabulary sizes; source shards
    (4096, 14336, 1024, 32_000, 3),
    (2560, 6912, 640, 50_257, 2),
    (576, 1536, 192, 49_152, 1),
    (3000, 8000, 750, 50_257, 3),
    (4097, 11_001, 1025, 50_257, 4),
    (1000, 2730, 250, 50_257, 1),
]


def main() -> None:
    print(
        "| hidden | intermediate | source shards | output, GB | output shards | clonable |\n|---|---|---|---|---|---|"
    )
    for hidden, intermediate, kv, vocab, num_shards in SHAPES:
        with tempfile.TemporaryDirectory() as name:
            tensors = llama_tensors(32, hidden, intermediate, kv, vocab)
            config = llama_config(32, hidden, intermediate, vocab)
            folder = write_checkpoint(Path(name) / "model", tensors, config, num_shards=num_shards, fill=None)
            plan = make_plan(Base(ModelRef(name, path=folder)), open_checkpoint(folder), MapRequest())
        size, part = plan.num_data_bytes, plan.num_clonable_bytes / plan.num_data_bytes
        print(f"| {hidden} | {intermediate} | {num_shards} | {size / 1e9:.2f} | {len(plan.shards)} | {part:.1%} |")


if __name__ == "__main__":
    main()
