"""Read JSON objects strictly, with errors that help a person who edited the file."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

from dus_cli.errors import CheckpointError, shown
from dus_cli.source.mistaken import NUM_BYTES, not_fetched

# A real config has about four levels.
_MAX_NESTING = 64

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

# Text that people or programs write although JSON does not have it, at the place where the parser
# stops.
_FOREIGN = (
    (re.compile(r"//|/\*|#"), "a comment"),
    (re.compile(r"'"), "a text in single quotes"),
    (re.compile(r"True\b|False\b|None\b"), "a Python constant"),
    (re.compile(r"[A-Za-z_]\w*"), "a word without quotes"),
)


class _DuplicateKeyError(ValueError):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        first: dict[str, Any] = {}
        for key, value in pairs:
            if key in first:
                raise _DuplicateKeyError(
                    f"the name {shown(key)!r} occurs twice ({_short(first[key])}, then "
                    f"{_short(value)})"
                )
            first[key] = value
    return result


def _short(value: Any) -> str:
    return shown(type(value).__name__ if isinstance(value, (dict, list)) else json.dumps(value))


def parse_json_object(raw: bytes, where: str, *, is_header: bool = False) -> dict[str, Any]:
    """Parse a JSON object with distinct names and encodable text.

    A name that occurs twice is refused: transformers uses the last value, other readers the first.
    NaN and infinities are accepted, as transformers does.

    Args:
        raw: the file's bytes.
        where: the file's name in messages.
        is_header: the text is a safetensors header, which people do not edit.

    Raises:
        CheckpointError: the text is not UTF-8, not JSON or not an object, has a name twice, is
            nested too deeply, or is not Unicode (half a surrogate pair).
    """
    if not is_header and (problem := not_fetched(raw[:NUM_BYTES], len(raw))) is not None:
        raise CheckpointError(f"{where} {problem}")
    try:
        value = json.loads(_decoded(raw, where), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise CheckpointError(
            f"{where} is nested more deeply than any real one; refusing it"
        ) from None
    except _DuplicateKeyError as error:
        advice = (
            "the file is damaged, download it again"
            if is_header
            else "readers differ in which one they use; keep one"
        )
        raise CheckpointError(f"{where}: {error}; {advice}") from None
    except json.JSONDecodeError as error:
        why = shown(error) if is_header else _explained(error)
        advice = (
            "the file is damaged, download it again"
            if is_header or _is_cut(error)
            else "correct the file"
        )
        raise CheckpointError(f"{where} is not valid JSON: {why}; {advice}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise CheckpointError(
            f"{where} is not valid JSON: {shown(error)}; the file is damaged"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where} holds a JSON {type(value).__name__}, not an object; download the file again"
        )
    if b"\\u" in raw:  # the only way for half a surrogate pair to get in
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise CheckpointError(
                f"{where} has text that is not Unicode (half a surrogate pair)"
            ) from None
    return value


def _decoded(raw: bytes, where: str) -> str:
    if raw.startswith(codecs.BOM_UTF8):
        raise CheckpointError(
            f"{where} begins with a byte-order mark, which JSON does not have and transformers "
            "does not read; save it as UTF-8 without one"
        )
    if raw.startswith(_UTF_16):
        raise CheckpointError(
            f"{where} is not UTF-8 but UTF-16, by its byte-order mark; save it as UTF-8"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where} is not UTF-8 (byte {error.start}); the file is damaged, or was saved in "
            "another encoding"
        ) from None


def _is_cut(error: json.JSONDecodeError) -> bool:
    """Whether the text ends where more must follow."""
    return not error.doc[error.pos :].strip() or error.msg.startswith("Unterminated string")


def _explained(error: json.JSONDecodeError) -> str:
    """What the parser stopped at, and in which line."""
    text, at = error.doc, error.pos
    if _is_cut(error):
        return f"it ends in the middle, in line {error.lineno}"
    before, after = text[:at].rstrip(), text[at:].lstrip()
    # Python 3.13 points at the comma itself, older versions after it.
    comma = before.endswith(",") or after.startswith(",")
    if comma and after.lstrip(", \t\r\n").startswith(("}", "]")):
        return (
            f"a comma before the closing {after.lstrip(', ' + chr(9) + chr(13) + chr(10))[0]} in "
            f"line {error.lineno}"
        )
    line = text.count("\n", 0, len(text) - len(after)) + 1
    for pattern, name in _FOREIGN:
        if (match := pattern.match(after)) is not None:
            rest = after[match.start() : match.start() + 40].splitlines()[0]
            return f"{name} in line {line} ({shown(rest)})"
    return f"{error.msg} in line {error.lineno}, column {error.colno}"


def limit_nesting(value: object, where: str) -> None:
    """Check that JSON is not nested much more deeply than a real config, so that code may recurse.

    Raises:
        CheckpointError: it is.
    """
    level: list[object] = [value]
    for _ in range(_MAX_NESTING):
        level = [
            c
            for v in level
            for c in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())
        ]
        if not level:
            return
    raise CheckpointError(f"{where} is nested more deeply than any real one; refusing it")
