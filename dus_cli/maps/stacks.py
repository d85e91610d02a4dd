"""Find the decoder's layers among a checkpoint's tensor names, and account for every other
number.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dus_cli.errors import CheckpointError, described, shown, shown_list
from dus_cli.maps import architectures as arch
from dus_cli.maps.layers import LayerMap, number_span, split_name
from dus_cli.maps.model_config import DecoderConfig
from dus_cli.maps.naming import NO_ASSUMPTIONS, Assumption, NumberedNames

# Parts of a prefix by which a stack is of another tower than the language model's, whatever its
# depth.
_OTHER_TOWER = re.compile(
    r"vision|visual|image|img|audio|speech|video|(^|[._])(vit|vpm|apm|clip|siglip|encoder|resampler|perceiver|projector"
    r"|connector|draft|medusa|eagle)([._]|$)|encoder\.|projector|resampler"
)

# Tensors of a head that gives logits: an encoder's stack alone has none.
_HEADS = frozenset(["lm_head", "output_layer", "embed_out"])


@dataclass(frozen=True)
class LayerStack:
    """Where the decoder's layers stand: tensors `prefix.0.…` to `prefix.n-1.…`.

    `num_extra` counts multi-token-prediction layers numbered n and beyond (deepseek_v3). `beside`
    are other prefixes that hold a tensor for each layer from some layer on, which is number 0 there
    (inkling2). `tables` are tensors outside the layers with a block for each of them, and the axis
    along which the blocks lie; each is `table_width` long (gemma3n). `others` are all numbered
    prefixes but the layers'.
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
        """The numbered names, for what a config says by them."""
        return NumberedNames(self.prefix, self.others)

    def output_names(self, name: str, layer_map: LayerMap) -> tuple[str, ...]:
        """The names under which a base tensor stands in the output: none where the map drops its
        layer.
        """
        split = split_name(name)
        if split is None:
            return (name,)
        return tuple(map(split.at, self.output_numbers(split.prefix, split.index, layer_map)))

    def output_numbers(self, prefix: str, index: int, layer_map: LayerMap) -> tuple[int, ...]:
        """The numbers that a base tensor has in the output instead of `index`, which stands
        behind `prefix`.
        """
        if prefix == self.prefix:
            if index < self.num_layers:
                return layer_map.outputs[index]
            return (index - self.num_layers + len(layer_map),)
        for other, first in self.beside:
            if prefix == other:
                return tuple(output - first for output in layer_map.outputs[index + first])
        return (index,)


def _numbered(names: Iterable[str]) -> dict[str, set[int]]:
    """The numbers behind each prefix of tensor names that have one."""
    found: dict[str, set[int]] = defaultdict(set)
    for name in names:
        span = number_span(name)
        if span is not None:
            start, end = span
            found[name[: start - 1]].add(int(name[start:end]))
    return found


def find_stack(
    names: Iterable[str],
    decoder: DecoderConfig,
    assume: Mapping[str, Assumption] = NO_ASSUMPTIONS,
    recorded: str | None = None,
) -> tuple[LayerStack, tuple[str, ...]]:
    """The decoder's layer stack, and warnings.

    Args:
        names: of all tensors.
        decoder: what config.json says.
        assume: other numbered stacks that are kept, or that follow the map, by prefix.
        recorded: the stack's prefix, where it is known: then no other stack is doubted.

    Raises:
        CheckpointError: no stack of the config's depth, layers missing or beyond the depth, layers
            that hold no tensor, or a second stack that dus does not understand.
    """
    names = tuple(names)
    indices = _numbered(names)
    depth = decoder.num_layers
    prefix, warnings = recorded or "", list[str]()
    if prefix not in indices:
        prefix, warnings = _choose(indices, names, decoder, assume)
    found = indices[prefix]
    missing = sorted(set(range(depth)) - found)
    if missing:
        raise CheckpointError(
            f"{prefix} lacks {'layer' if len(missing) == 1 else 'layers'} "
            f"{shown_list([str(i) for i in missing])} of the {depth} that config.json counts; "
            "shards are missing, download the checkpoint again"
        )
    num_extra = _count_extra(prefix, found, decoder)
    beside = (*_beside(indices, decoder), *_assumed_beside(indices, prefix, depth, assume))
    if recorded is None:
        others = indices.keys() - {prefix, *(name for name, _ in beside), *_apart(decoder)}
        warnings += _check_others({name: indices[name] for name in others}, prefix, decoder, assume)
    needs = arch.architecture(decoder.model_type).needs
    lacking = [need for need in needs if not any(name.endswith(need) for name in names)]
    if lacking:
        raise CheckpointError(
            f"no tensors end in {shown_list(lacking)}: {decoder.model_type} then makes them up "
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
    """The tensors outside the layers that have a block for each, with its axis; and how long a
    block is.

    Raises:
        CheckpointError: config.json says that there are some, and there are none.
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
    found = {
        name: axis
        for module, axis in known.axes.items()
        for name in names
        if f".{name}".rpartition(".")[0].endswith(f".{module}")
    }
    for module in known.axes:
        if not any(f".{name}".rpartition(".")[0].endswith(f".{module}") for name in found):
            raise CheckpointError(
                f"config.json: {known.width_key} is {width}, and there is no tensor of {module}; "
                "shards are missing, download the checkpoint again"
            )
    return found, width


def _assumed_beside(
    indices: Mapping[str, set[int]], chosen: str, depth: int, assume: Mapping[str, Assumption]
) -> tuple[tuple[str, int], ...]:
    """Stacks outside the layers that follow the map because a person says so."""
    following = [
        p
        for p, assumption in assume.items()
        if assumption == "map" and p in indices and p != chosen
    ]
    for prefix in following:
        if indices[prefix] != set(range(depth)):
            raise CheckpointError(
                f"--assume {shown(prefix)}=map: it has no entry for each of the {depth} layers; "
                f"say {shown(prefix)}=keep, or leave it out"
            )
    return tuple((prefix, 0) for prefix in following)


def _beside(indices: dict[str, set[int]], decoder: DecoderConfig) -> tuple[tuple[str, int], ...]:
    found = tuple(
        (prefix, first)
        for ending, first in arch.architecture(decoder.model_type).beside.items()
        for prefix in indices
        if prefix.endswith(ending)
    )
    for prefix, first in found:
        if indices[prefix] != set(range(decoder.num_layers - first)):
            raise CheckpointError(
                f"{shown(prefix)} has {len(indices[prefix])} entries for "
                f"{decoder.num_layers - first} layers; "
                "shards are missing, download the checkpoint again"
            )
    return found


def _choose(
    indices: Mapping[str, set[int]],
    names: Iterable[str],
    decoder: DecoderConfig,
    assume: Mapping[str, Assumption],
) -> tuple[str, list[str]]:
    """The prefix of the decoder's layers, and warnings: a known one, or else the only stack of
    the config's depth.
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
            f"there are several layer stacks ({shown_list(sorted(right or known))}) where one "
            "decoder is meant; dus deepens decoder-only language models; for another that has "
            "nothing to do with the layers, say --assume PREFIX=keep"
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
            "of their names; say --assume PREFIX=keep of those that are not the decoder's layers"
        )
    (chosen,) = by_name
    _refuse_encoder_decoder(chosen, indices)
    return chosen, [
        f"the layers were taken to be {shown(chosen)}.0 to {depth - 1}, a place dus does not know"
    ]


def _not_assumed(prefixes: list[str], assume: Mapping[str, Assumption]) -> list[str]:
    """Of several stacks those about which no person decided; of one that stack, whose
    differences may be assumed.
    """
    return [prefix for prefix in prefixes if prefix not in assume] or prefixes


def _may_be_decoder(prefix: str, names: Iterable[str], decoder: DecoderConfig) -> bool:
    """Whether a stack of the right depth may be a decoder's: one called an encoder is, if the model
    gives logits.

    ChatGLM's decoder stands under transformer.encoder.layers; BERT's kin have `encoder.layer`, T5's
    `encoder.block`.
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
    """Check that what was taken for the decoder has no counterpart: model.decoder.layers, and
    model.encoder.layers.
    """
    for mine, other in (("decoder", "encoder"), ("encoder", "decoder")):
        counterpart = re.sub(rf"\b{mine}\b", other, prefix)
        if counterpart != prefix and counterpart in indices:
            raise CheckpointError(
                f"{shown(prefix)} stands beside {shown(counterpart)}: this is an encoder-decoder "
                "model; dus deepens decoder-only language models"
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
            f"the layers stand under {shown_list(sorted(encoders))}: this is an encoder; "
            "dus deepens decoder-only language models"
        )
    seen = f"; numbered names: {shown_list(sorted(indices))}" if indices else ""
    return CheckpointError(
        f"no tensors are named like the {depth} layers that config.json counts "
        f"(model.layers.0 to model.layers.{depth - 1}, for example){seen}"
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


def _count_extra(prefix: str, found: set[int], decoder: DecoderConfig) -> int:
    beyond = sorted(index for index in found if index >= decoder.num_layers)
    if not beyond:
        return 0
    announced = decoder.fields.get("num_nextn_predict_layers")
    if type(announced) is int and beyond == list(
        range(decoder.num_layers, decoder.num_layers + announced)
    ):
        return announced
    raise CheckpointError(
        f"tensors named {prefix}.{beyond[0]} lie beyond the {decoder.num_layers} layers that "
        "config.json counts; the config is of another model"
    )


def _check_others(
    others: Mapping[str, set[int]],
    prefix: str,
    decoder: DecoderConfig,
    assume: Mapping[str, Assumption],
) -> list[str]:
    """Numbered names outside the decoder's layers: understood, or an error that names them. Returns
    warnings.

    A multimodal model's encoders stand outside the language model and stay as they are. Elsewhere,
    what is not numbered 0 to depth - 1 is no table with one entry per layer, and stays as well;
    what is so numbered may be one (gemma3n's altup projections).
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
                f"{prefix}; dus does not know whether it follows the layer map; say --assume "
                f"{shown(other)}=keep, or =map if it has an entry per layer"
            )
    warnings = [f"{shown(other)} was kept, as --assume says" for other in assumed]
    if kept:
        warnings.append(
            f"{shown_list(kept)}: numbered, but not from 0 to {decoder.num_layers - 1} like the "
            "layers; dus kept them as they are"
        )
    return warnings
