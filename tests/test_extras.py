"""Every extra alone: the built wheel in an environment with nothing else, and the commands that the
extra is for.

Each extra holds the one before it (core, heal, eval), so that one environment grows and each stage
has exactly what `pip install dus-cli[…]` brings; fastokens and stores, which add to heal, come last.
It takes minutes and a package index: `make test` sets DUS_TEST_EXTRAS=1.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
from hub_uploads import WRITER, WritableHub

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    "DUS_TEST_EXTRAS" not in os.environ, reason="DUS_TEST_EXTRAS=1 installs each extra"
)

TASK = """task: guesses
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: 0
doc_to_choice: ["a", "b"]
metric_list:
  - metric: acc
"""


class Alone:
    """An environment with the wheel and what was asked for behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.pip("wheel", "--no-deps", "--wheel-dir", folder, ROOT)
        self.wheel = next(folder.glob("dus_cli-*.whl"))

    def pip(self, verb: str, *arguments: str | Path) -> None:
        # compiled where they are imported, which is a small part of what is installed
        options = (
            ["--no-compile", "--constraint", str(ROOT / "tests/constraints.txt")]
            if verb == "install"
            else []
        )
        command = [
            str(self.folder / "venv/bin/python"),
            "-m",
            "pip",
            "--quiet",
            "--disable-pip-version-check",
            verb,
        ]
        subprocess.run(
            [*command, *options, *arguments], check=True, env=os.environ | {"PYTHONPATH": ""}
        )

    def dus(self, *arguments: str | Path, code: int = 0, **environment: str) -> str:
        """What the installed command prints; on stderr where it fails. No GPU: two workers would
        need two.
        """
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "PYTHON"))
        }
        done = subprocess.run(
            [self.folder / "venv/bin/dus", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env=kept | self.environment | environment,
        )
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    def report(self, *arguments: str | Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.dus(*arguments, "--json"))
        return found


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    alone = Alone(tmp_path_factory.mktemp("alone"))
    alone.pip("install", alone.wheel)
    tiny.write_base(alone.folder / "base")
    tiny.write_corpus(alone.folder / "corpus.jsonl")
    yield alone
    # pytest keeps the folders of three runs, and torch takes gigabytes
    shutil.rmtree(alone.folder / "venv")


def test_the_wheel_alone_scales_verifies_and_pushes(core: Alone) -> None:
    report = core.report("upscale", "./base", "--trim", "1", "-o", "out", "--checksums")
    assert report["status"] == "written"
    assert core.report("verify", "out", "--base", "./base")["sound"] is True
    with WritableHub({}) as hub:
        into = ("push", "out", "org/deeper", "-q")
        core.dus(
            *into,
            HF_ENDPOINT=hub.endpoint,
            HF_TOKEN=WRITER,
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
        )
        assert "org/deeper" in hub.repos
    for verb in ("heal", "probe", "eval"):
        error = core.dus(verb, "./out", "--data", "corpus.jsonl", code=1)
        needed = "torch and transformers; pip install 'dus-cli[heal]'"
        assert error == f"error: dus {verb} needs {needed}\n"


@pytest.fixture(scope="module")
def healing(core: Alone) -> Alone:
    core.pip("install", f"{core.wheel}[heal]")
    core.dus("upscale", "./base", "--trim", "1", "-o", "scaled", "-q")
    return core


def test_the_heal_extra_alone_heals_on_two_workers_and_measures(healing: Alone) -> None:
    data = ("--data", "corpus.jsonl")
    few = ("--seq-length", "32", "--steps", "2", "--batch-tokens", "128", "--holdout", "5%")
    report = healing.report("heal", "scaled", *data, *few, "--nproc-per-node", "2", "-o", "healed")
    assert report["status"] == "healed"
    assert report["num_workers"] == 2
    healing.dus("probe", "./base", *data, "--tokens", "256", "-q")
    healing.dus("eval", "./base", "./healed", *data, "--max-documents", "4", "-q")
    error = healing.dus("eval", "./base", "--tasks", "h6", code=1)
    assert "error: --tasks needs lm_eval; pip install 'dus-cli[eval]'\n" in error


def test_the_eval_extra_alone_runs_a_task(healing: Alone) -> None:
    healing.pip("install", f"{healing.wheel}[eval]")
    tasks = healing.folder / "tasks"
    tasks.mkdir()
    (tasks / "test.jsonl").write_text(
        "".join(json.dumps({"text": f"word {n}"}) + "\n" for n in range(4))
    )
    (tasks / "guesses.yaml").write_text(TASK.format(file=tasks / "test.jsonl"))
    report = healing.report("eval", "./base", "--tasks", "guesses", "--include-path", "tasks")
    assert report["models"][0]["scores"][0]["task"] == "guesses"


def test_the_fastokens_extra_gives_the_same_tokens(healing: Alone) -> None:
    healing.pip("install", f"{healing.wheel}[fastokens]")
    tiny.write_corpus(healing.folder / "long.jsonl", 3000)
    assert (healing.folder / "long.jsonl").stat().st_size > 1 << 18  # less is left to tokenizers
    few = ("--data", "long.jsonl", "--seq-length", "32", "--steps", "1", "--batch-tokens", "128")

    def tokens(name: str) -> dict[str, bytes]:
        healing.dus("heal", "scaled", *few, "-o", name, "--print-command")
        folder = healing.folder / name / "tokens"
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.bin")}

    quick = tokens("quick")
    healing.pip("uninstall", "--yes", "fastokens")
    assert quick == tokens("slow") != {}


class _Store(BaseHTTPRequestHandler):
    """An S3 server of one object, of which a long part always breaks off."""

    asked: ClassVar[list[str]] = []
    content: ClassVar[bytes] = b""

    def do_GET(self) -> None:
        self.asked.append(self.path)
        code, body, headers = 404, b"<Error><Code>NoSuchBucket</Code></Error>", {}
        if self.path == "/corpus/pages.jsonl.gz":
            code, body = 200, self.content
            headers = {"ETag": '"1"', "Last-Modified": "Mon, 30 Nov 2026 10:00:00 GMT"}
        wanted = self.headers["Range"]
        if wanted:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            code, body = 206, body[first : last + 1]
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if len(body) <= 300_000 else body[:1000])
        self.close_connection = True

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def write_pages(path: Path) -> None:
    """Compressed JSONL of documents that are short, of records that are not."""
    tiny.write_corpus(path)
    chance, lines = random.Random(0), path.read_text().splitlines()
    records = [json.loads(line) | {"page": chance.randbytes(4000).hex()} for line in lines]
    path.write_bytes(
        gzip.compress("".join(f"{json.dumps(record)}\n" for record in records).encode())
    )


def test_the_stores_extra_heals_from_an_object_store(healing: Alone) -> None:
    """Over connections that break, the curve is that of the same text on the disk."""
    few = "--stream --shuffle-window 2000 --seq-length 32 --batch-tokens 256 --steps 20".split()
    pages = healing.folder / "pages.jsonl.gz"
    write_pages(pages)
    _Store.content = pages.read_bytes()
    stored = ("heal", "scaled", "--data", f"s3://corpus/{pages.name}", *few, "-o", "stored", "-q")
    assert "needs s3fs; pip install 'dus-cli[stores]'" in healing.dus(*stored, code=1)
    healing.pip("install", f"{healing.wheel}[stores]")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        healing.environment |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        healing.dus(*stored)
        missing = ("heal", "scaled", "--data", "s3://corpus/none.jsonl", "-o", "missing", "-q")
        error = healing.dus(*missing, code=1)
        server.shutdown()
    assert error.startswith("error: s3://corpus/none.jsonl is not there")
    assert len(_Store.asked) > len(_Store.content) / 300_000
    healing.dus("heal", "scaled", "--data", pages, *few, "-o", "from the disk", "-q")
    assert tiny.curve(healing.folder / "stored") == tiny.curve(healing.folder / "from the disk")
    code = "import gcsfs, fsspec; fsspec.get_filesystem_class('gs')"
    subprocess.run([healing.folder / "venv/bin/python", "-c", code], check=True)
