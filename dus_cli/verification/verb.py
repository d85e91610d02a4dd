"""Reopen an output and hold it against its plan, its base, its own duplicates and its checksums."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dus_cli.common.libraries import require
from dus_cli.errors import DusError, VerificationError, shown, shown_list
from dus_cli.maps.layers import MAX_OUTPUT_LAYERS, LayerMap, split_name
from dus_cli.maps.model_config import DecoderConfig, decoder_config, deepen_config
from dus_cli.maps.naming import Assumption
from dus_cli.maps.stacks import find_stack
from dus_cli.pictures.layer_map import PICTURES
from dus_cli.planning import judging
from dus_cli.planning.dtypes import output_config
from dus_cli.planning.treatment import Making, Treatment
from dus_cli.progress import NoProgress, Progress
from dus_cli.release import card, lineage
from dus_cli.release.checksums import check_sums
from dus_cli.source.checkpoint import CONFIG_NAME, Checkpoint, read_config
from dus_cli.source.files import inside
from dus_cli.source.headers import read_header
from dus_cli.source.incomplete import check_whole
from dus_cli.source.reading import read_small_file
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
from dus_cli.verification.compare import Compared, Comparison, Place, compare
from dus_cli.verification.report import Verification
from dus_cli.writing.transfer import DEFAULT_JOBS

_MAX_CARD_BYTES = 16_000_000

# What a new layer's output projection is in an identity, in messages.
_ZEROS = "an identity's zeros"


# --- `dus verify` -------------------------------------------------------------------------------


def verify(
    folder: Path,
    base: Checkpoint | None = None,
    *,
    deep: bool = True,
    engines: Sequence[str] = (),
    jobs: int = DEFAULT_JOBS,
    reads_all: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Check a checkpoint and gather every problem.

    Every header, the index against the headers, the config against the tensors; with dus.json the
    layers that stand twice against each other, byte by byte; with `base` every tensor against its
    source and the config against the base's; with SHA256SUMS every file's sum. Without `deep` no
    data is read: neither layers that stand twice nor sums. What lies in the same blocks of the disk
    is equal, and read only where `reads_all`. Of `engines` what they make of the config, by name.

    Raises:
        CheckpointError: a run is writing it in place, or left it half-written.
    """
    check_whole(folder)
    found = Verification(str(folder))
    progress = progress or NoProgress()
    config = _gather(found, lambda: read_config(folder)[0])
    tensors, all_readable = _open_tensors(folder, config or {}, found)
    found.num_tensors = len(tensors)
    found.num_parameters = sum(place.tensor.num_elements for place in tensors.values())
    decoder = _gather(found, lambda: decoder_config(config)) if config is not None else None
    if decoder is not None:
        found.num_layers = decoder.num_layers
    record = _gather(found, lambda: lineage.read_lineage(folder))
    if decoder is not None and all_readable:
        prefix = None if record is None else record.get("layer_prefix")
        _gather(
            found,
            lambda: find_stack(
                tensors, decoder, recorded=prefix if isinstance(prefix, str) else None
            ),
        )
    is_healed = record is not None and bool(record.get("healing"))
    has_map = record is not None and not (is_healed and "layer_map" not in record)
    recorded = _gather(found, lambda: _recorded(record)) if has_map else None
    layer_map, treatment = recorded or (None, Treatment())
    if record is None and not found.problems:
        found.warnings.append(
            f"there is no {lineage.NAME}: which layers stand twice is not known, none were compared"
        )
    if has_map and all_readable:
        _check_counts(found, record)
    if decoder is not None and layer_map is not None:
        found.problems += _check_depth(decoder, layer_map)
    if is_healed and base is not None:
        found.problems.append(
            f"{lineage.NAME} says the model was healed: its tensors are no base's; leave out --base"
        )
        base = None
    if layer_map is not None and not is_healed:
        pairs, problems, num_unlike = _duplicates(tensors, layer_map, treatment)
        if all_readable:  # else one bad shard would be told once for each of its tensors
            found.problems += problems
        found.warnings += _only_by_a_base(num_unlike, base)
        if base is None and deep:  # else the base says more: what equals it equals its twin
            progress.start("comparing twins", _num_bytes(pairs))
            _compare_all(found, pairs, jobs, progress, reads_all=reads_all)
    if base is not None:
        assume = _gather(found, lambda: lineage.recorded_assumptions(record or {})) or {}
        pairs, problems = _against_base(tensors, base, config, layer_map, treatment, assume)
        if all_readable:
            found.problems += problems
        if any(pair.dtype not in {None, pair.right.tensor.dtype} for pair in pairs):
            require("--base of a model that was cast", "torch")
        progress.start("comparing with the base", _num_bytes(pairs))
        _compare_all(found, pairs, jobs, progress, reads_all=reads_all)
    _check_engines(config if decoder is not None else None, record or {}, engines, found)
    _check_pictures(folder, found)
    if deep:
        found.files_summed, problems = check_sums(folder, jobs)
        found.problems += problems
    return found


def _check_engines(
    config: dict[str, Any] | None,
    record: dict[str, Any],
    engines: Sequence[str],
    found: Verification,
) -> None:
    """What inference engines would not compute as the config says it."""
    if config is None or not engines:
        return
    assume = _gather(found, lambda: lineage.recorded_assumptions(record)) or {}
    judged = _gather(found, lambda: judging.judge_config(config, assume))
    of_these = [one for one in judged or () if one.engine.name in engines]
    found.engines = [one.to_json() for one in of_these]
    found.problems += judging.problems(of_these)
    found.warnings += judging.asides(of_these)


def _only_by_a_base(num_unlike: int, base: Checkpoint | None) -> list[str]:
    """A warning of tensors that nothing in the output can be held against, where no base is
    given.
    """
    if not num_unlike or base is not None:
        return []
    return [
        (
            f"{num_unlike} tensors were scaled otherwise than their twins: only --base can tell "
            "whether they are right"
        )
    ]


def _check_pictures(folder: Path, found: Verification) -> None:
    """Warn of pictures that the card shows and that are not there; without a card nothing is
    amiss.
    """
    try:
        path = inside(folder, card.NAME)
        text = (
            read_small_file(path, card.NAME, _MAX_CARD_BYTES).decode("utf-8", "replace")
            if path.is_file()
            else ""
        )
        lacking = [
            name for name in PICTURES if f'"{name}"' in text and not inside(folder, name).is_file()
        ]
    except (DusError, OSError):
        return  # other checks read every file that counts
    if lacking:
        found.warnings.append(
            f"{card.NAME} shows {shown_list(lacking)}, which is not there; the command makes it "
            "again"
        )


def _gather(found: Verification, step: Callable[[], Any]) -> Any:
    """The step's result; None, with its problem gathered, where it fails."""
    try:
        return step()
    except DusError as error:
        found.problems.append(str(error))
        return None


def _find_shards(
    folder: Path, config: dict[str, Any], found: Verification
) -> tuple[Index | None, list[str]]:
    """The index, where there is one, and the shards from which transformers would load; [] where
    there are none.
    """
    chosen = _gather(found, lambda: find_weights(folder, config) or PICKLED_NAME)
    if chosen is None:
        return None, []
    if is_pickled(chosen):
        found.problems.append(f"{shown(folder)} has neither {SINGLE_NAME} nor {INDEX_NAME}")
        return None, []
    if others := rivals(regular_files(folder), chosen):
        found.warnings.append(
            f"{chosen} was read, as transformers does, and {shown_list(others)} was not"
        )
    if not is_index(chosen):
        return None, [chosen]
    index = _gather(found, lambda: read_index(folder, chosen))
    return index, [] if index is None else index.shard_names


def _open_tensors(
    folder: Path, config: dict[str, Any], found: Verification
) -> tuple[dict[str, Place], bool]:
    """All tensors by name, and whether every shard could be read.

    Unlike `open_checkpoint` it goes on past a bad shard, to find every problem.
    """
    index, shard_names = _find_shards(folder, config, found)
    if not shard_names:
        return {}, False
    tensors: dict[str, Place] = {}
    unreadable: set[str] = set()
    for name in shard_names:
        try:
            path = inside(folder, name)
            header = read_header(path, shown(name))
        except DusError as error:
            found.problems.append(str(error))
            unreadable.add(name)
            continue
        for tensor in header.tensors:
            if tensor.name in tensors:
                found.problems.append(f"tensor {shown(tensor.name)} stands in two shards")
            if index is not None and index.weight_map.get(tensor.name) != name:
                found.problems.append(
                    f"{shown(name)} holds {shown(tensor.name)}, which the index does not place "
                    "there"
                )
            tensors[tensor.name] = Place(path, tensor)
    if index is not None:
        for tensor_name, name in index.weight_map.items():
            if tensor_name not in tensors and name not in unreadable:
                found.problems.append(
                    f"the index places {shown(tensor_name)} in {shown(name)}, which lacks it"
                )
        if not unreadable:
            found.problems += _check_total(index, tensors)
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


def _recorded(record: dict[str, Any]) -> tuple[LayerMap, Treatment]:
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


def _check_counts(found: Verification, record: dict[str, Any]) -> None:
    for key, counted in (
        ("num_tensors", found.num_tensors),
        ("num_parameters", found.num_parameters),
    ):
        if record.get(key) != counted:
            found.problems.append(
                f"{lineage.NAME} says {key} {shown(record.get(key))}, the shards hold {counted}"
            )


def _check_depth(decoder: DecoderConfig, layer_map: LayerMap) -> list[str]:
    problems = []
    if decoder.num_layers != len(layer_map):
        problems.append(
            f"{CONFIG_NAME} counts {decoder.num_layers} layers, {lineage.NAME} {len(layer_map)}"
        )
    kinds = decoder.fields.get("layer_types")
    if isinstance(kinds, list) and len(kinds) != decoder.num_layers:
        problems.append(
            f"{CONFIG_NAME}: layer_types has {len(kinds)} entries for {decoder.num_layers} layers"
        )
    return problems


def _duplicates(
    tensors: dict[str, Place], layer_map: LayerMap, treatment: Treatment
) -> tuple[list[Comparison], list[str], int]:
    """Output layers with the same source: pairs to compare, tensors that only one of them has, and
    how many differ.

    Each new layer is held against the base's own; in an identity, output projections against zeros.
    Of two that were scaled by unlike factors neither tells what the other is, unless one was left
    as it was in the base.
    """
    layer_prefix = treatment.layer_prefix
    layers: dict[int, dict[str, Place]] = {output: {} for output in range(len(layer_map))}
    for name, place in tensors.items():
        split = split_name(name)
        if split is not None and split.prefix == layer_prefix and split.index in layers:
            layers[split.index][split.suffix] = place
    pairs: list[Comparison] = []
    problems: list[str] = []
    num_unlike = 0
    base_outputs = layer_map.base_outputs
    for output in layer_map.new_layers:
        own = base_outputs[layer_map.sources[output]]
        assert own is not None  # what has a new copy has one of its own
        first, other = layers[own], layers[output]
        for suffix in sorted(first.keys() ^ other.keys()):
            lacking = output if suffix in first else own
            problems.append(
                f"{shown(layer_prefix)}.{lacking} lacks {shown(suffix)}, which its twin layer has"
            )
        for suffix in sorted(first.keys() & other.keys()):
            twin, copy = first[suffix], other[suffix]
            if treatment.is_zero(copy.tensor.name):
                pairs.append(Comparison(copy, twin, _ZEROS, Making.zeros))
                continue
            theirs, ours = (
                treatment.scale_of(place.tensor.name, place.tensor) for place in (twin, copy)
            )
            if theirs is not None and theirs != ours:
                num_unlike += 1
                continue
            scale = None if ours == theirs else ours
            making = Making.copied if scale is None else Making.scaled
            pairs.append(
                Comparison(copy, twin, f"its twin {shown(twin.tensor.name)}", making, scale=scale)
            )
    return pairs, problems, num_unlike


def _against_base(
    tensors: dict[str, Place],
    base: Checkpoint,
    config: dict[str, Any] | None,
    layer_map: LayerMap | None,
    treatment: Treatment,
    assume: dict[str, Assumption],
) -> tuple[list[Comparison], list[str]]:
    """Names and config held against the base's: pairs that remain to be compared, and problems."""
    if layer_map is None:
        return [], [f"without a valid {lineage.NAME} the output cannot be held against a base"]
    decoder = decoder_config(base.config)
    if decoder.num_layers != layer_map.num_base_layers:
        return [], [
            (
                f"the base has {decoder.num_layers} layers, {lineage.NAME} was made from "
                f"{layer_map.num_base_layers}"
            )
        ]
    stack, _ = find_stack((tensor.name for _, tensor in base.tensors()), decoder, assume)
    pairs: list[Comparison] = []
    problems: list[str] = []
    expected: set[str] = set()
    for shard, tensor in base.tensors():
        for name in stack.output_names(tensor.name, layer_map):
            expected.add(name)
            if name in tensors:
                making, dtype = treatment.making(name, tensor), treatment.dtype_of(tensor)
                source = _ZEROS if making is Making.zeros else f"the base's {shown(tensor.name)}"
                scale = treatment.scale_of(name, tensor)
                pairs.append(
                    Comparison(
                        tensors[name], Place(shard.path, tensor), source, making, dtype, scale
                    )
                )
            else:
                problems.append(
                    f"tensor {shown(name)} is missing (the base's {shown(tensor.name)})"
                )
    problems += [
        f"tensor {shown(n)} comes from no tensor of the base"
        for n in sorted(tensors.keys() - expected)
    ]
    deeper = deepen_config(base.config, layer_map, assume, stack.names)
    planned = output_config(deeper.config, treatment.dtype)
    if config is not None and _text(config) != _text(planned):
        keys = sorted(
            k for k in {*config, *planned} if _text(config.get(k)) != _text(planned.get(k))
        )
        problems.append(
            f"{CONFIG_NAME} differs from the base's carried to the new depth in {shown_list(keys)}"
        )
    return pairs, problems


def _text(value: object) -> str:
    """A value of JSON as text, by which NaN is the same as NaN."""
    return json.dumps(value, sort_keys=True)


def _num_bytes(pairs: list[Comparison]) -> int:
    return sum(pair.left.tensor.num_bytes for pair in pairs)


def _compare_all(
    found: Verification, pairs: list[Comparison], jobs: int, progress: Progress, *, reads_all: bool
) -> None:
    tally = Compared()
    found.problems += compare(pairs, jobs, progress.advance, tally, reads_all=reads_all)
    found.bytes_compared += _num_bytes(pairs)
    found.bytes_shared += tally.shared
