"""Find the decoder's layers among a checkpoint's tensor names, and account for all other numbered
names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dus_cli.errors import CheckpointError, described, shown, shown_list
from dus_cli.maps import architectures as arch
from dus_cli.maps.layers import LayerMap, number_spans, split_name
from dus_cli.maps.model_config import DecoderConfig
from dus_cli.maps.naming import NO_ASSUMPTIONS, Assumption, NumberedNames

# Parts of a prefix that show that a stack is not the language model's, whatever its depth.
_OTHER_TOWER = re.compile(
    r"vision|visual|image|img|audio|speech|video|(^|[._])(vit|vpm|apm|clip|siglip|encoder|resampler|perceiver|projector"
    r"|connector|draft|medusa|eagle)([._]|$)|encoder\.|projector|resampler"
)

# Names of a head that gives logits, which a pure encoder does not have.
_HEADS = frozenset(["lm_head", "output_layer", "embed_out"])


@dataclass(frozen=True)
class LayerStack:
    """The names of the decoder's layers: tensors `prefix.0.…` to `prefix.n-1.…`.

    Attributes:
        prefix: the layers' prefix.
        num_layers: n.
        num_extra: number of multi-token-prediction layers, numbered from n (deepseek_v3).
        beside: other prefixes with a tensor for each layer, from some layer on, which has number 0
            there; that layer (inkling2).
        others: all numbered prefixes but the layers'.
        tables: tensors outside the layers with a block for each layer, and the axis of the blocks
            (gemma3n).
        table_width: the length of a block.
    """

    prefix: str
    num_layers: int
    num_extra: int = 0
    beside: tuple[tuple[str, int], ...] = ()
    others: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    tables: Mapping[str, int] = field(default_factory=dict)
    table_width: int = 0

    @property
    def names(self) -> NumberedNames:
        """The numbered prefixes, for names in a config."""
        return NumberedNames(self.prefix, self.others)

    def output_names(self, name: str, layer_map: LayerMap) -> tuple[str, ...]:
        """The names of a base tensor's copies in the output; none if the map drops its layer."""
        split = split_name(name)
        if split is None:
            return (name,)
        return tuple(map(split.at, self.output_numbers(split.prefix, split.index, layer_map)))

    def output_numbers(self, prefix: str, index: int, layer_map: LayerMap) -> tuple[int, ...]:
        """The numbers of a base tensor's copies in the output, instead of `index`."""
        if prefix == self.prefix:
            if index < self.num_layers:
                return layer_map.outputs[index]
            return (index - self.num_layers + len(layer_map),)
        for other, first in self.beside:
            if prefix == other:
                return tuple(output - first for output in layer_map.outputs[index + first])
        return (index,)


def _numbered(names: Sequence[str]) -> dict[str, set[int]]:
    """The numbers after each prefix, for tensor names that have one."""
    numbers: dict[str, set[int]] = defaultdict(set)
    of_layer: tuple[int, int] | None = None
    for name, span in zip(names, number_spans(names), strict=True):
        if span is not None and span is not of_layer:
            start, end = span
            numbers[name[: start - 1]].add(int(name[start:end]))
        of_layer = span
    return numbers


def find_stack(
    names: Iterable[str],
    decoder: DecoderConfig,
    assume: Mapping[str, Assumption] = NO_ASSUMPTIONS,
    recorded: str | None = None,
) -> tuple[LayerStack, tuple[str, ...]]:
    """Find the decoder's layer stack.

    Args:
        names: the names of all tensors.
        decoder: the decoder's config.
        assume: the user's decisions (--assume) about other numbered stacks, by prefix.
        recorded: the layers' prefix, if it is known; then other stacks are not checked.

    Returns:
        The stack, and warnings.

    Raises:
        CheckpointError: there is no stack of the config's depth, or several; layers are missing or
            beyond the depth; or another stack may or may not be per layer.
    """
    names = tuple(names)
    indices = _numbered(names)
    depth = decoder.num_layers
    prefix, warnings = recorded or "", list[str]()
    if prefix not in indices:
        prefix, warnings = _choose(indices, names, decoder, assume)
    numbers = indices[prefix]
    missing = sorted(set(range(depth)) - numbers)
    if missing:
        raise CheckpointError(
            f"{prefix} lacks {'layer' if len(missing) == 1 else 'layers'} "
            f"{shown_list([str(i) for i in missing])} of the {depth} that config.json counts; "
            "shards are missing, download the checkpoint again"
        )
    num_extra = _count_extra(prefix, numbers, decoder)
    beside = (*_beside(indices, decoder), *_assumed_beside(indices, prefix, depth, assume))
    if recorded is None:
        others = indices.keys() - {prefix, *(name for name, _ in beside), *_apart(decoder)}
        warnings += _check_others({name: indices[name] for name in others}, prefix, decoder, assume)
    needs = arch.architecture(decoder.model_type).needs
    lacking = [need for need in needs if not any(name.endswith(need) for name in names)]
    if lacking:
        raise CheckpointError(
            f"no tensors end in {shown_list(lacking)}: {decoder.model_type} then computes them "
            "from the layers' numbers, which change; load and save the base once with a current "
            "transformers, which writes them"
        )
    tables, width = _tables(names, decoder)
    return LayerStack(
        prefix,
        depth,
        num_extra,
        beside,
        frozenset(indices.keys() - {prefix}),
        tables=tables,
        table_width=width,
    ), tuple(warnings)


def _tables(names: Iterable[str], decoder: DecoderConfig) -> tuple[dict[str, int], int]:
    """The tensors outside the layers with a block for each layer, each with the axis of the blocks;
    and the length of a block.

    Raises:
        CheckpointError: config.json says that there are such tensors, and there are none.
    """
    known = arch.architecture(decoder.model_type).tables
    if known is None:
        return {}, 0
    width = decoder.fields.get(known.width_key)
    width = known.default_width if width is None else width
    if width == 0 or width is False:
        return {}, 0
    if type(width) is not int or width < 0:
        raise CheckpointError(f"config.json: {known.width_key} is {described(width)}, not a width")
    axes = {
        name: axis
        for module, axis in known.axes.items()
        for name in names
        if f".{name}".rpartition(".")[0].endswith(f".{module}")
    }
    for module in known.axes:
        if not any(f".{name}".rpartition(".")[0].endswith(f".{module}") for name in axes):
            raise CheckpointError(
                f"config.json: {known.width_key} is {width}, and there is no tensor of {module}; "
                "shards are missing, download the checkpoint again"
            )
    return axes, width


def _assumed_beside(
    indices: Mapping[str, set[int]], chosen: str, depth: int, assume: Mapping[str, Assumption]
) -> tuple[tuple[str, int], ...]:
    """Stacks outside the layers that follow the map by the user's decision (--assume)."""
    following = [
        p
        for p, assumption in assume.items()
        if assumption == "map" and p in indices and p != chosen
    ]
    for prefix in following:
        if indices[prefix] != set(range(depth)):
            raise CheckpointError(
                f"--assume {shown(prefix)}=map: it does not have an entry for each of the {depth} "
                f"layers; give {shown(prefix)}=keep, or leave it out"
            )
    return tuple((prefix, 0) for prefix in following)


def _beside(indices: dict[str, set[int]], decoder: DecoderConfig) -> tuple[tuple[str, int], ...]:
    prefixes = tuple(
        (prefix, first)
        for ending, first in arch.architecture(decoder.model_type).beside.items()
        for prefix in indices
        if prefix.endswith(ending)
    )
    for prefix, first in prefixes:
        if indices[prefix] != set(range(decoder.num_layers - first)):
            raise CheckpointError(
                f"{shown(prefix)} has {len(indices[prefix])} entries for "
                f"{decoder.num_layers - first} layers; "
                "shards are missing, download the checkpoint again"
            )
    return prefixes


def _choose(
    indices: Mapping[str, set[int]],
    names: Iterable[str],
    decoder: DecoderConfig,
    assume: Mapping[str, Assumption],
) -> tuple[str, list[str]]:
    """The prefix of the decoder's layers, and warnings. It is a known prefix, or else that of the
    only stack of the config's depth.
    """
    depth = decoder.num_layers
    known = [
        prefix
        for prefix in indices
        if prefix in arch.LAYER_STACKS or _is_bert_decoder(prefix, decoder)
    ]
    known = [prefix for prefix in known if prefix not in _apart(decoder)]
    complete = [
        prefix
        for prefix, found in indices.items()
        if len(found) == depth and max(found) == depth - 1
    ]
    right = [prefix for prefix in known if prefix in complete]
    likely = [
        prefix
        for prefix in complete
        if prefix not in known and _may_be_decoder(prefix, names, decoder)
    ]
    right = _not_assumed(right, assume)
    if len(right) > 1 or (len(known) > 1 and not right and not likely):
        raise CheckpointError(
            f"there are several layer stacks ({shown_list(sorted(right or known))}), and dus "
            "deepens one decoder; give --assume PREFIX=keep for those that are not the decoder's "
            "layers"
        )
    if right or (known and len(likely) != 1):
        chosen = (right or known)[0]
        _refuse_encoder_decoder(chosen, indices)
        return chosen, []
    if not likely:
        raise _no_stack(indices, decoder)
    by_name = _not_assumed(
        [prefix for prefix in likely if not _OTHER_TOWER.search(prefix)] or likely, assume
    )
    if len(by_name) != 1:
        raise CheckpointError(
            f"there are several stacks of {depth} numbered entries "
            f"({shown_list(sorted(by_name))}), and dus knows none "
            "of their names; give --assume PREFIX=keep for those that are not the decoder's layers"
        )
    (chosen,) = by_name
    _refuse_encoder_decoder(chosen, indices)
    return chosen, [
        f"the layers were taken to be {shown(chosen)}.0 to {depth - 1}, a place dus does not know"
    ]


def _not_assumed(prefixes: list[str], assume: Mapping[str, Assumption]) -> list[str]:
    """The stacks without a decision of the user; if all have one (such as one about differences
    between the layers), all of them.
    """
    return [prefix for prefix in prefixes if prefix not in assume] or prefixes


def _may_be_decoder(prefix: str, names: Iterable[str], decoder: DecoderConfig) -> bool:
    """Whether a stack of the right depth may be a decoder's: one named encoder may, if the model
    gives logits.

    ChatGLM's decoder is transformer.encoder.layers; models like BERT have `encoder.layer`, models
    like T5 `encoder.block`.
    """
    if prefix.endswith(("encoder.layer", "encoder.block")):
        return False
    if not prefix.endswith("encoder.layers"):
        return True
    heads, loaders = decoder.fields.get("architectures"), decoder.fields.get("auto_map")
    return (
        (isinstance(heads, list) and any(str(head).endswith("ForCausalLM") for head in heads))
        or (isinstance(loaders, dict) and "AutoModelForCausalLM" in loaders)
        or any(not _HEADS.isdisjoint(name.split(".")) for name in names)
    )


def _refuse_encoder_decoder(prefix: str, indices: Mapping[str, set[int]]) -> None:
    """Check that the decoder's prefix has no counterpart, such as model.encoder.layers beside
    model.decoder.layers.

    Raises:
        CheckpointError: it has one.
    """
    for mine, other in (("decoder", "encoder"), ("encoder", "decoder")):
        counterpart = re.sub(rf"\b{mine}\b", other, prefix)
        if counterpart != prefix and counterpart in indices:
            raise CheckpointError(
                f"there are both {shown(prefix)} and {shown(counterpart)}: this is an "
                "encoder-decoder model; dus deepens decoder-only language models"
            )


def _no_stack(indices: Mapping[str, set[int]], decoder: DecoderConfig) -> CheckpointError:
    depth = decoder.num_layers
    encoders = [
        prefix
        for prefix in indices
        if prefix.endswith(("encoder.layer", "encoder.layers", "encoder.block"))
    ]
    if any(len(indices[prefix]) == depth for prefix in encoders):
        return CheckpointError(
            f"the layers are named {shown_list(sorted(encoders))}: this is an encoder; "
            "dus deepens decoder-only language models"
        )
    numbered = f"; numbered names: {shown_list(sorted(indices))}" if indices else ""
    return CheckpointError(
        f"no tensors are named like the {depth} layers that config.json counts "
        f"(model.layers.0 to model.layers.{depth - 1}, for example){numbered}"
    )


def _apart(decoder: DecoderConfig) -> tuple[str, ...]:
    return (
        *arch.architecture(decoder.model_type).apart,
        *arch.architecture(decoder.wrapper_type).apart,
    )


def _is_bert_decoder(prefix: str, decoder: DecoderConfig) -> bool:
    return (
        decoder.is_causal_bert and prefix.count(".") <= 2 and prefix.endswith(arch.DECODER_SUFFIX)
    )


def _count_extra(prefix: str, numbers: set[int], decoder: DecoderConfig) -> int:
    beyond = sorted(index for index in numbers if index >= decoder.num_layers)
    if not beyond:
        return 0
    announced = decoder.fields.get("num_nextn_predict_layers")
    if type(announced) is int and beyond == list(
        range(decoder.num_layers, decoder.num_layers + announced)
    ):
        return announced
    raise CheckpointError(
        f"tensors named {prefix}.{beyond[0]} are beyond the {decoder.num_layers} layers that "
        "config.json counts; the config is of another model"
    )


def _check_others(
    others: Mapping[str, set[int]],
    prefix: str,
    decoder: DecoderConfig,
    assume: Mapping[str, Assumption],
) -> list[str]:
    """Check the numbered names outside the decoder's layers; return warnings.

    A multimodal model's encoders are outside the language model and stay as they are. Other stacks
    that are not numbered 0 to depth - 1 cannot have one entry per layer, and stay too; those that
    are may have one (gemma3n's altup projections).

    Raises:
        CheckpointError: a stack may or may not have one entry per layer.
    """
    language_model = prefix.rpartition(".")[0]
    assumed, kept = [], []
    for other in sorted(others):
        if arch.MTP_STACK.search(other):
            continue
        is_inside = language_model not in ("", "model") and other.startswith(f"{language_model}.")
        if other in assume:
            assumed.append(other)
        elif decoder.is_multimodal and not is_inside:
            continue
        elif others[other] != set(range(decoder.num_layers)):
            kept.append(other)
        else:
            raise CheckpointError(
                f"{shown(other)} is a numbered stack ({len(others[other])} entries) beside "
                f"{prefix}; dus does not know whether it follows the layer map; give --assume "
                f"{shown(other)}=keep, or =map if it has an entry per layer"
            )
    warnings = [f"{shown(other)} was kept, as --assume says" for other in assumed]
    if kept:
        warnings.append(
            f"{shown_list(kept)}: numbered, but not from 0 to {decoder.num_layers - 1} like the "
            "layers; dus kept them as they are"
        )
    return warnings
