"""The model of a training run, loaded in shards."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from dus_cli.heal.estimate import num_shards
from dus_cli.heal.run import Run
from dus_cli.models.attention import attend_by_document
from dus_cli.models.decoder import Decoder, stack_name
from dus_cli.models.loading import load_config, load_model, transformers_errors
from dus_cli.models.precision import torch_dtype
from dus_cli.models.team import Team


def load(run: Run, team: Team, *, is_base: bool = False) -> Decoder:
    """The model of a run on this worker's device, split over the team by FSDP2 as its own plan
    says.

    Each worker reads its shards only (transformers' `DistributedConfig`); weights never exist
    whole. `is_base`: its base instead, which does not learn: the base's layers inside the model, or
    the base itself where that is elsewhere.

    Raises:
        LoadError: transformers cannot load it, or would make up weights that the files lack.
        HealError: it is of an unknown structure.
    """
    elsewhere = run.base.folder if is_base and run.base is not None else None
    folder = elsewhere or run.model
    num_layers = (
        len(run.base.layers) if elsewhere is not None and run.base is not None else run.num_layers
    )
    with transformers_errors(folder):
        config = _without_dropout(load_config(folder))
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    attention = _attention(run, team, skeleton)
    if attention == "sdpa" and team.device.type == "cpu":
        attend_by_document()
    model = load_model(
        folder,
        folder,
        torch_dtype(run.fit.precision),
        config=config,
        attn_implementation=attention,
        distributed_config=_distribution(run, team, skeleton, num_layers),
    )
    if team.size == 1:
        model = model.to(team.device)
    model.eval()  # until the first step, because routers add noise in training mode
    decoder = Decoder(model, num_layers, packs_rows=attention == "flash_attention_2")
    if is_base:
        model.requires_grad_(False)
        assert run.base is not None
        if elsewhere is None:
            decoder.keep_only(run.base.layers)
    else:
        _checkpoint_activations(model, run.fit.activation_checkpointing)
    return decoder


def _without_dropout(config: Any) -> Any:
    """Set every dropout rate of a config to 0: continued pretraining uses none, and must be
    repeatable.
    """
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def _distribution(run: Run, team: Team, skeleton: Any, num_layers: int) -> DistributedConfig | None:
    if team.size == 1:
        return None
    shards = num_shards(run.fit.sharding, team.size, team.num_local)
    return DistributedConfig(
        fsdp_size=shards,
        dp_replicate_size=team.size // shards,
        fsdp_plan=_plan(skeleton, num_layers),
        fsdp_mixed_precision=run.fit.precision == "bf16",
        fsdp_cpu_offload=run.fit.offload,
    )


def _plan(skeleton: Any, num_layers: int) -> dict[str, str] | None:
    """Shard each layer by itself, for an architecture without a plan of its own (GPT-2); None if it
    has one.

    If only the root were sharded, FSDP would never reduce a gradient: its hooks are on the model's
    outputs, which we do not use.
    """
    inner = skeleton.get_decoder()
    path = next(name for name, module in skeleton.named_modules() if module is inner)
    layers = f"{path}.{stack_name(inner, num_layers)}."
    return (
        None
        if any(key.startswith(layers) for key in skeleton.fsdp_plan)
        else {f"{layers}*": "free_full_weight"}
    )


def _attention(run: Run, team: Team, skeleton: Any) -> str:
    """Varlen flash attention where it is installed, else flex attention for documents on a GPU,
    else SDPA.

    Architectures that lack it (Gemma 2 caps its scores) compute attention step by step.
    """
    if team.device.type == "cuda":
        if importlib.util.find_spec("flash_attn") is not None and run.fit.precision == "bf16":
            return "flash_attention_2"
        if run.document_mask and getattr(skeleton, "_supports_flex_attn", False):
            return "flex_attention"
    return "sdpa" if getattr(skeleton, "_supports_sdpa", False) else "eager"


def _checkpoint_activations(model: Any, how: str) -> None:
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

        products = {
            torch.ops.aten.mm.default,
            torch.ops.aten.addmm.default,
            torch.ops.aten.bmm.default,
        }

        def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
            keep = op in products
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        options["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
