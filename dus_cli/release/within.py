"""The base of a deeper model, by its dus.json: the layers that are the base's, or the base's own
folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_cli.common.reference import user_path
from dus_cli.errors import DusError, HealError
from dus_cli.maps.layers import LayerMap
from dus_cli.maps.model_config import decoder_config
from dus_cli.maps.rules import Fields
from dus_cli.release import lineage
from dus_cli.source.checkpoint import open_checkpoint


@dataclass(frozen=True)
class BasePlan:
    """How to run the base of a model.

    Attributes:
        layers: the output layers that compute what the base does, if only they are run. With a
            `folder`, all layers of the model there.
        name: the base's name.
        folder: the base's own directory, if the model does not contain the base; else None.
    """

    layers: tuple[int, ...]
    name: str
    folder: str | None = None


def base_within(folder: Path) -> BasePlan | None:
    """The base inside the model in a folder; None if the model does not contain its base.

    Raises:
        DusError: the folder is not a decoder's checkpoint, or its dus.json is damaged.
    """
    decoder = decoder_config(open_checkpoint(folder).config)
    record = lineage.read_lineage(folder)
    return recorded_base(record, recorded_map(record, decoder.num_layers), decoder.fields)


def recorded_map(record: dict[str, Any] | None, num_layers: int) -> LayerMap | None:
    """The layer map that a dus.json records for a model of so many layers; None if it has none.

    Raises:
        HealError: the record does not fit the model.
    """
    if record is None or "layer_map" not in record:
        return None
    try:
        layer_map = LayerMap(
            tuple(map(int, record["layer_map"])), int(record["num_layers"]["base"])
        )
    except (TypeError, ValueError, KeyError):
        layer_map = LayerMap((), 0)
    sources = layer_map.sources
    if len(sources) != num_layers or not all(
        0 <= layer < layer_map.num_base_layers for layer in sources
    ):
        raise HealError(
            f"{lineage.NAME} does not describe this model of {num_layers} layers; it was damaged "
            "or edited"
        )
    return layer_map


def runs_whole_only(record: dict[str, Any], fields: Fields) -> bool:
    """Whether the model of these config fields runs with all its layers or not at all: a table
    outside them has a part for each, or they share keys and values.
    """
    return bool(record.get("tables") or fields.get("num_kv_shared_layers"))


def recorded_base(
    record: dict[str, Any] | None, layer_map: LayerMap | None, fields: Fields
) -> BasePlan | None:
    """The output layers that are the base's own (`LayerMap.base_outputs`). `fields` are those of
    the decoder's config.

    None if a layer of the base is left out or was scaled, if the model was trained since, or if it
    runs with all its layers only.

    Raises:
        CheckpointError: the record is damaged.
    """
    if record is None or layer_map is None or record.get("healing"):
        return None
    if runs_whole_only(record, fields):
        return None
    layers = tuple(layer for layer in layer_map.base_outputs if layer is not None)
    scaled = lineage.recorded_treatment(record, layer_map).scaled_layers
    if len(layers) < layer_map.num_base_layers or not set(layers).isdisjoint(scaled):
        return None
    name = record.get("base", {}).get("name")
    return BasePlan(layers, str(name or "base"))


def scaled_base(
    record: dict[str, Any] | None, layer_map: LayerMap | None, fields: Fields
) -> BasePlan | None:
    """For a model whose start scaled the base's own layers, or that runs with all its layers only:
    the base in the folder that dus.json records.

    None if that folder holds another model or none, and for every other kind of output.

    Raises:
        CheckpointError: the record is damaged.
    """
    if record is None or layer_map is None:
        return None
    if not scales_base(record, layer_map) and (
        record.get("healing") or not runs_whole_only(record, fields)
    ):
        return None
    base: Any = record.get("base")
    folder = _recorded_folder(base) if isinstance(base, dict) else None
    if folder is None or not _is_recorded(folder, base):
        return None
    return BasePlan(
        tuple(range(layer_map.num_base_layers)), str(base.get("name") or "base"), str(folder)
    )


def scales_base(record: dict[str, Any], layer_map: LayerMap) -> bool:
    """Whether the start scaled the base's own layers, and the model was not trained since.

    Raises:
        CheckpointError: the record is damaged.
    """
    scaled = lineage.recorded_treatment(record, layer_map).scaled_layers
    return not record.get("healing") and not set(layer_map.base_outputs).isdisjoint(scaled)


def _recorded_folder(base: dict[str, Any]) -> Path | None:
    """The recorded folder of a base: its directory, or its snapshot in the Hub's cache; None if it
    does not exist.
    """
    if isinstance(base.get("path"), str):
        folder = user_path(base["path"])
        return folder.resolve() if folder.is_dir() else None
    repo_id, commit = base.get("repo_id"), base.get("commit")
    if (
        not isinstance(repo_id, str)
        or not isinstance(commit, str)
        or not re.fullmatch(r"[0-9a-f]{40}", commit)
    ):
        return None
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repo = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(
        repo_id=repo_id, repo_type="model"
    )
    folder = repo / "snapshots" / commit
    return folder if folder.is_dir() else None


def _is_recorded(folder: Path, base: Any) -> bool:
    """Whether the model in a folder is the recorded one, by its config and the sizes of its
    weights.
    """
    try:
        checkpoint = open_checkpoint(folder)
    except DusError:
        return False
    shards = {shard.name: shard.header.end for shard in checkpoint.shards}
    return (checkpoint.config_sha256, shards) == (base.get("config_sha256"), base.get("shards"))
