"""The checks of `dus verify`: each is a function that returns a `Finding`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from dus_cli.common.libraries import require
from dus_cli.errors import DusError, shown, shown_list
from dus_cli.maps.layers import LayerMap, split_name
from dus_cli.maps.model_config import decoder_config, deepen_config
from dus_cli.maps.naming import Assumption
from dus_cli.pictures.layer_map import PICTURES
from dus_cli.planning import judging
from dus_cli.planning.dtypes import FLOATS, output_config
from dus_cli.planning.tables import expected_size, followed
from dus_cli.planning.treatment import Making, Treatment
from dus_cli.progress import Progress
from dus_cli.release import card, lineage
from dus_cli.release.checksums import check_sums
from dus_cli.source.checkpoint import CONFIG_NAME, Checkpoint
from dus_cli.source.files import inside
from dus_cli.source.reading import read_small_file
from dus_cli.verification.compare import Compared, Comparison, Place, compare
from dus_cli.verification.options import VerifyOptions
from dus_cli.verification.origin import OutputOrigin
from dus_cli.verification.output import Output, gathered
from dus_cli.verification.report import Finding

_MAX_CARD_BYTES = 16_000_000

# The name, in messages, of what a new layer's output projection must be in an identity.
_ZEROS = "an identity's zeros"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an output is checked against.

    Attributes:
        options: the options of the verb.
        base: the checkpoint that `options.base` names, opened; None without one.
        deep: read data, to compare copies of layers and to sum files.
        progress: receives the progress.
    """

    options: VerifyOptions
    base: Checkpoint | None
    deep: bool
    progress: Progress


Check = Callable[[Output, Request], Finding]


def check_counts(output: Output, _request: Request) -> Finding:
    """Check that the numbers of tensors and parameters are those in dus.json."""
    finding = Finding()
    if not (output.has_map and output.all_readable) or output.record is None:
        return finding
    counts = {"num_tensors": len(output.tensors), "num_parameters": output.num_parameters}
    for key, counted in counts.items():
        recorded = output.record.get(key)
        if recorded != counted:
            finding.problems.append(
                f"{lineage.NAME} says {key} {shown(recorded)}, the shards hold {counted}"
            )
    return finding


def check_depth(output: Output, _request: Request) -> Finding:
    """Check that the config has as many layers as the layer map, and a kind for each."""
    finding = Finding()
    decoder, layer_map = output.decoder, output.layer_map
    if decoder is None or layer_map is None:
        return finding
    if decoder.num_layers != len(layer_map):
        finding.problems.append(
            f"{CONFIG_NAME} counts {decoder.num_layers} layers, {lineage.NAME} {len(layer_map)}"
        )
    kinds = decoder.fields.get("layer_types")
    if isinstance(kinds, list) and len(kinds) != decoder.num_layers:
        finding.problems.append(
            f"{CONFIG_NAME}: layer_types has {len(kinds)} entries for {decoder.num_layers} layers"
        )
    return finding


def check_tables(output: Output, _request: Request) -> Finding:
    """Check that weights with a block for each layer are as long as the config's depth requires.

    Quantised weights are left out, because several of their numbers may be packed in one.
    """
    finding, stack = Finding(), output.stack
    if stack is None:
        return finding
    for name in sorted(stack.tables):
        tensor = output.tensors[name].tensor
        size = expected_size(tensor, stack)
        if size is None or tensor.dtype not in FLOATS or not name.endswith(".weight"):
            continue
        axis, expected = size
        if tensor.shape[axis : axis + 1] != (expected,):
            finding.problems.append(
                f"{shown(name)} is {list(tensor.shape)}, and not {expected} along axis {axis}, "
                f"{stack.table_width} for each of {stack.num_layers} layers"
            )
    return finding


def check_twins(output: Output, request: Request) -> Finding:
    """Check that the copies of a base layer are the same, byte by byte.

    With a base, check only that they have the same tensors: `check_base` compares the bytes.
    """
    finding = Finding()
    if output.layer_map is None or output.is_healed:
        return finding
    pairs, problems, num_unlike = _twins(output.tensors, output.layer_map, output.treatment)
    if output.all_readable:  # else each tensor of one bad shard would be a problem of its own
        finding.problems += problems
    if request.base is not None:
        return finding
    if num_unlike:
        finding.warnings.append(
            f"{num_unlike} tensors have another factor than their twins: only --base can show "
            "whether they are right"
        )
    if request.deep:
        request.progress.start("comparing twins", _num_bytes(pairs))
        _compare_all(finding, pairs, request)
    return finding


def check_base(output: Output, request: Request) -> Finding:
    """Check that every tensor is the base's, byte by byte, and that the config is the base's at the
    new depth.
    """
    finding = Finding()
    if request.base is None:
        return finding
    if output.is_healed:
        finding.problems.append(
            f"{lineage.NAME} says the model was healed: its tensors are not the base's; leave out "
            "--base"
        )
        return finding
    layer_map, assume = output.layer_map, _assumptions(output, finding)
    origin = None
    if layer_map is not None:
        origin = OutputOrigin(request.base, layer_map, output.treatment, assume)
    pairs, problems = _against_base(output, origin)
    if output.all_readable:
        finding.problems += problems
    if any(pair.dtype not in {None, pair.right.tensor.dtype} for pair in pairs):
        require("--base of a model that was cast", "torch")
    request.progress.start("comparing with the base", _num_bytes(pairs))
    _compare_all(finding, pairs, request)
    return finding


def check_forward(output: Output, request: Request) -> Finding:
    """Run the output on tokens, and check that every layer computes what the base's does."""
    finding, base, layer_map = Finding(), request.base, output.layer_map
    options = request.options
    if not options.forward or base is None or output.is_healed:
        return finding
    if layer_map is None or not output.all_readable:
        return finding  # other checks report that
    from dus_cli.verification.forward import run_forward

    origin = OutputOrigin(base, layer_map, output.treatment, _assumptions(output, finding))
    forward = gathered(
        finding, lambda: run_forward(output.folder, origin, options.data, request.progress)
    )
    if forward is not None:
        finding.forward = forward
        finding.problems += forward.problems
        finding.warnings += forward.warnings
    return finding


def check_engines(output: Output, request: Request) -> Finding:
    """Check that the engines named with --for compute what the config says."""
    finding, engines = Finding(), request.options.engines
    config = output.config
    if config is None or output.decoder is None or not engines:
        return finding
    assume = _assumptions(output, finding)
    judged = gathered(finding, lambda: judging.judge_config(config, assume))
    requested = [one for one in judged or () if one.engine.name in engines]
    finding.engines = [one.to_json() for one in requested]
    finding.problems += judging.problems(requested)
    finding.warnings += judging.asides(requested)
    return finding


def check_pictures(output: Output, _request: Request) -> Finding:
    """Check that the pictures in the model card exist; without a card there is nothing to check."""
    finding, folder = Finding(), output.folder
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
        return finding  # other checks report unreadable files
    if lacking:
        finding.warnings.append(
            f"{card.NAME} shows {shown_list(lacking)}, which does not exist; the command in the "
            "card makes it again"
        )
    return finding


def check_files(output: Output, request: Request) -> Finding:
    """Check that every file has the sum in SHA256SUMS."""
    finding = Finding()
    if request.deep:
        finding.files_summed, finding.problems = check_sums(output.folder, request.options.jobs)
    return finding


# All checks, in the order in which their findings are reported.
CHECKS: tuple[Check, ...] = (
    check_counts,
    check_depth,
    check_tables,
    check_twins,
    check_base,
    check_forward,
    check_engines,
    check_pictures,
    check_files,
)


def _assumptions(output: Output, finding: Finding) -> dict[str, Assumption]:
    """The recorded decisions (--assume) about fields that dus does not know."""
    return gathered(finding, lambda: lineage.recorded_assumptions(output.record or {})) or {}


def _twins(
    tensors: dict[str, Place], layer_map: LayerMap, treatment: Treatment
) -> tuple[list[Comparison], list[str], int]:
    """Compare output layers that come from the same base layer.

    Each new layer is compared with the base's own copy; in an identity, its output projections with
    zeros. Two tensors with different factors can be compared only if one has the factor 1.

    Returns:
        The pairs to compare, a problem for each tensor that only one of two layers has, and the
        number of tensors that cannot be compared.
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
        assert own is not None  # a base layer with a new copy also has its own
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
    output: Output, origin: OutputOrigin | None
) -> tuple[list[Comparison], list[str]]:
    """Compare names and config with the base's; return the pairs of tensors to compare, and
    problems.
    """
    config, tensors = output.config, output.tensors
    if origin is None:
        return [], [f"without a valid {lineage.NAME} the output cannot be compared with a base"]
    base, layer_map, treatment, assume = origin
    decoder = decoder_config(base.config)
    if decoder.num_layers != layer_map.num_base_layers:
        problem = (
            f"the base has {decoder.num_layers} layers, and the base in {lineage.NAME} had "
            f"{layer_map.num_base_layers}"
        )
        return [], [problem]
    stack = origin.stack()
    pairs: list[Comparison] = []
    problems: list[str] = []
    expected: set[str] = set()
    for shard, stored in base.tensors():
        tensor = followed(stored, stack, layer_map)
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
    """A JSON value as text, so that NaN equals NaN."""
    return json.dumps(value, sort_keys=True)


def _num_bytes(pairs: list[Comparison]) -> int:
    return sum(pair.left.tensor.num_bytes for pair in pairs)


def _compare_all(finding: Finding, pairs: list[Comparison], request: Request) -> None:
    tally, options = Compared(), request.options
    finding.problems += compare(
        pairs, options.jobs, request.progress.advance, tally, reads_all=options.read
    )
    finding.bytes_compared += _num_bytes(pairs)
    finding.bytes_shared += tally.shared
