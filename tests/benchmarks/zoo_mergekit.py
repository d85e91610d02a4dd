"""The zoo of tests/test_zoo.py by mergekit: the same tiny bases, layer map and expected logits.

    python tests/benchmarks/zoo_mergekit.py VENV/bin/mergekit-yaml

Every type is merged with `passthrough` and two slices by the real command, in a process forked from
one that has imported it (a start takes seconds). Prints the table of docs/architectures.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
import zoo
from equality import TRIM, save_base
from zoo import EQUAL

from dus_cli.maps.layers import source_layers

# Runs under mergekit's own Python: a line "LIMIT CONFIG OUT" in, the exit code of mergekit-yaml
# out; its output goes to OUT.log, and a merge that exceeds its limit (seconds) ends by SIGALRM.
_SERVER = """
import os, signal, sys
import torch
import transformers.models.auto
from mergekit.scripts.run_yaml import main
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    limit, config, out = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if not child:
        log = os.open(out + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.alarm(int(limit))
        main([config, out, "--no-copy-tokenizer"], prog_name="mergekit-yaml")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

OUTCOMES = {
    "equal": "loads, and computes what the base does with its layers rearranged",
    "failed": "exit code other than 0",
    "does not load": "exit code 0; transformers cannot load the result, or cannot run it",
    "something else": "exit code 0; the result loads and runs, and computes something else",
}


class Mergekit:
    """mergekit-yaml, imported once and forked for every merge."""

    def __init__(self, executable: Path, limit: int) -> None:
        python = str(executable.with_name("python"))
        self.limit = limit
        self.process = subprocess.Popen(
            [python, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._answer() == "ready"
        code = (
            "from importlib.metadata import version as v; print(*(f'{name} {v(name)}' for name in "
            "('mergekit', 'transformers', 'torch')), sep=', ')"
        )
        self.versions = subprocess.run(
            [python, "-c", code], check=True, capture_output=True, text=True
        ).stdout.strip()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def merge(self, base: Path, out: Path, num_layers: int, trim: int) -> int:
        """Stack layers 0…n−m−1 and m…n−1; returns the exit code, negative if a signal ended it."""
        slices = [
            {"sources": [{"model": str(base), "layer_range": list(layers)}]}
            for layers in ((0, num_layers - trim), (trim, num_layers))
        ]
        config = out.with_suffix(".yaml")
        # JSON is YAML
        config.write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
        assert self.process.stdin is not None
        self.process.stdin.write(f"{self.limit}\t{config}\t{out}\n")
        return int(self._answer())


def outcome(model_type: str, folder: Path, mergekit: Mergekit) -> tuple[str, str]:
    """One of OUTCOMES, and its detail."""
    save_base(model_type, folder)
    code = mergekit.merge(folder / "base", folder / "out", zoo.NUM_LAYERS, TRIM)
    if code:
        lines = (folder / "out.log").read_text(errors="replace").strip().splitlines()
        return "failed", f"exit {code}: {lines[-1] if lines else ''}"
    base, _ = zoo.load(model_type, folder / "base")
    tokens = zoo.tokens(base)
    expected = zoo.expected_logits(base, source_layers(zoo.NUM_LAYERS, TRIM), tokens)
    try:
        written, complaints = zoo.load(model_type, folder / "out")
        found = zoo.logits(written, tokens)
    except Exception as error:  # noqa: BLE001  (whatever a loader or a layer raises on what it was given)
        return "does not load", f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
        return "equal", ""
    return "something else", _difference(written, complaints)


def _difference(written: Any, complaints: dict[str, Any]) -> str:
    """Visible signs of a wrong result: the depth, and keys that the loader reports."""
    config = written.config.get_text_config()
    depth = next((getattr(config, key) for key in zoo.DEPTH_KEYS if hasattr(config, key)), None)
    keys = ", ".join(f"{len(found)} {name}" for name, found in complaints.items())
    return f"depth {depth}{', ' if keys else ''}{keys}"


def table(found: dict[str, tuple[str, str]]) -> str:
    """Markdown: the counts, and the types of each outcome."""
    counts = Counter(result for result, _ in found.values())
    rows = ["| outcome | of | which model types |", "|---|---|---|"]
    for name, meaning in OUTCOMES.items():
        types = " ".join(
            sorted(model_type for model_type, (result, _) in found.items() if result == name)
        )
        rows.append(f"| {name}: {meaning} | {counts[name]} | {types} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mergekit", type=Path, help="path of mergekit-yaml")
    parser.add_argument("--limit", type=int, default=60, help="seconds for one merge (60)")
    parser.add_argument(
        "--types", nargs="*", default=EQUAL, help="model types (all that dus writes equal)"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    mergekit = Mergekit(options.mergekit, options.limit)
    found: dict[str, tuple[str, str]] = {}
    for model_type in options.types:
        with tempfile.TemporaryDirectory() as folder:
            found[model_type] = outcome(model_type, Path(folder), mergekit)
        print(
            f"{model_type}: {': '.join(filter(None, found[model_type]))}",
            file=sys.stderr,
            flush=True,
        )
    print(f"{mergekit.versions}; read by transformers {transformers.__version__}\n\n{table(found)}")


if __name__ == "__main__":
    main()
