"""The metadata of the base's model card (README.md) that still holds for a deeper model: licence,
languages, task, tags.

The card is untrusted. Only the lines of these fields are parsed as YAML, each a few kB, with a
loader that makes only text, lists and mappings, and only values of a known form are used. So a card
of any size costs little, YAML aliases and tags have no effect, and no text in it can end the
output's metadata or begin another field.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_cli.errors import CheckpointError, shown
from dus_cli.source.files import inside
from dus_cli.source.reading import open_regular

NAME = "README.md"

# The front matter of embedding models lists hundreds of evaluations; none is larger than this.
_MAX_FRONT_BYTES = 4_000_000
_MAX_FIELD_BYTES = 20_000

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+_-]{0,63}", re.ASCII)
_LICENSE_NAME = re.compile(r"[A-Za-z0-9][\w .,()+-]{0,99}", re.ASCII)
_URL = re.compile(r"https?://[\w.~:/?#@!$&*+,;=%-]{3,500}", re.ASCII)
_FILE = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][\w./ -]{0,199}", re.ASCII)
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z0-9]{2,8}){0,3}|code|multilingual", re.ASCII)
_TAG = re.compile(r"(?:arxiv:)?[A-Za-z0-9][\w .+-]{0,63}", re.ASCII)

# Tasks of models that generate text; the Hub has dozens of others, which a decoder does not do.
_TASKS = (
    "text-generation",
    "image-text-to-text",
    "audio-text-to-text",
    "video-text-to-text",
    "any-to-any",
    "image-to-text",
    "visual-question-answering",
    "feature-extraction",
)

# Tags about the base's files or training, and those that the Hub sets itself: not carried over.
_TAGS_OF_THE_BASE = frozenset(
    """gguf ggml llama.cpp onnx openvino mlx coreml safetensors pytorch tf jax tensorboard awq gptq
    exl2 quantized 4-bit 8-bit model-index eval-results generated_from_trainer
    autotrain_compatible endpoints_compatible text-generation-inference transformers merge
    mergekit finetuned base_model license region dataset""".split()
)

_MAX_LANGUAGES, _MAX_TAGS = 400, 40


@dataclass(frozen=True)
class BaseCard:
    """The metadata of the base's card. If the card cannot be read, all is empty and `problem` says
    why.

    `license_link` is an address, or the name of a file in the base's folder.
    """

    license: tuple[str, ...] = ()
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    task: str | None = None
    tags: tuple[str, ...] = ()
    problem: str | None = None


def read_base_card(folder: Path) -> BaseCard:
    """Read the card in a base's folder. Nothing raises: a card that cannot be read is empty, with a
    `problem`.
    """
    try:
        path = inside(folder, NAME)
        if not os.path.lexists(path):
            return BaseCard()
        with open_regular(path) as file:
            text = file.read(_MAX_FRONT_BYTES).decode("utf-8-sig", "replace")
    except CheckpointError as error:
        return BaseCard(problem=str(error))
    except OSError as error:
        return BaseCard(problem=f"the base's {NAME} cannot be read: {error.strerror or error}")
    return parse_base_card(text)


def parse_base_card(text: str) -> BaseCard:
    r"""Parse the metadata at the beginning of a card.

    >>> front = "license: other\nlicense_name: llama3\nlanguage: [en, no]"
    >>> card = parse_base_card(f"---\n{front}\n---\n# Llama")
    >>> card.license, card.license_name, card.languages
    (('other',), 'llama3', ('en', 'no'))
    """
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.strip()), 0)
    if not lines or lines[start].rstrip() != "---":
        return BaseCard()
    end = next(
        (number for number in range(start + 1, len(lines)) if lines[number].rstrip() == "---"), None
    )
    if end is None:
        return BaseCard(
            problem=f"the base's {NAME} has metadata without an end: its licence is not carried "
            "over"
        )
    fields = _fields(lines[start + 1 : end])
    damaged = sorted(name for name, value in fields.items() if value is None)
    tags = [
        tag
        for tag in _texts(fields.get("tags"), _TAG, _MAX_TAGS)
        if tag.lower() not in _TAGS_OF_THE_BASE
    ]
    return BaseCard(
        license=_texts(fields.get("license"), _LICENSE, 8),
        license_name=_text(fields.get("license_name"), _LICENSE_NAME),
        license_link=_text(fields.get("license_link"), _URL)
        or _text(fields.get("license_link"), _FILE),
        languages=_texts(fields.get("language"), _LANGUAGE, _MAX_LANGUAGES),
        task=next(
            (task for task in _texts(fields.get("pipeline_tag"), _TAG, 1) if task in _TASKS), None
        ),
        tags=tuple(tags),
        problem=f"the base's {NAME}: {shown(', '.join(damaged))} is no metadata that can be read"
        if damaged
        else None,
    )


def _fields(lines: list[str]) -> dict[str, Any]:
    """The used fields in the lines of a front matter; None for a field that is not valid YAML.

    A field's lines are its own and those after it that are indented or list items.
    """
    blocks: dict[str, list[str]] = {}
    block: list[str] = []
    for line in lines:
        if line[:1] not in ("", " ", "\t", "-", "#"):
            block = []
            name, colon, _ = line.partition(":")
            if colon and name in (
                "license",
                "license_name",
                "license_link",
                "language",
                "pipeline_tag",
                "tags",
            ):
                blocks[name] = block
        block.append(line)
    return {name: _value("\n".join(block), name) for name, block in blocks.items()}


def _value(text: str, name: str) -> Any:
    """A field's value as text, lists and mappings; "" if it is empty, None if it is not valid."""
    import yaml  # imported here: most commands do not need it

    if len(text) > _MAX_FIELD_BYTES:
        return None
    try:
        # BaseLoader reads every scalar as text, so that Norwegian (`no`) is not a boolean, and
        # makes no other objects.
        mapping = yaml.load(text, yaml.BaseLoader)  # noqa: S506  (safer than SafeLoader: it resolves no tag at all)
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    return mapping.get(name) if isinstance(mapping, dict) else None


def _text(value: Any, form: re.Pattern[str]) -> str | None:
    return value if isinstance(value, str) and form.fullmatch(value) else None


def _texts(value: Any, form: re.Pattern[str], limit: int) -> tuple[str, ...]:
    """The texts of the given form in a text or a list of texts: each once, at most `limit`."""
    values = value[: 10 * limit] if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text for text in values if _text(text, form) is not None))[:limit]
