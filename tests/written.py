"""The output of a command: its tensors, its digests, and what verify finds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from forked import dus

from dus_cli.source.headers import TensorInfo, read_header


def layer_bytes(folder: Path, prefix: str = "model.layers") -> dict[int, set[int]]:
    """The distinct bytes in the tensors of each output layer; with our fixtures, the number of its
    base layer.
    """
    found: dict[int, set[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        for tensor in read_header(path).tensors:
            if tensor.name.startswith(prefix + "."):
                index = int(tensor.name.removeprefix(prefix + ".").split(".")[0])
                found.setdefault(index, set()).update(raw[tensor.start : tensor.end])
    return found


def names_and_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        for t in read_header(path).tensors:
            found[t.name] = (t.dtype, t.shape, raw[t.start : t.end])
    return found


def folder_digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensor_at(folder: Path, name: str) -> tuple[Path, TensorInfo]:
    for path in folder.glob("*.safetensors"):
        for tensor in read_header(path).tensors:
            if tensor.name == name:
                return path, tensor
    raise LookupError(name)


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def problems(folder: Path, *options: str | Path) -> list[str]:
    done = dus("verify", folder, "--json", *options)
    report = json.loads(done.stdout)
    assert done.returncode == (1 if report["problems"] else 0)
    assert report["sound"] == (not report["problems"])
    found: list[str] = report["problems"]
    return found
