"""Where tensors lie in the output: what a file system with reflinks can share."""

from __future__ import annotations

import os
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from checkpoints import (
    Tensor,
    fill_randomly,
    llama_config,
    llama_tensors,
    moe_config,
    moe_tensors,
    write_checkpoint,
    write_in_shards,
)
from forked import dus

from dus_cli.common.reference import ModelRef
from dus_cli.planning.layout import BLOCK
from dus_cli.planning.plan import Base, MapRequest, UpscalePlan, make_plan
from dus_cli.source.checkpoint import open_checkpoint
from dus_cli.writing.moves import moves


def plan_of(
    folder: Path, max_shard_bytes: int = 5 * 10**9, request: MapRequest | None = None
) -> UpscalePlan:
    return make_plan(
        Base(ModelRef(str(folder), path=folder)),
        open_checkpoint(folder),
        request or MapRequest(),
        max_shard_bytes,
    )


def clonable_part(plan: UpscalePlan) -> float:
    return plan.num_clonable_bytes / plan.num_data_bytes


def source(
    folder: Path, hidden: int, intermediate: int, num_shards: int = 1, num_layers: int = 12
) -> Path:
    """A Llama of these sizes whose data is a hole: only the plan is looked at."""
    tensors = llama_tensors(num_layers, hidden, intermediate, hidden // 3, 4096)
    config = llama_config(num_layers, hidden, intermediate, 4096)
    return write_checkpoint(folder, tensors, config, num_shards=num_shards, fill=None)


def test_nearly_all_of_an_ordinary_model_can_be_cloned(tmp_path: Path) -> None:
    assert clonable_part(plan_of(source(tmp_path / "m", 768, 2048))) > 0.99


def test_also_with_norms_that_are_no_multiple_of_the_block(tmp_path: Path) -> None:
    assert clonable_part(plan_of(source(tmp_path / "m", 576, 1536))) > 0.99


def test_also_with_matrices_that_are_no_multiple_of_the_block(tmp_path: Path) -> None:
    """Hidden size 500: nothing fits; second copies then get shards of their own."""
    plan = plan_of(source(tmp_path / "m", 500, 1300), max_shard_bytes=20_000_000)
    assert clonable_part(plan) > 0.6


def test_an_output_shard_draws_on_one_source_shard(tmp_path: Path) -> None:
    plan = plan_of(source(tmp_path / "m", 768, 2048, num_shards=3), max_shard_bytes=40_000_000)
    assert all(
        len({p.shard.name for p in layout.placements}) == 1 for layout in plan.shards.values()
    )
    assert clonable_part(plan) > 0.99


def test_segments_cover_every_output_byte_once(tmp_path: Path) -> None:
    plan = plan_of(source(tmp_path / "m", 500, 1300, num_shards=3), max_shard_bytes=9_000_000)
    for layout in plan.shards.values():
        position = len(layout.header)
        for segment in layout.segments():
            assert segment.start == position
            assert len(segment.clonable) % BLOCK == 0
            position += segment.length
        assert position == layout.num_bytes


def test_moves_cover_the_same_bytes_and_read_each_source_byte_once(tmp_path: Path) -> None:
    plan = plan_of(source(tmp_path / "m", 500, 1300, num_shards=3), max_shard_bytes=9_000_000)
    written: dict[str, list[tuple[int, int]]] = {name: [] for name in plan.shards}
    for shard, shard_moves in moves(plan):
        position = shard.header.data_start
        for move in shard_moves:
            assert move.source_start >= position
            position = move.source_start + move.length
            for name, start in move.targets:
                written[name].append((start, start + move.length))
    for name, layout in plan.shards.items():
        position = len(layout.header)
        for start, end in sorted(written[name]):
            assert start == position
            position = end
        assert position == layout.num_bytes


# 298 MB, matrices and norms of whole blocks but for the norms
WIDE = llama_tensors(8, 1024, 4096, 256, 8192)
OUTER = [tensor for tensor in WIDE if ".layers." not in tensor[0]]
INNER = [tensor for tensor in WIDE if ".layers." in tensor[0]]


def split(tensors: list[Tensor], num_shards: int) -> list[list[Tensor]]:
    """The tensors in order, as evenly as their count allows."""
    return [
        tensors[len(tensors) * i // num_shards : len(tensors) * (i + 1) // num_shards]
        for i in range(num_shards)
    ]


GROUPS = {
    "embeddings first": split([*OUTER, *INNER], 3),
    "embeddings last": split([*INNER, *OUTER], 3),
    "embeddings alone": [*split(INNER, 2), *([tensor] for tensor in OUTER)],
    "output embeddings in a small last shard": [*split(WIDE[:-2], 2), WIDE[-2:]],
    "seven shards": split(WIDE, 7),
    "one shard": [WIDE],
}


def shards_needed(plan: UpscalePlan) -> int:
    """The least number of shards that could all be cloned, where every tensor is whole blocks.

    What begins at different places modulo the block cannot share a file: safetensors has no holes
    between tensors.
    """
    sizes: Counter[int] = Counter()
    for placement in plan.placements:
        sizes[placement.shard.header.data_start % BLOCK] += placement.num_bytes
    return sum(-(-size // plan.max_shard_bytes) for size in sizes.values())


@pytest.mark.parametrize("max_shard_bytes", [100_000_000, 5 * 10**9])
@pytest.mark.parametrize("groups", GROUPS)
def test_every_layout_of_source_shards_can_be_cloned(
    tmp_path: Path, groups: str, max_shard_bytes: int
) -> None:
    config = llama_config(8, 1024, 4096, 8192)
    plan = plan_of(write_in_shards(tmp_path / "m", GROUPS[groups], config), max_shard_bytes)
    assert clonable_part(plan) > 0.995
    assert len(plan.shards) <= shards_needed(plan) + 1
    assert all(layout.num_bytes <= max_shard_bytes for layout in plan.shards.values())


def test_what_is_deepened_twice_can_be_cloned_twice(tmp_path: Path) -> None:
    plan = plan_of(source(tmp_path / "m", 768, 2048, num_shards=2), max_shard_bytes=60_000_000)
    once = tmp_path / "once"
    once.mkdir()
    for name, text in plan.text_files().items():
        (once / name).write_text(text)
    for name, layout in plan.shards.items():
        (once / name).write_bytes(layout.header)
        os.truncate(once / name, layout.num_bytes)
    assert clonable_part(plan_of(once, max_shard_bytes=60_000_000)) > 0.99


def test_experts_in_fp8_with_scales_can_be_cloned(tmp_path: Path) -> None:
    shape = (4, 24, 1024, 512, 4096)
    folder = write_checkpoint(
        tmp_path / "m",
        moe_tensors(*shape, is_fp8=True),
        moe_config(*shape, is_fp8=True),
        num_shards=3,
        fill=None,
    )
    assert clonable_part(plan_of(folder)) > 0.99


def test_an_output_of_few_bytes_is_one_file(tmp_path: Path) -> None:
    plan = plan_of(source(tmp_path / "m", 96, 256, num_shards=3))
    assert list(plan.shards) == ["model.safetensors"]


def test_a_plan_holds_few_bytes_for_each_tensor(tmp_path: Path) -> None:
    """At most 300 bytes for each of 9,000 tensors, names and headers of the base counted."""
    shape = (4, 300, 64, 32, 256)
    folder = write_checkpoint(
        tmp_path / "m",
        moe_tensors(*shape, is_fp8=True),
        moe_config(*shape, is_fp8=True),
        num_shards=9,
        fill=None,
    )
    plan_of(folder)  # what is imported and compiled once is no part of a plan
    tracemalloc.start()
    plan = plan_of(folder)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.num_tensors > 9_000
    assert held / plan.num_tensors < 300


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_more_copies_are_as_clonable(tmp_path: Path, copies: int) -> None:
    plan = plan_of(source(tmp_path / "m", 576, 1536), request=MapRequest(trim=2, copies=copies))
    assert clonable_part(plan) > 0.98


# --- on a real file system with reflinks ----------------------------------------------------------


def used_bytes(folder: Path) -> int:
    os.sync()
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_reflinks_take_no_space_and_hold_the_same_bytes(reflinks: Path) -> None:
    tensors = llama_tensors(12, 576, 1536, 192, 4096)
    base = write_checkpoint(
        reflinks / "base", tensors, llama_config(12), num_shards=2, fill=fill_randomly
    )
    before = used_bytes(reflinks)
    options = ("--max-shard-size", "60MB", "--copy-mode", "clone", "--json")
    report = dus("upscale", base, "-o", reflinks / "out", *options).report
    assert report["bytes_cloned"] > 0.99 * report["bytes"]
    assert report["bytes_cloned"] + report["bytes_copied"] == report["bytes"]
    # Metadata of a file system this small is coarse; the copy below takes over ten times as much.
    cloned = used_bytes(reflinks) - before
    copied = dus(
        "upscale", base, "-o", reflinks / "copy", *options[:2], "--copy-mode", "copy", "--json"
    ).report
    assert copied["bytes_cloned"] == 0
    assert used_bytes(reflinks) - before - cloned > 10 * cloned
    for name in ("out", "copy"):
        assert dus("verify", reflinks / name, "--base", base, "-q").returncode == 0
    for path in (reflinks / "out").iterdir():
        assert path.read_bytes() == (reflinks / "copy" / path.name).read_bytes()


def test_clone_mode_fails_where_blocks_cannot_be_shared(tmp_path: Path, reflinks: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors(4), llama_config(4))
    done = dus("upscale", base, "-o", reflinks / "out", "--copy-mode", "clone", "-q")
    done.assert_one_line_error("--copy-mode clone", "reflinks")
    assert not any(reflinks.glob("*out*"))
    assert dus("upscale", base, "-o", reflinks / "out", "-q").returncode == 0


def test_a_header_that_would_pass_the_formats_limit_begins_another_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100,000 layers of tiny tensors the lines in one header would be more than 100 MB."""
    folder = source(tmp_path / "m", 12, 24, num_layers=6)
    assert len(plan_of(folder, request=MapRequest(copies=8)).shards) == 1
    monkeypatch.setattr("dus_cli.planning.layout._MOST_HEADER_BYTES", 20_000)
    plan = plan_of(folder, request=MapRequest(copies=8))
    assert len(plan.shards) > 1
    assert all(len(layout.header) < 20_000 + BLOCK for layout in plan.shards.values())
    names = [placement.name for layout in plan.shards.values() for placement in layout.placements]
    assert len(names) == len(set(names)) == plan.num_tensors
