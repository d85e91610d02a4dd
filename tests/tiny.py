"""A language model small enough to train in a test: four Llama layers on bytes, with a tokenizer
and text.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import child
from conftest import Run
from forked import dus

EOS = 256


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with an id for each byte, and an end-of-text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)} | {"<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "model_max_length": 128,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_base(
    folder: Path,
    num_layers: int = 4,
    seed: int = 0,
    *,
    model_type: str = "llama",
    shard: str = "5GB",
    **fields: Any,
) -> Path:
    """Write a base with random bf16 weights. `fields` change its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "eos_token_id": EOS,
        "bos_token_id": EOS,
        "initializer_range": 0.2,
    }
    config = AutoConfig.for_model(model_type, **(settings | fields))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return folder


def upscaled(base: Path, output: Path, trim: int = 1, *, shard: str = "5GB") -> Path:
    """Up-scale the base with the real command."""
    options = ["-o", str(output), "--trim", str(trim), "--max-shard-size", shard, "-q"]
    done = dus("upscale", base, *options)
    assert done.returncode == 0, done.stderr
    return output


def write_corpus(path: Path, num_documents: int = 200, seed: int = 0) -> Path:
    """Write JSONL of made-up sentences, from which a small model learns within a few steps."""
    chance = random.Random(seed)
    words = (
        "the seam joins one layer to another and the model heals when it reads more text".split()
    )
    lines = []
    for number in range(num_documents):
        text = " ".join(chance.choice(words) for _ in range(chance.randint(5, 60)))
        lines.append(json.dumps({"id": number, "text": f"{text}."}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_home(folder: Path, num_documents: int = 200) -> Path:
    """Write what a healing begins with into `folder`: corpus.jsonl, base and scaled."""
    write_corpus(folder / "corpus.jsonl", num_documents)
    upscaled(write_base(folder / "base"), folder / "scaled")
    return folder


def write_tasks(folder: Path) -> None:
    """Tasks of lm-evaluation-harness in `folder`/tasks: a choice, a group of two, a generation."""
    words = ("seam", "layer", "model", "text")
    rows = [
        {"question": f"the {word} joins", "choices": list(words), "answer": k}
        for k, word in enumerate(words)
    ] * 3
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "rows.jsonl"}
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
"""
    choice = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""
    tasks = folder / "tasks"
    tasks.mkdir()
    for name in ("words", "words_a", "words_b"):
        (tasks / f"{name}.yaml").write_text(f"task: {name}\n{common}{choice}")
    (tasks / "group.yaml").write_text(
        "group: all_words\ntask: [words_a, words_b]\naggregate_metric_list:\n  - {metric: acc, "
        "weight_by_size: true}\n"
    )
    (tasks / "says.yaml").write_text(
        f'task: says\n{common}output_type: generate_until\ndoc_to_target: "{{{{choices[answer]}}}}"\n'
        "generation_kwargs: {until: ['.'], max_gen_toks: 4}\n"
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )


def train(
    folder: Path, corpus: Path, num_steps: int = 120, seq_length: int = 64, shard: str = "5GB"
) -> Path:
    """Train a base on the corpus a little, so that scaling makes it worse."""
    import torch
    from transformers import AutoModelForCausalLM

    text = [
        [*json.loads(line)["text"].encode(), EOS]
        for line in corpus.read_text(encoding="utf-8").splitlines()
    ]
    tokens = torch.tensor([token for document in text for token in document])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    chance = random.Random(0)
    for _ in range(num_steps):
        starts = [chance.randrange(len(tokens) - seq_length) for _ in range(8)]
        ids = torch.stack([tokens[start : start + seq_length] for start in starts])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    return folder


# --- the command and its workers, forked from a server that has imported everything ---------------

# Imported once by the server, because it takes several seconds.
_PRELOADED = (
    "dus_cli.cli dus_cli.heal.launch.verb dus_cli.data.shelf dus_cli.data.streams "
    "dus_cli.data.sample dus_cli.heal.worker dus_cli.heal.train.setup dus_cli.models.decoder "
    "dus_cli.models.weights dus_cli.heal.train.checkpoints dus_cli.heal.train.optimizer "
    "dus_cli.heal.proof.publish dus_cli.heal.train.evaluate dus_cli.models.team "
    "dus_cli.heal.launch.torchrun torch.distributed.run "
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend "
    "dus_cli.evaluation.verb dus_cli.evaluation.scorer pyarrow fsspec "
    "torch.distributed.checkpoint._fsspec_filesystem torch.profiler._cupti_monitor "
    "transformers.models.llama.modeling_llama transformers.models.auto.tokenization_auto "
    "transformers.convert_slow_tokenizer transformers.integrations.mistral "
    "transformers.models.encoder_decoder "
    "dus_cli.commands.upscale dus_cli.commands.verify dus_cli.commands.heal dus_cli.commands.eval "
    "dus_cli.commands.probe dus_cli.probe.verb dus_cli.probe.measure dus_cli.probe.picture "
    "dus_cli.upscaling.verb dus_cli.verification.verb typer._adapters pydantic.type_adapter"
).split()


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _start(
    log: Path, environment: dict[str, str], target: str, arguments: list[str], first: str = ""
) -> Any:
    process = _context().Process(
        target=child.run, args=(str(log), environment, target, arguments, first)
    )
    process.start()
    return process


def wait(process: Any, seconds: float = 900) -> int:
    """Wait for a process and return its exit code; kill one that hangs (-9). `seconds` is long,
    because a busy machine takes minutes instead of seconds.
    """
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return int(process.exitcode)


def start_dus(log: Path, *arguments: str | Path, first: str = "") -> Any:
    """Start `dus` in a process that is forked with everything imported; its output goes to `log`
    and `log`.err.
    """
    environment = {"OMP_NUM_THREADS": "1"}
    return _start(log, environment, "dus", [str(argument) for argument in arguments], first)


class ForkedDus:
    """`dus` on its way in a process that is forked with everything imported, and so are torchrun
    and the workers; with those methods of subprocess.Popen that tests of the command in a new
    interpreter use.
    """

    def __init__(self, *arguments: str | Path, first: str = "") -> None:
        descriptor, name = tempfile.mkstemp(prefix="dus-")
        os.close(descriptor)
        self.log = Path(name)
        environment = {"OMP_NUM_THREADS": "1"}
        words = [str(argument) for argument in arguments]
        self.process = _start(self.log, environment, "dus", words, first)

    def poll(self) -> int | None:
        code: int | None = self.process.exitcode
        return code

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def send_signal(self, signum: signal.Signals) -> None:
        os.kill(self.process.pid, signum)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float = 900) -> tuple[str, str]:
        """Wait for its end; return what it wrote to stdout and stderr."""
        wait(self.process, timeout)
        paths = (self.log, Path(f"{self.log}.err"))
        said = [path.read_text(encoding="utf-8") for path in paths]
        for path in paths:
            path.unlink()
        return said[0], said[1]


def forked_dus(*arguments: str | Path, first: str = "", **environment: str) -> Run:
    """Run `dus` in a process that is forked with everything imported. `first` is Python code that
    runs before it.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        code = wait(
            _start(log, environment, "dus", [str(argument) for argument in arguments], first)
        )
        return Run(
            arguments,
            code,
            log.read_text(encoding="utf-8"),
            Path(f"{log}.err").read_text(encoding="utf-8"),
        )


def start_server(folder: Path) -> tuple[Any, list[str]]:
    """Start a process that forks a `dus` with everything imported for scripts; return it, and the
    command line that stands for `dus` in them.
    """
    path = folder / "server"
    process = _start(folder / "log", {"OMP_NUM_THREADS": "1"}, "server", [str(path)])
    while not path.exists():
        assert process.is_alive(), (folder / "log.err").read_text(encoding="utf-8")
        time.sleep(0.01)
    return process, [sys.executable, "-IS", str(Path(__file__).with_name("asking.py")), str(path)]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start_workers(
    out: Path,
    size: int = 1,
    num_local: int | None = None,
    *,
    target: str = "worker",
    more: tuple[str, ...] = (),
    extra: dict[str, str] | None = None,
    first: str = "",
) -> list[tuple[Any, Path]]:
    """Start the workers of OUT/run.json as Slurm would, by environment variables; returns them with
    their logs.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    shared |= {"LOCAL_WORLD_SIZE": str(num_local or size), "OMP_NUM_THREADS": "1"} | (extra or {})
    logs = Path(tempfile.mkdtemp(prefix="dus-workers-"))
    workers: list[tuple[Any, Path]] = []
    for rank in range(size):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % (num_local or size))}
        log = logs / str(rank)
        workers.append(
            (_start(log, environment, target, [str(out / "run.json"), *more], first), log)
        )
    # their logs are there as long as the first of them is looked at
    weakref.finalize(workers[0][0], shutil.rmtree, logs, ignore_errors=True)
    return workers


def logits(out: Path, size: int) -> list[Any]:
    """The logits of each worker's model before the first step."""
    import torch

    codes = [
        wait(process) for process, _ in start_workers(out, size, target="logits", more=(str(out),))
    ]
    assert not any(codes), codes
    return [torch.load(out / f"logits-{size}-{rank}.pt") for rank in range(size)]


def heal(
    model: Path,
    out: Path,
    *arguments: str | Path,
    workers: int = 1,
    num_local: int | None = None,
    **environment: str,
) -> str:
    """Heal in the two parts of --print-command: the real command writes run.json, then its workers
    run. Returns the error, or "".
    """
    prepared = forked_dus(
        "heal", model, "-o", out, *arguments, "--print-command", "-q", **environment
    )
    if prepared.returncode:
        return prepared.stderr
    (out / "failure.json").unlink(missing_ok=True)
    return ended(out, start_workers(out, workers, num_local, extra=environment))


def ended(out: Path, workers: list[tuple[Any, Path]]) -> str:
    """Wait for all workers; returns the error, or ""."""
    codes = [wait(process) for process, _ in workers]
    if not any(codes):
        return ""
    failure = out / "failure.json"
    if failure.is_file():
        return str(json.loads(failure.read_text())["error"])
    said = [Path(f"{log}.err").read_text(encoding="utf-8") for _, log in workers]
    return "\n".join([f"workers ended with {codes}", *said])


def metrics(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def curve(out: Path) -> list[tuple[Any, ...]]:
    """The losses and rates of each step, equal for equal runs."""
    names = ("step", "tokens", "loss", "eval_loss", "base_loss", "lr", "grad_norm", "kl", "skipped")
    return [tuple(row.get(name) for name in names) for row in metrics(out)]


def weights(out: Path) -> dict[str, Any]:
    """All tensors of a checkpoint."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for path in sorted(out.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
