"""Digests of everything that dus writes, to check that a refactor does not change a byte.

    python tests/outputs.py SCRATCH > before.json    # at the commit before the refactor
    python tests/outputs.py SCRATCH > after.json     # at the commit after it
    diff before.json after.json && echo equal

SCRATCH keeps the bases, so that both runs read the same ones; it may be removed afterwards. The
digests are of what `upscale` writes for every model type of the zoo, for a model of Mistral's shape
and for each kind of option; of the loss curve and the weights of a short `heal` on a CPU; and of
the JSON of `probe` and `eval`, without times and paths.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from checkpoints import write_mistral
from tiny import curve, digests, write_base, write_corpus

# Fields of reports that differ from one run to the next.
VOLATILE = frozenset(
    "seconds started finished elapsed free_bytes peak_memory_bytes tokens_per_second made path "
    "output peak".split()
)

UPSCALES: dict[str, list[str]] = {
    "trim": ["--trim", "1", "--checksums"],
    "copies": ["--copies", "3", "--trim", "1"],
    "layers": ["--layers", "0:3,1:4,2:4"],
    "identity": ["--layers", "0:3,2:4", "--identity"],
    "half": ["--double", "1:3", "--start", "half"],
    "fade": ["--trim", "1", "--start", "fade"],
    "dtype": ["--trim", "1", "--dtype", "float16"],
    "shards": ["--trim", "1", "--max-shard-size", "40KB"],
}


def run(folder: Path, *arguments: str) -> Any:
    """Run a command in `folder`; returns the JSON that it prints, or its error."""
    command = [sys.executable, "-m", "dus_cli", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip()


def settled(value: Any) -> Any:
    """A report without times and paths."""
    if isinstance(value, dict):
        return {key: settled(item) for key, item in value.items() if key not in VOLATILE}
    return [settled(item) for item in value] if isinstance(value, list) else value


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def upscaled(folder: Path, base: str, options: list[str]) -> Any:
    """Digests of the files that `dus upscale` writes, or its error."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    report = run(folder, "upscale", f"./{base}", "-o", "out", "--json", *options)
    return report if isinstance(report, str) else digests(folder / "out")


def zoo_outputs(folder: Path) -> dict[str, Any]:
    import zoo

    found = {}
    for model_type in zoo.EQUAL:
        base = folder / "zoo" / model_type
        if not base.exists():
            zoo.tiny_model(model_type).save_pretrained(base)
        found[model_type] = upscaled(folder / "zoo", model_type, ["--trim", "2"])
    return found


def healed(folder: Path) -> dict[str, Any]:
    """The curve and weights of a short run with one worker, and the reports of probe and eval."""
    shutil.rmtree(folder / "deeper", ignore_errors=True)
    shutil.rmtree(folder / "healed", ignore_errors=True)
    run(folder, "upscale", "./base", "--trim", "1", "-o", "deeper", "--json")
    options = ["--seq-length", "64", "--batch-tokens", "256", "--steps", "6", "--eval-every", "3"]
    report = run(
        folder, "heal", "./deeper", "--data", "text.jsonl", "-o", "healed", "--json", *options
    )
    if isinstance(report, str):
        return {"error": report}
    written = digests(folder / "healed")
    probe = run(folder, "probe", "./base", "--data", "text.jsonl", "--json")
    evaluation = run(folder, "eval", "./base", "./healed", "--data", "text.jsonl", "--json")
    return {
        "curve": digest(curve(folder / "healed")),
        "files": {
            name: value
            for name, value in written.items()
            if name.endswith((".safetensors", "config.json"))
        },
        "probe": settled(probe),
        "eval": settled(evaluation),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("scratch", type=Path)
    parser.add_argument(
        "--without-zoo", action="store_true", help="leave out the model types of the zoo (minutes)"
    )
    options = parser.parse_args()
    folder: Path = options.scratch.resolve()
    if not (folder / "base").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_base(folder / "base")
        write_corpus(folder / "text.jsonl")
        write_mistral(folder / "mistral", num_layers=8, hidden=128)
    found: dict[str, Any] = {
        name: upscaled(folder, "base", given) for name, given in UPSCALES.items()
    }
    found["mistral"] = upscaled(folder, "mistral", ["--trim", "2", "--checksums"])
    found["heal"] = healed(folder)
    if not options.without_zoo:
        found["zoo"] = zoo_outputs(folder)
    json.dump(found, sys.stdout, indent=1, sort_keys=True)
    print()


if __name__ == "__main__":
    main()
