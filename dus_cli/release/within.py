"""The base inside a deeper model: which of its layers are the base's, by its dus.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_cli.errors import HealError
from dus_cli.maps.layers import LayerMap
from dus_cli.maps.model_config import decoder_config
from dus_cli.release import lineage
from dus_cli.source.checkpoint import open_checkpoint


@dataclass(frozen=True)
class BasePlan:
    """The base inside the model: `layers` are the output layers that, run alone, are the base."""

    layers: tuple[int, ...]
    name: str


def base_within(folder: Path) -> BasePlan | None:
    """The base inside the model in a folder, or None where it does not hold one.

    Raises:
        DusError: it is no checkpoint of a decoder, or its dus.json is damaged.
    """
    num_layers = decoder_config(open_checkpoint(folder).config).num_layers
    record = lineage.read_lineage(folder)
    return recorded_base(record, recorded_map(record, num_layers))


def recorded_map(record: dict[str, Any] | None, num_layers: int) -> LayerMap | None:
    """The layer map that a dus.json records for a model of so many layers, or None where it records none.

    Raises:
        HealError: the record does not fit the model.
    """
    if record is None or "layer_map" not in record:
        return None
    try:
        layer_map = LayerMap(tuple(map(int, record["layer_map"])), int(record["num_layers"]["base"]))
    except (TypeError, ValueError, KeyError):
        layer_map = LayerMap((), 0)
    sources = layer_map.sources
    if len(sources) != num_layers or not all(0 <= layer < layer_map.num_base_layers for layer in sources):
        raise HealError(f"{lineage.NAME} does not describe this model of {num_layers} layers; it was damaged or edited")
    return layer_map


def recorded_base(record: dict[str, Any] | None, layer_map: LayerMap | None) -> BasePlan | None:
    """The output layers that are the base (`LayerMap.base_outputs`).

    None where a layer of the base is left out or was scaled, and where the model was trained since.

    Raises:
        CheckpointError: the record is damaged.
    """
    if record is None or layer_map is None or record.get("healing"):
        return None
    layers = tuple(layer for layer in layer_map.base_outputs if layer is not None)
    scaled = lineage.recorded_treatment(record, layer_map).scaled_layers
    if len(layers) < layer_map.num_base_layers or not set(layers).isdisjoint(scaled):
        return None
    name = record.get("base", {}).get("name")
    return BasePlan(layers, str(name or "base"))
