"""From what was asked to a `Run` with every number filled in, or one line that says why not."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_cli import __version__
from dus_cli.common.bounds import check_fields
from dus_cli.errors import HealError, UsageError, shown
from dus_cli.heal import run as run_file
from dus_cli.heal.options import (
    Budget,
    Fit,
    HealOptions,
    Keeping,
    Launch,
    RateScales,
    Recipe,
    Train,
)
from dus_cli.heal.run import FitPlan, KeepingPlan, RatesPlan, RecipePlan, Run
from dus_cli.maps.model_config import decoder_config
from dus_cli.maps.shape import context_length, vocab_size
from dus_cli.release import lineage
from dus_cli.release.within import BasePlan, recorded_base, recorded_map, scaled_base, scales_base
from dus_cli.source.checkpoint import Checkpoint, open_checkpoint
from dus_cli.source.reading import open_regular, reading

_LONGEST_SEQUENCE = 4096

_SMALL_BATCH, _LARGE_BATCH, _LARGE_MODEL = 512, 262_144, 1_000_000_000

# Held-out measurements in a run where no interval was given, and the fewest, where each would else
# be too thin.
_EVALS, _FEWEST_EVALS = 20, 5

# Held-out tokens of a measurement where none were asked for: the most, and with less it is better
# to measure seldom.
_EVAL_TOKENS, _THIN_EVAL_TOKENS = 250_000, 16_384

# Of a run's time, what measurements may take where nothing was asked for.
_EVAL_SHARE = 0.1

# The time of a forward pass, in steps of as many tokens: forward and twice as much backward, or
# where few layers learn little more than a backward pass through them.
_FORWARD_SHARE, _FORWARD_SHARE_OF_FEW = 1 / 3, 2 / 3

# At the start two are measured, the base and the scaled model.
_AT_START = 2

# Of a shard, how many bytes after its header go into the model's digest: the header has names and
# sizes.
_SAMPLE = 1 << 20


@dataclass(frozen=True)
class Model:
    """The model to heal: its checkpoint, and where its base stands in it.

    `max_length` and `vocab_size` are None where config.json does not say. `new_layers` are the
    output layers that are none of the base's own: () where dus.json tells of none.
    `is_base_scaled`: the base's own were scaled, so that it does not stand in the model.
    """

    checkpoint: Checkpoint
    num_layers: int
    max_length: int | None
    vocab_size: int | None
    base: BasePlan | None
    new_layers: tuple[int, ...]
    is_base_scaled: bool = False


def open_model(folder: Path) -> Model:
    """A model's directory, with what its dus.json says about the base.

    Raises:
        DusError: not a checkpoint of a decoder.
    """
    if not folder.is_dir():
        raise HealError(f"{shown(folder)} is not a directory; give the one that dus upscale wrote")
    checkpoint = open_checkpoint(folder)
    if checkpoint.is_pickled:
        raise HealError(
            f"{shown(folder)} holds pickled weights, and dus heal writes back the safetensors that "
            "it was given; deepen it with dus upscale, which writes them, or load it in "
            "transformers and save_pretrained it"
        )
    decoder = decoder_config(checkpoint.config)
    record = lineage.read_lineage(folder)
    layer_map = recorded_map(record, decoder.num_layers)
    return Model(
        checkpoint,
        decoder.num_layers,
        context_length(decoder.fields),
        vocab_size=vocab_size(checkpoint.config, decoder.fields),
        base=recorded_base(record, layer_map) or scaled_base(record, layer_map),
        new_layers=()
        if record is None or layer_map is None
        else lineage.recorded_layers(record, layer_map),
        is_base_scaled=record is not None
        and layer_map is not None
        and scales_base(record, layer_map),
    )


def model_key(checkpoint: Checkpoint) -> str:
    """A digest by which a resumed run knows its model: config, headers, and a sample of each
    shard's data.
    """
    digest = hashlib.sha256(checkpoint.config_sha256.encode())
    for shard in checkpoint.shards:
        digest.update(f"{shard.name} {shard.header.end}".encode())
        with reading(shard.name), open_regular(shard.path) as file:
            digest.update(file.read(shard.header.data_start + _SAMPLE))
    return digest.hexdigest()


def ties_embeddings(checkpoint: Checkpoint) -> bool:
    """Whether the output embedding is the input's: then the file has no tensor for it."""
    return not any(
        tensor.name.endswith(("lm_head.weight", "embed_out.weight"))
        for _, tensor in checkpoint.tensors()
    )


def check_wishes(wishes: HealOptions, model: Model) -> None:
    """What needs no data to be refused.

    Raises:
        UsageError: a number outside of its bounds, or rates at which nothing learns.
        HealError: options that do not go together, or do not go with this model.
    """
    for options in (
        wishes.data,
        wishes.budget,
        wishes.recipe,
        wishes.fit,
        wishes.launch,
        wishes.keeping,
    ):
        check_fields(options)
    if wishes.recipe.lr == 0 and wishes.recipe.gain_lr == 0:
        raise UsageError("--lr 0 and --gain-lr 0: nothing would learn; raise one of them")
    if wishes.data.chat_field is not None and wishes.data.token_field is not None:
        raise UsageError("--chat-field and --token-field both say what is read; leave one out")
    given = [
        name for name in ("tokens", "steps", "epochs") if getattr(wishes.budget, name) is not None
    ]
    if len(given) > 1:
        raise HealError(f"--{given[0]} and --{given[1]} both give the budget; leave one out")
    if wishes.keeping.average is not None and wishes.keeping.save_every.steps is None:
        raise HealError(
            "--average counts checkpoints by steps, and how many --save-every by time makes is not "
            "known before; give --save-every STEPS"
        )
    if wishes.keeping.average is not None and wishes.budget.until is not None:
        raise HealError(
            "--average needs checkpoints to the end of the budget, and --until base may end before "
            "it; leave one out"
        )
    if wishes.budget.steps is not None:  # of other budgets it is known with the data
        check_average(wishes.keeping, wishes.budget.steps)
    needs = {
        "--until base": wishes.budget.until is not None,
        "--distill": wishes.recipe.distill is not None and wishes.recipe.distill.weight > 0,
    }
    for option, is_asked in needs.items():
        if is_asked and model.base is None and model.is_base_scaled:
            raise HealError(
                f"{option} needs the base: the start of {shown(wishes.model)} scaled the base's "
                "own layers, so it does not stand in the model, and it is not where "
                f"{lineage.NAME} says; put it there, or leave the option out"
            )
        if is_asked and model.base is None:
            raise HealError(
                f"{option} needs the base inside the model, and {shown(wishes.model)} has no "
                f"{lineage.NAME} that tells its layers (or it was healed before); give one that "
                "dus upscale wrote, or leave the option out"
            )
    if wishes.recipe.train is Train.new and not model.new_layers:
        raise HealError(
            f"{shown(wishes.model)} has no new layers that {lineage.NAME} tells of; use --train all"
        )
    if wishes.recipe.lr_scale is not None:
        _check_scales(wishes.recipe.lr_scale, wishes, model)
    length = wishes.data.seq_length
    if length is not None and model.max_length is not None and length > model.max_length:
        raise HealError(
            f"--seq-length {length} is more than the model's {model.max_length} positions; choose "
            "less"
        )


def check_average(keeping: Keeping, num_steps: int) -> None:
    """Check that a run of so many steps saves as many checkpoints as --average wants.

    Raises:
        HealError: it saves fewer.
    """
    every = keeping.save_every.steps
    if keeping.average is None or every is None:
        return
    count = -(-num_steps // every)
    if count < keeping.average:
        enough = num_steps // keeping.average
        way_out = f"--save-every {enough}, or a smaller N" if enough else "a smaller N"
        raise HealError(
            f"--average {keeping.average} needs as many checkpoints, and this run of {num_steps} "
            f"steps saves {count} (--save-every {every}); give {way_out}"
        )


def _check_scales(scales: RateScales, wishes: HealOptions, model: Model) -> None:
    """Check that the groups of --lr-scale can be told apart, and that some of them learn."""
    learning = [scales.new, scales.norms or 0.0]
    if wishes.recipe.train is Train.all:
        learning += [scales.base, scales.embeddings]
    elif (scales.base, scales.embeddings) != (1, 1):
        raise HealError(
            "--train new leaves the base's layers and the embeddings as they are; leave base and "
            "embeddings out of --lr-scale, or use --train all"
        )
    if scales.new != scales.base and not model.new_layers:
        raise HealError(
            f"{shown(wishes.model)} has no new layers that {lineage.NAME} tells of, so that "
            "--lr-scale cannot tell new from base; give both the same factor"
        )
    if not any(learning):
        raise UsageError("--lr-scale freezes all that would learn; give a group more than 0")


def seq_length(wishes: HealOptions, model: Model) -> int:
    """Tokens of a row: as asked, or min(4096, the model's)."""
    return wishes.data.seq_length or min(_LONGEST_SEQUENCE, model.max_length or _LONGEST_SEQUENCE)


def rows_per_step(wishes: HealOptions, model: Model) -> int:
    """Rows of a step: `--batch-tokens` in whole rows.

    Raises:
        HealError: less than a row.
    """
    length = seq_length(wishes, model)
    tokens = wishes.recipe.batch_tokens
    if tokens is None:
        return max(1, default_batch_tokens(model) // length)
    if tokens < length:
        raise HealError(
            f"--batch-tokens {tokens} is less than one row of {length} tokens; see --seq-length"
        )
    return tokens // length


def default_batch_tokens(model: Model) -> int:
    """Tokens of a step where none were asked for: few for a small model, which heals in the fewest
    tokens so.

    docs/healing.md measures that. From a billion parameters on it is what keeps many devices busy,
    unmeasured.
    """
    return _SMALL_BATCH if model.checkpoint.num_parameters < _LARGE_MODEL else _LARGE_BATCH


def make_run(wishes: HealOptions, model: Model, data: dict[str, Any], rows_per_epoch: int) -> Run:
    """Everything resolved. `data` is `Prepared` as JSON, `rows_per_epoch` its rows at this sequence
    length.

    Raises:
        HealError: less data than one step.
    """
    length, rows = seq_length(wishes, model), rows_per_step(wishes, model)
    if rows_per_epoch < rows:
        raise HealError(
            f"the data has {rows_per_epoch} rows of {length} tokens and a step takes {rows}; "
            "give more text, or a smaller --batch-tokens or --seq-length"
        )
    steps = _num_steps(wishes.budget, length * rows, rows_per_epoch / rows)
    recipe = _recipe(wishes.recipe, model, steps, length * rows)
    sets = len(set(data["eval_names"])) or 1
    every, most = _measuring(
        wishes.keeping, recipe, steps, rows * length, _num_heldout_tokens(data), num_sets=sets
    )
    check_average(wishes.keeping, steps)
    return Run(
        schema=run_file.SCHEMA,
        version=__version__,
        model=str(wishes.model.resolve()),
        model_key=model_key(model.checkpoint),
        output=str(wishes.output.resolve()),
        options=wishes.to_json(),
        num_layers=model.num_layers,
        num_parameters=model.checkpoint.num_parameters,
        base=model.base,
        data=data,
        seq_length=length,
        document_mask=wishes.data.document_mask,
        rows_per_step=rows,
        num_steps=steps,
        until=wishes.budget.until.value if wishes.budget.until else None,
        recipe=recipe,
        fit=_fit(wishes.fit, wishes.launch),
        keeping=_keeping(wishes.keeping, every, max(most, length * sets)),
        epochs=steps * rows / rows_per_epoch,
        notes=_notes(wishes, model),
    )


def _notes(wishes: HealOptions, model: Model) -> tuple[str, ...]:
    """What does not hold of a model whose start scaled the base's own layers."""
    if not model.is_base_scaled:
        return ()
    found = []
    if model.base is None:
        found.append(
            "the start scaled the base's own layers, so the base does not stand in the model, and "
            f"it is not where {lineage.NAME} says: its loss is not known"
        )
    if wishes.recipe.train is Train.new:
        found.append(
            "--train new leaves the base's own layers as the start scaled them; --train all lets "
            "them learn"
        )
    return tuple(found)


def _num_steps(budget: Budget, tokens_per_step: int, steps_per_epoch: float) -> int:
    if budget.tokens is not None:
        return -(-budget.tokens // tokens_per_step)
    if budget.steps is not None:
        return budget.steps
    epochs = 1.0 if budget.epochs is None else budget.epochs
    return max(1, int(epochs * steps_per_epoch))


def _recipe(recipe: Recipe, model: Model, steps: int, tokens_per_step: int) -> RecipePlan:
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


def _fit(fit: Fit, launch: Launch) -> FitPlan:
    sharding = fit.sharding.value
    if sharding == "auto":
        sharding = "hsdp" if launch.nnodes > 1 else "fsdp"
    return FitPlan(
        micro_batch_rows=fit.micro_batch,
        precision=fit.precision.on().value,
        master_weights=fit.master_weights.value,
        activation_checkpointing=fit.activation_checkpointing.value,
        compile=fit.compile,
        sharding=sharding,
        offload=fit.offload,
    )


def _measuring(
    keeping: Keeping,
    recipe: RecipePlan,
    steps: int,
    tokens_per_step: int,
    num_heldout: int,
    *,
    num_sets: int = 1,
) -> tuple[int, int]:
    """Steps between two measurements, and held-out tokens of each.

    Where no tokens were asked for, all measurements together take at most a tenth of the run's
    time: by counting what a forward pass costs beside a step, so that a run that goes on, and any
    number of workers, measures the same.
    """
    if keeping.eval_tokens is not None:
        return keeping.eval_every or max(1, steps // _EVALS), keeping.eval_tokens
    all_learn = recipe.train_layers is None and (recipe.rates is None or all(recipe.rates.layers))
    cost = _FORWARD_SHARE if all_learn else _FORWARD_SHARE_OF_FEW
    total = int(_EVAL_SHARE / (1 - _EVAL_SHARE) * steps * tokens_per_step / cost)
    worth = max(1, min(_THIN_EVAL_TOKENS * num_sets, num_heldout))
    wanted = min(_EVALS, max(_FEWEST_EVALS, total // worth - _AT_START))
    every = keeping.eval_every or -(-steps // wanted)
    return every, min(_EVAL_TOKENS, total // (-(-steps // every) + _AT_START))


def _num_heldout_tokens(data: dict[str, Any]) -> int:
    parts = [*data["eval_parts"], *(part for source in data["sources"] for part in source["parts"])]
    return sum(part["num_heldout_tokens"] for part in parts)


def _keeping(keeping: Keeping, eval_every: int, eval_tokens: int) -> KeepingPlan:
    return KeepingPlan(
        eval_every=eval_every,
        eval_tokens=eval_tokens,
        save_every_steps=keeping.save_every.steps,
        save_every_seconds=keeping.save_every.seconds,
        keep=keeping.keep,
        track=keeping.track.value,
        export_every=keeping.export_every,
        average=keeping.average,
    )
