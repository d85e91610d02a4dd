"""Which tensors of a layer must be scaled so that what the layer adds to the residual stream is.

In most layers, h + f(norm(h)), these are the output projections (`planning.projections`). If a norm
follows a block, h + norm(f(…)), it undoes any factor before it: then the norm's own weight is
scaled. Model types were read from models/*/modeling_*.py of transformers 5.23; tests/test_starts.py
compares every type of the zoo with its base.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

from dus_cli.errors import CheckpointError, ConfigError, shown, shown_list
from dus_cli.maps.model_config import DecoderConfig
from dus_cli.maps.stacks import LayerStack
from dus_cli.planning.projections import layer_kinds, stream_patterns
from dus_cli.source.headers import TensorInfo


class PostNorms(NamedTuple):
    """The norms that follow a type's blocks: attention and similar blocks, and the MLP or experts.

    None if a type has none there. `offset` is 1 if they multiply by 1 + w.
    """

    after_mixer: str | None
    after_mlp: str
    offset: int = 0

    def after(self, writer: str) -> str | None:
        """The norm that follows the block of an output projection; None if there is none."""
        is_mlp = _MLP.match(writer) is not None
        return self.after_mlp if is_mlp else self.after_mixer


_MLP = re.compile(r"mlp|ffn|feed_forward|block_sparse_moe|moe")

_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")

POST_NORMS: Mapping[str, PostNorms] = {
    "afmoe": PostNorms("post_attention_layernorm", "post_mlp_layernorm"),
    "axk1": PostNorms(None, "post_mlp_layernorm"),  # of layers of experts
    "exaone4": PostNorms(*_AFTER),
    "flex_olmo": PostNorms(*_AFTER),
    "gemma2": PostNorms(*_AFTER, offset=1),
    "gemma3_text": PostNorms(*_AFTER, offset=1),
    "glm4": PostNorms("post_self_attn_layernorm", "post_mlp_layernorm"),
    "glm4v_text": PostNorms("post_self_attn_layernorm", "post_mlp_layernorm"),
    "glm_ocr_text": PostNorms("post_self_attn_layernorm", "post_mlp_layernorm"),
    "hyperclovax": PostNorms("post_norm1", "post_norm2"),
    "kolibri1": PostNorms("post_attn_norm", "post_ffn_norm"),  # as its files have them
    "lfm3": PostNorms("post_operator_norm", "post_ffn_norm"),
    "muse_glimmer_text": PostNorms(*_AFTER, offset=1),
    "olmo2": PostNorms(*_AFTER),
    "olmo3": PostNorms(*_AFTER),
}

# Names of tensors that may be norms after a block, for types that are not in the table above.
_LOOKS_POST_NORM = re.compile(
    r"post_?(feed_?forward|ffn?|ffw|mlp|moe|self_attn|mixer|operator|block|norm)"
)


def scaled_tensors(
    decoder: DecoderConfig,
    stack: LayerStack,
    tensors: Iterable[TensorInfo],
    layers: Container[int],
    option: str,
) -> dict[str, int]:
    """The tensors that are scaled in these base layers: their names within the layer
    (`projections.pattern`), with the offset of each.

    `option` is the option's name in messages.

    Raises:
        ConfigError: the layers of this model are not h + f(h), or a norm may follow a block.
        CheckpointError: a block has no output projection, or a quantised one; or only some layers
            have a norm after a block.
    """
    tensors = tuple(tensors)
    writers = stream_patterns(decoder, stack, tensors, layers, option)
    norms = POST_NORMS.get(decoder.model_type)
    offsets: dict[str, int] = {}
    kinds = layer_kinds(tensors, stack, layers)
    for kind in kinds:
        offsets |= _scaled_in(kind, writers & kind, norms)
        known = () if norms is None else (norms.after_mixer, norms.after_mlp)
        post_norms = sorted(
            name
            for name in kind
            if _LOOKS_POST_NORM.search(name) and name.rpartition(".")[0] not in known
        )
        if post_norms:
            raise ConfigError(
                f"{option}: {shown_list(post_norms)} may follow a block and undo its scaling, "
                "and dus does not know "
                f"that of model type {shown(decoder.model_type)!r}; leave out {option}"
            )
    for kind in kinds:
        if both := sorted((offsets.keys() & kind) - _scaled_in(kind, writers & kind, norms).keys()):
            raise CheckpointError(
                f"{option}: {shown_list(both)} would have to be scaled in some layers and not in "
                f"others; leave out {option}"
            )
    return dict(sorted(offsets.items()))


def _scaled_in(
    kind: frozenset[str], writers: frozenset[str], norms: PostNorms | None
) -> dict[str, int]:
    """The tensors that are scaled in layers with these tensors: each output projection, or the norm
    after it.
    """
    if norms is None or not all(
        f"{norm}.weight" in kind for norm in (norms.after_mixer, norms.after_mlp) if norm
    ):
        return dict.fromkeys(writers, 0)
    offsets: dict[str, int] = {}
    for writer in writers:
        norm = norms.after(writer)
        if norm is None:
            offsets[writer] = 0
            continue
        offsets[f"{norm}.weight"] = norms.offset
        if f"{norm}.bias" in kind:
            offsets[f"{norm}.bias"] = 0
    return offsets
