"""Speed and memory of tokenising: `python tests/benchmarks/tokenise.py DATA.jsonl MODEL
[MEGABYTES…]`.

DATA is repeated, each time with another number before its texts, until the file has the requested
size. A child process tokenises it with MODEL's tokenizer (with fastokens, if it is installed), and
another one finds the token files. Where it is installed, `datasets` then maps the same tokenizer
over the text with two processes. Files are written to a folder below the current one, which is removed: choose a disk, not a tmpfs.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

VOCAB_SIZE = 1 << 20


def make_corpus(data: Path, target: Path, size: int) -> None:
    with open(target, "w", encoding="utf-8") as file:
        number = 0
        while True:
            number += 1
            with open(data, encoding="utf-8") as lines:
                for line in lines:
                    file.write(json.dumps({"text": f"{number} {json.loads(line)['text']}"}) + "\n")
                    if file.tell() >= size:
                        return


def child(corpus: str, model: str, folder: str) -> None:
    from dus_cli.data.shelf import Shelf, prepare
    from dus_cli.data.sources import parse_sources

    before, cpu_before = time.monotonic(), time.process_time()
    sources = parse_sources([corpus], Path(folder))
    prepared = prepare(Shelf(Path(folder) / "tokens", Path(model), VOCAB_SIZE), sources, ())
    figures = {
        "seconds": time.monotonic() - before,
        "cpu": time.process_time() - cpu_before,
        "tokens": prepared.num_train_tokens + prepared.num_heldout_tokens,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts KiB
    }
    print(json.dumps(figures))


def peer(corpus: str, model: str, folder: str) -> None:
    import datasets  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoTokenizer

    before = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids(texts: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids: list[list[int]] = tokenizer(texts["text"], add_special_tokens=False)["input_ids"]
        return {"input_ids": ids, "length": [[len(row) + 1] for row in ids]}

    data = datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=folder)
    mapped = data.map(ids, batched=True, num_proc=2, remove_columns=data.column_names)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    figures = {
        "seconds": time.monotonic() - before,
        "cpu": sum(usage.ru_utime + usage.ru_stime for usage in used),
        "tokens": sum(length for (length,) in mapped["length"]),
        "peak": max(usage.ru_maxrss for usage in used) * 1024,
    }
    print(json.dumps(figures))


def measure(data: Path, model: str, size: int) -> None:
    with tempfile.TemporaryDirectory(dir=".", prefix=".tokenise-") as folder:
        corpus = Path(folder) / "corpus.jsonl"
        make_corpus(data, corpus, size)
        runs = [("first run", "--child"), ("second run", "--child")]
        if find_spec("datasets") is not None:
            runs.append(("datasets", "--peer"))
        for name, what in runs:
            command = [sys.executable, __file__, what, str(corpus), model, folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(
                f"{size / 1e6:6,.0f} MB  {name:10}  {line(size, **json.loads(done.stdout))}",
                flush=True,
            )


def line(size: int, seconds: float, cpu: float, tokens: int, peak: int) -> str:
    figures = f"{seconds:7.1f} s, {cpu:.1f} s of CPU, peak RSS {peak / 1e6:,.0f} MB"
    if seconds < 1:  # nothing was tokenised
        return figures
    return (
        f"{figures}, {tokens:,} tokens: {size / 1e6 / seconds:,.1f} MB/s, "
        f"{tokens / seconds / 1e6:,.2f} M tokens/s, {tokens / cpu / 1e6:,.2f} M a second of CPU"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    elif sys.argv[1:2] == ["--peer"]:
        peer(*sys.argv[2:])
    elif len(sys.argv) < 3:
        sys.exit(__doc__)
    else:
        for megabytes in sys.argv[3:] or ("100", "1000"):
            measure(Path(sys.argv[1]), sys.argv[2], int(float(megabytes) * 1e6))
