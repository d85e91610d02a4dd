"""What lies in the same blocks of the disk is equal without being read; the rest is read, each
base tensor once.
"""

from __future__ import annotations

import fcntl
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from checkpoints import fill_randomly, llama_config, llama_tensors, write_checkpoint
from forked import dus

from dus_cli import verify
from dus_cli.source import extents
from dus_cli.source.direct import DirectFile, aligned_room
from dus_cli.source.extents import Extent, FileBlocks
from dus_cli.source.headers import read_header

XFS, EXT4, OVERLAY, BCACHEFS, NFS, FUSE = (
    0x58465342,
    0xEF53,
    0x794C7630,
    0xCA451A4E,
    0x6969,
    0x65735546,
)

SIZES = (6, 256, 768, 128, 1024)  # 11 MB, of which the norms are no whole blocks


def made(folder: Path, *options: str) -> tuple[Path, Path]:
    """A base of random numbers, and what `dus upscale` makes of it."""
    layers, hidden, intermediate, kv, vocab = SIZES
    config = llama_config(layers, hidden, intermediate, vocab)
    tensors = llama_tensors(layers, hidden, intermediate, kv, vocab)
    base = write_checkpoint(folder / "base", tensors, config, num_shards=2, fill=fill_randomly)
    assert dus("upscale", base, "-o", folder / "out", "-q", *options).returncode == 0
    return base, folder / "out"


def flip_a_bit(path: Path, name: str) -> None:
    (tensor,) = (tensor for tensor in read_header(path).tensors if tensor.name == name)
    with path.open("r+b") as file:
        file.seek(tensor.start)
        byte = file.read(1)[0]
        file.seek(tensor.start)
        file.write(bytes([byte ^ 1]))


# --- on a real file system with reflinks ----------------------------------------------------------


def test_blocks_that_are_shared_with_the_base_are_equal_without_being_read(reflinks: Path) -> None:
    base, out = made(reflinks, "--copy-mode", "clone")
    found = dus("verify", out, "--base", base, "--json").report
    assert found["sound"]
    assert found["bytes_compared"] > found["bytes_shared"] > 0.97 * found["bytes_compared"]
    assert "are the same blocks on the disk" in dus("verify", out, "--base", base).stdout
    read = dus("verify", out, "--base", base, "--read", "--json").report
    assert (read["bytes_compared"], read["bytes_shared"]) == (found["bytes_compared"], 0)
    assert dus("upscale", base, "-o", reflinks / "again", "--verify", "full", "-q").returncode == 0


def test_twins_share_blocks_where_the_base_is_not_asked(reflinks: Path) -> None:
    _, out = made(reflinks, "--copy-mode", "clone")
    found = dus("verify", out, "--json").report
    assert found["bytes_shared"] > 0.9 * found["bytes_compared"] > 0


def test_a_flipped_bit_ends_the_sharing_and_is_found(reflinks: Path) -> None:
    base, out = made(reflinks, "--copy-mode", "clone", "--max-shard-size", "1GB")
    (path,) = (
        p
        for p in out.glob("*.safetensors")
        if b'"model.layers.7.mlp.up_proj' in p.read_bytes()[:100_000]
    )
    flip_a_bit(path, "model.layers.7.mlp.up_proj.weight")
    for options in ((), ("--read",), ("--base", base), ("--base", base, "--read")):
        done = dus("verify", out, *options)
        assert done.returncode == 1
        assert "model.layers.7.mlp.up_proj.weight differs from" in done.stdout
        assert "at byte 0" in done.stdout


def test_what_was_copied_is_read(reflinks: Path) -> None:
    base, out = made(reflinks, "--copy-mode", "copy")
    found = dus("verify", out, "--base", base, "--json").report
    assert (found["sound"], found["bytes_shared"]) == (True, 0)


# --- what a file system may say -------------------------------------------------------------------


def answering(told: list[tuple[int, int, int, int]], *, is_realtime: bool = False) -> Any:
    """An ioctl that gives these extents, as (logical, physical, length, flags), at most 500 at a
    time.
    """

    def ioctl(_file: int, request: int, buffer: bytearray) -> int:
        if request == 0x801C581F:  # FS_IOC_FSGETXATTR
            buffer[:4] = struct.pack("=L", 1 if is_realtime else 0)
            return 0
        start, length, flags, _, room, _ = struct.unpack_from("=QQLLLL", buffer)
        assert flags & 1, "what is not yet written has no blocks: FIEMAP_FLAG_SYNC"
        fitting = [one for one in told if one[0] + one[2] > start and one[0] < start + length][
            :room
        ]
        struct.pack_into("=L", buffer, 20, len(fitting))
        for number, (logical, physical, size, marks) in enumerate(fitting):
            struct.pack_into(
                "=QQQ16xL12x", buffer, 32 + 56 * number, logical, physical, size, marks
            )
        return 0

    return ioctl


def mapped(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: list[tuple[int, int, int, int]],
    kind: int = XFS,
    **how: bool,
) -> list[Extent]:
    path = folder / "file"
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    monkeypatch.setattr(fcntl, "ioctl", answering(told, **how))
    monkeypatch.setattr(extents, "_kind_of", lambda _file: kind)
    return extents._extents_of(path)[1]


@pytest.mark.parametrize(
    ("flag", "what"),
    [
        (0x2, "not known"),
        (0x4, "delayed"),
        (0x8, "compressed or encoded otherwise"),
        (0x80, "encrypted"),
        (0x100, "not aligned"),
        (0x200, "in the inode"),
        (0x400, "in part of a block"),
        (0x800, "never written"),
        (0x4000, "a flag of a later kernel"),
    ],
)
def test_an_extent_whose_bytes_are_not_in_its_blocks_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: int, what: str
) -> None:
    told = [
        (0, 8192, 4096, 0x2000),
        (4096, 65_536, 4096, 0x2000 | flag),
        (8192, 12_288, 4096, 0x2001),
    ]
    assert mapped(tmp_path, monkeypatch, told) == [
        Extent(0, 8192, 4096),
        Extent(8192, 12_288, 4096),
    ], what


def test_more_extents_than_fit_into_one_answer_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [(i * 8192, i * 16_384, 4096, 1 if i == 1234 else 0) for i in range(1235)]
    assert mapped(tmp_path, monkeypatch, told) == [
        Extent(i * 8192, i * 16_384, 4096) for i in range(1235)
    ]


@pytest.mark.parametrize("kind", [EXT4, OVERLAY, BCACHEFS, NFS, FUSE, 0])
def test_addresses_of_other_file_systems_prove_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    assert mapped(tmp_path, monkeypatch, [(0, 8192, 4096, 0x2001)], kind) == []


def test_addresses_on_a_realtime_device_prove_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mapped(tmp_path, monkeypatch, [(0, 8192, 4096, 0x2001)], is_realtime=True) == []


def test_parts_with_the_same_addresses_are_those_that_a_walk_over_every_byte_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(18)

    def file() -> list[Extent]:
        found, start = [], 0
        for _ in range(rng.randrange(6)):
            start += rng.choice((0, 4))
            length = 4 * rng.randint(1, 4)
            found.append(Extent(start, start + 4 * rng.randrange(1, 3), length))
            start += length
        return found

    def addresses(one: list[Extent]) -> dict[int, int]:
        return {e.start + i: e.physical + i for e in one for i in range(e.length)}

    num_proved = 0
    for _ in range(3000):
        left, right = file(), file()
        first, length = rng.randrange(30), rng.randrange(40)
        second = first + 4 * rng.randrange(-1, 2) if first >= 4 else rng.randrange(30)
        told = {Path("l"): (1, left), Path("r"): (1, right)}
        monkeypatch.setattr(extents, "_extents_of", told.__getitem__)
        parts = list(FileBlocks().not_shared(Path("l"), first, Path("r"), second, length))
        to_read = {i for start, size in parts for i in range(start, start + size)}
        ours, theirs = addresses(left), addresses(right)
        same = {i for i in range(length) if ours.get(first + i, -1) == theirs.get(second + i, -2)}
        assert to_read == set(range(length)) - same
        assert all(size > 0 for _, size in parts)
        num_proved += len(same)
    assert num_proved > 1000


def test_files_of_two_devices_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {Path("l"): (1, [Extent(0, 0, 100)]), Path("r"): (2, [Extent(0, 0, 100)])}
    monkeypatch.setattr(extents, "_extents_of", told.__getitem__)
    assert list(FileBlocks().not_shared(Path("l"), 0, Path("r"), 0, 100)) == [(0, 100)]


# --- where nothing is shared ----------------------------------------------------------------------


def test_each_tensor_of_the_base_is_read_once_for_all_its_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = made(tmp_path, "--copies", "3", "--trim", "1", "--copy-mode", "copy")
    opened: dict[int, Path] = {}
    num_read = {base: 0, out: 0}
    open_file, read = DirectFile.__init__, DirectFile.read

    def opening(self: DirectFile, path: Path, room: memoryview) -> None:
        open_file(self, path, room)
        opened[id(self)] = path.parent

    def counting(self: DirectFile, start: int, length: int) -> memoryview:
        num_read[opened[id(self)]] += length
        return read(self, start, length)

    monkeypatch.setattr(DirectFile, "__init__", opening)
    monkeypatch.setattr(DirectFile, "read", counting)
    found = verify(out, base=base, jobs=1)
    assert found.is_sound
    data = {
        folder: sum(
            t.num_bytes for p in folder.glob("*.safetensors") for t in read_header(p).tensors
        )
        for folder in num_read
    }
    assert num_read == data
    assert found.bytes_compared == data[out]


@pytest.mark.parametrize("is_direct", [True, False])
def test_a_file_is_read_from_any_byte_on_to_its_end(tmp_path: Path, *, is_direct: bool) -> None:
    path = tmp_path / "file"
    content = random.Random(1).randbytes(20_000)
    path.write_bytes(content)
    file = DirectFile(path, aligned_room(20_000))
    if not is_direct:
        file.close_direct()
    for start, length in (
        (0, 20_000),
        (1, 4095),
        (4096, 4096),
        (4095, 2),
        (19_999, 1),
        (8191, 11_809),
        (19_990, 100),
    ):
        assert bytes(file.read(start, length)) == content[start : start + length]
    assert bytes(file.read(30_000, 10)) == b""
    file.close()
