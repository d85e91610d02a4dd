"""Resolve the options of a healing to a `Run`, with every default filled in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dus_cli import __version__
from dus_cli.common.bounds import check_fields
from dus_cli.common.units import counted
from dus_cli.errors import HealError, UsageError, shown
from dus_cli.heal import run as run_file
from dus_cli.heal.options import (
    BudgetOptions,
    Checkpointing,
    FitOptions,
    HealOptions,
    LaunchOptions,
    RateScales,
    RecipeOptions,
    SavingOptions,
    Train,
)
from dus_cli.heal.run import FitPlan, RatesPlan, RecipePlan, Run, SavingPlan, TasksPlan
from dus_cli.maps.model_config import decoder_config
from dus_cli.maps.shape import context_length, vocab_size
from dus_cli.push.target import Target
from dus_cli.release import lineage
from dus_cli.release.within import BasePlan, recorded_base, recorded_map, scaled_base, scales_base
from dus_cli.source.checkpoint import Checkpoint, open_checkpoint
from dus_cli.source.reading import open_regular, reading

_LONGEST_SEQUENCE = 4096

_SMALL_BATCH, _LARGE_BATCH, _LARGE_MODEL = 512, 262_144, 1_000_000_000

# Held-out measurements in a run without --eval-every: the most, and the fewest if each would
# otherwise have too few tokens.
_EVALS, _FEWEST_EVALS = 20, 5

# Held-out tokens of a measurement without --eval-tokens: the most, and the number below which it is
# better to measure less often.
_EVAL_TOKENS, _THIN_EVAL_TOKENS = 250_000, 16_384

# The share of a run's time that measurements may take without --eval-tokens.
_EVAL_SHARE = 0.1

# The time of a forward pass in training steps of as many tokens. A backward pass takes twice the
# time of a forward pass, or half of it if only few layers are trained.
_FORWARD_SHARE, _FORWARD_SHARE_OF_FEW = 1 / 3, 2 / 3

# Measurements at the start: of the base and of the scaled model.
_AT_START = 2

# FLOPs of a worker from which on compiling takes less time than it saves: minutes on a CPU.
_WORTH_COMPILING = 5e13

# Bytes after each shard's header (which has names and sizes) that go into the model's digest.
_SAMPLE = 1 << 20


@dataclass(frozen=True)
class Model:
    """The model to heal.

    Attributes:
        checkpoint: its files.
        num_layers: the number of its layers.
        max_length: the context length in tokens; None if config.json gives none.
        vocab_size: None if config.json gives none.
        base: where the base is; None if that is unknown.
        new_layers: the layers that are not the base's own; () if dus.json names none.
        is_base_scaled: whether the base's own layers were scaled, so that the model does not hold
            the base.
    """

    checkpoint: Checkpoint
    num_layers: int
    max_length: int | None
    vocab_size: int | None
    base: BasePlan | None
    new_layers: tuple[int, ...]
    is_base_scaled: bool = False


def open_model(folder: Path) -> Model:
    """Open a model's directory, and read in its dus.json where the base is.

    Raises:
        DusError: the directory is not a checkpoint of a decoder.
    """
    if not folder.is_dir():
        raise HealError(f"{shown(folder)} is not a directory; give the one that dus upscale wrote")
    checkpoint = open_checkpoint(folder)
    if checkpoint.is_pickled:
        raise HealError(
            f"{shown(folder)} holds pickled weights, and dus heal needs safetensors; scale it up "
            "with dus upscale, which writes safetensors, or convert it with transformers' "
            "save_pretrained"
        )
    decoder = decoder_config(checkpoint.config)
    record = lineage.read_lineage(folder)
    layer_map = recorded_map(record, decoder.num_layers)
    return Model(
        checkpoint,
        decoder.num_layers,
        context_length(decoder.fields),
        vocab_size=vocab_size(checkpoint.config, decoder.fields),
        base=recorded_base(record, layer_map, decoder.fields)
        or scaled_base(record, layer_map, decoder.fields),
        new_layers=()
        if record is None or layer_map is None
        else lineage.recorded_layers(record, layer_map),
        is_base_scaled=record is not None
        and layer_map is not None
        and scales_base(record, layer_map),
    )


def model_key(checkpoint: Checkpoint) -> str:
    """A digest by which a resumed run recognises its model: of config, headers, and a sample of
    each shard's data.
    """
    digest = hashlib.sha256(checkpoint.config_sha256.encode())
    for shard in checkpoint.shards:
        digest.update(f"{shard.name} {shard.header.end}".encode())
        with reading(shard.name), open_regular(shard.path) as file:
            digest.update(file.read(shard.header.data_start + _SAMPLE))
    return digest.hexdigest()


def ties_embeddings(checkpoint: Checkpoint) -> bool:
    """Whether the output embedding is the input embedding: the file then has no tensor for it."""
    return not any(
        tensor.name.endswith(("lm_head.weight", "embed_out.weight"))
        for _, tensor in checkpoint.tensors()
    )


def check_options(options: HealOptions, model: Model) -> None:
    """Check the options without reading data.

    Raises:
        UsageError: a number is out of bounds, or nothing would be trained.
        HealError: options contradict each other or the model.
    """
    for group in (
        options.data,
        options.budget,
        options.recipe,
        options.fit,
        options.launch,
        options.saving,
    ):
        check_fields(group)
    if options.recipe.lr == 0 and options.recipe.gain_lr == 0:
        raise UsageError("--lr 0 and --gain-lr 0: nothing would be trained; raise one of them")
    if options.data.chat_field is not None and options.data.token_field is not None:
        raise UsageError(
            "--chat-field and --token-field both name the field to read; leave one out"
        )
    budgets = [
        name for name in ("tokens", "steps", "epochs") if getattr(options.budget, name) is not None
    ]
    if len(budgets) > 1:
        raise HealError(f"--{budgets[0]} and --{budgets[1]} both give the budget; leave one out")
    _check_stream(options)
    _check_saving(options.saving, options.budget)
    needs_base = {
        "--until base": options.budget.until is not None,
        "--distill": options.recipe.distill is not None and options.recipe.distill.weight > 0,
    }
    for option, is_set in needs_base.items():
        if is_set and model.base is None and model.is_base_scaled:
            raise HealError(
                f"{option} needs the base: the start of {shown(options.model)} scaled the base's "
                "own layers, so the model does not hold its base, and the base is not in the "
                f"folder that {lineage.NAME} names; put it there, or leave the option out"
            )
        if is_set and model.base is None:
            raise HealError(
                f"{option} needs the base inside the model, and {shown(options.model)} has no "
                f"{lineage.NAME} that names the base's layers (or it was healed before, or it has "
                "per-layer embeddings or shared keys and its base is not in the folder that "
                f"{lineage.NAME} names); give a model that dus upscale wrote, or leave the option "
                "out"
            )
    if options.recipe.train is Train.new and not model.new_layers:
        raise HealError(
            f"{shown(options.model)} has no new layers by its {lineage.NAME}; use --train all"
        )
    if options.recipe.lr_scale is not None:
        _check_scales(options.recipe.lr_scale, options, model)
    length = options.data.seq_length
    if length is not None and model.max_length is not None and length > model.max_length:
        raise HealError(
            f"--seq-length {length} is longer than the model's context length, {model.max_length}; "
            "choose at most that"
        )


def _check_stream(options: HealOptions) -> None:
    """Check the options of training while the text is tokenised."""
    data, budget = options.data, options.budget
    if not data.stream:
        for name in ("shuffle_window", "token_cache", "token_cache_size"):
            if getattr(data, name) is not None:
                raise HealError(
                    f"--{name.replace('_', '-')} is for training while the text is tokenised; add "
                    "--stream, or leave it out"
                )
        return
    if data.token_cache_size is not None and data.token_cache is None:
        raise HealError("--token-cache-size bounds a --token-cache; add it, or leave the size out")
    if budget.tokens is None and budget.steps is None:
        raise HealError(
            "--stream does not know the length of an epoch when it starts; give the budget with "
            "--tokens or --steps"
        )
    if "-" in (*data.files, *data.eval_files):
        raise HealError(
            "--stream reads its text again when a run is resumed, and standard input can be read "
            "once; write it to a file, or leave out --stream"
        )


def _check_saving(saving: SavingOptions, budget: BudgetOptions) -> None:
    if saving.average is not None and saving.save_every.steps is None:
        raise HealError(
            "--average needs to know how many checkpoints there will be, and --save-every with a "
            "time does not say; give --save-every STEPS"
        )
    if saving.average is not None and budget.until is not None:
        raise HealError(
            "--average needs checkpoints to the end of the budget, and --until base may end before "
            "it; leave one out"
        )
    if (saving.push_every is None) != (saving.push_to is None):
        raise HealError(
            "--push-every STEPS and --push-to ORG/NAME need each other; give both, or leave both "
            "out"
        )
    push_target(saving)
    for name in ("eval-tasks-limit", "include-path"):
        if getattr(saving, name.replace("-", "_")) is not None and not saving.eval_tasks:
            raise HealError(f"--{name} is about --eval-tasks; name some, or leave it out")
    if budget.steps is not None:  # the steps of other budgets depend on the data
        check_average(saving, budget.steps)


def push_target(saving: SavingOptions) -> Target | None:
    """Where exports are pushed; None if nowhere. Not main by default, where a finished model lies.

    Raises:
        UsageError: --push-to is not the id of a repo.
    """
    if saving.push_to is None:
        return None
    target = Target.parse(saving.push_to)
    return target if "@" in saving.push_to else replace(target, branch="healing")


def check_average(saving: SavingOptions, num_steps: int) -> None:
    """Check that a run of `num_steps` steps saves as many checkpoints as --average needs.

    Raises:
        HealError: it saves fewer.
    """
    every = saving.save_every.steps
    if saving.average is None or every is None:
        return
    count = -(-num_steps // every)
    if count < saving.average:
        enough = num_steps // saving.average
        advice = f"--save-every {enough}, or a smaller N" if enough else "a smaller N"
        raise HealError(
            f"--average {saving.average} needs as many checkpoints, and this run of "
            f"{counted(num_steps, 'step')} saves {count} (--save-every {every}); give {advice}"
        )


def _check_scales(scales: RateScales, options: HealOptions, model: Model) -> None:
    """Check that the model has the groups of --lr-scale, and that some of them are trained."""
    learning = [scales.new, scales.norms or 0.0]
    if options.recipe.train is Train.all:
        learning += [scales.base, scales.embeddings]
    elif (scales.base, scales.embeddings) != (1, 1):
        raise HealError(
            "--train new leaves the base's layers and the embeddings as they are; leave base and "
            "embeddings out of --lr-scale, or use --train all"
        )
    if scales.new != scales.base and not model.new_layers:
        raise HealError(
            f"{shown(options.model)} has no new layers by its {lineage.NAME}, so --lr-scale cannot "
            "distinguish new and base; give both the same factor"
        )
    if not any(learning):
        raise UsageError("--lr-scale freezes everything; give a group a factor above 0")


def seq_length(options: HealOptions, model: Model) -> int:
    """The tokens of a row: --seq-length, or 4,096, or the context length if that is less."""
    return options.data.seq_length or min(_LONGEST_SEQUENCE, model.max_length or _LONGEST_SEQUENCE)


def rows_per_step(options: HealOptions, model: Model) -> int:
    """The rows of a step: `--batch-tokens` in whole rows.

    Raises:
        HealError: --batch-tokens is less than a row.
    """
    length = seq_length(options, model)
    tokens = options.recipe.batch_tokens
    if tokens is None:
        return max(1, default_batch_tokens(model) // length)
    if tokens < length:
        raise HealError(
            f"--batch-tokens {tokens} is less than one row of {length} tokens; see --seq-length"
        )
    return tokens // length


def default_batch_tokens(model: Model) -> int:
    """The tokens of a step without --batch-tokens.

    A small model heals in the fewest tokens with few tokens in a step (docs/healing.md has the
    measurement). For a billion parameters and more the default is chosen to keep many devices busy;
    it is not measured.
    """
    return _SMALL_BATCH if model.checkpoint.num_parameters < _LARGE_MODEL else _LARGE_BATCH


def make_run(options: HealOptions, model: Model, data: dict[str, Any], rows_per_epoch: int) -> Run:
    """The run with every option resolved. `data` is `Prepared` as JSON, `rows_per_epoch` its number
    of rows.

    Raises:
        HealError: the data have fewer rows than a step.
    """
    length, rows = seq_length(options, model), rows_per_step(options, model)
    is_estimate = data.get("growing", {}).get("is_estimate", False)
    if rows_per_epoch < rows and not is_estimate:
        raise HealError(
            f"the data have {counted(rows_per_epoch, 'row')} of {length} tokens and a step takes "
            f"{rows}; give more text, or a smaller --batch-tokens or --seq-length"
        )
    steps = _num_steps(options.budget, length * rows, rows_per_epoch / rows)
    recipe = _recipe(options.recipe, model, steps, length * rows)
    sets = len(set(data["eval_names"])) or 1
    every, most = _measuring(
        options.saving, recipe, steps, rows * length, _num_heldout_tokens(data), num_sets=sets
    )
    check_average(options.saving, steps)
    return Run(
        schema=run_file.SCHEMA,
        version=__version__,
        model=str(options.model.resolve()),
        model_key=model_key(model.checkpoint),
        output=str(options.output.resolve()),
        options=options.to_json(),
        num_layers=model.num_layers,
        num_parameters=model.checkpoint.num_parameters,
        base=model.base,
        data=data,
        seq_length=length,
        document_mask=options.data.document_mask,
        rows_per_step=rows,
        num_steps=steps,
        until=options.budget.until.value if options.budget.until else None,
        recipe=recipe,
        fit=_fit(
            options.fit,
            options.launch,
            6.0 * model.checkpoint.num_parameters * steps * rows * length,
        ),
        keeping=_saving(options.saving, every, max(most, length * sets)),
        epochs=steps * rows / rows_per_epoch,
        notes=_notes(options, model),
    )


def _notes(options: HealOptions, model: Model) -> tuple[str, ...]:
    """Warnings about a model whose start scaled the base's own layers."""
    if not model.is_base_scaled:
        return ()
    notes = []
    if model.base is None:
        notes.append(
            "the start scaled the base's own layers, so the model does not hold its base, and the "
            f"base is not in the folder that {lineage.NAME} names: its loss is unknown"
        )
    if options.recipe.train is Train.new:
        notes.append(
            "--train new leaves the base's own layers as the start scaled them; --train all trains "
            "them, too"
        )
    return tuple(notes)


def _num_steps(budget: BudgetOptions, tokens_per_step: int, steps_per_epoch: float) -> int:
    if budget.tokens is not None:
        return -(-budget.tokens // tokens_per_step)
    if budget.steps is not None:
        return budget.steps
    epochs = 1.0 if budget.epochs is None else budget.epochs
    return max(1, int(epochs * steps_per_epoch))


def _recipe(recipe: RecipeOptions, model: Model, steps: int, tokens_per_step: int) -> RecipePlan:
    distill = recipe.distill
    until = steps
    if distill is not None and distill.until is not None:
        until = distill.until.in_steps(steps, tokens_per_step)
    return RecipePlan(
        lr=recipe.lr,
        gain_lr=recipe.gain_lr,
        schedule=recipe.schedule.value,
        warmup_steps=recipe.warmup.in_steps(steps, tokens_per_step),
        decay_steps=recipe.decay.in_steps(steps, tokens_per_step),
        weight_decay=recipe.weight_decay,
        betas=recipe.betas,
        grad_clip=recipe.grad_clip,
        seed=recipe.seed,
        train_layers=model.new_layers if recipe.train is Train.new else None,
        distill_weight=distill.weight if distill is not None else 0.0,
        distill_steps=until,
        max_skipped=recipe.max_skipped,
        rates=None if recipe.lr_scale is None else _rates(recipe.lr_scale, model),
    )


def _rates(scales: RateScales, model: Model) -> RatesPlan:
    new = set(model.new_layers)
    layers = tuple(scales.new if i in new else scales.base for i in range(model.num_layers))
    return RatesPlan(layers, outside=scales.embeddings, norms=scales.norms)


def _fit(fit: FitOptions, launch: LaunchOptions, flops: float) -> FitPlan:
    """How the run fits the devices. `flops` are those of the whole training."""
    sharding = fit.sharding.value
    if sharding == "auto":
        sharding = "hsdp" if launch.nnodes > 1 else "fsdp"
    return FitPlan(
        micro_batch_rows=fit.micro_batch,
        precision=fit.precision.on().value,
        master_weights=fit.master_weights.value,
        activation_checkpointing=fit.activation_checkpointing.value,
        # without --nproc-per-node there is one worker on a CPU
        compile=_compiles(fit, flops / ((launch.nproc_per_node or 1) * launch.nnodes)),
        sharding=sharding,
        offload=fit.offload,
    )


def _compiles(fit: FitOptions, flops: float) -> bool | None:
    """Whether layers are compiled; None has the worker try it. `flops` are those of a worker."""
    if fit.compile is not None:
        return fit.compile
    import torch

    from dus_cli.models.compiled import has_compiler

    is_worth_it = (
        flops >= _WORTH_COMPILING
        and fit.activation_checkpointing is Checkpointing.none
        and not torch.accelerator.is_available()
        and has_compiler()
    )
    return None if is_worth_it else False


def _measuring(
    saving: SavingOptions,
    recipe: RecipePlan,
    steps: int,
    tokens_per_step: int,
    num_heldout: int,
    *,
    num_sets: int = 1,
) -> tuple[int, int]:
    """The steps between two measurements, and the held-out tokens of each.

    Without --eval-tokens all measurements together take at most a tenth of the run's time. The time
    is estimated by the costs of a forward pass and a step and not measured, so that a resumed run,
    and any number of workers, has the same measurements.
    """
    if saving.eval_tokens is not None:
        return saving.eval_every or max(1, steps // _EVALS), saving.eval_tokens
    all_learn = recipe.train_layers is None and (recipe.rates is None or all(recipe.rates.layers))
    cost = _FORWARD_SHARE if all_learn else _FORWARD_SHARE_OF_FEW
    total = int(_EVAL_SHARE / (1 - _EVAL_SHARE) * steps * tokens_per_step / cost)
    fewest_tokens = max(1, min(_THIN_EVAL_TOKENS * num_sets, num_heldout))
    num_evals = min(_EVALS, max(_FEWEST_EVALS, total // fewest_tokens - _AT_START))
    every = saving.eval_every or -(-steps // num_evals)
    return every, min(_EVAL_TOKENS, total // (-(-steps // every) + _AT_START))


def _num_heldout_tokens(data: dict[str, Any]) -> int:
    parts = [*data["eval_parts"], *(part for source in data["sources"] for part in source["parts"])]
    return sum(part["num_heldout_tokens"] for part in parts)


def _tasks(saving: SavingOptions) -> TasksPlan | None:
    if not saving.eval_tasks:
        return None
    path = saving.include_path
    return TasksPlan(
        saving.eval_tasks,
        saving.eval_tasks_every,
        limit=saving.eval_tasks_limit,
        include_path=None if path is None else str(path.resolve()),
    )


def _saving(saving: SavingOptions, eval_every: int, eval_tokens: int) -> SavingPlan:
    target = push_target(saving)
    return SavingPlan(
        eval_every=eval_every,
        eval_tokens=eval_tokens,
        save_every_steps=saving.save_every.steps,
        save_every_seconds=saving.save_every.seconds,
        keep=saving.keep,
        track=saving.track.value,
        export_every=saving.export_every,
        average=saving.average,
        track_project=saving.track_project,
        track_run=saving.track_run,
        track_group=saving.track_group,
        push_every=saving.push_every,
        push_to=None if target is None else target.repo_id,
        push_branch=None if target is None else target.branch,
        tasks=_tasks(saving),
    )
