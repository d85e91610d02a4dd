"""dus.json: the base of a model and how it was made, so that it can be verified and made again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dus_cli import __version__
from dus_cli.errors import CheckpointError, shown
from dus_cli.maps.layers import LayerMap, Seam
from dus_cli.maps.naming import Assumption
from dus_cli.maps.starts import LARGEST_FACTOR, StartRule
from dus_cli.pictures.layer_map import PICTURES
from dus_cli.planning.dtypes import Dtype
from dus_cli.planning.plan import UpscalePlan
from dus_cli.planning.treatment import Treatment
from dus_cli.source.checkpoint import Checkpoint
from dus_cli.source.files import inside
from dus_cli.source.json_objects import limit_nesting, parse_json_object
from dus_cli.source.reading import read_small_file

NAME = "dus.json"
CARD_FILES = ("README.md", *PICTURES)
SCHEMA = 1

_MAX_BYTES = 16_000_000


def map_record(plan: UpscalePlan) -> dict[str, Any]:
    """The fields of `dus.json` and the report about the layer map, and how tensors were made."""
    layer_map, treatment = plan.layer_map, plan.treatment
    return {
        "num_layers": {"base": layer_map.num_base_layers, "output": len(layer_map)},
        "trim": layer_map.trim,
        "layers": str(layer_map),
        "layer_map": list(layer_map.sources),
        "recipe": plan.request.recipe,
        "new_layers": list(layer_map.new_layers),
        "identity": sorted(treatment.zeros) or None,
        "dtype": None if treatment.dtype is None else treatment.dtype.value,
    }


def engines_record(plan: UpscalePlan) -> list[dict[str, Any]]:
    """The field of `dus.json` and the report about each inference engine."""
    return [judged.to_json() for judged in plan.engines]


def starts_record(plan: UpscalePlan) -> dict[str, Any]:
    """More fields of the report; dus.json has those that are not None."""
    return {
        "double": plan.request.double,
        "scaled": _scaled_record(plan),
        "tables": _tables_record(plan),
    }


def _tables_record(plan: UpscalePlan) -> dict[str, Any] | None:
    """The tensors outside the layers with a block for each layer, and a block's width; None if
    there are none. In the output each layer has the block of its source.
    """
    stack = plan.stack
    return {"width": stack.table_width, "tensors": sorted(stack.tables)} if stack.tables else None


def _scaled_record(plan: UpscalePlan) -> dict[str, Any] | None:
    """The start, its factor for each output layer, and the tensors that were multiplied; None if
    none was.

    `one_plus` lists the tensors w of which 1 + w was multiplied, because the model uses 1 + w.
    """
    treatment = plan.treatment
    if not treatment.scaled:
        return None
    return {
        "start": str(plan.request.start),
        "factors": list(treatment.factors),
        "tensors": sorted(treatment.scaled),
        "one_plus": sorted(name for name, offset in treatment.scaled.items() if offset),
    }


def seam_record(seam: Seam) -> dict[str, Any]:
    return {
        "output_layers": list(seam.output_layers),
        "base_layers": list(seam.base_layers),
        "distance": seam.distance,
    }


def lineage(plan: UpscalePlan) -> dict[str, Any]:
    """The content of dus.json. It has no times and no output path, so two runs write the same.

    `chain` holds the lineage of the base, oldest first, if dus made it.
    """
    ref, checkpoint, layer_map = plan.base.ref, plan.checkpoint, plan.layer_map
    base: dict[str, Any] = {"name": plan.base.name}
    if ref.repo_id is not None:
        base |= {"repo_id": ref.repo_id, "revision": ref.revision, "commit": plan.base.commit}
    else:
        base |= {"path": ref.text}
    base |= {"config_sha256": checkpoint.config_sha256, "index_sha256": checkpoint.index_sha256}
    base["format"] = checkpoint.format
    base["shards"] = {shard.name: shard.header.end for shard in checkpoint.shards}
    return {
        "schema": SCHEMA,
        "dus_version": __version__,
        "base": base,
        **map_record(plan),
        **{name: value for name, value in starts_record(plan).items() if value is not None},
        "assume": dict(plan.request.assume),
        "layer_prefix": plan.stack.prefix,
        "max_shard_size": plan.max_shard_bytes,
        "seams": [seam_record(seam) for seam in layer_map.seams],
        "engines": engines_record(plan),
        "num_tensors": plan.num_tensors,
        "num_parameters": plan.num_parameters,
        "total_size": plan.num_data_bytes,
        "files": output_files(plan),
        "chain": base_chain(checkpoint),
    }


def output_files(plan: UpscalePlan) -> list[str]:
    """Every file that is written except dus.json and SHA256SUMS: these may later be pushed, or
    replaced.
    """
    return sorted({*plan.shards, *plan.text_names, *plan.along, *CARD_FILES})


def digest(record: dict[str, Any]) -> str:
    """Digest of a dus.json; equal for two runs with the same output."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """The content of the dus.json in a folder; None if there is none.

    Raises:
        CheckpointError: it is damaged, or of a newer dus.
    """
    path = inside(folder, NAME)
    if not os.path.lexists(path):
        return None
    return parse_lineage(read_small_file(path, NAME, _MAX_BYTES), NAME)


def parse_lineage(raw: bytes, name: str) -> dict[str, Any]:
    """Parse a dus.json, which is called `name` in messages.

    Raises:
        CheckpointError: as `read_lineage`.
    """
    record = parse_json_object(raw, name)
    limit_nesting(record, name)
    if record.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{name} has a schema that this dus does not know; update dus (pip install -U dus-cli)"
        )
    return record


def recorded_layers(record: dict[str, Any], layer_map: LayerMap) -> tuple[int, ...]:
    """The new output layers that dus.json lists; if it is of an older dus, those of the map.

    Raises:
        CheckpointError: they are not ascending numbers of output layers.
    """
    layers = record.get("new_layers", list(layer_map.new_layers))
    if (
        not isinstance(layers, list)
        or not all(type(layer) is int and 0 <= layer < len(layer_map) for layer in layers)
        or layers != sorted(set(layers))
    ):
        raise CheckpointError(
            f"{NAME}: new_layers is not a list of output layers; it was damaged or edited"
        )
    return tuple(layers)


def recorded_treatment(record: dict[str, Any], layer_map: LayerMap) -> Treatment:
    """How tensors were made from the base's, by dus.json.

    Raises:
        CheckpointError: dus.json is damaged.
    """
    zeros = record.get("identity") or []
    if not isinstance(zeros, list) or not all(isinstance(name, str) for name in zeros):
        raise CheckpointError(
            f"{NAME}: identity is not a list of tensor names; it was damaged or edited"
        )
    dtype = record.get("dtype")
    if dtype is not None and dtype not in [choice.value for choice in Dtype]:
        raise CheckpointError(f"{NAME}: dtype is {shown(dtype)}; it was damaged or edited")
    new_layers = frozenset(recorded_layers(record, layer_map))
    by_layer, scaled = _recorded_scales(record, len(layer_map))
    prefix = str(record.get("layer_prefix"))
    return Treatment(prefix, new_layers, frozenset(zeros), dtype and Dtype(dtype), by_layer, scaled)


def _recorded_scales(
    record: dict[str, Any], num_layers: int
) -> tuple[tuple[float, ...], dict[str, int]]:
    """The factor of each output layer, and the scaled tensors; empty if nothing was scaled.

    Raises:
        CheckpointError: dus.json is damaged.
    """
    scaled = record.get("scaled")
    if scaled is None:
        return (), {}
    fields: dict[str, Any] = scaled if isinstance(scaled, dict) else {}
    by_layer, names, one_plus = (fields.get(key, 0) for key in ("factors", "tensors", "one_plus"))
    if (
        not isinstance(by_layer, list)
        or len(by_layer) != num_layers
        or not all(
            type(factor) in {int, float} and 0 < factor <= LARGEST_FACTOR for factor in by_layer
        )
        or not _are_names(names)
        or not _are_names(one_plus)
    ):
        raise CheckpointError(f"{NAME}: scaled is not what dus writes; it was damaged or edited")
    return tuple(map(float, by_layer)), {name: int(name in one_plus) for name in names}


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def recorded_start(record: dict[str, Any]) -> StartRule:
    """The start that dus.json records; the default one for an identity.

    Raises:
        CheckpointError: dus.json is damaged.
    """
    scaled = record.get("scaled")
    if scaled is None:
        return StartRule()
    try:
        return StartRule.parse(scaled["start"])
    except (TypeError, KeyError, AttributeError, ValueError):
        raise CheckpointError(
            f"{NAME}: scaled is not what dus writes; it was damaged or edited"
        ) from None


def recorded_assumptions(record: dict[str, Any]) -> dict[str, Assumption]:
    """The decisions (--assume) about fields that dus did not know, by dus.json.

    Raises:
        CheckpointError: dus.json is damaged.
    """
    assume = record.get("assume", {})
    if not isinstance(assume, dict) or not all(
        value in ("keep", "map") for value in assume.values()
    ):
        raise CheckpointError(
            f"{NAME}: assume is not a mapping of fields to keep or map; it was damaged or edited"
        )
    return assume


def base_chain(checkpoint: Checkpoint) -> list[Any]:
    """The lineage of a base, oldest first; empty if dus did not make it.

    Raises:
        CheckpointError: as `read_lineage`.
    """
    record = read_lineage(checkpoint.folder)
    if record is None:
        return []
    earlier = record.pop("chain", [])
    return [*(earlier if isinstance(earlier, list) else []), record]
