"""Layers that hold different tensors, in a model type in no table: its config may describe them in
a way that dus does not know.

The headers show which tensors a layer has, and their shapes. If layers differ, either a field that
followed the map must tell the same layers apart, or the map must keep their pattern along the
depth, as a class that goes by the layers' numbers would continue it. Anything else is refused, with
the layers' numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dus_cli.errors import ConfigError, shown, shown_list
from dus_cli.maps.layers import LayerMap, split_name
from dus_cli.maps.rules import Kinds

# Buffers, which are not parameters, that older files may hold in some layers or in all.
_BUFFERS = (
    "inv_freq",
    "masked_bias",
    "position_ids",
    "attn.bias",
    "attention.bias",
    "rotary_emb.cos_cached",
)

# No published model has a longer pattern along the depth; the search takes time that grows with
# this.
_LONGEST_PATTERN = 128

_FLOATS = frozenset(("F64", "F32", "F16", "BF16"))


@dataclass
class LayerTensors:
    """The tensors of each base layer: their names within the layer, with their shapes.

    `is_quantised`: some have a dtype that only quantisers write.
    """

    prefix: str
    by_layer: list[dict[str, tuple[int, ...]]]
    is_quantised: bool = False

    @classmethod
    def of(
        cls, tensors: Iterable[tuple[str, str, tuple[int, ...]]], prefix: str, num_layers: int
    ) -> LayerTensors:
        """Sort tensors, given as (name, dtype, shape)."""
        layers = cls(prefix, [{} for _ in range(num_layers)])
        for name, dtype, shape in tensors:
            split = split_name(name)
            if split is not None and split.prefix == prefix and split.index < num_layers:
                # interned, because all layers have the same names
                layers.by_layer[split.index][sys.intern(split.suffix)] = shape
                layers.is_quantised = layers.is_quantised or dtype not in _FLOATS
        return layers

    def signatures(self, *, is_quantised: bool) -> list[frozenset[object]]:
        """For each layer, what distinguishes it from layers with other tensors.

        A quantiser stores a module in several tensors, whose sizes depend on its bits: then only
        the modules' names count. Biases and buffers do not count, because they may be left out.
        """
        if is_quantised or self.is_quantised:
            return [frozenset(name.rpartition(".")[0] for name in layer) for layer in self.by_layer]
        return [
            frozenset(
                (name, shape)
                for name, shape in layer.items()
                if not name.endswith(("bias", *_BUFFERS))
            )
            for layer in self.by_layer
        ]


def check_alike(
    tensors: LayerTensors, layer_map: LayerMap, distinctions: Kinds, *, is_quantised: bool
) -> tuple[str, ...]:
    """Check that the map may move layers with different tensors.

    Returns:
        A warning if nothing in the config explains the differences, but the map keeps their
        pattern.

    Raises:
        ConfigError: the map moves such layers to numbers at which the model's class may expect
            others.
    """
    signatures = tensors.signatures(is_quantised=is_quantised)
    if len(set(signatures)) == 1 or _explain(distinctions, signatures):
        return ()
    groups = _groups(signatures)
    if _keeps_pattern(signatures, layer_map):
        warning = (
            f"the layers are not all built alike ({groups}), and nothing that dus knows in "
            "config.json says which"
        )
        return (f"{warning} is which; the map keeps the pattern along the depth",)
    raise ConfigError(
        f"the layers of {shown(tensors.prefix)} are not all built alike ({groups}), and nothing "
        "that dus knows in config.json says which is which, so the model's code may go by the "
        "layers' numbers, which this map changes; use a map that keeps the pattern, or give "
        f"--assume {shown(tensors.prefix)}=keep if the deeper model loads"
    )


def _explain(distinctions: Kinds, signatures: Sequence[object]) -> bool:
    """Whether the config distinguishes all layers that hold different tensors."""
    kinds = (
        list(zip(*distinctions.values(), strict=True)) if distinctions else [()] * len(signatures)
    )
    return len(set(zip(kinds, signatures, strict=True))) == len(set(kinds))


def _groups(signatures: Sequence[frozenset[object]]) -> str:
    """The layers with the same tensors, in words: for each group its layers, and a tensor that
    others lack or have in another shape.
    """
    layers: dict[frozenset[object], list[int]] = {}
    for layer, signature in enumerate(signatures):
        layers.setdefault(signature, []).append(layer)
    shared = frozenset.intersection(*layers)
    groups = []
    for signature, members in layers.items():
        own_entries = sorted(map(_named, signature - shared))
        description = shown_list(own_entries, 1) if own_entries else "none of what the others have"
        groups.append(f"{_ranges(members)}: {description}")
    return (
        shown_list(groups, 4)
        if len(groups) < 5
        else f"{len(groups)} builds, {shown_list(groups, 3)}"
    )


def _named(entry: object) -> str:
    if isinstance(entry, tuple):
        return f"{shown(entry[0])} {list(entry[1])}"
    return shown(entry)


def _ranges(layers: Sequence[int]) -> str:
    """Layer numbers in words, with consecutive ones as ranges.

    >>> _ranges([0, 1, 2, 5, 7])
    'layers 0-2, 5, 7'
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    text = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {shown_list(text, 8)}"


def _keeps_pattern(signatures: Sequence[object], layer_map: LayerMap) -> bool:
    """Whether the output's layers continue the base's pattern along the depth.

    The pattern is the shortest that fits the base: k first layers, then a period that occurs at
    least twice.
    """
    if layer_map.sources == tuple(range(layer_map.num_base_layers)):
        return True
    pattern = _pattern(signatures)
    if pattern is None:
        return False
    first, period = pattern
    built = [signatures[base] for base in layer_map.sources]
    return all(
        kind == signatures[output if output < first else first + (output - first) % period]
        for output, kind in enumerate(built)
    )


def _pattern(signatures: Sequence[object]) -> tuple[int, int] | None:
    """How many layers come before the pattern, and its period; None if there is no pattern."""
    n = len(signatures)
    for length in range(1, min(n, _LONGEST_PATTERN)):
        for period in range(1, length + 1):
            first = length - period
            if n - first < 2 * period:
                continue
            if all(
                signatures[layer] == signatures[layer - period]
                for layer in range(first + period, n)
            ):
                return first, period
    return None
