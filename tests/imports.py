"""Which libraries a command imports."""

from __future__ import annotations

import json
import subprocess
import sys

# `dus upscale` of a local model must not import these: each takes longer than a reflinked upscale.
HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "huggingface_hub",
    "httpx",
    "httpx2",
    "requests",
    "tqdm",
    "pydantic",
}


def imported_by(*arguments: str) -> set[str]:
    """Top-level modules in sys.modules after a command."""
    code = (
        "import sys, json, contextlib\n"
        "from dus_cli.cli import main\n"
        f"sys.argv = ['dus', *{list(arguments)!r}]\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))
