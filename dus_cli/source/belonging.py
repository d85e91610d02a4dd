"""Which files in a folder belong to the model. An allow-list: any other file is left alone.

People also train, log in and keep keys in a checkpoint's folder. So a file is copied to a deeper
model, pushed to the Hub, or removed for another model only if its name is one that a model's files
have, if another file of the model names it (`auto_map`, and imports in its code), or if dus.json
lists it as written by dus.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from dus_cli.errors import CheckpointError, shown
from dus_cli.source.files import (
    OF_A_HEALING,
    WRITTEN_ANEW,
    check_fetched,
    inside,
    is_index,
    is_weights,
    walk_order,
)
from dus_cli.source.reading import unreadable

# Names of files on the Hub, in lower case. Each part of a path has its own pattern.
_NAMES = (
    # tokenizers: transformers' VOCAB_FILES_NAMES, tiktoken, mistral-common, sentencepiece, rwkv
    "tokenizer*.json",
    "*.model",
    "tokenizer*.model.v*",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.vocab",
    "*vocab*.json",
    "*vocab*.txt",
    "*merges*.txt",
    "encoder.json",
    "dict.txt",
    "added_tokens*.json",
    "special_tokens_map*.json",
    "tekken*.json",
    "tokenizer/tokenizer*.json",
    "tokenizer/*.model",
    "tokenizer/*vocab*.json",
    "tokenizer/*merges*.txt",
    "tokenizer/added_tokens*.json",
    "tokenizer/special_tokens_map*.json",
    # templates
    "*.jinja",
    "chat_template*.json",
    "additional_chat_templates/*.jinja",
    "chat_templates/*.jinja",
    # processors and settings
    "*processor_config.json",
    "*extractor_config.json",
    "generation_config*.json",
    "configuration.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]_*/config.json",
    # code that transformers loads by name
    "configuration_*.py",
    "modeling_*.py",
    "modelling_*.py",
    "tokenization_*.py",
    "*processing_*.py",
    "custom_generate/*.py",
    "custom_generate/requirements.txt",
    "licenses/*",
)

# Files that say how the weights were quantised; loaders read them. Layer names in them follow the
# layer map.
SIDECARS = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
)

# The content of these files decides which files are carried over, and how they are changed.
DECIDING = (*SIDECARS, "*.py", "*_config.json")

# Files about the base's layers, for loaders and tools of other weights: wrong for the output.
OF_OTHER_LAYERS = ("params.json", "mergekit_config.yml", "mergekit_config.yaml")

# Names of files with the terms of a model's use.
_TERMS = re.compile(
    r"licen[cs]e|notice|copying|copyright|polic(y|ies)|agreement|terms[_ "
    r"-]?of|citation|^authors|^patents"
)
_TERMS_SUFFIXES = ("", ".md", ".txt", ".pdf", ".rst", ".html", ".cff")

# Source files that a model's code compiles (Qwen's kernels).
_KERNELS = ("*.cpp", "*.cu", "*.cuh")

# Tokenizers reach 100 MB; a file of gigabytes with a tokenizer's name is something else.
LARGEST_CARRIED_BYTES = 2_000_000_000
_MAX_TEXT_BYTES = 16_000_000

# Weights as transformers and dus name them.
_WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
)

# Files that `hf download --local-dir` and git leave in a folder; they can be removed.
_TRACES = (
    ".gitattributes",
    ".cache/huggingface/.gitignore",
    ".cache/huggingface/cachedir.tag",
    ".cache/huggingface/download/*.metadata",
    ".cache/huggingface/download/*.lock",
    ".cache/huggingface/download/*/*.metadata",
    ".cache/huggingface/download/*/*.lock",
)

_RELATIVE_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(?P<dots>\.+)(?P<module>[\w.]*)[ \t]+import[ "
    r"\t]*(?P<names>\([^)]*\)|[^\n]*)"
    r"|import[ \t]+\.(?P<plain>[\w.]+))",
    re.MULTILINE,
)


def fits(relative: str, patterns: Iterable[str]) -> bool:
    """Whether a path (with "/") matches one of the patterns part by part, ignoring case.

    >>> fits("Tokenizer.json", ["tokenizer*.json"]), fits("a/tokenizer.json", ["tokenizer*.json"])
    (True, False)
    """
    parts = PurePosixPath(relative.lower()).parts
    for pattern in patterns:
        expected = pattern.split("/")
        if len(parts) == len(expected) and all(map(fnmatchcase, parts, expected)):
            return True
    return False


def belongs_by_name(relative: str) -> bool:
    """Whether a file of this name is carried over to a deeper model, whatever its content.

    >>> belongs_by_name("tokenizer.json"), belongs_by_name("LICENSE"), belongs_by_name(".env")
    (True, True, False)
    """
    if (
        relative in WRITTEN_ANEW
        or is_weights(relative)
        or any(p.startswith(".") for p in relative.split("/"))
    ):
        return False
    return fits(relative, (*_NAMES, *SIDECARS)) or _is_of_terms(relative)


def _is_of_terms(relative: str) -> bool:
    path = PurePosixPath(relative.lower())
    if len(path.parts) > 1 or not _TERMS.search(path.name) or "key" in path.name:
        return False
    return path.suffix in _TERMS_SUFFIXES or not path.suffix[1:].isalpha()  # LICENSE-2.0


@dataclass(frozen=True)
class Carried:
    """The files of a folder that are carried over.

    Attributes:
        files: (path with "/", file), sorted, so that every run writes the same.
        left_out: every other file, except weights that were read, indices, and files that dus
            writes itself; a folder that is left out as a whole is one entry, with "/" at its end.
    """

    files: tuple[tuple[str, Path], ...]
    left_out: tuple[str, ...]


def carried_files(folder: Path, weights: Collection[str] = ()) -> Carried:
    """Which files of a folder are carried over. `weights` are the files of weights that were read.

    Raises:
        CheckpointError: a file that would be carried over is a link that leaves the folder, is not
            a regular file, or is far too large.
    """
    carried = _carried_names(folder)
    files = tuple((name, _checked(folder, name)) for name in sorted(carried, key=walk_order))
    left_out = tuple(name for name in _others(folder, set(carried)) if name not in weights)
    return Carried(files, left_out)


def _carried_names(folder: Path) -> list[str]:
    by_name = [name for name in _candidates(folder) if belongs_by_name(name)]
    return by_name + [name for name in code_files(folder, by_name) if name not in by_name]


def _candidates(folder: Path) -> Iterator[str]:
    """Files and links at the top level, and those in folders that a pattern names."""
    for entry in _entries(folder):
        is_folder = entry.is_dir(follow_symlinks=False)
        if not is_folder:
            yield entry.name
        elif any("/" in p and fnmatchcase(entry.name.lower(), p.split("/")[0]) for p in _NAMES):
            yield from (
                f"{entry.name}/{e.name}" for e in _entries(folder / entry.name) if not e.is_dir()
            )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise CheckpointError(f"{shown(folder)} cannot be read: {error.strerror}") from error


def _others(folder: Path, carried: set[str]) -> Iterator[str]:
    for entry in _entries(folder):
        if not entry.is_dir(follow_symlinks=False):
            if (
                entry.name not in carried
                and entry.name not in WRITTEN_ANEW
                and not is_index(entry.name)
            ):
                yield entry.name
        elif any(name.startswith(f"{entry.name}/") for name in carried):
            for root, _, names in os.walk(folder / entry.name):
                inner = (
                    (Path(root) / name).relative_to(folder).as_posix() for name in sorted(names)
                )
                yield from (name for name in inner if name not in carried)
        else:
            yield f"{entry.name}/"


def _checked(folder: Path, relative: str) -> Path:
    path = inside(folder, relative)
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(relative, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{shown(relative)} is not a regular file; remove it from the folder")
    if status.st_size > LARGEST_CARRIED_BYTES:
        raise CheckpointError(
            f"{shown(relative)} has {status.st_size} bytes, too many for a file of that name; move "
            "it out of the model's folder"
        )
    check_fetched(relative, path)
    return path


# --- custom code ----------------------------------------------------------------------------------


def code_files(folder: Path, names: Collection[str]) -> list[str]:
    """The code files of a model: those that `auto_map` names in its JSON files, and those that
    these import relatively.

    No code is run: the text is searched, as transformers does before it copies such files
    (dynamic_module_utils).
    """
    waiting = [name for name in names if name.endswith(".py")]
    settings = ["config.json", *(name for name in names if name.endswith("_config.json"))]
    waiting += [module for name in settings for module in _mapped_modules(_text(folder, name))]
    code: list[str] = []
    while waiting:
        name = waiting.pop()
        if name in code or (text := _text(folder, name)) is None:
            continue
        code.append(name)
        waiting += _relative_imports(name, text)
    if code:
        code += [
            entry.name
            for entry in _entries(folder)
            if entry.is_file() and fits(entry.name, _KERNELS)
        ]
    return code


def _text(folder: Path, name: str) -> str | None:
    """A small file's text; None if there is no such file or it cannot be read."""
    try:
        path = inside(folder, name)
        if not path.is_file() or path.stat().st_size > _MAX_TEXT_BYTES:
            return None
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, CheckpointError):
        return None


def _mapped_modules(text: str | None) -> Iterator[str]:
    try:
        record = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return
    mapped = record.get("auto_map") if isinstance(record, dict) else None
    for value in mapped.values() if isinstance(mapped, dict) else ():
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str) and "--" not in reference:  # another repo's code
                yield reference.rpartition(".")[0].replace(".", "/") + ".py"


def _relative_imports(name: str, text: str) -> Iterator[str]:
    """Paths that the relative imports in a file may mean; most of them do not exist."""
    folders = PurePosixPath(name).parts[:-1]
    for match in _RELATIVE_IMPORT.finditer(text):
        up = len(match["dots"] or ".") - 1
        if up > len(folders):
            continue
        module = (match["module"] or match["plain"] or "").strip(".")
        at = [*folders[: len(folders) - up], *filter(None, module.split("."))]
        if module:
            yield "/".join(at) + ".py"
        yield "/".join([*at, "__init__.py"])
        for imported in re.findall(r"\w+", match["names"] or ""):
            yield "/".join([*at, f"{imported}.py"])


# --- what a folder holds --------------------------------------------------------------------------


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's dus.json; None if there is none, or it cannot be read."""
    try:
        record = json.loads(_text(folder, "dus.json") or "null")
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "dus_version" in record else None


def recorded_files(record: Mapping[str, Any] | None) -> set[str] | None:
    """The files that dus wrote, by the content of a dus.json; None if it does not list them."""
    files = (record or {}).get("files")
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        return None
    return {*files, "dus.json", "SHA256SUMS"}


def model_files(folder: Path, record: Mapping[str, Any] | None) -> set[str]:
    """The names of the files of the model in a folder: those that its dus.json lists, else those
    that have the name of a model's file.

    Some may not exist. `record` is the content of dus.json; None if there is none.
    """
    recorded = recorded_files(record)
    if recorded is not None:
        return recorded
    files = {*_carried_names(folder), *WRITTEN_ANEW, *indexed_weights(folder)}
    files |= {entry.name for entry in _entries(folder) if fits(entry.name, _WEIGHTS)}
    return files | _healing_files(folder) if record is not None else files


def holds_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint: it has a model's config.json, and weights."""
    try:
        config = json.loads(_text(folder, "config.json") or "null")
    except (ValueError, RecursionError):
        return False
    is_config = isinstance(config, dict) and not {"model_type", "architectures"}.isdisjoint(config)
    return is_config and any(fits(entry.name, _WEIGHTS) for entry in _entries(folder))


def is_trace(relative: str) -> bool:
    """Whether a file is one that git or `hf download` leaves beside what it fetched."""
    return fits(relative, _TRACES)


def indexed_weights(folder: Path) -> set[str]:
    """The shards that the folder's indices name."""
    names: set[str] = set()
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        try:
            weight_map = json.loads(_text(folder, index) or "{}").get("weight_map")
        except (ValueError, RecursionError, AttributeError):
            continue
        values = weight_map.values() if isinstance(weight_map, dict) else ()
        names |= {name for name in values if isinstance(name, str) and is_weights(name)}
    return names


def _healing_files(folder: Path) -> set[str]:
    """The files of a healing, for models of versions that did not list them in dus.json."""
    names = {
        entry.name
        for entry in _entries(folder)
        if fits(entry.name, OF_A_HEALING) and entry.is_file()
    }
    events = (folder / "tensorboard").glob("events.out.tfevents.*")
    return names | {path.relative_to(folder).as_posix() for path in events}
