"""Names of a checkpoint's files (weights, files that dus writes itself, files of a healing), and
paths that must stay inside the folder.
"""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from dus_cli.errors import CheckpointError, shown
from dus_cli.source.mistaken import NUM_BYTES, not_fetched
from dus_cli.source.reading import open_regular, reading

# Weights in any format, and their indices. On the Hub, a `.bin` file is always a pickle.
WEIGHT_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.pickle",
    "*.gguf",
    "*.ggml",
    "*.ggmlv3.*",
    "*.h5",
    "*.h5.index.json",
    "*.msgpack",
    "*.msgpack.index.json",
    "*.npz",
    "*.ot",
    "*.onnx",
    "*.onnx_data",
    "*.onnx.data",
    "*.tflite",
    "*.engine",
    "*.nemo",
    "*.mlmodel",
    "*.llamafile",
)

# Folders that hold the same model for another runtime.
OTHER_FORMAT_FOLDERS = (
    "original",
    "onnx",
    "openvino",
    "gguf",
    "coreml",
    "metal",
    "mlx",
    "tensorrt",
    "*.mlpackage",
    "*.mlmodelc",
)

# Files that dus writes for the deeper model, rather than copies; README.md is the model card.
WRITTEN_ANEW = (
    "README.md",
    "layer-map-light.svg",
    "layer-map-dark.svg",
    "dus.json",
    "SHA256SUMS",
    "config.json",
)

# Files of a run of `dus heal`: they describe that model, not one made from it.
OF_A_HEALING = (
    "run.json",
    "metrics.jsonl",
    "report.json",
    "healing-*.svg",
    "tensorboard",
    "tokens",
    "checkpoints",
)

# Files and folders, at any depth, that are never part of a model.
LEFT_BEHIND = (".git*", ".cache", "__pycache__", ".DS_Store", "lost+found")

# Suffixes of files that may rightly begin as a web page, be compressed, or begin with zeros.
_PAGES = (".html", ".htm", ".xml", ".svg", ".gz", ".zip", ".xz", ".zst", ".bz2", ".npy")


def is_weights(relative: str) -> bool:
    """Whether a file holds weights of some format, or their index, by its name.

    >>> is_weights("model.safetensors"), is_weights("tokenizer.json")
    (True, False)
    """
    return any(
        fnmatch(PurePosixPath(relative).name.lower(), pattern) for pattern in WEIGHT_PATTERNS
    )


def is_index(relative: str) -> bool:
    """Whether a file at the top level is an index of weights, by its name."""
    return "/" not in relative and relative.endswith(".index.json")


def inside(folder: Path, relative: str) -> Path:
    """The path of a file in a folder, if it does not lead out of the folder.

    Links from a snapshot in the Hub's cache into its `blobs` are allowed: that is how the cache
    stores files (huggingface_hub, "Understand caching").

    Raises:
        CheckpointError: the path is absolute, has "..", or is a link that leaves the folder.
    """
    pure = PurePosixPath(relative)
    # such a name would need escaping in a terminal and in SHA256SUMS
    if not relative.isprintable() or "\\" in relative:
        raise CheckpointError(
            f"the file name {shown(relative)!r} has control characters or a backslash; rename it"
        )
    if pure.is_absolute() or ".." in pure.parts or not relative:
        raise CheckpointError(
            f"{shown(relative)!r} points outside the model's folder; refusing to follow it"
        )
    path = folder / pure
    try:
        real, root = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError):
        return path  # missing or unreadable: opening it raises
    allowed = [root]
    if root.parent.name == "snapshots":
        repo = root.parent.parent
        # The repo's own blobs, and those that huggingface_hub 2 shares between repos (Xet).
        allowed += [repo / "blobs", repo.parent / "blobs"]
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{shown(relative)} is a link that leaves the model's folder (to {shown(real)}); "
            "refusing to follow it"
        )
    return path


def walk_order(relative: str) -> list[tuple[bool, str]]:
    """A sort key for paths: by name, a folder's own files before those in its subfolders.

    >>> sorted(["b/c", "a/d", "z"], key=walk_order)
    ['z', 'a/d', 'b/c']
    """
    *folders, name = PurePosixPath(relative).parts
    return [*((True, folder) for folder in folders), (False, name)]


def check_fetched(relative: str, path: Path) -> None:
    """Check that a file can be read, and is not the remains of a failed clone or download.

    An empty file is allowed: some tokenizers have an empty merges.txt.

    Raises:
        CheckpointError: it cannot be read, or is a Git LFS pointer, a web page or the like.
    """
    with reading(relative), open_regular(path) as file:
        head = file.read(NUM_BYTES)
        num_bytes = os.fstat(file.fileno()).st_size
    problem = not_fetched(head, num_bytes) if num_bytes and not relative.endswith(_PAGES) else None
    if problem is not None:
        raise CheckpointError(f"{shown(relative)} {problem}")
