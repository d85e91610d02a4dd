"""The share of the output that a file system with reflinks shares with the base, by layout of the
base's shards.

    PYTHONPATH=.:tests python tests/benchmarks/clonable.py

It only plans: the checkpoints have real headers, and holes for data. `needed` is the least number
of shards of at most --max-shard-size with which everything could be cloned: tensors of source
shards whose data begin at different offsets modulo the block cannot share a file. `least` is the
same number without cloning. `left` is what is copied, and the largest part of it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from checkpoints import (
    Tensor,
    llama_config,
    llama_tensors,
    moe_config,
    moe_tensors,
    num_bytes,
    write_in_shards,
)

from dus_cli.common.reference import ModelRef
from dus_cli.planning.layout import BLOCK
from dus_cli.planning.plan import Base, MapRequest, UpscalePlan, make_plan
from dus_cli.planning.treatment import Making
from dus_cli.source.checkpoint import open_checkpoint

GB = 10**9


@dataclass(frozen=True)
class Layout:
    """A base, and how its tensors are divided into shards.

    `embeddings` are "in order" (first and last), "last" (both), or "alone" (in shards of their
    own).
    """

    name: str
    tensors: Sequence[Tensor]
    config: dict[str, object]
    num_shards: int = 1
    shard_gb: float | None = None
    embeddings: str = "in order"
    max_shard_gb: float = 5
    request: MapRequest = field(default_factory=MapRequest)
    rounds: int = 1


def groups(layout: Layout) -> list[list[Tensor]]:
    """The tensors of each source shard."""
    outer = [tensor for tensor in layout.tensors if ".layers." not in tensor[0]]
    inner = [tensor for tensor in layout.tensors if ".layers." in tensor[0]]
    ordered = {
        "in order": list(layout.tensors),
        "first": [*outer, *inner],
        "last": [*inner, *outer],
        "alone": inner,
    }[layout.embeddings]
    total = sum(map(num_bytes, ordered))
    limit = layout.shard_gb * GB if layout.shard_gb is not None else total / layout.num_shards
    found: list[list[Tensor]] = [[]]
    size = 0.0
    for tensor in ordered:
        if found[-1] and size + num_bytes(tensor) > limit * 1.0001:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += num_bytes(tensor)
    if layout.embeddings == "alone":
        found += [[tensor] for tensor in outer]
    return found


def llama(
    layers: int, hidden: int, intermediate: int, kv: int, vocab: int, *, tied: bool = False
) -> tuple[list[Tensor], dict[str, object]]:
    config = llama_config(layers, hidden, intermediate, vocab) | {"tie_word_embeddings": tied}
    return llama_tensors(layers, hidden, intermediate, kv, vocab, tied=tied), config


SMALL = llama(8, 4096, 14_336, 1024, 32_000)  # 4.0 GB: 8 layers to 12
MISTRAL = llama(32, 4096, 14_336, 1024, 32_000)
SMOL = llama(30, 576, 1536, 192, 49_152, tied=True)
QWEN = llama(36, 2560, 9728, 1024, 151_936, tied=True)
LARGE = llama(80, 8192, 28_672, 1024, 128_256)
MOE = moe_tensors(16, 128, 2048, 768, 151_936), moe_config(16, 128, 2048, 768, 151_936)
FP8 = (
    moe_tensors(8, 256, 7168, 2048, 129_280, is_fp8=True),
    moe_config(8, 256, 7168, 2048, 129_280, is_fp8=True),
)
THREE = MapRequest(copies=3)

LAYOUTS = [
    Layout("4.0 GB in shards of 2 GB", *SMALL, shard_gb=2),
    Layout("4.0 GB in shards of 2 GB, embeddings first", *SMALL, shard_gb=2, embeddings="first"),
    Layout("4.0 GB in shards of 2 GB, embeddings last", *SMALL, shard_gb=2, embeddings="last"),
    Layout("4.0 GB in shards of 2 GB, embeddings alone", *SMALL, shard_gb=2, embeddings="alone"),
    Layout("4.0 GB in shards of 2 GB, one file", *SMALL, shard_gb=2, max_shard_gb=50),
    *(Layout(f"4.0 GB in {n}", *SMALL, num_shards=n) for n in (1, 2, 3, 5)),
    *(
        Layout(f"4.0 GB in {n}, room for one file", *SMALL, num_shards=n, max_shard_gb=50)
        for n in (1, 2, 3, 5, 8)
    ),
    *(Layout(f"Mistral 7B in {n}", *MISTRAL, num_shards=n) for n in (1, 2, 3, 4, 8, 15, 30)),
    *(
        Layout(f"Mistral 7B in 3, embeddings {e}", *MISTRAL, num_shards=3, embeddings=e)
        for e in ("first", "last", "alone")
    ),
    *(
        Layout(f"Mistral 7B in 3, shards of {gb} GB", *MISTRAL, num_shards=3, max_shard_gb=gb)
        for gb in (1, 2, 10, 50)
    ),
    Layout("Mistral 7B in 3, --copies 3", *MISTRAL, num_shards=3, request=THREE),
    Layout("Mistral 7B in 1, --copies 3, one file", *MISTRAL, max_shard_gb=100, request=THREE),
    Layout("Mistral 7B in 3, twice deepened", *MISTRAL, num_shards=3, rounds=2),
    Layout("Mistral 7B in 1, twice deepened", *MISTRAL, rounds=2),
    Layout("Mistral 7B in 1, three times deepened", *MISTRAL, rounds=3),
    *(Layout(f"SmolLM2 135M in {n}", *SMOL, num_shards=n) for n in (1, 2, 3)),
    Layout("SmolLM2 135M in 1, --copies 3", *SMOL, request=THREE),
    Layout("SmolLM2 135M in 1, twice deepened", *SMOL, rounds=2),
    Layout("SmolLM2 135M in 1, shards of 100 MB", *SMOL, max_shard_gb=0.1),
    *(Layout(f"Qwen3 4B's shape in {n}", *QWEN, num_shards=n) for n in (2, 3)),
    Layout("Qwen3 4B's shape in 3, embeddings alone", *QWEN, num_shards=3, embeddings="alone"),
    Layout("Llama 70B's shape in 30", *LARGE, num_shards=30),
    Layout("Llama 70B's shape in 30, shards of 10 GB", *LARGE, num_shards=30, max_shard_gb=10),
    Layout("Llama 70B's shape in 15, --copies 3", *LARGE, num_shards=15, request=THREE),
    *(Layout(f"MoE of 128 experts in {n}", *MOE, num_shards=n) for n in (1, 4, 16)),
    Layout("MoE of 128 experts in 4, --copies 3", *MOE, num_shards=4, request=THREE),
    Layout("MoE of 128 experts in 4, twice deepened", *MOE, num_shards=4, rounds=2),
    *(
        Layout(f"MoE of 256 experts in FP8 with scales in {n}", *FP8, num_shards=n)
        for n in (1, 8, 30)
    ),
    Layout("MoE of 256 experts in FP8, embeddings alone", *FP8, num_shards=8, embeddings="alone"),
    Layout("hidden 3000 in 3", *llama(32, 3000, 8000, 750, 50_257), num_shards=3),
    Layout("hidden 4097 in 4", *llama(32, 4097, 11_001, 1025, 50_257), num_shards=4),
    Layout("hidden 1000 in 1", *llama(32, 1000, 2730, 250, 50_257)),
]


def plan_of(folder: Path, layout: Layout) -> UpscalePlan:
    size = int(layout.max_shard_gb * GB)
    return make_plan(
        Base(ModelRef(str(folder), path=folder)), open_checkpoint(folder), layout.request, size
    )


def deepened(folder: Path, plan: UpscalePlan) -> Path:
    """Write the plan's output with holes for data, as a base for the next round."""
    folder.mkdir()
    for name, text in plan.text_files().items():
        (folder / name).write_text(text)
    for name, shard in plan.shards.items():
        with (folder / name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.num_bytes)
    return folder


def needed(plan: UpscalePlan) -> int:
    """The least number of shards with which everything could be cloned."""
    phases: Counter[int] = Counter()
    for placement in plan.placements:
        phases[placement.shard.header.data_start % BLOCK] += placement.num_bytes
    return sum(ceil(size / plan.max_shard_bytes) for size in phases.values())


def left(plan: UpscalePlan) -> str:
    """The tensors of which at least a block is copied, by their names without numbers."""
    copied: Counter[str] = Counter()
    for shard in plan.shards.values():
        for placement, start in shard.positions():
            if placement.making is Making.copied and (placement.tensor.start - start) % BLOCK:
                name = ".".join(
                    "N" if part.isdecimal() else part for part in placement.name.split(".")
                )
                copied[name] += placement.num_bytes
    return ", ".join(name for name, _ in copied.most_common(1)) or "ends of runs"


def main() -> None:
    print(
        "| base | output, GB | shards | needed | least | clonable | left "
        "|\n|---|---|---|---|---|---|---|"
    )
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as name:
            folder = write_in_shards(Path(name) / "model", groups(layout), layout.config)
            plan = plan_of(folder, layout)
            for number in range(1, layout.rounds):
                plan = plan_of(deepened(Path(name) / f"round-{number}", plan), layout)
            size, part = plan.num_data_bytes, plan.num_clonable_bytes / plan.num_data_bytes
            least = ceil(size / plan.max_shard_bytes)
            row = (
                layout.name,
                f"{size / GB:.2f}",
                len(plan.shards),
                needed(plan),
                least,
                f"{part:.2%}",
                left(plan),
            )
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
