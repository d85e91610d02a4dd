"""Output projections: the matrices with which a layer's blocks write to the residual stream.

A pre-norm layer h + f(norm(h)) whose output projections are zeros is the identity: LLaMA Pro's
block expansion uses this (arXiv:2401.02415, section 3.2). With a factor c on them it is
h + c · f(norm(h)), unless a norm follows f (`planning.post_norms`). Names were read from the files
that transformers 5.23 writes and from models/*/modeling_*.py; tests/test_recipes.py and
tests/test_starts.py compare every type of the zoo with its base.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dus_cli.errors import CheckpointError, ConfigError, LayerMapError, shown, shown_list
from dus_cli.maps.layers import LayerMap, split_name
from dus_cli.maps.model_config import DecoderConfig
from dus_cli.maps.stacks import LayerStack
from dus_cli.planning.dtypes import FLOATS
from dus_cli.source.headers import TensorInfo

# Names of modules that write to the residual stream, unless their shape shows otherwise: w2 is the
# output of Llama's w1, w2, w3 but an input of Qwen 1's w1, w2, c_proj.
PROJECTIONS = frozenset(
    """
    o_proj out_proj c_proj down_proj dense_4h_to_h fc2 fc_out w2 output_linear linear_out proj_down
    attention_out w_out wo_ud
    """.split()
)

# Names that have other meanings elsewhere, with the block in which they are the output projection.
IN_BLOCK = frozenset(
    [
        ("attention", "dense"),  # gpt_neox, bailing_hybrid
        ("self_attention", "dense"),  # bloom, falcon
        ("self_attn", "dense"),  # phi, persimmon
        ("multi_head_attention", "dense"),  # ctrl
        ("attention", "wo"),  # internlm2
    ]
)

# Other tensors with which a model type writes to the stream, as patterns.
BY_TYPE: Mapping[str, tuple[str, ...]] = {
    # the second of two matrices, which only have numbers in a Sequential
    "ctrl": ("ffn.2.weight", "ffn.2.bias"),
    "jetmoe": ("mlp.bias", "self_attention.experts.bias"),
}

# Model types whose layer is not h + f(h): zeros would not make it the identity.
NOT_IDENTITIES: Mapping[str, str] = {
    "beam": "its residual is scaled by the layer's number",
    "deepseek_v4": "it mixes several residual streams",
    "doge": "it scales the residual",
    "gemma3n_text": "it mixes several residual streams",
    "gemma4_text": "it scales the stream behind each layer",
    "gemma4_unified_text": "it scales the stream behind each layer",
    "glm_moe_dsa": "a layer hands on which tokens the next ones attend to",
    "hy_v4": "it mixes several residual streams",
    "inkling2_text": "later layers read each block of layers by itself",
    "longcat_flash": "some of its experts hand their input on",
    "minimax": "its residual is the normed input",
} | dict.fromkeys(
    "bart blenderbot-small marian mvp openai-gpt plbart trocr".split(),
    "its norms stand on the residual stream, behind each block",
)

# Fields of the config with the value for which a layer is not h + f(h).
NOT_WITH: Mapping[str, tuple[Any, str]] = {
    # opt
    "do_layer_norm_before": (False, "norms then stand on the residual stream, behind each block"),
    # bloom
    "apply_residual_connection_post_layernorm": (True, "the residual is then the normed input"),
}

# Prefixes of blocks that are not blocks themselves (dbrx).
_WRAPPERS = ("norm_attn_norm.",)

# Convolutions without bias after a block, which map zeros to zeros (inkling_text).
_AFTER_BLOCKS = frozenset(["attn_sconv", "mlp_sconv"])

# Matrices in a layer that are not inside a block; together they are one (opt, xglm, biogpt).
_BARE = frozenset(["fc1", "fc2"])

# Fields of the config with the width of the residual stream, for layers without a norm.
_WIDTHS = ("hidden_size", "n_embd", "d_model", "model_dim")

# Names of matrices that read the stream in attention: their shape shows which side of a matrix is
# its input.
_READERS = re.compile(
    r"^(c_attn|query_key_value|w?qkv(_proj)?|w?[qkv]|[qkv]_proj|qkv)$", re.IGNORECASE
)

_NORM = re.compile(r"norm\d?$|norm_\w+$|^ln_?|layernorm", re.IGNORECASE)
_GATE = re.compile(r"gates?$|^router$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)(?!\.(weight|bias)$)")


def pattern(suffix: str) -> str:
    """A tensor's name within its layer, with `*` for numbers of experts; numbers in a Sequential
    stay.

    >>> pattern("mlp.experts.31.down_proj.weight"), pattern("ffn.2.weight")
    ('mlp.experts.*.down_proj.weight', 'ffn.2.weight')
    """
    return _NUMBER.sub("*", suffix)


def is_output_projection(suffix: str, model_type: str = "") -> bool:
    """Whether a tensor is an output projection's weight or bias, by its name within its layer.

    >>> is_output_projection("self_attn.o_proj.weight"), is_output_projection("mlp.up_proj.weight")
    (True, False)
    """
    if pattern(suffix) in BY_TYPE.get(model_type, ()):
        return True
    parts = _stem(suffix).split(".")
    return parts[-1] in PROJECTIONS or tuple(parts[-2:]) in IN_BLOCK


class Writers(NamedTuple):
    """The tensors of a layer that write to the residual stream, as patterns; and, for modules in
    which that is unclear, the matrices that may.
    """

    found: frozenset[str]
    unclear: tuple[tuple[str, ...], ...]


def stream_writers(
    layer: Mapping[str, Sequence[int]], model_type: str = "", width: int | None = None
) -> Writers:
    """Find a layer's output projections, weights and biases, by name, shape and position.

    Only one matrix of a module may write: if several have such a name, it is the one whose output
    is as wide as the stream. Zeros on two factors of one product would leave neither a gradient.

    Args:
        layer: shapes of the layer's tensors by their names within it.
        model_type: the decoder's type.
        width: the width of the residual stream, for a layer without a norm.

    >>> shapes = {"input_layernorm.weight": (8,)}
    >>> shapes |= {"mlp.w1.weight": (32, 8), "mlp.w2.weight": (32, 8)}
    >>> sorted(stream_writers(shapes | {"mlp.c_proj.weight": (8, 32)}).found)
    ['mlp.c_proj.weight']
    """
    width = _stream_width(layer) or width
    modules: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for suffix, shape in layer.items():
        if len(shape) > 1 and not suffix.endswith("bias") and _block_of(suffix) is not None:
            stem = _stem(suffix)
            modules[stem.rpartition(".")[0]].setdefault(stem, tuple(shape))
    orientation = _orientation(layer)
    chosen: set[str] = set()
    unclear = []
    for matrices in modules.values():
        named = [stem for stem in matrices if is_output_projection(stem)]
        writer = _writer(matrices, named, orientation, width) if named else None
        if writer is not None:
            chosen.add(writer)
        elif named:
            unclear.append(tuple(named))
    own = BY_TYPE.get(model_type, ())
    found = frozenset(
        pattern(suffix) for suffix in layer if _stem(suffix) in chosen or pattern(suffix) in own
    )
    return Writers(found, tuple(unclear))


def _stem(suffix: str) -> str:
    """The pattern of the module that a weight or bias belongs to, also for experts in one tensor.

    >>> _stem("mlp.experts.7.w2.weight"), _stem("mlp.experts.down_proj_bias")
    ('mlp.experts.*.w2', 'mlp.experts.down_proj')
    """
    parts = pattern(suffix).split(".")
    if len(parts) > 1 and parts[-1] in {"weight", "bias"}:
        parts.pop()
    if len(parts) > 1 and parts[-1] == "linear":  # moshi
        parts.pop()
    parts[-1] = parts[-1].removesuffix("_bias").removesuffix("_weight")
    return ".".join(parts)


def _stream_width(layer: Mapping[str, Sequence[int]]) -> int | None:
    """The width of the residual stream: that of most of the layer's own norms; None without one."""
    widths = Counter(
        shape[0] for suffix, shape in layer.items() if len(shape) == 1 and _is_norm(suffix)
    )
    return widths.most_common(1)[0][0] if widths else None


def _orientation(layer: Mapping[str, Sequence[int]]) -> int | None:
    """Which side of this layer's matrices is their output: 0 as in `nn.Linear`, 1 as in GPT-2's
    Conv1D; None if that is not clear.

    It follows from a bias, which is as long as the output, and from the matrices that read the
    stream for attention.
    """
    votes = [0, 0]
    width = _stream_width(layer)
    for suffix, shape in layer.items():
        if len(shape) != 2 or shape[0] == shape[1] or not suffix.endswith("weight"):
            continue
        bias = layer.get(f"{suffix.removesuffix('weight')}bias")
        if bias is not None and len(bias) == 1 and bias[0] in shape:
            votes[list(shape).index(bias[0])] += 1
        elif (
            width is not None
            and width in shape
            and _READERS.search(_stem(suffix).rpartition(".")[2])
        ):
            votes[1 - list(shape).index(width)] += 1
    if votes[0] == votes[1]:
        return None
    return int(votes[1] > votes[0])


def _writer(
    matrices: Mapping[str, tuple[int, ...]],
    named: Sequence[str],
    orientation: int | None,
    width: int | None,
) -> str | None:
    """The matrix of a module that writes to the stream; None if that is not clear.

    `named` are the matrices with the name of an output projection.
    """
    if orientation is None:
        orientation = _odd_one_out(matrices, width)
    writing = [stem for stem in named if _writes(matrices[stem], orientation, width)]
    if len(named) > 1:
        return writing[0] if len(writing) == 1 else None
    if writing:
        return writing[0]
    others = [
        stem
        for stem, shape in matrices.items()
        if stem not in named
        and len(shape) == 2
        and shape[0] != shape[1]
        and _writes(shape, orientation, width)
    ]
    if not others:
        return named[0]  # only the name shows it, and no shape contradicts it (dbrx)
    return others[0] if len(others) == 1 and orientation is not None else None


def _writes(shape: tuple[int, ...], orientation: int | None, width: int | None) -> bool:
    """Whether a matrix's output is as wide as the stream. For several matrices in one tensor,
    either side may be the output.
    """
    if len(shape) == 2 and orientation is not None:
        return shape[orientation] == width
    return width in shape[-2:]


def _odd_one_out(matrices: Mapping[str, tuple[int, ...]], width: int | None) -> int | None:
    """The side with the stream's width of the only matrix that has it there: a block has more
    matrices that read than matrices that write.
    """
    sides = Counter(
        shape.index(width)
        for shape in matrices.values()
        if len(shape) == 2 and shape[0] != shape[1] and width in shape
    )
    alone = [side for side, count in sides.items() if count == 1 and sides[1 - side] > 1]
    return alone[0] if alone else None


def zero_patterns(
    decoder: DecoderConfig, stack: LayerStack, tensors: Iterable[TensorInfo], layer_map: LayerMap
) -> frozenset[str]:
    """The tensors of new layers that must be zeros for the model to compute what its base does, as
    `pattern`s.

    Every tensor of the copied layers must be in a norm, or in a block that ends in zeros.

    Raises:
        LayerMapError: the output does not have the base's layers, all and in order; or it has no
            new layers.
        ConfigError: the layers of this model are not h + f(h).
        CheckpointError: a block has no output projection, or a quantised one.
    """
    _check_map(layer_map)
    copied = {layer_map.sources[output] for output in layer_map.new_layers}
    return stream_patterns(decoder, stack, tensors, copied, "--identity")


def stream_patterns(
    decoder: DecoderConfig,
    stack: LayerStack,
    tensors: Iterable[TensorInfo],
    copied: Container[int],
    option: str,
) -> frozenset[str]:
    """The output projections of these base layers, weights and biases; every block must have one.

    `option` is the option's name in messages.

    Raises:
        ConfigError: the layers of this model are not h + f(h).
        CheckpointError: a block has no output projection, or a quantised one.
    """
    _check_config(decoder, option)
    layers: dict[int, dict[str, TensorInfo]] = defaultdict(dict)
    for tensor in tensors:
        split = split_name(tensor.name)
        if split is not None and split.prefix == stack.prefix and split.index in copied:
            layers[split.index][split.suffix] = tensor
    width = next(
        (decoder.fields[key] for key in _WIDTHS if type(decoder.fields.get(key)) is int), None
    )
    of_kind: dict[tuple[tuple[str, str, tuple[int, ...]], ...], frozenset[str]] = {}
    for index in sorted(layers):
        kind = tuple(sorted((suffix, t.dtype, t.shape) for suffix, t in layers[index].items()))
        if kind not in of_kind:
            of_kind[kind] = _writers_of(layers[index], decoder.model_type, width, option)
    found = frozenset().union(*of_kind.values())
    for kind, writers in of_kind.items():
        both = sorted(found & {pattern(suffix) for suffix, _, _ in kind} - writers)
        if both:
            raise CheckpointError(
                f"{option}: {shown_list(both)} writes to the residual stream in some layers and "
                f"not in others, by its shapes; leave out {option}"
            )
    return found


def layer_kinds(
    tensors: Iterable[TensorInfo], stack: LayerStack, layers: Container[int]
) -> frozenset[frozenset[str]]:
    """The sets of tensors that these layers hold, as `pattern`s; each set once."""
    patterns: dict[int, set[str]] = defaultdict(set)
    for tensor in tensors:
        split = split_name(tensor.name)
        if split is not None and split.prefix == stack.prefix and split.index in layers:
            patterns[split.index].add(pattern(split.suffix))
    return frozenset(map(frozenset, patterns.values()))


def _check_map(layer_map: LayerMap) -> None:
    if not layer_map.new_layers:
        raise LayerMapError(
            "--identity: this map has no new layer; leave it out, or give a deeper map"
        )
    if not layer_map.holds_base:
        left_out = [str(layer) for layer, outputs in enumerate(layer_map.outputs) if not outputs]
        problem = (
            f"leaves out layers {shown_list(left_out)}" if left_out else "has them in another order"
        )
        raise LayerMapError(
            "--identity needs the base's layers in the output, all and in order, and this map "
            f"{problem}: the model could not start as its base; leave out --identity"
        )


def _check_config(decoder: DecoderConfig, option: str) -> None:
    cannot = "cannot be identities" if option == "--identity" else "cannot be scaled"
    reason = NOT_IDENTITIES.get(decoder.model_type)
    if reason is not None:
        raise ConfigError(
            f"{option}: layers of model type {decoder.model_type!r} {cannot}: {reason}"
        )
    for key, (value, reason) in NOT_WITH.items():
        if decoder.fields.get(key) is value:
            raise ConfigError(
                f"{option}: config.json has {key} {value}, so layers {cannot}: {reason}"
            )


def _writers_of(
    layer: Mapping[str, TensorInfo], model_type: str, width: int | None, option: str
) -> frozenset[str]:
    """The patterns of one layer's output projections; every block must have one."""
    writers = stream_writers(
        {suffix: tensor.shape for suffix, tensor in layer.items()}, model_type, width
    )
    blocks: dict[str, list[str]] = defaultdict(list)
    ended: set[str] = set()
    for suffix, tensor in layer.items():
        block = _block_of(suffix)
        if block is None:
            continue
        blocks[block].append(tensor.name)
        if pattern(suffix) in writers.found:
            _check_float(tensor, option)
            # experts also end the block with the router that chooses them
            ended |= {block, block.partition(".")[0]}
        elif is_output_projection(suffix, model_type):
            if tensor.dtype not in FLOATS:
                raise _quantised(tensor, option)
        elif any(
            part in PROJECTIONS or part.startswith(tuple(f"{p}_" for p in PROJECTIONS))
            for part in suffix.split(".")
        ):
            raise _quantised(tensor, option)
    if writers.unclear:
        names = [
            tensor.name for suffix, tensor in layer.items() if _stem(suffix) in writers.unclear[0]
        ]
        raise CheckpointError(
            f"{option}: by name and shape, {shown_list(names)} may or may not write to the "
            f"residual stream, and a change to the wrong matrix would do harm; leave out {option}"
        )
    can = "silence" if option == "--identity" else "scale"
    for block, names in blocks.items():
        if block not in ended:
            raise CheckpointError(
                f"{option}: no output projection is known in {shown_list(names)}: dus cannot {can} "
                f"this layer; leave out {option}"
            )
    return frozenset(
        writers.found & {pattern(suffix) for suffix in layer if _block_of(suffix) is not None}
    )


def _is_norm(suffix: str) -> bool:
    """Whether a tensor belongs to one of the layer's own norms."""
    for wrapper in _WRAPPERS:
        suffix = suffix.removeprefix(wrapper)
    return _NORM.search(suffix.partition(".")[0]) is not None


def _block_of(suffix: str) -> str | None:
    """The block that a tensor belongs to; None for a layer's own norms and for tensors that only
    scale a block.

    Experts and shared experts are separate blocks: each of them writes to the stream.
    """
    for wrapper in _WRAPPERS:
        suffix = suffix.removeprefix(wrapper)
    parts = suffix.split(".")
    if (
        _NORM.search(parts[0])
        or any(map(_GATE.search, parts))
        or (parts[0] in _AFTER_BLOCKS and parts[-1] != "bias")
    ):
        return None
    if parts[0] in _BARE:
        return "fc"
    path = [part for part in parts if not part.isdecimal()]
    if (
        len(path) > 2
        and re.search("expert|shared", path[1])
        and not _GATE.search(path[1])
        and not path[2].endswith("_bias")
    ):
        return f"{path[0]}.{path[1]}"
    return path[0]


def _check_float(tensor: TensorInfo, option: str) -> None:
    if tensor.dtype not in FLOATS:
        raise _quantised(tensor, option)


def _quantised(tensor: TensorInfo, option: str) -> CheckpointError:
    return CheckpointError(
        f"{option}: {shown(tensor.name)} ({tensor.dtype}) is a quantised output projection, and "
        f"dus does not know what its values mean; use the unquantised model, or leave out {option}"
    )
