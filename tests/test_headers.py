"""The safetensors format: what the reader accepts the library accepts; each fault has its own
line.
"""

from __future__ import annotations

import json
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import header_bytes, llama_config, llama_tensors, write_checkpoint
from damage import mutate, one_line_problem
from safetensors import SafetensorError, safe_open

from dus_cli.common.reference import ModelRef
from dus_cli.errors import CheckpointError
from dus_cli.planning.plan import Base, MapRequest, make_plan
from dus_cli.source import headers, weights
from dus_cli.source.checkpoint import open_checkpoint
from dus_cli.source.headers import (
    DTYPE_BITS,
    encode_header,
    encoded_bytes,
    header_size,
    is_aligned,
    read_header,
)

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "scalar": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
    "nothing": {"dtype": "U8", "shape": [0, 5], "data_offsets": [40, 40]},
}


def write(path: Path, entries: dict[str, Any] | bytes, data: int = 40) -> Path:
    raw = entries if isinstance(entries, bytes) else header_bytes(entries)
    path.write_bytes(raw + bytes(data))
    return path


def library_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "np"):
            return True
    except SafetensorError:
        return False


def test_a_sound_header_is_read_whole(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "x", GOOD))
    assert [t.name for t in header.tensors] == ["a", "b", "scalar", "nothing"]
    a, b, scalar, nothing = header.tensors
    assert (a.num_bytes, b.num_bytes, scalar.num_bytes, nothing.num_bytes) == (24, 8, 8, 0)
    assert (a.num_elements, b.num_elements, scalar.num_elements, nothing.num_elements) == (
        6,
        4,
        1,
        0,
    )
    assert a.start == header.data_start
    assert header.metadata == {"format": "pt"}


def changed(name: str, **fields: object) -> dict[str, Any]:
    return GOOD | {name: GOOD[name] | fields}


BAD_ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "overlap": (changed("b", data_offsets=[16, 24]), "overlaps"),
    "gap": (
        GOOD | {"b": {"dtype": "BF16", "shape": [2], "data_offsets": [28, 32]}},
        "leaves a gap",
    ),
    "offsets disagree with shape": (changed("a", shape=[2, 4]), "needs 32"),
    "offsets reversed": (changed("a", data_offsets=[24, 0]), "needs 24"),
    "offsets beyond the file": (
        changed("scalar", shape=[100], data_offsets=[32, 832]),
        "needs 800|accounts for|leaves a gap|overlaps",
    ),
    "unknown dtype": (changed("a", dtype="F33"), "dtype F33"),
    "dtype is a number": (changed("a", dtype=7), "dtype 7"),
    "negative size": (changed("a", shape=[-2, -3]), "not a list of sizes"),
    "size is a float": (changed("a", shape=[2.0, 3]), "not a list of sizes"),
    "size is true": (changed("a", shape=[True, 6]), "not a list of sizes"),
    "shape overflows": (changed("a", shape=[2**40, 2**40]), "overflows"),
    "size of 2^70": (changed("a", shape=[2**70]), "not a list of sizes"),
    "three offsets": (changed("a", data_offsets=[0, 24, 24]), "data_offsets"),
    "a field missing": (GOOD | {"a": {"dtype": "F32", "shape": [2, 3]}}, "must have just"),
    "entry is a list": (GOOD | {"a": [1]}, "must have just"),
    "metadata of numbers": (GOOD | {"__metadata__": {"format": 1}}, "text to text"),
    "half a byte": (changed("nothing", dtype="F4", shape=[3]), "needs 1.5"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_a_bad_entry_has_its_own_line(tmp_path: Path, case: str) -> None:
    entries, message = BAD_ENTRIES[case]
    path = write(tmp_path / "x", entries)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)
    assert not library_accepts(path)


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "seven bytes": (b"1234567", "too few"),
    "header beyond the file": (struct.pack("<Q", 1000) + b"{}", "truncated"),
    "header of 2^60": (struct.pack("<Q", 2**60) + b"{}", "over the format's limit"),
    "header of 2^64-1": (b"\xff" * 8 + b"{}", "over the format's limit"),
    "not JSON": (struct.pack("<Q", 8) + b"{nonsens", "not valid JSON"),
    "a JSON list": (struct.pack("<Q", 2) + b"[]", "does not start with"),
    "a leading space": (struct.pack("<Q", 3) + b" {}", "does not start with"),
    "invalid UTF-8": (struct.pack("<Q", 8) + b'{"\xff": 1}'[:8], "not UTF-8"),
    "deep nesting": (
        struct.pack("<Q", 200_005) + b'{"a":' + b"[" * 200_000,
        "nested more deeply|not valid JSON",
    ),
    "half a surrogate pair": (
        header_bytes({"\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
        "not Unicode",
    ),
    "data after the end": (header_bytes({}) + b"more", "followed by other data"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_has_its_own_line(tmp_path: Path, case: str) -> None:
    raw, message = BAD_FILES[case]
    path = tmp_path / "x"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="'a' occurs twice"):
        read_header(path)


def test_an_absurd_integer_is_refused_without_being_computed(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"U8","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,0]}}'
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_header(path)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
@pytest.mark.parametrize("phase", [0, 8, 4088])
def test_an_encoded_header_is_read_back_by_us_and_the_library(
    tmp_path: Path, dtype: str, phase: int
) -> None:
    size = 16 * DTYPE_BITS[dtype] // 8
    raw = encode_header({"format": "pt"}, [("ünï.code", dtype, (4, 4), size)], 4096, phase)
    assert len(raw) % 4096 == phase
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw + bytes(size))
    (tensor,) = read_header(path).tensors
    assert (tensor.name, tensor.dtype, tensor.shape, tensor.start) == (
        "ünï.code",
        dtype,
        (4, 4),
        len(raw),
    )
    assert library_accepts(path)


def test_the_size_of_a_header_is_known_before_it_is_made() -> None:
    tensors = [
        ('ünï."code"', "BF16", (4, 4), 32),
        ("scalar", "I64", (), 8),
        ("\x1f", "F8_E4M3", (3,), 3),
    ]
    name_bytes = sum(encoded_bytes(name) for name, *_ in tensors)
    kinds = [(dtype, shape, 1) for _, dtype, shape, _ in tensors]
    sizes = [size for *_, size in tensors]
    for metadata in ({}, {"format": "pt", "é": "\n"}):
        for block, phase in ((8, 0), (4096, 16)):
            raw = encode_header(metadata, tensors, block, phase)
            size = header_size(metadata, name_bytes, kinds, sizes, block=block, phase=phase)
            assert size == len(raw)
            assert json.loads(raw[8:])["scalar"] == {
                "dtype": "I64",
                "shape": [],
                "data_offsets": [32, 40],
            }


def test_alignment_counts_from_the_start_of_the_data() -> None:
    assert is_aligned([("F32", 8), ("BF16", 6), ("U8", 3)])
    assert not is_aligned([("U8", 3), ("BF16", 6)])


def peak_rss() -> int:
    """Bytes of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_of_5000_damaged_headers_none_is_accepted_that_the_library_refuses(tmp_path: Path) -> None:
    rng = random.Random(20261123)
    raw = header_bytes(GOOD) + bytes(40)
    path = tmp_path / "x.safetensors"
    accepted, peak = 0, peak_rss()
    for _ in range(5000):
        path.write_bytes(mutate(raw, rng))
        problem = one_line_problem(lambda: read_header(path))
        if problem is None:
            accepted += 1
            assert library_accepts(path), path.read_bytes()
    # no length or shape in a file makes the reader take memory
    assert peak_rss() - peak < 100_000_000
    # flips in names and padding: the fuzzing does reach past the reader's first checks
    assert accepted > 50


def test_of_5000_damaged_configs_and_indexes_all_end_in_success_or_one_line(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "m", llama_tensors(3, 8, 8, 8, 8), llama_config(3), num_shards=2
    )
    rng = random.Random(2312_15166)
    originals = {
        name: (folder / name).read_bytes()
        for name in ("config.json", "model.safetensors.index.json")
    }
    outcomes = {"planned": 0, "refused": 0}
    before, peak = sorted(tmp_path.rglob("*")), peak_rss()
    for number in range(5000):
        name = list(originals)[number % 2]
        # The mutator's first eight bytes are a header's length: give it that many to spoil.
        (folder / name).write_bytes(mutate(b"        " + originals[name], rng)[8:])
        problem = one_line_problem(
            lambda: make_plan(
                Base(ModelRef.parse("./m")), open_checkpoint(folder), MapRequest()
            ).text_files()
        )
        outcomes["planned" if problem is None else "refused"] += 1
        (folder / name).write_bytes(originals[name])
    assert sorted(tmp_path.rglob("*")) == before
    assert peak_rss() - peak < 100_000_000
    assert min(outcomes.values()) > 300, outcomes


def outcome(read: Callable[[], object]) -> object:
    """What is read, or the error's line."""
    try:
        return read()
    except CheckpointError as error:
        return str(error)


class Counted:
    """A reader, and how often it found something."""

    def __init__(self, read: Callable[[bytes, str], object]) -> None:
        self.read, self.found = read, 0

    def __call__(self, raw: bytes, where: str) -> object:
        result = self.read(raw, where)
        self.found += result is not None
        return result


def test_the_reader_for_the_librarys_layout_reads_what_the_general_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(20261130)
    raw, path = header_bytes(GOOD) + bytes(40), tmp_path / "x"
    usual = Counted(headers._usual_entries)
    for number in range(1000):
        path.write_bytes(mutate(raw, rng) if number else raw)
        monkeypatch.setattr(headers, "_usual_entries", usual)
        found = outcome(lambda: read_header(path))
        monkeypatch.setattr(headers, "_usual_entries", lambda *_: None)
        assert found == outcome(lambda: read_header(path)), path.read_bytes()
    assert 10 < usual.found < 900


def test_an_index_parsed_in_pieces_reads_as_a_whole_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(20261130)
    weight_map = {f"layers.{n}.weight": f"model-{n // 4}.safetensors" for n in range(12)}
    path = tmp_path / weights.INDEX_NAME
    usual = Counted(weights._usual_index)
    monkeypatch.setattr(weights, "_PIECE", 50)
    for number in range(1000):
        indent = rng.choice([None, 2])
        raw = json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}, indent=indent)
        path.write_bytes(mutate(b"        " + raw.encode(), rng)[8:] if number else raw.encode())
        monkeypatch.setattr(weights, "_usual_index", usual)
        found = outcome(lambda: weights.read_index(tmp_path))
        monkeypatch.setattr(weights, "_usual_index", lambda *_: None)
        assert found == outcome(lambda: weights.read_index(tmp_path)), path.read_bytes()
    assert 100 < usual.found < 950


@pytest.mark.parametrize("at", [0, 5, 11])
def test_a_name_twice_in_an_index_is_refused_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(weights, "_PIECE", 50)
    pairs = [f'"layers.{n}.weight": "model.safetensors"' for n in range(12)]
    text = ", ".join([*pairs, pairs[at]])
    (tmp_path / weights.INDEX_NAME).write_text(f'{{"weight_map": {{{text}}}}}')
    with pytest.raises(CheckpointError, match=rf"'layers\.{at}\.weight' occurs twice"):
        weights.read_index(tmp_path)
