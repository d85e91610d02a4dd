"""Output projections by name, shape and place: what is zero in an identity can learn, and
nothing else is zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import forked_dus
from torch import Tensor
from torch.nn.functional import silu

from dus_cli.heal.train.gains import matrices_of_the_stream
from dus_cli.planning.projections import stream_writers

H, WIDE, E = 8, 24, 2  # the stream, within a block, experts
Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, Tensor]
LINEAR_ATTENTION: Shapes = {"attn.c_attn.weight": (3 * H, H), "attn.c_proj.weight": (H, H)}
CONV1D_ATTENTION: Shapes = {
    "attn.c_attn.weight": (H, 3 * H),
    "attn.c_attn.bias": (3 * H,),
    "attn.c_proj.weight": (H, H),
    "attn.c_proj.bias": (H,),
}


class Form(NamedTuple):
    """A layer's matrices besides its norms, what its second block computes, and what of it
    writes to the stream.
    """

    shapes: Shapes
    block: Callable[[Tensor, Weights], Tensor]
    writes: set[str]


def gated(
    gate: str, up: str, down: str, prefix: str = "mlp."
) -> Callable[[Tensor, Weights], Tensor]:
    return lambda x, w: (
        (silu(x @ w[f"{prefix}{gate}.weight"].T) * (x @ w[f"{prefix}{up}.weight"].T))
        @ w[f"{prefix}{down}.weight"].T
    )


def experts(prefix: str, gate: str, up: str, down: str) -> Callable[[Tensor, Weights], Tensor]:
    def block(x: Tensor, w: Weights) -> Tensor:
        weights = torch.softmax(x @ w["mlp.gate.weight"].T, -1)
        each = [
            gated(gate, up, down, f"{prefix}.{k}.")(x, w) * weights[:, k : k + 1] for k in range(E)
        ]
        return torch.stack(each).sum(0)

    return block


def three(gate: str, up: str, down: str, prefix: str = "mlp.", wide: int = WIDE) -> Shapes:
    return {
        f"{prefix}{gate}.weight": (wide, H),
        f"{prefix}{up}.weight": (wide, H),
        f"{prefix}{down}.weight": (H, wide),
    }


def many(prefix: str, gate: str, up: str, down: str) -> Shapes:
    found: Shapes = {"mlp.gate.weight": (E, H)}
    for k in range(E):
        found |= three(gate, up, down, f"{prefix}.{k}.")
    return found


def conv1d(x: Tensor, w: Weights) -> Tensor:
    hidden = silu(x @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"])
    return hidden @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]


def like_dbrx(x: Tensor, w: Weights) -> Tensor:
    first, gate, second = (w[f"ffn.experts.mlp.{name}"] for name in ("w1", "v1", "w2"))
    return (silu(x @ first.T) * (x @ gate.T)) @ second


def fused(x: Tensor, w: Weights) -> Tensor:
    hidden = torch.einsum("th,eih->eti", x, w["mlp.experts.gate_up_proj"])
    return torch.einsum("eti,ehi->th", silu(hidden), w["mlp.experts.down_proj"])


def fused_transposed(x: Tensor, w: Weights) -> Tensor:
    hidden = (
        torch.einsum("th,ehi->eti", x, w["mlp.experts.gate_up_proj"])
        + w["mlp.experts.gate_up_proj_bias"][:, None]
    )
    behind = torch.einsum("eti,eih->eth", silu(hidden), w["mlp.experts.down_proj"])
    return (behind + w["mlp.experts.down_proj_bias"][:, None]).sum(0)


def mixer(x: Tensor, w: Weights) -> Tensor:
    left, right = (x @ w["mixer.in_proj.weight"].T).chunk(2, -1)
    return (left * silu(right)) @ w["mixer.out_proj.weight"].T


C_PROJ = "attn.c_proj.weight"
FORMS = {
    "llama_w1_w2_w3": Form(
        LINEAR_ATTENTION | three("w1", "w3", "w2", "feed_forward."),
        gated("w1", "w3", "w2", "feed_forward."),
        {C_PROJ, "feed_forward.w2.weight"},
    ),
    "qwen1_w1_w2_c_proj": Form(
        LINEAR_ATTENTION | three("w2", "w1", "c_proj"),
        gated("w2", "w1", "c_proj"),
        {C_PROJ, "mlp.c_proj.weight"},
    ),
    "xformers_w1_w2_w3": Form(
        LINEAR_ATTENTION | three("w1", "w2", "w3"),
        gated("w1", "w2", "w3"),
        {C_PROJ, "mlp.w3.weight"},
    ),
    "fc1_fc2_fc3": Form(
        LINEAR_ATTENTION | three("fc1", "fc2", "fc3"),
        gated("fc1", "fc2", "fc3"),
        {C_PROJ, "mlp.fc3.weight"},
    ),
    "no_wider_than_the_stream": Form(
        LINEAR_ATTENTION | three("w1", "w3", "w2", wide=H),
        gated("w1", "w3", "w2"),
        {C_PROJ, "mlp.w2.weight"},
    ),
    "gpt2_conv1d": Form(
        CONV1D_ATTENTION
        | {
            "mlp.c_fc.weight": (H, WIDE),
            "mlp.c_fc.bias": (WIDE,),
            "mlp.c_proj.weight": (WIDE, H),
            "mlp.c_proj.bias": (H,),
        },
        conv1d,
        {C_PROJ, "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"},
    ),
    "dbrx_all_of_one_shape": Form(
        LINEAR_ATTENTION
        | {f"ffn.experts.mlp.{name}": (E * WIDE, H) for name in ("w1", "v1", "w2")},
        like_dbrx,
        {C_PROJ, "ffn.experts.mlp.w2"},
    ),
    "experts_w1_w2_w3": Form(
        LINEAR_ATTENTION | many("mlp.experts", "w1", "w3", "w2"),
        experts("mlp.experts", "w1", "w3", "w2"),
        {C_PROJ, "mlp.experts.*.w2.weight"},
    ),
    "experts_w1_w2_c_proj": Form(
        LINEAR_ATTENTION | many("mlp.experts", "w2", "w1", "c_proj"),
        experts("mlp.experts", "w2", "w1", "c_proj"),
        {C_PROJ, "mlp.experts.*.c_proj.weight"},
    ),
    "experts_in_one_tensor": Form(
        LINEAR_ATTENTION
        | {"mlp.experts.gate_up_proj": (E, WIDE, H), "mlp.experts.down_proj": (E, H, WIDE)},
        fused,
        {C_PROJ, "mlp.experts.down_proj"},
    ),
    "experts_in_one_transposed_tensor": Form(
        LINEAR_ATTENTION
        | {
            "mlp.experts.gate_up_proj": (E, H, WIDE),
            "mlp.experts.gate_up_proj_bias": (E, WIDE),
            "mlp.experts.down_proj": (E, WIDE, H),
            "mlp.experts.down_proj_bias": (E, H),
        },
        fused_transposed,
        {C_PROJ, "mlp.experts.down_proj", "mlp.experts.down_proj_bias"},
    ),
    "mixer": Form(
        LINEAR_ATTENTION
        | {"mixer.in_proj.weight": (2 * WIDE, H), "mixer.out_proj.weight": (H, WIDE)},
        mixer,
        {C_PROJ, "mixer.out_proj.weight"},
    ),
}
NORMS: Shapes = {"ln_1.weight": (H,), "ln_2.weight": (H,)}


def write(folder: Path, shapes: Shapes, num_layers: int = 4) -> Path:
    """A checkpoint of a model type that no table knows, with random weights."""
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(16, H),
        "lm_head.weight": torch.randn(16, H),
    }
    for layer in range(num_layers):
        for name, shape in (NORMS | shapes).items():
            tensors[f"model.layers.{layer}.{name}"] = torch.randn(shape) / H**0.5
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "ours",
        "hidden_size": H,
        "num_hidden_layers": num_layers,
        "vocab_size": 16,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def attention(x: Tensor, w: Weights) -> Tensor:
    """Causal, and turned the way the matrices stand."""
    is_linear = w["attn.c_attn.weight"].shape == (3 * H, H)
    turned = [
        w[f"attn.{name}.weight"].T if is_linear else w[f"attn.{name}.weight"]
        for name in ("c_attn", "c_proj")
    ]
    biases = [w.get(f"attn.{name}.bias", torch.zeros(())) for name in ("c_attn", "c_proj")]
    query, key, value = (x @ turned[0] + biases[0]).chunk(3, -1)
    scores = (query @ key.T).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    return torch.softmax(scores, -1) @ value @ turned[1] + biases[1]


def logits(tensors: Weights, form: Form) -> Tensor:
    """The model of this form on a few tokens, with as many layers as there are."""
    x = tensors["model.embed_tokens.weight"][torch.arange(6)]
    for layer in range(1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)):
        prefix = f"model.layers.{layer}."
        w = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        x = x + attention(torch.rms_norm(x, (H,), w["ln_1.weight"]), w)
        x = x + form.block(torch.rms_norm(x, (H,), w["ln_2.weight"]), w)
    return x @ tensors["lm_head.weight"].T


@pytest.mark.parametrize("name", FORMS)
def test_every_output_projection_of_an_identity_gets_a_gradient_and_the_model_is_its_base(
    name: str, tmp_path: Path
) -> None:
    form = FORMS[name]
    base = write(tmp_path / "base", form.shapes)
    done = forked_dus("upscale", base, "-t", "1", "--identity", "-o", tmp_path / "out", "--json")
    assert set(done.report["identity"]) == form.writes
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(logits(tensors, form), logits(load_file(base / "model.safetensors"), form))
    for tensor in tensors.values():
        tensor.requires_grad_()
    torch.autograd.backward(logits(tensors, form).square().sum())
    zeros = [name for name, tensor in tensors.items() if not tensor.any()]
    for layer in done.report["new_layers"]:
        mine = [tensors[name] for name in zeros if name.startswith(f"model.layers.{layer}.")]
        assert len(mine) >= len(form.writes)
        assert all(tensor.grad is not None and tensor.grad.any() for tensor in mine)
    assert all(int(name.split(".")[2]) in done.report["new_layers"] for name in zeros)


@pytest.mark.parametrize("name", FORMS)
def test_a_gain_is_learned_for_the_same_matrices(name: str) -> None:
    form = FORMS[name]
    layer = {
        f"model.layers.1.{suffix}": torch.empty(shape)
        for suffix, shape in (NORMS | form.shapes).items()
    }
    learned = {name.removeprefix("model.layers.1.") for name in matrices_of_the_stream(layer)}
    wanted = {
        name.replace("*", str(k))
        for name in form.writes
        if name.endswith(".weight")
        for k in range(E)
    }
    assert learned == wanted


UNCLEAR: dict[str, Shapes] = {
    "square": LINEAR_ATTENTION | three("w2", "w1", "c_proj", wide=H),
    "the_name_says_one_and_the_shape_another_of_two": LINEAR_ATTENTION
    | {"mlp.w2.weight": (WIDE, H), "mlp.left.weight": (H, WIDE), "mlp.right.weight": (H, WIDE)},
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_where_two_candidates_are_left_an_identity_is_refused_by_name(
    name: str, tmp_path: Path
) -> None:
    base = write(tmp_path / "base", UNCLEAR[name])
    done = forked_dus("upscale", base, "-t", "1", "--identity", "-o", tmp_path / "out", "-q")
    done.assert_one_line_error("--identity", "model.layers.1.mlp.w2.weight", "leave out --identity")
    assert not (tmp_path / "out").exists()
    layer = {
        f"model.layers.1.{suffix}": torch.empty(shape)
        for suffix, shape in (NORMS | UNCLEAR[name]).items()
    }
    assert matrices_of_the_stream(layer) == ["model.layers.1.attn.c_proj.weight"]


def test_what_stands_in_a_norm_or_a_router_writes_nothing_to_the_stream() -> None:
    shapes = NORMS | {
        "ln_1.mlp.fc2.weight": (H, 4),
        "mlp.gate.down_proj.weight": (H, WIDE),
        "mlp.w2.weight": (H, WIDE),
    }
    assert stream_writers(shapes).found == {"mlp.w2.weight"}


def test_layers_that_disagree_about_a_name_are_refused(tmp_path: Path) -> None:
    """w2 writes in one kind of layer and reads in another, and one pattern would zero both."""
    base = write(tmp_path / "base", LINEAR_ATTENTION | three("w1", "w3", "w2"))
    tensors = load_file(base / "model.safetensors")
    for name in ("w1", "w2"):
        tensors[f"model.layers.2.mlp.{name}.weight"] = torch.randn(WIDE, H)
    tensors["model.layers.2.mlp.c_proj.weight"] = torch.randn(H, WIDE)
    del tensors["model.layers.2.mlp.w3.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    # without it layers that are built unlike are refused before
    assumed = ["--assume", "model.layers=keep"]
    done = forked_dus(
        "upscale", base, "-t", "1", "--identity", *assumed, "-o", tmp_path / "out", "-q"
    )
    done.assert_one_line_error("--identity", "mlp.w2.weight", "in some layers and not in others")
