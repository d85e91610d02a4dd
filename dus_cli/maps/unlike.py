"""Layers that hold other tensors than others: what a config of a type in no table may say without
dus seeing it.

The evidence is in the headers alone: which tensors a layer has, and of which shapes. Where they
differ, either something that followed the map tells the same layers apart, or the map has to keep
the pattern that is seen along the depth, as a class would continue it that goes by the layers'
numbers. Anything else is refused, naming the layers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dus_cli.errors import ConfigError, shown, shown_list
from dus_cli.maps.layers import LayerMap, split_name
from dus_cli.maps.rules import Kinds

# What older files hold of a layer that is no parameter, in some layers or in all.
_BUFFERS = (
    "inv_freq",
    "masked_bias",
    "position_ids",
    "attn.bias",
    "attention.bias",
    "rotary_emb.cos_cached",
)

# No pattern along the depth of a published model is longer, and looking for one takes time that
# grows with this.
_LONGEST_PATTERN = 128

_FLOATS = frozenset(("F64", "F32", "F16", "BF16"))


@dataclass
class LayerTensors:
    """What each base layer holds: the ends of its tensors' names, with their shapes.

    `is_quantised`: some of them are of types that only quantisers write.
    """

    prefix: str
    by_layer: list[dict[str, tuple[int, ...]]]
    is_quantised: bool = False

    @classmethod
    def of(
        cls, tensors: Iterable[tuple[str, str, tuple[int, ...]]], prefix: str, num_layers: int
    ) -> LayerTensors:
        """Sort tensors, given as (name, dtype, shape)."""
        found = cls(prefix, [{} for _ in range(num_layers)])
        for name, dtype, shape in tensors:
            split = split_name(name)
            if split is not None and split.prefix == prefix and split.index < num_layers:
                # Interned: every layer has the same ones.
                found.by_layer[split.index][sys.intern(split.suffix)] = shape
                found.is_quantised = found.is_quantised or dtype not in _FLOATS
        return found

    def signatures(self, *, is_quantised: bool) -> list[frozenset[object]]:
        """For each layer what tells it from layers of another build.

        A quantiser stores a module in several tensors, of sizes that follow from its bits: there
        the modules' names alone count. Biases and buffers do not: they may be left out.
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
    tensors: LayerTensors, layer_map: LayerMap, tells: Kinds, *, is_quantised: bool
) -> tuple[str, ...]:
    """Warnings about layers whose differences nothing in the config explains, and that the map
    keeps in their pattern.

    Raises:
        ConfigError: the map moves such layers to numbers at which the model's class may expect
            others.
    """
    signatures = tensors.signatures(is_quantised=is_quantised)
    if len(set(signatures)) == 1 or _explain(tells, signatures):
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
        "layers' numbers, which this map changes; use a map that keeps the pattern, or say "
        f"--assume {shown(tensors.prefix)}=keep if the deeper model loads"
    )


def _explain(tells: Kinds, signatures: Sequence[object]) -> bool:
    """Whether what the config says of the layers tells apart all that are built unlike."""
    said = list(zip(*tells.values(), strict=True)) if tells else [()] * len(signatures)
    return len(set(zip(said, signatures, strict=True))) == len(set(said))


def _groups(signatures: Sequence[frozenset[object]]) -> str:
    """Which layers hold what: for each build its layers, and a tensor that others lack or have
    in another shape.
    """
    layers: dict[frozenset[object], list[int]] = {}
    for layer, signature in enumerate(signatures):
        layers.setdefault(signature, []).append(layer)
    shared = frozenset.intersection(*layers)
    said = []
    for signature, members in layers.items():
        own = sorted(map(_named, signature - shared))
        what = shown_list(own, 1) if own else "none of what the others have"
        said.append(f"{_ranges(members)}: {what}")
    return shown_list(said, 4) if len(said) < 5 else f"{len(said)} builds, {shown_list(said, 3)}"


def _named(entry: object) -> str:
    if isinstance(entry, tuple):
        return f"{shown(entry[0])} {list(entry[1])}"
    return shown(entry)


def _ranges(layers: Sequence[int]) -> str:
    """The numbers, neighbours joined.

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
    """Whether the output's layers are those of the base's pattern, continued by the layers'
    numbers.

    The pattern is the shortest that holds for the base: k first layers, then a period that is seen
    twice at least.
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
    """How many layers come before the pattern, and its period; None where the depth shows none."""
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
