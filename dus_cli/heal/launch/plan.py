"""What a run will do and what it needs, before it does it: for the dry run and for the start of
a run.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_cli.common.memory import available_bytes, smallest_gpu
from dus_cli.common.reports import public
from dus_cli.common.units import human_bytes, human_time
from dus_cli.heal import estimate
from dus_cli.heal.estimate import MemoryEstimate, num_shards
from dus_cli.heal.options import Launch
from dus_cli.heal.run import Run
from dus_cli.maps.shape import Shape, flops_per_token
from dus_cli.models.precision import torch_dtype

if TYPE_CHECKING:
    from dus_cli.data.streams import Prepared

# What a well-tuned run in bf16 reaches of a device's peak. Published for the H100: 34% and,
# compiled, 39% (torchtitan, Llama 3.1 8B, December 2024), 39% to 41% (NeMo AutoModel, Llama 3 70B).
# Times are told for it.
TYPICAL_MFU = 0.40
REFERENCE_GPU = "H100"

# Below this a held-out loss says little: differences of some hundredths of a nat are noise.
_FEW_DOCUMENTS, _FEW_TOKENS = 20, 10_000

# Beyond this, text that comes again teaches less and less (arXiv:2305.16264, section 6).
_MANY_EPOCHS = 4

# A worker's Python, torch and transformers.
_LIBRARIES = 500_000_000


def num_processes(launch: Launch) -> int:
    """Workers of this node: as asked, or one for each accelerator, or one."""
    if launch.nproc_per_node is not None:
        return launch.nproc_per_node
    import torch

    return max(1, torch.accelerator.device_count())


def source_name(text: str) -> str:
    """What a source is called where others read it: its last name, without a query, which may hold
    a signature.

    >>> source_name("/data/*.jsonl"), source_name("https://host/a.jsonl?signature=1")
    ('*.jsonl', 'a.jsonl')
    """
    said = str(public(text))
    return Path(said).name or said


def data_record(run: Run, data: Prepared, epochs: float) -> dict[str, Any]:
    """What a run trains and measures on, as the plan and the proof record it. Paths are left out
    of names.
    """
    record = {
        "data": [source_name(source.name) for source in data.sources],
        "epochs": epochs,
        "train_tokens": data.num_train_tokens,
        "train_documents": data.num_train_documents,
        "heldout_tokens": run.heldout_tokens,
        "heldout_documents": run.heldout_documents,
        "available_heldout_tokens": data.num_heldout_tokens,
        "available_heldout_documents": data.num_heldout_documents,
    }
    sets = [{"name": name, **counts} for name, counts in run.heldout_sets.items()]
    return record | ({"heldout_sets": sets} if sets else {})


def plan_of(run: Run, shape: Shape, launch: Launch) -> dict[str, Any]:
    """The plan as JSON; docs/layout.md describes each field."""
    import torch

    from dus_cli.data.streams import Prepared

    data = Prepared.from_json(run.data)
    local, workers = num_processes(launch), num_processes(launch) * launch.nnodes
    on_cpu = not torch.accelerator.is_available()
    memory = _memory(run, shape, workers, workers // launch.nnodes)
    tokens = run.num_steps * run.tokens_per_step
    flops = flops_per_token(shape, run.seq_length)
    measured = run.heldout_tokens * (
        -(-run.num_steps // run.keeping.eval_every) + (2 if run.base else 1)
    )
    plan: dict[str, Any] = {
        **data_record(run, data, run.epochs),
        "before": list(data.before),
        "steps": run.num_steps,
        "tokens": tokens,
        "eval_every": run.keeping.eval_every,
        "evaluation_share": measured
        / (measured + 3 * tokens),  # a forward pass is a third of a step
        "num_workers": workers,
        "memory_per_device": {
            key: int(value) for key, value in (asdict(memory) | {"total": memory.total}).items()
        },
    }
    plan |= _place(run, memory, local, on_cpu=on_cpu)
    plan |= _time(run, tokens * flops + measured * flops / 3, workers, launch.nnodes, on_cpu=on_cpu)
    return plan | {"warnings": [*run.notes, *_warnings(plan)]}


def _place(run: Run, memory: MemoryEstimate, num_local: int, *, on_cpu: bool) -> dict[str, Any]:
    """What there is of memory on this node. None where it cannot be asked."""
    host = run.num_parameters * (2 if run.fit.precision == "bf16" else 4) + num_local * _LIBRARIES
    gpu = None if on_cpu else smallest_gpu()
    if on_cpu:
        host = num_local * (int(memory.total) + _LIBRARIES)
    elif run.fit.offload:
        host += num_local * int(memory.weights + memory.gradients + memory.optimizer)
    there = available_bytes()
    device = there // num_local if on_cpu else None if gpu is None else gpu[1]
    fits = host <= there and (device is None or memory.total <= device)
    return {
        "device": "cpu" if on_cpu else "accelerator" if gpu is None else gpu[0],
        "memory_available_per_device": device,
        "host_memory": host,
        "host_memory_available": there,
        "fits": fits,
    }


def _time(run: Run, flops: float, workers: int, num_nodes: int, *, on_cpu: bool) -> dict[str, Any]:
    """Seconds by the clock: on these workers, for a CPU by a measured product, else for H100s at
    the usual MFU.
    """
    peak, units = estimate.PEAK_FLOPS[REFERENCE_GPU], workers
    if on_cpu:  # workers of a node share its cores
        import torch

        from dus_cli.heal.train.fitting import peak_flops

        dtype = torch_dtype(run.fit.precision)
        peak, units = peak_flops(torch.device("cpu"), dtype)[0], num_nodes
    return {
        "seconds": round(flops / (TYPICAL_MFU * peak * units), 1),
        "seconds_on": "cpu" if on_cpu else REFERENCE_GPU,
    }


def num_learning(run: Run, shape: Shape) -> int:
    """Parameters that learn, norms of frozen layers aside."""
    layers = len(run.recipe.learning_layers(run.num_layers))
    return estimate.num_learning(shape, layers, with_embeddings=run.recipe.embeddings_learn)


def _memory(run: Run, shape: Shape, workers: int, num_local: int) -> MemoryEstimate:
    return estimate.memory_per_device(
        shape,
        num_learning=num_learning(run, shape),
        num_shards=num_shards(run.fit.sharding, workers, num_local),
        micro_batch_tokens=(run.fit.micro_batch_rows or 1) * run.seq_length,
        weight_bytes=2 if run.fit.precision == "bf16" else 4,
        has_fp32_masters=run.fit.master_weights == "fp32",
        activation_checkpointing=run.fit.activation_checkpointing,
        teacher_layers=len(run.base.layers) if run.base and run.recipe.distill_weight else 0,
    )


def _warnings(plan: dict[str, Any]) -> list[str]:
    """Where the proof would be thin, or the run would not get through."""
    found = []
    whole = {"name": "", "documents": plan["heldout_documents"], "tokens": plan["heldout_tokens"]}
    for each in plan.get("heldout_sets", [whole]):
        documents, tokens = each["documents"], each["tokens"]
        if documents >= _FEW_DOCUMENTS and tokens >= _FEW_TOKENS:
            continue
        more = "--holdout or --eval-data gives more"
        if plan["available_heldout_tokens"] >= 2 * max(1, plan["heldout_tokens"]):
            more = "--eval-tokens 250K measures more, and takes longer"
        where = f"{each['name']}: " * bool(each["name"])
        few = f"{_counted(tokens, documents)} held out are too few to prove much"
        found.append(f"{where}{few}; {more}")
    if plan["epochs"] > _MANY_EPOCHS:
        found.append(
            f"the budget goes over the data {plan['epochs']:,.1f} times, so the model learns "
            f"{plan['train_documents']:,} documents by heart rather than heals; give more text, "
            "or a smaller budget"
        )
    if not plan["fits"]:
        found.append(_not_fitting(plan))
    return found


def _not_fitting(plan: dict[str, Any]) -> str:
    needs, there = plan["memory_per_device"]["total"], plan["memory_available_per_device"]
    where = "worker"
    if there is None or needs <= there:
        needs, there, where = plan["host_memory"], plan["host_memory_available"], "node"
    return (
        f"a {where} needs {human_bytes(needs)} of memory and has {human_bytes(there)} here "
        f"({plan['device']}): it will "
        "not fit; more workers, --activation-checkpointing full or a smaller --seq-length take less"
    )


def _counted(tokens: int, documents: int) -> str:
    return f"{tokens:,} tokens of {documents:,} document{'s' * (documents != 1)}"


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The plan for a person, warnings last."""
    there = plan["available_heldout_tokens"]
    of = f" of {there:,} tokens held out" if there > plan["heldout_tokens"] * 1.05 else ""
    available = plan["memory_available_per_device"]
    memory = human_bytes(plan["memory_per_device"]["total"])
    workers = f"{plan['num_workers']} worker{'s' * (plan['num_workers'] != 1)}"
    time = (
        f"about {human_time(plan['seconds'])} for {workers} ({plan['seconds_on']} at "
        f"{TYPICAL_MFU:.0%} MFU)"
    )
    rows = [
        (
            "data",
            (
                f"{_counted(plan['train_tokens'], plan['train_documents'])}, gone over "
                f"{_times(plan['epochs'])}"
            ),
        ),
        (
            "held out",
            f"{_counted(plan['heldout_tokens'], plan['heldout_documents'])} are measured{of}",
        ),
        *(
            ("", f"{each['name']}: {_counted(each['tokens'], each['documents'])}")
            for each in plan.get("heldout_sets", [])
        ),
        (
            "measured",
            f"every {plan['eval_every']:,} steps, about {plan['evaluation_share']:.0%} of the run",
        ),
        (
            "needed",
            f"{memory} a worker, "
            + (
                "not known what there is"
                if available is None
                else f"{human_bytes(available)} there"
            )
            + f" ({plan['device']})",
        ),
        ("time", time),
    ]
    return [
        *(f"{label:<13}{value}" for label, value in rows),
        *(f"warning: {text}" for text in plan["warnings"]),
    ]


def _times(epochs: float) -> str:
    if epochs < 0.01:
        return "in part"
    return "once" if abs(epochs - 1) < 0.005 else f"{epochs:,.2f} times"
