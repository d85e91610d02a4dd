"""JSON objects read strictly: what is wrong with one is said in the words of whoever has to mend
it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import Any

from dus_cli.errors import CheckpointError, shown
from dus_cli.source.mistaken import NUM_BYTES, not_fetched

# A real config has four levels.
_MAX_NESTING = 64

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

# What a person, or another language's printer, writes and JSON does not have; where the parser
# stops before it.
_FOREIGN = (
    (re.compile(r"//|/\*|#"), "a comment"),
    (re.compile(r"'"), "a text in single quotes"),
    (re.compile(r"True\b|False\b|None\b"), "a word of Python's"),
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
                    f"the name {shown(key)!r} stands twice ({_short(first[key])}, then "
                    f"{_short(value)})"
                )
            first[key] = value
    return result


def _hook(
    on_object: Callable[[list[tuple[str, Any]]], Any] | None,
) -> Callable[[list[tuple[str, Any]]], Any]:
    if on_object is None:
        return _without_duplicates

    def hook(pairs: list[tuple[str, Any]]) -> Any:
        found = on_object(pairs)
        return _without_duplicates(pairs) if found is None else found

    return hook


def _short(value: Any) -> str:
    return shown(type(value).__name__ if isinstance(value, (dict, list)) else json.dumps(value))


def parse_json_object(
    raw: bytes,
    where: str,
    *,
    is_header: bool = False,
    on_object: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> dict[str, Any]:
    """A JSON object with distinct names and encodable text.

    A name that stands twice is refused: transformers takes the last value, others the first. NaN
    and infinities are read, as transformers reads them.

    Args:
        raw: the file's bytes.
        where: what to call it in messages.
        is_header: it is a safetensors header, which no person edits.
        on_object: told the names and values of each object, the innermost first; what it returns
            stands for the object, unless that is None.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, a name twice, nested too deep, or text
            that is no Unicode (half a surrogate pair).
    """
    if not is_header and (what := not_fetched(raw[:NUM_BYTES], len(raw))) is not None:
        raise CheckpointError(f"{where} {what}")
    try:
        value = json.loads(_decoded(raw, where), object_pairs_hook=_hook(on_object))
    except RecursionError:
        raise CheckpointError(
            f"{where} is nested too deeply to be what it claims; refusing it"
        ) from None
    except _DuplicateKeyError as error:
        advice = (
            "the file is damaged, download it again"
            if is_header
            else "readers differ in which counts; keep one"
        )
        raise CheckpointError(f"{where}: {error}; {advice}") from None
    except json.JSONDecodeError as error:
        why = shown(error) if is_header else _explained(error)
        advice = (
            "the file is damaged, download it again"
            if is_header or _is_cut(error)
            else "mend the file"
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
    """What stands where the parser stopped, and in which line."""
    text, at = error.doc, error.pos
    if _is_cut(error):
        return f"it ends in the middle, in line {error.lineno}"
    before, after = text[:at].rstrip(), text[at:].lstrip()
    # Python 3.13 points at the comma itself, older ones behind it.
    comma = before.endswith(",") or after.startswith(",")
    if comma and after.lstrip(", \t\r\n").startswith(("}", "]")):
        return (
            f"a comma before the closing {after.lstrip(', ' + chr(9) + chr(13) + chr(10))[0]} in "
            f"line {error.lineno}"
        )
    line = text.count("\n", 0, len(text) - len(after)) + 1
    for pattern, name in _FOREIGN:
        if (found := pattern.match(after)) is not None:
            rest = after[found.start() : found.start() + 40].splitlines()[0]
            return f"{name} in line {line} ({shown(rest)})"
    return f"{error.msg} in line {error.lineno}, column {error.colno}"


def limit_nesting(value: object, where: str) -> None:
    """Check that JSON is nested no deeper than a real config, so that what walks or writes it may
    recurse.

    Raises:
        CheckpointError: deeper than that.
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
    raise CheckpointError(f"{where} is nested too deeply to be what it claims; refusing it")
