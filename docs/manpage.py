"""The manual page dus(1) in roff (man macros), as groff and mandoc read it: from the same facts
as docs/cli.md.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

from dus_cli import __version__


class Option(NamedTuple):
    """An option or argument: its spellings with the value's name, what it means, its default as
    text.
    """

    spelling: str
    meaning: str
    default: str


class Command(NamedTuple):
    """A command as its help has it."""

    usage: str
    help: str
    options: tuple[Option, ...]


_EXIT = (
    ("0", "done; also where the output was already what the command writes"),
    (
        "1",
        (
            "a known failure, in one line on stderr; of dus verify, problems; of dus eval, a gate "
            "that was missed"
        ),
    ),
    ("2", "a usage error: the same command line will always fail"),
    ("129, 130, 143", "ended by SIGHUP, SIGINT or SIGTERM; dus heal has saved a checkpoint first"),
    ("141", "nobody reads the results (dus … | head); quiet"),
)

_ENVIRONMENT = (
    ("HF_HOME, HF_HUB_CACHE", "where huggingface_hub keeps what it fetches"),
    ("HF_TOKEN, HF_ENDPOINT", "the login and the address of the Hub"),
    ("HF_HUB_OFFLINE", "1: use what is in the cache, and no network"),
    ("NO_COLOR", "no colours in the help"),
    ("DUS_DEBUG", "1: show the traceback of a failure"),
)

_EXAMPLES = (
    "dus upscale mistralai/Mistral-7B-v0.1 --trim 8 -o out/",
    "dus verify out/ --base mistralai/Mistral-7B-v0.1",
    "dus heal out/ --data corpus.jsonl --until base",
    "dus upscale ./base -o out --json --progress json 2>log | jq .bytes",
)


def man_page(root: Command, commands: Iterable[Command]) -> str:
    """The whole page: every command in one."""
    lines = [
        '.\\" Generated from the code by `make docs`; a test fails when it is stale.',
        # Without a date, which would make the page another one every day; mandoc -Tlint misses it.
        f'.TH DUS 1 "" "dus {__version__}" "User Commands"',
        ".SH NAME",
        f"dus \\- {_text(root.help.split(': ')[1].rstrip('.'))}",
        ".SH SYNOPSIS",
    ]
    commands = tuple(commands)
    for number, command in enumerate(commands):
        lines += [".br"] * bool(number) + [_usage(command.usage)]
    lines += [".SH DESCRIPTION"]
    lines += _paragraphs(
        "Results are printed on stdout, all else on stderr. An output directory is whole and "
        "verified, or it is not there. Nothing ever asks."
    )
    lines += [".SH OPTIONS", *_options(root.options), ".SH COMMANDS"]
    for command in commands:
        lines += [f".SS {_text(' '.join(command.usage.split()[:2]))}", *_paragraphs(command.help)]
        lines += _options(command.options)
    lines += [".SH EXIT STATUS", *_items(_EXIT), ".SH ENVIRONMENT", *_items(_ENVIRONMENT)]
    lines += [".SH EXAMPLES", ".nf", *(_text(example) for example in _EXAMPLES), ".fi"]
    lines += [
        ".SH SEE ALSO",
        "The project's docs/: concepts, layout, healing, pipelines, troubleshooting.",
    ]
    return "\n".join(lines) + "\n"


def _usage(usage: str) -> str:
    """The words of the command in bold, the rest as it is."""
    words = usage.split()
    return f"\\fB{_text(' '.join(words[:2]))}\\fR {_text(' '.join(words[2:]))}"


def _paragraphs(text: str) -> list[str]:
    parts = [" ".join(part.split()) for part in text.strip().split("\n\n")]
    return [
        line
        for number, part in enumerate(parts)
        for line in ([".PP"] * bool(number) + _filled(part))
    ]


def _filled(text: str) -> list[str]:
    """Running text in source lines of at most 80 bytes."""
    return [
        _text(line)
        for line in textwrap.wrap(text, 66, break_on_hyphens=False, break_long_words=False)
    ]


def _options(options: Iterable[Option]) -> list[str]:
    lines = []
    for option in options:
        names, _, value = option.spelling.partition(" ")
        spelling, more = option.spelling, ""
        if names.endswith(","):  # several spellings; the value stands behind the last
            *spellings, last = option.spelling.split(", ")
            names, _, value = last.partition(" ")
            names = ", ".join([*spellings, names])
        spelling = f"\\fB{_text(names)}\\fR" + (f" \\fI{_text(value)}\\fR" if value else "")
        if option.default:
            more = " Required." if option.default == "required" else f" Default: {option.default}."
        lines += [".TP", spelling, *_filled(option.meaning.rstrip(".") + "." + more)]
    return lines


def _items(items: Iterable[tuple[str, str]]) -> list[str]:
    return [
        line
        for name, meaning in items
        for line in (".TP", f"\\fB{_text(name)}\\fR", *_filled(meaning))
    ]


def _text(text: str) -> str:
    r"""Text that roff takes as it stands: ASCII alone, hyphens that can be copied, no line a
    request.

    >>> _text("--a …")
    '\\-\\-a \\[u2026]'
    >>> _text(".jsonl")
    '\\&.jsonl'
    """
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "")
    text = re.sub(r"[^\x20-\x7e]", lambda match: f"\\[u{ord(match[0]):04X}]", text)
    return f"\\&{text}" if text.startswith((".", "'")) else text
