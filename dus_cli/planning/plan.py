"""`UpscalePlan`: everything that will be written, decided before the first byte. It writes nothing,
so it is also the dry run.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from dus_cli.common.bounds import check_numbers
from dus_cli.common.libraries import require
from dus_cli.common.memory import collector_paused
from dus_cli.common.reference import ModelRef
from dus_cli.errors import UsageError, shown
from dus_cli.maps.architectures import KNOWN_TYPES, TRIED_TYPES
from dus_cli.maps.engines import parse_engines
from dus_cli.maps.layers import LayerMap, doubled_map, parse_double, parse_layers, stack, typed_map
from dus_cli.maps.model_config import (
    DecoderConfig,
    DeeperConfig,
    decoder_config,
    deepen_config,
    refuse_types,
)
from dus_cli.maps.naming import QUANTIZATION_KEYS, Assumption
from dus_cli.maps.recipes import RECIPES, recipe_map
from dus_cli.maps.rules import Kinds
from dus_cli.maps.stacks import LayerStack, find_stack
from dus_cli.maps.starts import COPY, StartRule, factors
from dus_cli.maps.unlike import LayerTensors, check_alike
from dus_cli.planning.dtypes import Dtype, check_castable, output_config
from dus_cli.planning.judging import Judged, Maps, check_right, choose_trim, engine_warnings
from dus_cli.planning.layout import Placement, ShardLayout, lay_out
from dus_cli.planning.post_norms import scaled_tensors
from dus_cli.planning.projections import zero_patterns
from dus_cli.planning.sidecars import go_along
from dus_cli.planning.treatment import Treatment
from dus_cli.source.base_card import BaseCard, read_base_card
from dus_cli.source.belonging import Carried, belongs_by_name, carried_files
from dus_cli.source.checkpoint import Checkpoint
from dus_cli.source.files import WRITTEN_ANEW, is_index, walk_order
from dus_cli.source.weights import INDEX_NAME, SINGLE_NAME

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class MapRequest:
    """The layer map that the user requests, before the base's depth is known.

    Attributes:
        trim: layers trimmed from each copy; None lets dus choose.
        layers: any other map, as half-open ranges of base layers.
        copies: copies to stack.
        recipe: a published map by name. `layers`, `double` and `recipe` exclude each other, `trim`
            and `copies`.
        identity: new layers start as identities.
        assume: the user's decisions about fields of config.json, and numbered stacks of tensors,
            that dus does not know, as (field or prefix, "keep" or "map").
        engines: names of engines that must compute the output as config.json says.
        double: the base with the layers of these ranges twice.
        start: the start of new layers, if they are not identities.

    Raises:
        UsageError: options exclude each other, a number is out of bounds, or there is no such
            recipe or engine.
        LayerMapError: `layers` or `double` does not have the right form.
    """

    trim: int | None = None
    layers: str | None = None
    copies: int = 2
    recipe: str | None = None
    identity: bool = False
    assume: tuple[tuple[str, Assumption], ...] = ()
    engines: tuple[str, ...] = ()
    double: str | None = None
    start: StartRule = COPY

    def __post_init__(self) -> None:
        parse_engines(self.engines)
        check_numbers(trim=self.trim, copies=self.copies)
        options = [
            name for name in ("layers", "double", "recipe") if getattr(self, name) is not None
        ]
        if options and (len(options) > 1 or self.trim is not None or self.copies != 2):
            others = [
                f"--{name}"
                for name in ("trim", "layers", "double", "recipe", "copies")
                if name != options[-1]
            ]
            raise UsageError(
                f"--{options[-1]} gives the whole map; leave out {' and '.join(others)}"
            )
        if self.recipe is not None and self.recipe not in RECIPES:
            raise UsageError(
                f"there is no recipe {shown(self.recipe)!r}; use one of {', '.join(RECIPES)}"
            )
        if self.layers is not None:
            parse_layers(self.layers)
        if self.double is not None:
            parse_double(self.double)
        if self.start.name != "copy" and self.starts_as_base:
            option = "--identity" if self.identity else f"--recipe {self.recipe}"
            raise UsageError(f"{option} decides how new layers start; leave out --start")

    @property
    def leaves_trim_open(self) -> bool:
        """Whether no option gives the layers: then dus chooses the trim."""
        return all(option is None for option in (self.trim, self.layers, self.double, self.recipe))

    @property
    def starts_as_base(self) -> bool:
        """Whether the new layers start as identities, by the request or by its recipe."""
        return self.identity or (self.recipe is not None and RECIPES[self.recipe].identity)

    def resolve(self, num_layers: int) -> LayerMap:
        """The map for a base of this depth.

        Raises:
            LayerMapError: the map is not valid for this depth.
        """
        if self.recipe is not None:
            return recipe_map(self.recipe, num_layers)
        if self.double is not None:
            return doubled_map(self.double, num_layers)
        return (
            stack(num_layers, self.trim, self.copies)
            if self.layers is None
            else typed_map(self.layers, num_layers)
        )


@dataclass(frozen=True)
class Base:
    """The base as the lineage records it: as typed, and its commit if it is from the Hub.

    `recorded_name` is the name in a lineage that is followed again; the directory may now have
    another.
    """

    ref: ModelRef
    commit: str | None = None
    recorded_name: str | None = None

    @property
    def name(self) -> str:
        return self.recorded_name or self.ref.name


class Start(str, Enum):
    """How an output differs from its base before training.

    `seams`: layers are adjacent that were not in the base, which makes it worse; `scaled`: the
    same, and some layers add less or more than in the base; `identity`: its new layers add nothing
    yet; `base`: it has exactly the base's layers in order; `part`: it has consecutive layers of the
    base, and no seam.
    """

    seams = "seams"
    scaled = "scaled"
    identity = "identity"
    base = "base"
    part = "part"


@dataclass(frozen=True)
class UpscalePlan:
    """The whole output: shards, config, files, and the numbers in the report.

    Attributes:
        base: the base, as the lineage records it.
        checkpoint: the open base.
        request: what the user requested.
        layer_map: the base layer of each output layer.
        max_shard_bytes: size of the largest shard.
        stack: the names of the layers.
        treatment: which tensors are cast, scaled or zeros.
        config: config.json of the output.
        kinds: by field, the kind of each base layer.
        shards: the layout of each shard by file name, in order.
        files: the base's other files that are copied, as (path with "/", file).
        sidecars: the contents of files whose layer names followed the map, by file name.
        left_out: the base's files that are not in the output.
        warnings: what a person should check, one line each.
        base_card: the metadata of the base's card.
        num_absent_bytes: bytes of those `files` that were not fetched.
        engines: the judgement of each inference engine.
        why_trim: why a trim that dus chose is not a quarter of the layers; else None.
    """

    base: Base
    checkpoint: Checkpoint
    request: MapRequest
    layer_map: LayerMap
    max_shard_bytes: int
    stack: LayerStack
    treatment: Treatment
    config: dict[str, Any]
    kinds: Kinds
    shards: dict[str, ShardLayout]
    files: tuple[tuple[str, Path], ...]
    sidecars: Mapping[str, dict[str, Any]]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]
    base_card: BaseCard
    num_absent_bytes: int = 0
    engines: tuple[Judged, ...] = ()
    why_trim: str | None = None

    @property
    def options(self) -> str:
        """The options that make this plan again, with defaults that depend on the model."""
        request, trim = self.request, self.layer_map.trim
        if request.recipe is not None:
            options = f"--recipe {request.recipe}"
        elif request.double is not None:
            options = f"--double {request.double}"
        else:
            options = f"--layers {self.layer_map}" if trim is None else f"--trim {trim}"
        if request.copies != 2:
            options += f" --copies {request.copies}"
        if request.identity and not (
            request.recipe is not None and RECIPES[request.recipe].identity
        ):
            options += " --identity"
        if request.start.scales:
            options += f" --start {request.start}"
        if self.treatment.dtype is not None:
            options += f" --dtype {self.treatment.dtype.value}"
        for field, assumption in request.assume:
            options += f" --assume {shlex.quote(f'{field}={assumption}')}"
        if self.max_shard_bytes != DEFAULT_SHARD_BYTES:
            options += f" --max-shard-size {self.max_shard_bytes}B"
        return options

    @property
    def start(self) -> Start:
        """How the output differs from its base before training."""
        layer_map = self.layer_map
        if self.treatment.zeros:
            return Start.identity
        if self.treatment.scaled:
            return Start.scaled
        if layer_map.seams:
            return Start.seams
        return Start.base if len(layer_map) == layer_map.num_base_layers else Start.part

    @property
    def output_kinds(self) -> Kinds:
        """By field, the kind of each output layer, which is its source's."""
        return {
            name: [kinds[base] for base in self.layer_map.sources]
            for name, kinds in self.kinds.items()
        }

    @property
    def along(self) -> list[str]:
        """The names of the base's other files that are in the output, changed or as they are."""
        return sorted([*(name for name, _ in self.files), *self.sidecars], key=walk_order)

    @property
    def placements(self) -> Iterator[Placement]:
        """Every output tensor."""
        return chain.from_iterable(layout.placements for layout in self.shards.values())

    def check_libraries(self) -> None:
        """Check that the libraries that writing takes are installed.

        Raises:
            MissingExtraError: a cast needs torch, or a factor numpy, and it is missing.
        """
        if any(placement.dtype != placement.tensor.dtype for placement in self.placements):
            require("--dtype", "torch")
        if self.treatment.scaled:
            require("--start", "numpy")

    @property
    def num_tensors(self) -> int:
        return sum(layout.num_tensors for layout in self.shards.values())

    @cached_property
    def num_parameters(self) -> int:
        return sum(layout.num_parameters for layout in self.shards.values())

    @property
    def num_data_bytes(self) -> int:
        """Bytes of tensor data, the index's `total_size`."""
        return sum(layout.num_bytes - layout.data_start for layout in self.shards.values())

    @cached_property
    def num_clonable_bytes(self) -> int:
        """Bytes that a file system with reflinks need not write."""
        return sum(len(s.clonable) for layout in self.shards.values() for s in layout.segments())

    @property
    def num_file_bytes(self) -> int:
        """Bytes of the base's other files that are copied."""
        return self.num_absent_bytes + sum(
            path.stat().st_size for _, path in self.files if path.exists()
        )

    def index(self) -> dict[str, Any] | None:
        """The content of model.safetensors.index.json; None if there is only one shard."""
        if SINGLE_NAME in self.shards:
            return None
        weight_map = {
            p.name: name for name, layout in self.shards.items() for p in layout.placements
        }
        metadata = {"total_size": self.num_data_bytes, "total_parameters": self.num_parameters}
        return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}

    def text_files(self) -> dict[str, str]:
        """The texts of config.json, the sidecars and the index, by file name."""
        index = self.index()
        records = {
            **self.sidecars,
            "config.json": self.config,
            **({} if index is None else {INDEX_NAME: index}),
        }
        return {name: dump_json(record) for name, record in records.items()}

    @property
    def text_names(self) -> list[str]:
        """The names of `text_files`."""
        return [
            *self.sidecars,
            "config.json",
            *([] if SINGLE_NAME in self.shards else [INDEX_NAME]),
        ]


def dump_json(value: object) -> str:
    """JSON in transformers' layout, with keys in their order; ASCII, so that any text can be
    written.
    """
    return json.dumps(value, indent=2) + "\n"


@collector_paused()
def make_plan(
    base: Base,
    checkpoint: Checkpoint,
    request: MapRequest,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: Dtype | None = None,
    absent: Mapping[str, int] | None = None,
) -> UpscalePlan:
    """Decide everything that will be written. Reads only headers, and small files.

    Args:
        base: the base, as the lineage records it.
        checkpoint: the open base.
        request: the layer map and start.
        max_shard_bytes: size of the largest shard.
        dtype: what floating-point tensors are cast to; None for no cast.
        absent: sizes in bytes of files of the repo that are not in the checkpoint's folder.

    Raises:
        LayerMapError: the map is not valid for this model.
        ConfigError: a field of the config cannot follow the map.
        EngineError: one of the request's engines would not compute what config.json says.
        CheckpointError: there are tensors that dus cannot place, scale or cast.
    """
    refuse_types(checkpoint.config)
    decoder = decoder_config(checkpoint.config)
    layer_map = request.resolve(decoder.num_layers)
    assume = dict(request.assume)
    layers, stack_warnings = find_stack((t.name for _, t in checkpoint.tensors()), decoder, assume)
    maps, why_trim = Maps(checkpoint.config, decoder, request.copies, assume, layers.names), None
    if request.leaves_trim_open:
        trim, why_trim = choose_trim(maps, request.engines)
        layer_map = replace(request, trim=trim).resolve(decoder.num_layers)
    deeper = deepen_config(checkpoint.config, layer_map, assume, layers.names)
    judged = maps.judge(layer_map)
    check_right(maps, judged, request.engines, layer_map.trim)
    if layers.prefix in assume:
        unlike: tuple[str, ...] = (
            f"differences between the layers under {layers.prefix} were kept, as --assume says",
        )
    else:
        unlike = _check_alike(checkpoint, decoder, layers, layer_map, deeper)
    treatment, treatment_warnings = _treatment(
        checkpoint, decoder, layers, layer_map, request, dtype
    )
    layouts = lay_out(checkpoint, layers, layer_map, max_shard_bytes, treatment)
    if len(layouts) == 1:
        shards = {SINGLE_NAME: layouts[0]}
    else:
        width = max(5, len(str(len(layouts))))
        names = [
            f"model-{i:0{width}}-of-{len(layouts):0{width}}.safetensors"
            for i in range(1, len(layouts) + 1)
        ]
        shards = dict(zip(names, layouts, strict=True))
    warnings = [
        *checkpoint.warnings,
        *stack_warnings,
        *deeper.warnings,
        *unlike,
        *treatment_warnings,
    ]
    warnings += engine_warnings(maps, judged, request.engines, layer_map.trim)
    if not layer_map.is_deeper:
        warnings.append(
            f"the map is not deeper than the base: {len(layer_map)} layers from "
            f"{layer_map.num_base_layers}"
        )
    if layers.num_extra:
        warnings.append(
            f"{layers.num_extra} multi-token-prediction layer(s) keep their place after the last "
            f"layer, as {layers.prefix}.{len(layer_map)} and on"
        )
    along = go_along(_carried(checkpoint, absent or {}), layer_map, layers.names)
    warnings += along.warnings
    base_card = read_base_card(checkpoint.folder)
    if base_card.problem is not None:
        warnings.append(base_card.problem)
    return UpscalePlan(
        base,
        checkpoint,
        request,
        layer_map=layer_map,
        max_shard_bytes=max_shard_bytes,
        stack=layers,
        treatment=treatment,
        config=output_config(deeper.config, dtype),
        kinds=deeper.kinds,
        shards=shards,
        files=along.files,
        sidecars=along.records,
        left_out=along.left_out,
        warnings=tuple(warnings),
        base_card=base_card,
        num_absent_bytes=sum(
            (absent or {}).get(name, 0) for name, path in along.files if not path.exists()
        ),
        engines=maps.with_trims(judged, layer_map.trim),
        why_trim=why_trim,
    )


def _check_alike(
    checkpoint: Checkpoint,
    decoder: DecoderConfig,
    layers: LayerStack,
    layer_map: LayerMap,
    deeper: DeeperConfig,
) -> tuple[str, ...]:
    """Check that the map may move layers that hold different tensors, for a type that the tests do
    not cover; return warnings.
    """
    if decoder.model_type in TRIED_TYPES:
        return ()
    is_quantised = any(
        checkpoint.config.get(key) or decoder.fields.get(key) for key in QUANTIZATION_KEYS
    )
    described = ((tensor.name, tensor.dtype, tensor.shape) for _, tensor in checkpoint.tensors())
    tensors = LayerTensors.of(described, layers.prefix, decoder.num_layers)
    return check_alike(tensors, layer_map, deeper.distinctions, is_quantised=is_quantised)


def _carried(checkpoint: Checkpoint, absent: Mapping[str, int]) -> Carried:
    """The files that are carried over from the checkpoint's folder, and from its repo if not all
    files were fetched.
    """
    weights = {shard.name for shard in checkpoint.shards}
    in_folder = carried_files(checkpoint.folder, weights)
    names = [name for name in absent if belongs_by_name(name)]
    files = [*in_folder.files, *((name, checkpoint.folder / name) for name in names)]
    folders = {name.split("/")[0] for name, _ in files if "/" in name}
    others = [
        name
        for name in absent
        if name not in {*names, *weights, *WRITTEN_ANEW} and not is_index(name)
    ]
    cut = (
        name if "/" not in name or name.split("/")[0] in folders else f"{name.split('/')[0]}/"
        for name in others
    )
    left_out = {*in_folder.left_out, *cut}
    return Carried(
        tuple(sorted(files, key=lambda file: walk_order(file[0]))), tuple(sorted(left_out))
    )


def _treatment(
    checkpoint: Checkpoint,
    decoder: DecoderConfig,
    layers: LayerStack,
    layer_map: LayerMap,
    request: MapRequest,
    dtype: Dtype | None,
) -> tuple[Treatment, list[str]]:
    """Which of the base's tensors are cast, scaled or zeros, and warnings."""
    zeros: frozenset[str] = frozenset()
    scaled: dict[str, int] = {}
    warnings = list(check_castable(checkpoint, dtype)) if dtype is not None else []
    tensors = (tensor for _, tensor in checkpoint.tensors())
    by_layer = factors(request.start, layer_map)
    copied = {base for base, factor in zip(layer_map.sources, by_layer, strict=True) if factor != 1}
    if request.starts_as_base:
        zeros = zero_patterns(decoder, layers, tensors, layer_map)
    elif copied:
        scaled = scaled_tensors(decoder, layers, tensors, copied, f"--start {request.start.name}")
    if (zeros or scaled) and decoder.model_type not in KNOWN_TYPES:
        option = "--identity" if zeros else f"--start {request.start.name}"
        against = (
            "its base's" if zeros else "those of its base's layers, called with these factors,"
        )
        warnings.append(
            f"{option} went by the names of tensors alone for model type "
            f"{shown(decoder.model_type)!r}; compare the "
            f"model's logits with {against} before you train it"
        )
    by_layer = by_layer if scaled else ()
    new_layers = frozenset(layer_map.new_layers)
    return Treatment(layers.prefix, new_layers, zeros, dtype, by_layer, scaled), warnings
