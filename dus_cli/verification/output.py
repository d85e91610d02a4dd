"""Read as much of an output as possible, for the checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dus_cli.errors import DusError, VerificationError, shown, shown_list
from dus_cli.maps.layers import MAX_OUTPUT_LAYERS, LayerMap
from dus_cli.maps.model_config import DecoderConfig, decoder_config
from dus_cli.maps.stacks import LayerStack, find_stack
from dus_cli.planning.treatment import Treatment
from dus_cli.release import lineage
from dus_cli.source.checkpoint import read_config
from dus_cli.source.files import inside
from dus_cli.source.headers import read_header
from dus_cli.source.weights import (
    INDEX_NAME,
    PICKLED_NAME,
    SINGLE_NAME,
    Index,
    find_weights,
    is_index,
    is_pickled,
    read_index,
    regular_files,
    rivals,
)
from dus_cli.verification.compare import Place
from dus_cli.verification.report import Finding


@dataclass(frozen=True, kw_only=True)
class Output:
    """A checkpoint that is verified. What could not be read, or does not exist, is None.

    Attributes:
        folder: its directory.
        config: config.json.
        decoder: the decoder's part of the config.
        stack: the names of the layers, if they are those that the config counts.
        tensors: the tensors of the shards that could be read, by name.
        all_readable: every shard could be read.
        record: its dus.json.
        layer_map: the layer map in dus.json.
        treatment: how tensors were made, by dus.json; all copied if there is no layer map.
    """

    folder: Path
    config: dict[str, Any] | None
    decoder: DecoderConfig | None
    stack: LayerStack | None
    tensors: dict[str, Place]
    all_readable: bool
    record: dict[str, Any] | None
    layer_map: LayerMap | None
    treatment: Treatment

    @property
    def is_healed(self) -> bool:
        return self.record is not None and bool(self.record.get("healing"))

    @property
    def has_map(self) -> bool:
        """Whether dus.json should have a layer map: not if dus healed a model that it did not
        make.
        """
        return self.record is not None and not (self.is_healed and "layer_map" not in self.record)

    @property
    def num_parameters(self) -> int:
        return sum(place.tensor.num_elements for place in self.tensors.values())


def read_output(folder: Path) -> tuple[Output, Finding]:
    """Read config, headers and dus.json of a checkpoint, and collect every problem."""
    finding = Finding()
    config = gathered(finding, lambda: read_config(folder)[0])
    tensors, all_readable = _open_tensors(folder, config or {}, finding)
    decoder = gathered(finding, lambda: decoder_config(config)) if config is not None else None
    record = gathered(finding, lambda: lineage.read_lineage(folder))
    output = Output(
        folder=folder,
        config=config,
        decoder=decoder,
        stack=None,
        tensors=tensors,
        all_readable=all_readable,
        record=record,
        layer_map=None,
        treatment=Treatment(),
    )
    if decoder is not None and all_readable:
        prefix = None if record is None else record.get("layer_prefix")
        recorded_prefix = prefix if isinstance(prefix, str) else None
        found = gathered(finding, lambda: find_stack(tensors, decoder, recorded=recorded_prefix))
        output = replace(output, stack=None if found is None else found[0])
    if output.has_map:
        recorded = gathered(finding, lambda: _recorded_map(record))
        if recorded is not None:
            output = replace(output, layer_map=recorded[0], treatment=recorded[1])
    if record is None and not finding.problems:
        finding.warnings.append(
            f"there is no {lineage.NAME}: which layers are copies is not known, none were compared"
        )
    return output, finding


def gathered(finding: Finding, step: Callable[[], Any]) -> Any:
    """Call `step` and return its result; if it raises a DusError, add that to the problems and
    return None.
    """
    try:
        return step()
    except DusError as error:
        finding.problems.append(str(error))
        return None


def _find_shards(
    folder: Path, config: dict[str, Any], finding: Finding
) -> tuple[Index | None, list[str]]:
    """The index, or None, and the names of the shards that transformers would load; [] if there
    are none.
    """
    chosen = gathered(finding, lambda: find_weights(folder, config) or PICKLED_NAME)
    if chosen is None:
        return None, []
    if is_pickled(chosen):
        finding.problems.append(f"{shown(folder)} has neither {SINGLE_NAME} nor {INDEX_NAME}")
        return None, []
    if others := rivals(regular_files(folder), chosen):
        finding.warnings.append(
            f"{chosen} was read, as transformers does, and {shown_list(others)} was not"
        )
    if not is_index(chosen):
        return None, [chosen]
    index = gathered(finding, lambda: read_index(folder, chosen))
    return index, [] if index is None else index.shard_names


def _open_tensors(
    folder: Path, config: dict[str, Any], finding: Finding
) -> tuple[dict[str, Place], bool]:
    """All tensors by name, and whether every shard could be read.

    Unlike `open_checkpoint` it continues after a bad shard, to find every problem.
    """
    index, shard_names = _find_shards(folder, config, finding)
    if not shard_names:
        return {}, False
    tensors: dict[str, Place] = {}
    unreadable: set[str] = set()
    for name in shard_names:
        try:
            path = inside(folder, name)
            header = read_header(path, shown(name))
        except DusError as error:
            finding.problems.append(str(error))
            unreadable.add(name)
            continue
        for tensor in header.tensors:
            if tensor.name in tensors:
                finding.problems.append(f"tensor {shown(tensor.name)} is in two shards")
            if index is not None and index.weight_map.get(tensor.name) != name:
                finding.problems.append(
                    f"{shown(name)} holds {shown(tensor.name)}, which the index does not place "
                    "there"
                )
            tensors[tensor.name] = Place(path, tensor)
    if index is not None:
        for tensor_name, name in index.weight_map.items():
            if tensor_name not in tensors and name not in unreadable:
                finding.problems.append(
                    f"the index places {shown(tensor_name)} in {shown(name)}, which lacks it"
                )
        if not unreadable:
            finding.problems += _check_total(index, tensors)
    return tensors, not unreadable


def _check_total(index: Index, tensors: dict[str, Place]) -> list[str]:
    total = sum(place.tensor.num_bytes for place in tensors.values())
    if index.total_size in (None, total):
        return []
    return [
        (
            f"the index says total_size {shown(index.total_size)}, the shards hold {total} bytes "
            "of tensor data"
        )
    ]


def _recorded_map(record: dict[str, Any]) -> tuple[LayerMap, Treatment]:
    depths, sources = record.get("num_layers"), record.get("layer_map")
    num_base = depths.get("base") if isinstance(depths, dict) else None
    if (
        type(num_base) is not int
        or num_base > MAX_OUTPUT_LAYERS
        or not isinstance(record.get("layer_prefix"), str)
        or not isinstance(sources, list)
        or not sources
        or not all(type(layer) is int and 0 <= layer < num_base for layer in sources)
    ):
        raise VerificationError(
            f"{lineage.NAME} holds no valid layer map; it was damaged or edited"
        )
    layer_map = LayerMap(tuple(sources), num_base, record.get("trim"))
    return layer_map, lineage.recorded_treatment(record, layer_map)
