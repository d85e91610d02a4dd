"""Layer maps: SOLAR's formula, the grammar of --layers, seams."""

from __future__ import annotations

import pytest

from dus_cli.errors import LayerMapError
from dus_cli.maps.layers import LayerMap, parse_layers, source_layers, split_name, stack, typed_map
from dus_cli.release.drawing import draw_map


def test_solar_stacks_layers_0_to_23_on_8_to_31() -> None:
    layer_map = stack(32, trim=8)
    assert layer_map.sources == (*range(24), *range(8, 32))
    assert len(layer_map) == 48


def test_the_default_trim_is_a_quarter() -> None:
    assert stack(32) == stack(32, trim=8)
    assert stack(30).trim == 7


def test_seam_joins_layer_23_to_layer_8_at_distance_15() -> None:
    (seam,) = stack(32, trim=8).seams
    assert seam.base_layers == (23, 8)
    assert seam.output_layers == (23, 24)
    assert seam.distance == 15


def test_trim_0_stacks_two_full_copies() -> None:
    assert stack(4, trim=0).sources == (0, 1, 2, 3, 0, 1, 2, 3)


@pytest.mark.parametrize("num_layers", range(1, 40))
def test_every_valid_trim_deepens_and_the_next_does_not(num_layers: int) -> None:
    trim = 0
    while 2 * (num_layers - trim) > num_layers:
        assert len(stack(num_layers, trim)) == 2 * (num_layers - trim)
        trim += 1
    with pytest.raises(LayerMapError, match="no deeper than the base"):
        stack(num_layers, trim)


def test_a_trim_too_large_names_the_valid_span() -> None:
    with pytest.raises(
        LayerMapError, match=r"--trim 20 would leave 24 of 32 layers, .* use 0 to 15"
    ):
        stack(32, trim=20)


@pytest.mark.parametrize("copies", [2, 3, 5])
@pytest.mark.parametrize("trim", [0, 1, 3])
def test_inner_copies_lose_both_ends(copies: int, trim: int) -> None:
    n = 8
    sources = source_layers(n, trim, copies)
    inner = list(range(trim, n - trim)) * (copies - 2)
    assert list(sources) == [*range(n - trim), *inner, *range(trim, n)]
    assert len(sources) == copies * n - 2 * (copies - 1) * trim


@pytest.mark.parametrize("trim", range(15))
def test_the_base_is_the_first_n_minus_m_and_the_last_m_layers(trim: int) -> None:
    """What healing rests on: the base's loss can be had from the up-scaled checkpoint alone."""
    sources = source_layers(30, trim)
    assert [*sources[: 30 - trim], *sources[len(sources) - trim :]] == list(range(30))


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("0:3,1:4", (0, 1, 2, 1, 2, 3)),
        ("5", (5,)),
        ("0:2,5,5,0:2", (0, 1, 5, 5, 0, 1)),
        (":2,6:", (0, 1, 6, 7)),
        (":", tuple(range(8))),
        (" 0:1 , 7 ", (0, 7)),
    ],
)
def test_ranges_are_half_open_like_slices(text: str, sources: tuple[int, ...]) -> None:
    assert typed_map(text, 8).sources == sources


@pytest.mark.parametrize(
    "text", ["", ",", "0-24", "1:2:3", "a", "0:2,", "-1:3", "٣", "1 2", "0:99999999999"]
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(LayerMapError, match="half-open like Python slices"):
        parse_layers(text)


@pytest.mark.parametrize("text", ["0:9", "8", "8:9", "9:", "0:999999999"])
def test_a_layer_beyond_the_base_is_refused(text: str) -> None:
    with pytest.raises(LayerMapError, match=r"beyond the base, which has 8 layers|is empty"):
        typed_map(text, 8)


@pytest.mark.parametrize("text", ["3:3", "5:2", "8:"])
def test_an_empty_range_is_refused(text: str) -> None:
    with pytest.raises(LayerMapError, match="is empty"):
        typed_map(text, 8)


@pytest.mark.parametrize("text", ["0:24,8:32", "5,0:3,5,5", "0:32"])
def test_a_map_prints_in_its_own_grammar(text: str) -> None:
    assert str(typed_map(text, 32)) == text
    assert typed_map(str(typed_map(text, 32)), 32) == typed_map(text, 32)


def test_runs_and_outputs_tell_the_same_map() -> None:
    layer_map = LayerMap((0, 1, 5, 5, 0, 1), 8)
    assert layer_map.runs == (range(2), range(5, 6), range(5, 6), range(2))
    assert layer_map.outputs == ((0, 4), (1, 5), (), (), (), (2, 3), (), ())


def test_phase_is_kept_when_the_shift_is_a_multiple_of_the_period() -> None:
    assert stack(24, trim=6).keeps_phase(6)  # shift 12
    assert not stack(24, trim=7).keeps_phase(6)  # shift 10


@pytest.mark.parametrize(
    ("name", "prefix", "index", "suffix"),
    [
        (
            "model.layers.7.mlp.experts.3.up_proj.weight",
            "model.layers",
            7,
            "mlp.experts.3.up_proj.weight",
        ),
        ("transformer.h.11.attn.c_attn.bias", "transformer.h", 11, "attn.c_attn.bias"),
        ("h.0.ln_1.weight", "h", 0, "ln_1.weight"),
    ],
)
def test_the_first_number_in_a_name_is_the_layer(
    name: str, prefix: str, index: int, suffix: str
) -> None:
    split = split_name(name)
    assert split is not None
    assert (split.prefix, split.index, split.suffix) == (prefix, index, suffix)
    assert split.at(index) == name


@pytest.mark.parametrize("name", ["lm_head.weight", "a.007.b", "a.²." + "b", "5.a", ""])
def test_other_names_have_no_layer(name: str) -> None:
    assert split_name(name) is None


def test_the_drawing_fits_the_width_and_shows_every_seam() -> None:
    drawing = draw_map(stack(32, trim=8), width=80)
    assert all(len(line) <= 80 for line in drawing.splitlines())
    assert "layer 23 feeds layer 8" in drawing


def test_a_drawing_of_a_hundred_runs_stays_short() -> None:
    drawing = draw_map(typed_map(",".join(["0"] * 100), 8), width=80)
    assert len(drawing.splitlines()) <= 26
