"""Everything that can go wrong for a reason we know: one line that says what, why and what to do.

The core raises these; only `cli` turns them into exit codes. A traceback means a bug in dus.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST_SHOWN = 120

# A library's message is shown whole unless it is longer than this: some hold a page of advice.
_LONGEST_REASON = 600


class DusError(Exception):
    """A known failure. Its text is the whole message; `cli` prints it and exits 1."""


class UsageError(DusError):
    """Options that are wrong for any model, or contradict each other. `cli` exits 2, as for an
    unknown option.
    """


class ModelNotFoundError(DusError):
    """MODEL is neither a directory nor a Hub id, or the Hub does not provide it."""


class CheckpointError(DusError):
    """The checkpoint is damaged, incomplete, hostile, or not a decoder checkpoint that dus
    reads.
    """


class LayerMapError(DusError):
    """The layer map is not valid for this model."""


class ConfigError(DusError):
    """A field of config.json is unknown to dus, or has no valid value at the new depth."""


class EngineError(DusError):
    """An inference engine named with --for would not compute what the model's config says."""


class OutputError(DusError):
    """The output cannot be written: it exists, or there is no space or permission, or the disk
    failed.
    """


class VerificationError(DusError):
    """What was written is not what was planned."""


class PushError(DusError):
    """The Hub refuses the output, or holds other bytes after the push."""


class MissingExtraError(DusError):
    """A library that an extra installs is missing, or cannot be imported."""


class HealError(DusError):
    """A run of `dus heal` cannot start or continue, or another process is running it."""


class LoadError(DusError):
    """transformers cannot load a model, or would initialise some of its weights at random."""


class EvaluationError(DusError):
    """A model cannot be evaluated, or its result cannot be written."""


class GateError(EvaluationError):
    """A model was evaluated and misses a limit, such as --max-loss."""


class ReplayError(DusError):
    """A model's layers cannot be called one by one, or cannot be read from disk one at a time. Its
    text is the reason only: the caller adds what to do instead.
    """


class ProbeError(DusError):
    """A model cannot be measured layer by layer, or does not fit this machine."""


class StoppedError(DusError):
    """A signal ended a run, and its work was saved. `cli` exits with 128 + the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def shown(text: object, *, limit: int = _LONGEST_SHOWN) -> str:
    r"""Text from a checkpoint as one printable line of at most `limit` characters.

    Names in a hostile file may hold escape sequences or be megabytes long.

    >>> shown("model.layers.0")
    'model.layers.0'
    >>> shown("red" + chr(27) + "[31m")
    'red\\x1b[31m'
    """
    line = str(text)[: limit + 1]
    if not line.isprintable():
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= limit else line[:limit] + "…"


def encodable(text: str) -> str:
    r"""Text that UTF-8 can encode: bytes of a path that are not UTF-8 (PEP 383) become escapes.

    >>> encodable("caf" + chr(0xDCE9))
    'caf\\udce9'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def reason_of(error: BaseException) -> str:
    r"""Another library's message on one line; of a long one the first sentences, at least one.

    >>> reason_of(ValueError("no such\n  layer"))
    'no such layer'
    >>> reason_of(KeyError())
    'KeyError'
    >>> reason_of(ValueError("no such layer. " + "See the manual. " * 100)).count("See the manual.")
    36
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > _LONGEST_REASON:
        end = text.rfind(". ", 0, _LONGEST_REASON + 1)
        text = text if end < 0 else text[: end + 1]
    return shown(text, limit=_LONGEST_REASON)


def described(value: object) -> str:
    """A JSON value of the wrong type, for a message: a string is called a text.

    >>> described("4"), described(4.5), described(None)
    ('the text "4"', '4.5', 'null')
    """
    if isinstance(value, str):
        return f'the text "{shown(value)}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else shown(value)


def shown_list(items: list[str] | tuple[str, ...], limit: int = 3) -> str:
    """The first `limit` names, and how many more there are.

    >>> shown_list(["a", "b", "c", "d"], limit=2)
    'a, b and 2 more'
    """
    text = ", ".join(shown(item) for item in items[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"


class DataError(DusError):
    """Training data that cannot be found, read or used."""


def listed(words: Sequence[str], last: str = "and") -> str:
    """Words joined as in a sentence; there is at least one.

    >>> listed(["4", "7", "10"], "or")
    '4, 7 or 10'
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
