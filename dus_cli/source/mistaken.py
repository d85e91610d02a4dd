"""Recognise, by its first bytes, a file that was never fetched or has another format."""

from __future__ import annotations

import re

from dus_cli.errors import shown

# How many bytes are looked at; a Git LFS pointer has about 130.
NUM_BYTES = 512

_AGAIN = "download the file again"

# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md; the second is from before its first
# release.
_LFS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")

_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|\?xml|error)", re.IGNORECASE)
_ANSWER = re.compile(rb'\s*\{\s*"(?:error|message|detail|status|code)s?"\s*:', re.IGNORECASE)

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
}

_OTHER_FORMATS = {
    b"GGUF": "a GGUF file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (TensorFlow's or Keras')",
    b"PK\3\4": "a zip archive (if torch.save wrote it, its name must be pytorch_model.bin)",
    b"\x80\2": "a pickle (if torch.save wrote it, its name must be pytorch_model.bin)",
    b"7z\xbc\xaf": "a 7z archive",
    b"%PDF": "a PDF",
}


def not_fetched(head: bytes, num_bytes: int) -> str | None:
    """What is wrong with a file that a clone or a download did not fetch, and what to do; None if
    nothing is.

    Args:
        head: its first `NUM_BYTES`, or all of it.
        num_bytes: the size of the whole file.

    Returns:
        A phrase that follows the file's name, such as "is empty; download the file again".
    """
    if num_bytes == 0:
        return f"is empty; {_AGAIN}"
    if head.startswith(_LFS):
        return (
            "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repo, or "
            + _AGAIN
        )
    if _PAGE.match(head):
        return (
            f"is a web page or a server's error in XML ({_beginning(head)}), not the file itself; "
            f"{_AGAIN}"
        )
    if not head.strip(b"\0"):
        return "begins with nothing but zeros, as an unfinished download does; " + _AGAIN
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            return f"is compressed with {name}; decompress it first"
    return None


def not_weights(head: bytes, num_bytes: int) -> str | None:
    """The same for a file that should hold weights: also a server's answer, and other formats."""
    if (problem := not_fetched(head, num_bytes)) is not None:
        return problem
    if _ANSWER.match(head):
        return f"is a server's answer ({_beginning(head)}), not the file itself; {_AGAIN}"
    for magic, name in _OTHER_FORMATS.items():
        if head.startswith(magic):
            return (
                f"is {name}; dus reads safetensors and pytorch_model*.bin, each under its own name"
            )
    if num_bytes >= 8 and _is_text(head):
        return f"is text ({_beginning(head)}), not weights; {_AGAIN}"
    return None


def is_answer(head: bytes) -> bool:
    """Whether JSON begins like a server's error message."""
    return _ANSWER.match(head) is not None


def _is_text(head: bytes) -> bool:
    return all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)


def _beginning(head: bytes) -> str:
    return shown(" ".join(head[:60].decode("utf-8", "replace").split()))
