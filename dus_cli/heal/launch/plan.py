"""The plan of a run: what it will do and need, shown by a dry run and at the start of a run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_cli.common.memory import available_bytes, smallest_gpu
from dus_cli.common.reports import public_address
from dus_cli.common.units import counted, human_bytes, human_time
from dus_cli.errors import shown_list
from dus_cli.heal import estimate
from dus_cli.heal.estimate import MemoryEstimate, num_shards
from dus_cli.heal.launch.data import token_bytes
from dus_cli.heal.options import LaunchOptions
from dus_cli.heal.run import Run
from dus_cli.maps.shape import Shape, flops_per_token
from dus_cli.models.precision import torch_dtype

if TYPE_CHECKING:
    from dus_cli.data.streams import Prepared

# The share of a device's peak FLOP/s that a well-tuned run in bf16 reaches. Published for the H100:
# 34% and, compiled, 39% (torchtitan, Llama 3.1 8B, December 2024), 39% to 41% (NeMo AutoModel,
# Llama 3 70B). Times are estimated with it.
TYPICAL_MFU = 0.40
REFERENCE_GPU = "H100"

# With less held-out text, differences of some hundredths of a nat are noise.
_FEW_DOCUMENTS, _FEW_TOKENS = 20, 10_000

# With more epochs, repeated text teaches less and less (arXiv:2305.16264, section 6).
_MANY_EPOCHS = 4

# Bytes of a worker's Python, torch and transformers.
_LIBRARIES = 500_000_000


# What follows the last colon of a source: its weight.
_WEIGHT = re.compile(r":[^:/]*$")


def num_processes(launch: LaunchOptions) -> int:
    """The number of workers on this node: --nproc-per-node, or one for each accelerator, or one."""
    if launch.nproc_per_node is not None:
        return launch.nproc_per_node
    import torch

    return max(1, torch.accelerator.device_count())


def source_names(texts: Iterable[str]) -> list[str]:
    """The names of sources in published files: of each path as many of its last parts as tell it
    from the others, whatever their weights; without a query, which may hold a signature.

    >>> source_names(["/data/*.jsonl", "https://host/a.jsonl?signature=1"])
    ['*.jsonl', 'a.jsonl']
    >>> source_names(["/data/code/a.jsonl:2", "/data/math/a.jsonl:1", "/data/b.jsonl:1"])
    ['code/a.jsonl:2', 'math/a.jsonl:1', 'b.jsonl:1']
    >>> source_names(["code/a.jsonl", "math/a.jsonl"])
    ['code/a.jsonl', 'math/a.jsonl']
    """
    typed = [Path(public_address(text)) for text in texts]
    paths = [path.relative_to(path.anchor) for path in typed]  # a release shows no absolute path
    files = [Path(_WEIGHT.sub("", str(path))) for path in paths]

    def name(path: Path, file: Path) -> Path:
        for count in range(1, len(path.parts)):
            ending = file.parts[-count:]
            if all(other == file or other.parts[-count:] != ending for other in files):
                return Path(*path.parts[-count:])
        return path

    return [str(name(path, file)) for path, file in zip(paths, files, strict=True)]


def _names(data: Prepared) -> list[str]:
    return source_names(source.name for source in data.sources)


def data_record(run: Run, data: Prepared, epochs: float) -> dict[str, Any]:
    """What a run trains and measures on, as the plan and the proof record it, without paths."""
    record = {
        "data": _names(data),
        "epochs": epochs,
        "train_tokens": data.num_train_tokens,
        "train_documents": data.num_train_documents,
        "heldout_tokens": run.heldout_tokens,
        "heldout_documents": run.heldout_documents,
        "available_heldout_tokens": data.num_heldout_tokens,
        "available_heldout_documents": data.num_heldout_documents,
    }
    if data.growing is not None:
        record["is_train_estimated"] = data.growing.is_estimate
    sets = [{"name": name, **counts} for name, counts in run.heldout_sets.items()]
    return record | ({"heldout_sets": sets} if sets else {})


def _mixture(data: Prepared, tokens: int) -> list[dict[str, Any]]:
    """Of each source of a mixture: its name, its share of the rows, and how many times `tokens`
    read its text. Empty if the sources have no weights.
    """
    weights = [source.weight for source in data.sources if source.weight is not None]
    if not weights:
        return []
    sizes = [source.num_train_tokens for source in data.sources]
    if data.growing is not None:
        sizes = list(data.growing.num_train_tokens)
    mixture = []
    for name, weight, size in zip(_names(data), weights, sizes, strict=True):
        share = weight / sum(weights)
        epochs = tokens * share / max(1, size)
        mixture.append({"name": name, "share": share, "epochs": epochs})
    return mixture


def _repeated(data: Prepared) -> list[str]:
    """A warning if several sources have the same text."""
    count = Counter(key for source in data.sources for key in {part.key for part in source.parts})
    names = [
        name
        for name, source in zip(_names(data), data.sources, strict=True)
        if any(count[part.key] > 1 for part in source.parts)
    ]
    if not names:
        return []
    which = "is read that much more often; leave one out if that is not meant"
    return [f"{shown_list(names)} have the same text, which {which}"]


def plan_of(run: Run, shape: Shape, launch: LaunchOptions) -> dict[str, Any]:
    """The plan as JSON; docs/layout.md describes each field."""
    import torch

    from dus_cli.data.streams import Prepared

    data = Prepared.from_json(run.data)
    local, workers = num_processes(launch), num_processes(launch) * launch.nnodes
    on_cpu = not torch.accelerator.is_available()
    memory = _memory(run, shape, workers, workers // launch.nnodes, on_cpu=on_cpu)
    tokens = run.num_steps * run.tokens_per_step
    flops = flops_per_token(shape, run.seq_length)
    num_measurements = -(-run.num_steps // run.keeping.eval_every)
    measured = run.heldout_tokens * (num_measurements + (2 if run.base else 1))
    tasks = run.keeping.tasks
    if tasks is not None:
        measured += tasks.num_tokens * tasks.num_runs(num_measurements)
    plan: dict[str, Any] = {
        **data_record(run, data, run.epochs),
        "before": list(data.before),
        "steps": run.num_steps,
        "tokens": tokens,
        "eval_every": run.keeping.eval_every,
        # a forward pass takes a third of a training step
        "evaluation_share": measured / (measured + 3 * tokens),
        **({} if tasks is None else {"tasks": asdict(tasks)}),
        "num_workers": workers,
        "memory_per_device": {
            key: int(value) for key, value in (asdict(memory) | {"total": memory.total}).items()
        },
    }
    if mixture := _mixture(data, tokens):
        plan["mixture"] = mixture
    plan |= _device(run, memory, local, on_cpu=on_cpu)
    plan |= _time(run, tokens * flops + measured * flops / 3, workers, launch.nnodes, on_cpu=on_cpu)
    if data.growing is not None:
        plan["token_bytes"] = token_bytes(run, data)
    return plan | {"warnings": [*run.notes, *_repeated(data), *_warnings(plan)]}


def _device(run: Run, memory: MemoryEstimate, num_local: int, *, on_cpu: bool) -> dict[str, Any]:
    """The device and the memory of this node; None for what is unknown."""
    host = run.num_parameters * (2 if run.fit.precision == "bf16" else 4) + num_local * _LIBRARIES
    gpu = None if on_cpu else smallest_gpu()
    if on_cpu:
        host = num_local * (int(memory.total) + _LIBRARIES)
    elif run.fit.offload:
        host += num_local * int(memory.weights + memory.gradients + memory.optimizer)
    available = available_bytes()
    device = available // num_local if on_cpu else None if gpu is None else gpu[1]
    fits = host <= available and (device is None or memory.total <= device)
    return {
        "device": "cpu" if on_cpu else "accelerator" if gpu is None else gpu[0],
        "memory_available_per_device": device,
        "host_memory": host,
        "host_memory_available": available,
        "fits": fits,
    }


def _time(run: Run, flops: float, workers: int, num_nodes: int, *, on_cpu: bool) -> dict[str, Any]:
    """The run's seconds on these workers: by a measured matrix product on a CPU, else as if they
    were H100s at the typical MFU.
    """
    peak, units = estimate.PEAK_FLOPS[REFERENCE_GPU], workers
    if on_cpu:  # the workers of a node share its cores
        import torch

        from dus_cli.heal.train.fitting import peak_flops

        dtype = torch_dtype(run.fit.precision)
        peak, units = peak_flops(torch.device("cpu"), dtype)[0], num_nodes
    return {
        "seconds": round(flops / (TYPICAL_MFU * peak * units), 3),
        "seconds_on": "cpu" if on_cpu else REFERENCE_GPU,
    }


def with_pace(pilot: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """What a pilot measured, with the time of the planned run at its speed: `run_seconds` by the
    clock, held-out measurements included and checkpoints not, and `worker_hours`.
    """
    training = plan["tokens"] / pilot["tokens_per_second"]
    seconds = training / (1 - plan["evaluation_share"])
    return pilot | {
        "run_seconds": round(seconds, 3),
        "worker_hours": round(seconds * plan["num_workers"] / 3600, 4),
    }


def num_learning(run: Run, shape: Shape) -> int:
    """The number of trained parameters, without the norms of frozen layers."""
    layers = len(run.recipe.learning_layers(run.num_layers))
    return estimate.num_learning(shape, layers, with_embeddings=run.recipe.embeddings_learn)


def _memory(
    run: Run, shape: Shape, workers: int, num_local: int, *, on_cpu: bool
) -> MemoryEstimate:
    """The memory of a device; on a GPU, where the rows at once are fitted to it, with one row."""
    from dus_cli.heal.train.fitting import rows_on_a_cpu

    is_compiled = on_cpu and run.fit.compile is not False
    rows = run.fit.micro_batch_rows or 1
    if on_cpu:
        rows = rows_on_a_cpu(run, workers, is_compiled=is_compiled)
    return estimate.memory_per_device(
        shape,
        num_learning=num_learning(run, shape),
        num_shards=num_shards(run.fit.sharding, workers, num_local),
        micro_batch_tokens=rows * run.seq_length,
        weight_bytes=2 if run.fit.precision == "bf16" else 4,
        has_fp32_masters=run.fit.master_weights == "fp32",
        activation_checkpointing=run.fit.activation_checkpointing,
        is_compiled=is_compiled,
        teacher_layers=len(run.base.layers) if run.base and run.recipe.distill_weight else 0,
    )


def _warnings(plan: dict[str, Any]) -> list[str]:
    """Warnings about too little held-out text, too many epochs, or too little memory."""
    warnings = []
    whole = {"name": "", "documents": plan["heldout_documents"], "tokens": plan["heldout_tokens"]}
    for each in plan.get("heldout_sets", [whole]):
        documents, tokens = each["documents"], each["tokens"]
        if documents >= _FEW_DOCUMENTS and tokens >= _FEW_TOKENS:
            continue
        more = "give more with --holdout or --eval-data"
        if plan["available_heldout_tokens"] >= 2 * max(1, plan["heldout_tokens"]):
            more = "measure more of it with --eval-tokens 250K, which takes longer"
        name = f"{each['name']}: " if each["name"] else ""
        warnings.append(
            f"{name}{text_size(tokens, documents)} held out are too few to prove much; {more}"
        )
    mixture = plan.get("mixture", [])
    warnings += [
        f"the budget reads {each['name']} {_times(each['epochs'])}, so the model memorises it; "
        "give more of such text, or a smaller weight"
        for each in mixture
        if each["epochs"] > _MANY_EPOCHS
    ]
    if plan["epochs"] > _MANY_EPOCHS and not mixture:
        warnings.append(
            f"the budget is {plan['epochs']:,.1f} epochs, so the model memorises "
            f"{counted(plan['train_documents'], 'document')} rather than heals; give more text, or "
            "a smaller budget"
        )
    if not plan["fits"]:
        warnings.append(_not_fitting(plan))
    return warnings


def _not_fitting(plan: dict[str, Any]) -> str:
    needed, available = plan["memory_per_device"]["total"], plan["memory_available_per_device"]
    where = "worker"
    if available is None or needed <= available:
        needed, available, where = plan["host_memory"], plan["host_memory_available"], "node"
    return (
        f"a {where} needs {human_bytes(needed)} of memory and has {human_bytes(available)} here "
        f"({plan['device']}): the run will not fit; use more workers, --activation-checkpointing "
        "full or a smaller --seq-length"
    )


def text_size(tokens: int, documents: int) -> str:
    """The size of some text.

    >>> text_size(5, 1)
    '5 tokens of 1 document'
    """
    return f"{counted(tokens, 'token')} of {counted(documents, 'document')}"


def train_size(record: dict[str, Any]) -> str:
    """The size of the training text in a record of `data_record`, which may be an estimate."""
    size = text_size(record["train_tokens"], record["train_documents"])
    return f"about {size} by their beginning" if record.get("is_train_estimated") else size


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The plan for a person, warnings last."""
    held_out = plan["available_heldout_tokens"]
    is_part = held_out > plan["heldout_tokens"] * 1.05
    of = f" of {counted(held_out, 'token')} held out" if is_part else ""
    available = plan["memory_available_per_device"]
    memory = human_bytes(plan["memory_per_device"]["total"])
    has = "an unknown amount" if available is None else human_bytes(available)
    time = (
        f"about {human_time(plan['seconds'])} for {counted(plan['num_workers'], 'worker')} "
        f"({plan['seconds_on']} at {TYPICAL_MFU:.0%} MFU)"
    )
    mixture = plan.get("mixture", [])
    read = "as a mixture" if mixture else _times(plan["epochs"])
    rows = [
        ("data", f"{train_size(plan)}, read {read}"),
        *(("", _mixture_line(each)) for each in mixture),
        (
            "held out",
            f"{text_size(plan['heldout_tokens'], plan['heldout_documents'])} are measured{of}",
        ),
        *(
            ("", f"{each['name']}: {text_size(each['tokens'], each['documents'])}")
            for each in plan.get("heldout_sets", [])
        ),
        (
            "measured",
            (
                f"every {counted(plan['eval_every'], 'step')}, about "
                f"{plan['evaluation_share']:.0%} of the run"
            ),
        ),
        *_tasks_row(plan),
        *_token_rows(plan),
        ("memory", f"{memory} needed per worker, {has} available ({plan['device']})"),
        ("time", time),
        *_pilot_rows(plan),
    ]
    return [
        *(f"{label:<13}{value}" for label, value in rows),
        *(f"warning: {text}" for text in plan["warnings"]),
    ]


def _mixture_line(source: dict[str, Any]) -> str:
    share, times = f"{source['share']:.1%}", _times(source["epochs"])
    return f"{share} of the rows from {source['name']}, read {times}"


def _tasks_row(plan: dict[str, Any]) -> list[tuple[str, str]]:
    if "tasks" not in plan:
        return []
    tasks = plan["tasks"]
    every = counted(tasks["every"], "measurement")
    names, size = ",".join(tasks["names"]), counted(tasks["num_tokens"], "token")
    return [("", f"of it {names} at the start and every {every}, {size} each time")]


def _token_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    if "token_bytes" not in plan:
        return []
    return [("tokens", f"made while it trains, about {human_bytes(plan['token_bytes'])} of files")]


def _pilot_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    if "pilot" not in plan:
        return []
    pilot = plan["pilot"]
    steps, memory = counted(pilot["steps"], "step"), human_bytes(pilot["peak_memory_bytes"])
    speed = f"{pilot['tokens_per_second']:,.0f} tokens/s, peak memory {memory} per worker"
    time = f"at this speed the run takes {human_time(pilot['run_seconds'])}"
    return [
        ("pilot", f"{speed} ({steps} in {human_time(pilot['seconds'])})"),
        ("", f"{time}, {pilot['worker_hours']:,.3g} worker hours, checkpoints aside"),
        # docs/studies.md has what was tried
        ("", "the tokens to the base's loss cannot be told by so few steps"),
    ]


def _times(epochs: float) -> str:
    if epochs < 0.01:
        return "in part"
    return "once" if abs(epochs - 1) < 0.005 else f"{epochs:,.2f} times"
