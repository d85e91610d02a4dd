"""Published maps, identities: which layers are new, which tensors are zeros, and that the base
is still computed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zoo
from checkpoints import fill_randomly, llama_config, llama_tensors, write_checkpoint
from forked import dus
from written import flip_bit, folder_digest, layer_bytes, names_and_bytes, problems, tensor_at

from dus_cli.errors import LayerMapError
from dus_cli.maps.layers import stack, typed_map
from dus_cli.maps.recipes import RECIPES, recipe_map
from dus_cli.planning.projections import is_output_projection

# What was published, from the sources that dus_cli/maps/recipes.py names.
PUBLISHED = {
    "solar": (32, 48, (*range(24), *range(8, 32))),
    "yi": (32, 48, (*range(28), *range(12, 32))),
    "bielik": (32, 50, (*range(25), *range(7, 32))),
    "granite-34b-code": (52, 88, (*range(44), *range(8, 52))),
    "llama-pro": (
        32,
        40,
        tuple(k for g in range(8) for k in (4 * g, 4 * g + 1, 4 * g + 2, 4 * g + 3, 4 * g + 3)),
    ),
    "llama-3-120b": (
        80,
        140,
        tuple(k for start in range(0, 70, 10) for k in range(start, start + 20)),
    ),
    "kl3m-007": (30, 120, tuple(range(30)) * 4),
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_is_the_published_map(name: str) -> None:
    num_base, num_output, sources = PUBLISHED[name]
    layer_map = recipe_map(name, num_base)
    assert layer_map.sources == sources
    assert len(layer_map) == num_output
    assert layer_map.holds_base


def test_solar_is_the_default_at_every_depth() -> None:
    for num_layers in range(4, 100):
        assert recipe_map("solar", num_layers) == stack(num_layers)


@pytest.mark.parametrize("name", ["solar", "yi", "llama-pro", "llama-3-120b", "kl3m-007"])
@pytest.mark.parametrize("num_layers", range(8, 100))
def test_at_other_depths_no_layer_is_lost_and_the_model_is_deeper(
    name: str, num_layers: int
) -> None:
    layer_map = recipe_map(name, num_layers)
    assert all(layer_map.outputs)
    assert layer_map.holds_base
    assert layer_map.is_deeper


def test_starts_are_rounded_down_and_ends_up() -> None:
    assert str(recipe_map("yi", 30)) == "0:27,11:30"  # 7/8 · 30 = 26.25, 3/8 · 30 = 11.25
    assert str(recipe_map("llama-3-120b", 12)) == "0:3,1:5,3:6,4:8,6:9,7:11,9:12"


def test_layers_after_the_last_whole_group_get_no_copy() -> None:
    assert recipe_map("llama-pro", 10).sources == (0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9)


@pytest.mark.parametrize(
    ("name", "num_layers", "said"),
    [
        (
            "bielik",
            30,
            "is for 32 layers and this model has 30: its trim of 7 .* --trim 7 is the same cut",
        ),
        ("bielik", 12, "is for 32 layers .* choose a --trim"),
        ("granite-34b-code", 32, "is for 52 layers and this model has 32: its trim of 8"),
        ("llama-pro", 3, "needs 4 layers or more and this model has 3"),
        ("yi", 7, "needs 8 layers or more"),
        ("solar", 3, "needs 4 layers or more"),
        ("nobody", 32, "there is no recipe 'nobody'; use one of solar, yi, "),
    ],
)
def test_a_depth_that_does_not_fit_is_refused_with_those_that_do(
    name: str, num_layers: int, said: str
) -> None:
    with pytest.raises(LayerMapError, match=said):
        recipe_map(name, num_layers)


def test_a_recipe_is_written_recorded_and_made_again(base: Path, tmp_path: Path) -> None:
    report = dus("upscale", base, "--recipe", "yi", "-o", tmp_path / "out", "--json").report
    assert report["layer_map"] == [*range(7), *range(3, 8)]
    assert layer_bytes(tmp_path / "out") == {j: {k} for j, k in enumerate(report["layer_map"])}
    record = json.loads((tmp_path / "out/dus.json").read_text())
    assert (record["recipe"], record["new_layers"], record["identity"]) == (
        "yi",
        [7, 8, 9, 10],
        None,
    )
    card = (tmp_path / "out/README.md").read_text()
    assert f"dus upscale {base} --recipe yi -o OUT" in card
    assert "arXiv:2403.04652" in card
    typed = dus("upscale", base, "--layers", "0:7,3:8", "-o", tmp_path / "typed", "--json").report
    assert typed["recipe"] is None
    assert names_and_bytes(tmp_path / "typed") == names_and_bytes(tmp_path / "out")


@pytest.mark.parametrize("other", [("--trim", "2"), ("--layers", "0:8,0:8"), ("--copies", "3")])
def test_a_recipe_excludes_what_else_says_the_map(
    base: Path, tmp_path: Path, other: tuple[str, str]
) -> None:
    done = dus("upscale", base, "--recipe", "solar", *other, "-o", tmp_path / "out")
    done.assert_one_line_error(
        "--recipe", "leave out --trim and --layers and --double and --copies", code=2
    )
    dus("upscale", base, "--recipe", "solo", "-o", tmp_path / "out").assert_one_line_error(
        "use one of solar", code=2
    )
    assert not (tmp_path / "out").exists()


# --- which layers are new -------------------------------------------------------------------------


@pytest.mark.parametrize("trim", range(4))
def test_of_a_depthwise_scaling_all_is_new_but_the_first_n_minus_m_and_the_last_m(
    trim: int,
) -> None:
    assert stack(8, trim).new_layers == tuple(range(8 - trim, 16 - 3 * trim))


@pytest.mark.parametrize(
    ("text", "new", "holds_base"),
    [
        ("0:3,1:4", (3, 4), True),
        ("2:4,0:4", (0, 1), True),  # the base stands behind the copies
        ("0,0,1,1,2,2,3,3", (1, 3, 5, 7), True),
        ("0:4", (), True),
        ("0:2,0:2", (2, 3), False),  # 2 and 3 are left out: the second copies are new
        ("3,2,1,0,0", (4,), False),
    ],
)
def test_new_layers_are_those_that_are_none_of_the_bases_own(
    text: str, new: tuple[int, ...], holds_base: bool
) -> None:
    layer_map = typed_map(text, 4)
    assert layer_map.new_layers == new
    assert layer_map.holds_base == holds_base


# --- identities -----------------------------------------------------------------------------------


@pytest.fixture
def random_base(tmp_path: Path) -> Path:
    return write_checkpoint(
        tmp_path / "base", llama_tensors(8), llama_config(8), num_shards=3, fill=fill_randomly
    )


def test_the_new_layers_output_projections_are_zeros_and_all_else_is_copied(
    random_base: Path, tmp_path: Path
) -> None:
    options = ("--trim", "2", "--verify", "full", "--max-shard-size", "200KB")
    report = dus(
        "upscale", random_base, *options, "--identity", "-o", tmp_path / "out", "--json"
    ).report
    dus("upscale", random_base, *options, "-o", tmp_path / "plain", "-q")
    ours, plain = names_and_bytes(tmp_path / "out"), names_and_bytes(tmp_path / "plain")
    zeros = {
        f"model.layers.{layer}.{name}.weight"
        for layer in (6, 7, 8, 9)
        for name in ("mlp.down_proj", "self_attn.o_proj")
    }
    assert ours.keys() == plain.keys()
    for name, (dtype, shape, data) in ours.items():
        assert (dtype, shape) == plain[name][:2]
        assert data == (bytes(len(data)) if name in zeros else plain[name][2]), name
    assert report["new_layers"] == [6, 7, 8, 9]
    assert report["identity"] == ["mlp.down_proj.weight", "self_attn.o_proj.weight"]
    assert report["bytes_zeros"] == sum(len(ours[name][2]) for name in zeros)
    assert (
        report["bytes_cloned"] + report["bytes_copied"] + report["bytes_zeros"] == report["bytes"]
    )


def test_an_identity_is_verified_and_made_again_from_its_card(
    random_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    dus("upscale", random_base, "--recipe", "llama-pro", "-o", out, "-q")
    assert problems(out) == []
    assert problems(out, "--base", random_base) == []
    card = (out / "README.md").read_text()
    assert "not healed" not in card
    assert "computes what its base does" in card
    assert "--recipe llama-pro -o OUT" in card
    dus(
        "upscale",
        random_base,
        "--layers",
        "0:4,3:8,7",
        "--identity",
        "-o",
        tmp_path / "typed",
        "-q",
    )
    assert "--layers 0:4,3:8,7 --identity -o OUT" in (tmp_path / "typed/README.md").read_text()
    weights = {
        name: digest
        for name, digest in folder_digest(out).items()
        if name.endswith((".safetensors", "config.json"))
    }
    assert weights.items() <= folder_digest(tmp_path / "typed").items()


@pytest.mark.parametrize(
    "name", ["model.layers.4.self_attn.o_proj.weight", "model.layers.9.mlp.gate_proj.weight"]
)
def test_one_flipped_bit_in_an_identity_is_found(
    random_base: Path, tmp_path: Path, name: str
) -> None:
    dus("upscale", random_base, "--recipe", "llama-pro", "-o", tmp_path / "out", "-q")
    path, tensor = tensor_at(tmp_path / "out", name)
    flip_bit(path, tensor.end - 1)
    for options in ((), ("--base", random_base)):
        (problem,) = problems(tmp_path / "out", *options)
        assert name in problem
        assert "differs from" in problem


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("0:4,0:4", "leaves out layers 4, 5, 6 and 1 more"),
        ("4:8,0:4,0", "in another order"),
        ("0:8", "no new layer"),
    ],
)
def test_a_map_without_the_whole_base_in_order_cannot_start_as_it(
    random_base: Path, tmp_path: Path, layers: str, said: str
) -> None:
    done = dus(
        "upscale", random_base, "--layers", layers, "--identity", "-o", tmp_path / "out", "-q"
    )
    done.assert_one_line_error("--identity", said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (
            ("strange.thing.weight", "BF16"),
            "no output projection is known in model.layers.2.strange.thing.weight",
        ),
        (("layer_scalar", "BF16"), "no output projection is known in model.layers.2.layer_scalar"),
        (
            ("mlp.shared_expert.strange.weight", "BF16"),
            "model.layers.2.mlp.shared_expert.strange.weight",
        ),
        (
            ("mlp.experts.0.down_proj.qweight", "I32"),
            "model.layers.2.mlp.experts.0.down_proj.qweight (I32) is a quantised",
        ),
        (("mlp.experts.down_proj_scales", "U8"), "is a quantised output projection"),
        (("mlp.experts.down_proj", "F8_E4M3"), "is a quantised output projection"),
    ],
)
def test_a_layer_with_a_tensor_that_no_rule_accounts_for_is_refused_by_name(
    tmp_path: Path, extra: tuple[str, str], said: str
) -> None:
    tensors = llama_tensors(8) + [
        (f"model.layers.{k}.{extra[0]}", extra[1], (4, 4)) for k in range(8)
    ]
    source = write_checkpoint(tmp_path / "base", tensors, llama_config(8))
    done = dus("upscale", source, "--identity", "-o", tmp_path / "out", "-q")
    done.assert_one_line_error("--identity", said)


def test_experts_and_shared_experts_end_in_zeros_and_routers_need_none(tmp_path: Path) -> None:
    names = [
        "experts.0.w2.weight",
        "experts.1.w2.weight",
        "experts.0.w1.weight",
        "shared_experts.down_proj.weight",
    ]
    names += ["gate.weight", "e_score_correction_bias"]
    tensors = [t for t in llama_tensors(8) if ".mlp." not in t[0]]
    tensors += [
        (f"model.layers.{k}.block_sparse_moe.{name}", "BF16", (8, 8))
        for k in range(8)
        for name in names
    ]
    source = write_checkpoint(tmp_path / "base", tensors, llama_config(8))
    report = dus("upscale", source, "--identity", "-o", tmp_path / "out", "--json").report
    block = "block_sparse_moe"
    assert report["identity"] == [
        f"{block}.experts.*.w2.weight",
        f"{block}.shared_experts.down_proj.weight",
        "self_attn.o_proj.weight",
    ]
    written = names_and_bytes(tmp_path / "out")
    assert not any(written[f"model.layers.7.{block}.experts.1.w2.weight"][2])
    assert problems(tmp_path / "out", "--base", source) == []


def test_a_model_type_that_dus_does_not_know_is_made_by_names_and_told_of(tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "base", llama_tensors(8), llama_config(8) | {"model_type": "ours"}
    )
    report = dus("upscale", source, "--identity", "-o", tmp_path / "out", "--json").report
    assert any("compare the model's logits" in warning for warning in report["warnings"])


def test_biases_of_output_projections_are_zeros_too() -> None:
    for name in (
        "attn.c_proj.bias",
        "mlp.fc2.bias",
        "fc2.bias",
        "self_attn.o_proj.bias",
        "mlp.experts.down_proj_bias",
    ):
        assert is_output_projection(name), name
    for name in (
        "attn.c_attn.bias",
        "fc1.bias",
        "dense.weight",
        "mlp.dense_h_to_4h.weight",
        "mlp.gate.weight",
    ):
        assert not is_output_projection(name), name


# --- identities where they cannot be, and what is recorded of them ---------------------------------


@pytest.mark.filterwarnings("ignore")
def test_where_norms_stand_on_the_stream_identities_are_refused(tmp_path: Path) -> None:
    for model_type, field in (
        ("opt", "do_layer_norm_before"),
        ("bloom", "apply_residual_connection_post_layernorm"),
    ):
        folder = tmp_path / model_type
        zoo.tiny_model(model_type).save_pretrained(folder)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        assert config[field] is (model_type == "opt")
        path.write_text(json.dumps(config | {field: not config[field]}))
        done = dus("upscale", folder, "--identity", "-o", tmp_path / "out", "-q")
        done.assert_one_line_error("--identity", field, "cannot be identities")


def test_four_copies_are_what_copies_and_trim_spell() -> None:
    assert recipe_map("kl3m-007", 30).sources == stack(30, 0, copies=4).sources
