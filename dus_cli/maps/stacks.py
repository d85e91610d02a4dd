"""Find the decoder's layers among a checkpoint's tensor names, and account for every other number."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from dus_cli.errors import CheckpointError, shown, shown_list
from dus_cli.maps import architectures as arch
from dus_cli.maps.layers import LayerMap, split_name
from dus_cli.maps.model_config import DecoderConfig


@dataclass(frozen=True)
class LayerStack:
    """Where the decoder's layers stand: tensors `prefix.0.…` to `prefix.n-1.…`.

    `num_extra` counts multi-token-prediction layers numbered n and beyond (deepseek_v3). `beside` are other
    prefixes that hold a tensor for each layer from some layer on, which is number 0 there (inkling2).
    """

    prefix: str
    num_layers: int
    num_extra: int = 0
    beside: tuple[tuple[str, int], ...] = ()

    def output_names(self, name: str, layer_map: LayerMap) -> tuple[str, ...]:
        """The names under which a base tensor stands in the output: none where the map drops its layer."""
        split = split_name(name)
        if split is None:
            return (name,)
        for prefix, first in self.beside:
            if split.prefix == prefix:
                return tuple(split.at(output - first) for output in layer_map.outputs[split.index + first])
        if split.prefix != self.prefix:
            return (name,)
        if split.index >= self.num_layers:
            return (split.at(split.index - self.num_layers + len(layer_map)),)
        return tuple(split.at(output) for output in layer_map.outputs[split.index])


def find_stack(names: Iterable[str], decoder: DecoderConfig) -> tuple[LayerStack, tuple[str, ...]]:
    """The decoder's layer stack, and warnings.

    Raises:
        CheckpointError: no stack of the config's depth, layers missing or beyond the depth, layers
            that hold no tensor, or a second stack that dus does not understand.
    """
    indices: dict[str, set[int]] = defaultdict(set)
    names = tuple(names)
    for name in names:
        split = split_name(name)
        if split is not None:
            indices[split.prefix].add(split.index)
    depth = decoder.num_layers
    prefix, warnings = _choose(indices, decoder)
    found = indices[prefix]
    missing = sorted(set(range(depth)) - found)
    if missing:
        raise CheckpointError(
            f"{prefix} lacks {'layer' if len(missing) == 1 else 'layers'} {shown_list([str(i) for i in missing])} "
            f"of the {depth} that config.json counts; shards are missing, download the checkpoint again"
        )
    num_extra = _count_extra(prefix, found, decoder)
    beside = _beside(indices, decoder)
    _check_others(indices, (prefix, *(name for name, _ in beside)), decoder)
    needs = arch.architecture(decoder.model_type).needs
    lacking = [need for need in needs if not any(name.endswith(need) for name in names)]
    if lacking:
        raise CheckpointError(
            f"no tensors end in {shown_list(lacking)}: {decoder.model_type} then makes them up from the layers' "
            "numbers, which change; load and save the base once with a current transformers, which writes them"
        )
    return LayerStack(prefix, depth, num_extra, beside), warnings


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
                f"{shown(prefix)} has {len(indices[prefix])} entries for {decoder.num_layers - first} layers; "
                "shards are missing, download the checkpoint again"
            )
    return found


def _choose(indices: dict[str, set[int]], decoder: DecoderConfig) -> tuple[str, tuple[str, ...]]:
    depth = decoder.num_layers
    known = [prefix for prefix in indices if prefix in arch.LAYER_STACKS or _is_bert_decoder(prefix, decoder)]
    known = [prefix for prefix in known if prefix not in _apart(decoder)]
    if len(known) == 1:
        return known[0], ()
    if len(known) > 1:
        raise CheckpointError(
            f"there are several layer stacks ({shown_list(sorted(known))}) where one decoder is meant; "
            "dus deepens decoder-only language models"
        )
    encoders = [prefix for prefix in indices if prefix.endswith(("encoder.layer", "encoder.layers", "encoder.block"))]
    if encoders:
        raise CheckpointError(
            f"the layers stand under {shown_list(sorted(encoders))}: this is an encoder; "
            "dus deepens decoder-only language models"
        )
    complete = [prefix for prefix, found in indices.items() if len(found) == depth and max(found) == depth - 1]
    if len(complete) != 1:
        seen = f"; numbered names: {shown_list(sorted(indices))}" if indices else ""
        raise CheckpointError(
            f"no tensors are named like the {depth} layers that config.json counts "
            f"(model.layers.0 to model.layers.{depth - 1}, for example){seen}"
        )
    warning = f"the layers were taken to be {shown(complete[0])}.0 to {depth - 1}, a place dus does not know"
    return complete[0], (warning,)


def _apart(decoder: DecoderConfig) -> tuple[str, ...]:
    return (*arch.architecture(decoder.model_type).apart, *arch.architecture(decoder.wrapper_type).apart)


def _is_bert_decoder(prefix: str, decoder: DecoderConfig) -> bool:
    return decoder.is_causal_bert and prefix.count(".") <= 2 and prefix.endswith(arch.DECODER_SUFFIX)


def _count_extra(prefix: str, found: set[int], decoder: DecoderConfig) -> int:
    beyond = sorted(index for index in found if index >= decoder.num_layers)
    if not beyond:
        return 0
    announced = decoder.fields.get("num_nextn_predict_layers")
    if type(announced) is int and beyond == list(range(decoder.num_layers, decoder.num_layers + announced)):
        return announced
    raise CheckpointError(
        f"tensors named {prefix}.{beyond[0]} lie beyond the {decoder.num_layers} layers that config.json counts; "
        "the config is of another model"
    )


def _check_others(indices: dict[str, set[int]], known: tuple[str, ...], decoder: DecoderConfig) -> None:
    """Numbered names outside the decoder's layers: understood, or an error that names them.

    A multimodal model's encoders stand outside the language model and stay as they are. Inside it a
    numbered stack may be a table with one entry per layer (gemma3n's altup projections).
    """
    prefix = known[0]
    language_model = prefix.rpartition(".")[0]
    for other in sorted(indices.keys() - {*known, *_apart(decoder)}):
        if arch.MTP_STACK.search(other):
            continue
        is_inside = language_model not in ("", "model") and other.startswith(f"{language_model}.")
        if is_inside or not decoder.is_multimodal:
            raise CheckpointError(
                f"{shown(other)} is a numbered stack ({len(indices[other])} entries) beside {prefix}; "
                "dus does not know whether it follows the layer map"
            )
