r"""Text of two domains that no healing corpus here has, to measure forgetting, as JSON lines.

    python tests/benchmarks/other_text.py OUT_FOLDER

Writes docstrings.jsonl (a document for each module of Python's standard library, with its
docstrings in order) and licences.jsonl (the texts of /usr/share/common-licenses on Debian).
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LICENCES = Path("/usr/share/common-licenses")
SHORTEST = 2000  # characters of a document worth its place


def docstrings() -> Iterator[tuple[str, str]]:
    """(module, its docstrings) of the standard library's own modules."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        yield path.stem, "\n\n".join(text for text in found if text)


def licences() -> Iterator[tuple[str, str]]:
    """(name, text) of each licence; links to another version are left out."""
    for path in sorted(LICENCES.iterdir()):
        if path.is_file() and not path.is_symlink():
            yield path.name, path.read_text(encoding="utf-8", errors="replace")


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in (("docstrings", docstrings()), ("licences", licences())):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for title, text in documents:
                if len(text) >= SHORTEST:
                    file.write(json.dumps({"id": title, "text": text}) + "\n")


if __name__ == "__main__":
    main()
