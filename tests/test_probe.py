"""What `dus probe` says of a map is what the checkpoint that `dus upscale` writes for it does;
nothing is guessed.
"""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import tiny
from forked import dus_with_torch
from hub_server import StandInHub, StandInRepo, commit_of
from tiny import forked_dus

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import zoo  # noqa: E402  (it imports both)
from probed import measured, own_loss, write_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from dus_cli.common.reference import ModelRef  # noqa: E402
from dus_cli.data.sample import Packed, read_sample  # noqa: E402
from dus_cli.data.tokeniser import open_tokeniser  # noqa: E402
from dus_cli.errors import LoadError, ProbeError, ReplayError  # noqa: E402
from dus_cli.maps.layers import source_layers  # noqa: E402
from dus_cli.models.replay import Replay  # noqa: E402
from dus_cli.models.weights import stream  # noqa: E402
from dus_cli.planning.plan import MapRequest  # noqa: E402
from dus_cli.probe import recommend  # noqa: E402
from dus_cli.probe.budget import plan_memory  # noqa: E402
from dus_cli.probe.measure import Batch, meter_of  # noqa: E402
from dus_cli.probe.report import probe_json, probe_text  # noqa: E402
from dus_cli.probe.tree import as_they_are  # noqa: E402
from dus_cli.source.checkpoint import open_checkpoint  # noqa: E402
from dus_cli.upscaling.request import UpscaleRequest, plan_for  # noqa: E402
from dus_cli.upscaling.verb import upscale  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about its tiny models

# Of each way in which layers differ, or are called, or what is behind them: dense; names of GPT-2;
# caps and sliding windows; scaled logits; experts, merged while they are loaded; dense layers
# before experts; mamba, and convolutions, beside attention; parallel attention; a head that is left
# to the model.
TYPES = "llama gpt2 gemma2 gemma3_text cohere2 qwen3_moe deepseek_v3 granitemoehybrid lfm2 gpt_neox falcon minicpm3".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("data") / "text.jsonl", 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("model_type", TYPES)
def test_the_loss_is_that_of_the_checkpoint_that_upscale_writes(
    model_type: str, corpus: Path, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", model_type)
    found = measured(base, corpus)
    upscale(UpscaleRequest(ModelRef.parse(str(base)), MapRequest(trim=2)), tmp_path / "out")
    assert found.base_loss is not None
    assert found.maps[0].loss is not None
    assert found.base_loss == pytest.approx(own_loss(base, corpus), abs=1e-4)
    assert found.maps[0].loss == pytest.approx(own_loss(tmp_path / "out", corpus), abs=1e-4)
    assert abs(found.maps[0].loss - found.base_loss) > 1e-3  # the comparison can fail
    streamed = measured(base, corpus, stream_layers=True)
    assert streamed.base_loss == found.base_loss
    assert streamed.maps[0].loss == found.maps[0].loss


def test_several_maps_at_once_are_what_each_is_alone(model: Path, corpus: Path) -> None:
    layers = ("0:5,2:7", "0,1,2:7,2:7", "3,3,0:7", "0:7,0:7")
    together = measured(model, corpus, trims=(0, None), layers=layers)
    assert [m.candidate.layer_map.trim for m in together.maps] == [
        0,
        1,
        2,
        3,
        None,
        None,
        None,
        None,
    ]
    for found in together.maps:
        (alone,) = measured(model, corpus, layers=(str(found.candidate.layer_map),)).maps
        assert found.loss == pytest.approx(alone.loss, abs=1e-6)
        assert found.seams == alone.seams
    assert together.maps[2].loss == together.maps[4].loss  # one map, asked for in two ways
    assert together.layer_passes < sum(len(m.candidate.layer_map) for m in together.maps)


def test_more_copies_are_measured(model: Path, corpus: Path, tmp_path: Path) -> None:
    (found,) = measured(model, corpus, trims=(2, 3), copies=3).maps
    upscale(
        UpscaleRequest(ModelRef.parse(str(model)), MapRequest(trim=2, copies=3)), tmp_path / "out"
    )
    assert found.candidate.options == "--trim 2 --copies 3"
    assert found.loss == pytest.approx(own_loss(tmp_path / "out", corpus), abs=1e-4)


def test_seams_have_the_distance_of_the_hidden_states_that_meet(model: Path, corpus: Path) -> None:
    (found,) = measured(model, corpus, layers=("0:5,2:7",)).maps
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokeniser = open_tokeniser(model, 96)
    rows = Packed(
        read_sample([str(corpus)], tokeniser, 100).texts, tokeniser, 24, document_mask=False
    )
    cosines = []
    handed: dict[int, Any] = {}
    for number in (2, 5):
        whole.model.layers[number].register_forward_pre_hook(
            lambda _module, args, number=number: handed.__setitem__(number, args[0])
        )
    for row in rows:
        with torch.no_grad():
            whole(input_ids=torch.from_numpy(row.input_ids)[None])
        cosine = torch.nn.functional.cosine_similarity(handed[2], handed[5], dim=-1)[0]
        cosines.append(cosine[torch.from_numpy(row.labels) != -100])
    cosine = torch.cat(cosines)  # layer 4 puts out what layer 5 is handed
    ((angular, influence),) = found.seams
    assert angular == pytest.approx(float(cosine.arccos().mean()) / math.pi, abs=1e-5)
    assert influence == pytest.approx(1 - float(cosine.mean()), abs=1e-5)


def test_what_upscale_refuses_is_listed_with_its_reason(corpus: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "jamba")
    found = measured(base, corpus, trims=(1, 3))
    refused = [m.candidate.refused for m in found.maps]
    assert [reason is None for reason in refused] == [False, True]
    assert all("layer_period" in reason for reason in refused if reason)
    assert [m.loss is None for m in found.maps] == [True, False]


def test_layers_that_hand_on_more_than_hidden_states_are_refused_by_name(
    corpus: Path, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", "zaya")
    with pytest.raises(ProbeError, match="zaya: layer 1 gets more from other layers"):
        measured(base, corpus, trims=(2, 3))


def test_what_happens_between_layers_is_noticed() -> None:
    model = zoo.tiny_model("llama")
    layers, ids = model.model.layers, zoo.tokens(model)

    def scaled(_module: Any, args: Any) -> Any:
        return (args[0] * 1.5, *args[1:])

    with (
        layers[3].register_forward_pre_hook(scaled),
        pytest.raises(ReplayError, match="before layer 3"),
        torch.no_grad(),
    ):
        Replay(model, 7, ids, lambda _: nullcontext())


def test_rows_that_do_not_fit_at_once_give_the_same_figures() -> None:
    model = zoo.tiny_model("llama")
    rows = zoo.tokens(model)
    batches = [Batch(row[None], row.roll(-1)[None]) for row in rows]
    maps = [as_they_are(each) for each in (range(7), source_layers(7, 1), source_layers(7, 2))]
    found = [
        meter_of(model, 7, batches, ready=lambda _: nullcontext(), batches_at_once=at_once).losses(
            maps
        )
        for at_once in (1, 2, 3)
    ]
    assert found[0] == pytest.approx(found[2], abs=1e-4)
    assert found[1] == pytest.approx(found[2], abs=1e-4)


def test_memory_is_counted_before_anything_is_loaded() -> None:
    memory = plan_memory(10**9, 16, 10**8, 40, 0, 5 * 10**9, streams=False)
    assert (memory.batches_at_once, memory.num_groups) == (2, 20)  # 17 states of 0.1 GB for each
    with pytest.raises(ProbeError, match="--stream-layers, or a larger machine"):
        plan_memory(10**10, 16, 10**8, 40, 0, 5 * 10**9, streams=False)
    with pytest.raises(ProbeError, match="a smaller --seq-length"):
        plan_memory(10**10, 16, 10**8, 40, 0, 5 * 10**9, streams=True)


def test_the_largest_within_a_bound_and_the_knee_are_recommended() -> None:
    """By the losses of SmolLM2's trims."""
    losses = [
        7.81,
        6.07,
        5.41,
        5.14,
        5.32,
        5.19,
        3.69,
        3.41,
        3.26,
        3.17,
        3.10,
        3.05,
        3.01,
        2.97,
        2.94,
    ]
    points = [(loss, 2 * (30 - trim)) for trim, loss in enumerate(losses)]
    assert recommend.within(points, 1.2 * 2.845) == 7
    assert recommend.within(points, 2.9) is None
    assert recommend.knee(points) == 6
    assert recommend.knee(points[:2]) is None
    # more trimming is worse: there is no knee
    assert recommend.knee([(1.0, 6), (2.0, 5), (3.0, 4)]) is None


def test_only_what_is_right_for_an_engine_is_recommended_for_it(
    corpus: Path, tmp_path: Path
) -> None:
    """cohere2 repeats every 4 layers: of 8, trim 2 alone keeps that, and llama.cpp and mlx-lm
    count.
    """
    base = tiny.write_base(tmp_path / "base", 8, model_type="cohere2", sliding_window=6)
    of_any = measured(base, corpus, trims=(1, 4), within=100)
    of_mlx = measured(base, corpus, trims=(1, 4), engines=("mlx",), within=100)
    assert [(found.within, found.knee) for found in (of_any, of_mlx)] == [
        (0, of_any.knee),
        (1, None),
    ]
    assert [[engine.name for engine in m.candidate.wrong] for m in of_any.maps] == [
        ["llama.cpp", "mlx", "transformers-4.52"], [], ["llama.cpp", "mlx", "transformers-4.52"],
    ]  # fmt: skip
    lines = probe_text(of_mlx).splitlines()
    assert [line.split()[-2:] for line in lines[:1]] == [["not", "in"]]
    assert [line.endswith("  lmt") for line in lines[2:5]] == [True, False, True]
    assert (
        "not in: l llama.cpp, m mlx-lm, t transformers before 4.53 would not compute it as "
        "config.json says" in lines
    )
    none = measured(base, corpus, trims=(1, 2), engines=("mlx",), within=100)
    assert none.within is None
    assert (
        "No deeper model that is right for mlx is within 10000% of the base's loss"
        in probe_text(none)
    )
    assert [one["verdict"] for one in probe_json(none)["maps"][0]["engines"]][:3] == [
        "differs",
        "differs",
        "right",
    ]
    assert probe_json(none)["for"] == ["mlx"]


def test_a_search_measures_the_maps_whose_layers_meet_closest(model: Path, corpus: Path) -> None:
    found = measured(model, corpus, search=True, best=3)
    assert [m.candidate.layer_map.trim for m in found.maps] == [0, 1, 2, 3, None, None, None]
    assert found.distances is not None
    for m in found.maps[4:]:
        first, second = m.candidate.layer_map.runs
        assert (first.start, second.stop) == (0, 7)
        assert first.stop + second.start != 7  # those are the trims
        of_that_depth = [
            found.distances.angular[a][b]
            for a in range(1, 8)
            for b in range(a)
            if a - b == first.stop - second.start and a + b != 7
        ]
        assert found.distances.angular[first.stop][second.start] == min(of_that_depth)
        (alone,) = measured(model, corpus, layers=(str(m.candidate.layer_map),)).maps
        assert m.loss == pytest.approx(alone.loss, abs=1e-6)


def test_streaming_reads_what_it_must_or_says_why_not(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    path = next(broken.glob("*.safetensors"))
    tensors = {k: v for k, v in load_file(path).items() if k != "model.layers.3.mlp.up_proj.weight"}
    save_file(tensors, path, {"format": "pt"})
    for streams in (False, True):
        with pytest.raises(LoadError, match=r"finds no weights for .*mlp.up_proj.weight"):
            measured(broken, corpus, stream_layers=streams)


def test_one_layer_at_a_time_has_weights_where_they_are_streamed(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    stack = plan_for(UpscaleRequest(ModelRef.parse(str(model)), MapRequest(layers="0:"))).stack
    streamed, ready = stream(checkpoint, stack, torch.float32, torch.device("cpu"))
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def with_weights() -> list[int]:
        layers = enumerate(streamed.model.layers)
        return [
            number for number, layer in layers if not any(p.is_meta for p in layer.parameters())
        ]

    assert with_weights() == []
    for number in (3, 0, 3):
        with ready(number):
            assert with_weights() == [number]
            for mine, theirs in zip(
                streamed.model.layers[number].parameters(),
                whole.model.layers[number].parameters(),
                strict=True,
            ):
                assert torch.equal(mine, theirs)
        assert with_weights() == []
    assert torch.equal(streamed.lm_head.weight, whole.lm_head.weight)


def test_the_picture_shows_what_was_measured(model: Path, corpus: Path, tmp_path: Path) -> None:
    options = (
        "--data",
        corpus,
        "--tokens",
        "100",
        "--seq-length",
        "24",
        "--layers",
        "0:5,2:7",
        "--trims",
        ":",
    )
    run = forked_dus(
        "probe", model, *options, "--plot", tmp_path / "p.svg", "-q", "--within", "100%"
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p-dark.svg", "p.svg"]
    for path in tmp_path.iterdir():
        root = ET.parse(path).getroot()  # noqa: S314  (our own)
        texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
        assert any(text.startswith("base ") for text in texts)
        assert {"0", "1", "2", "3", "loss (nats per token)", "parameters", "within 100%"} <= {
            t.split(":")[0] for t in texts
        }
    before = (tmp_path / "p.svg").read_bytes()
    refused = forked_dus("probe", model, *options, "--plot", tmp_path / "none" / "p.svg")
    refused.assert_one_line_error("is no place for a file")
    forked_dus("probe", model, *options, "--plot", tmp_path / "p.png").assert_one_line_error(
        "ends in .svg"
    )
    assert (tmp_path / "p.svg").read_bytes() == before


def test_what_cannot_be_is_one_line(model: Path, corpus: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    forked_dus("probe", model, "--data", empty).assert_one_line_error(
        "has no documents to measure on"
    )
    forked_dus("probe", model, "--data", tmp_path / "no").assert_one_line_error(
        "is not a file, a folder or a pattern"
    )
    forked_dus("probe", tmp_path / "no", "--data", corpus).assert_one_line_error("does not exist")
    for option, value, said, code in (
        ("--trims", "4:9", "use 0:4", 1),
        ("--trims", "3:1", "is no range of trims", 2),
        ("--layers", "0-3", "half-open", 2),
        ("--layers", "0:9", "beyond the base", 1),
        ("--seq-length", "100", "the model's 64 positions", 1),
        ("--max-memory", "1MB", "1.00 MB may be used; try --stream-layers", 1),
    ):
        forked_dus("probe", model, "--data", corpus, option, value).assert_one_line_error(
            said, code=code
        )


def test_layers_that_cannot_be_read_one_by_one_are_refused_in_one_line(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(model, pickled)
    weights = pickled / "model.safetensors"
    torch.save(load_file(weights), pickled / "pytorch_model.bin")
    weights.unlink()
    forked_dus("probe", pickled, "--data", corpus, "--stream-layers", "-q").assert_one_line_error(
        "--stream-layers: layers are read from safetensors", "are pickled; leave it out"
    )


def test_a_dry_run_loads_nothing(corpus: Path, base: Path) -> None:
    """Of a checkpoint whose bytes are no sensible weights, and that has no tokenizer."""
    report = forked_dus(
        "probe", base, "--data", corpus, "--precision", "fp32", "--dry-run", "--json"
    ).report
    assert [found["num_layers"] for found in report["maps"]] == [16, 14, 12, 10]
    assert report["maps"][0]["loss"] is None
    assert report["memory"]["weights"] == 4 * report["base"]["parameters"]
    assert report["memory"]["estimate"] > report["memory"]["weights"]


def test_the_decoder_of_a_whole_multimodal_model_is_measured(corpus: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "gemma3", whole=True)
    (found,) = measured(base, corpus).maps
    upscale(UpscaleRequest(ModelRef.parse(str(base)), MapRequest(trim=2)), tmp_path / "out")
    assert found.loss == pytest.approx(own_loss(tmp_path / "out", corpus), abs=1e-4)


def test_a_model_of_the_hub_is_measured(model: Path, corpus: Path, tmp_path: Path) -> None:
    commit = commit_of("llama")
    options = "--tokens 100 --seq-length 24 --trims 2 --precision fp32 --json".split()
    with StandInHub({"org/llama": StandInRepo({commit: model}, {"main": commit})}) as hub:
        found = dus_with_torch(
            "probe",
            "org/llama",
            "--data",
            corpus,
            *options,
            HF_ENDPOINT=hub.endpoint,
            HF_HOME=str(tmp_path / "hf"),
        ).report
    assert found["commit"] == commit
    assert found["maps"][0]["loss"] == measured(model, corpus).maps[0].loss
    assert (
        found["recommended"]["within"]["command"]
        == "dus upscale org/llama --trim 2 -o llama-10-layers"
    )


def test_every_field_of_the_report_is_documented(model: Path, corpus: Path) -> None:
    """Of the real command, in a terminal and as JSON."""
    layout = (Path(__file__).parent.parent / "docs/layout.md").read_text()
    options = ("--data", corpus, "--tokens", "100", "--seq-length", "24", "--trims", "1:4")
    report = forked_dus("probe", model, *options, "--json").report
    for record in (
        report,
        report["base"],
        report["maps"][0],
        report["maps"][0]["seams"][0],
        *report["distances"],
    ):
        for field in record if isinstance(record, dict) else (record,):
            assert f"`{field}`" in layout, field
    assert [found["trim"] for found in report["maps"]] == [1, 2, 3]
    assert report["maps"][0]["layer_map"] == [0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6]
    run = forked_dus("probe", model, *options, "--layers", "0:3,1:4,2:5,3:6,4:7")
    assert run.returncode == 0, run.stderr
    assert "\n0:3,1:4,2:5,3:… is 0:3,1:4,2:5,3:6,4:7\n" in run.stdout
    lines = run.stdout.splitlines()
    assert [line.split()[:3] for line in lines[2:5]] == [
        ["trim", str(m), str(2 * (7 - m))] for m in (1, 2, 3)
    ]
    assert all(
        len(line) <= 80 for line in lines if "  dus upscale" not in line and "4:7" not in line
    )
    assert "layers" in run.stderr


@pytest.mark.parametrize("how", [(), ("--stream-layers",)])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "model.layers.3.mlp.down_proj.weight",
            ("after layer 3", "layer 3: mlp.down_proj.weight"),
        ),
        (
            "model.layers.0.self_attn.k_proj.weight",
            ("after layer 0", "layer 0: self_attn.k_proj.weight"),
        ),
        ("model.norm.weight", ("behind its last layer", "model.norm.weight")),
    ],
)
def test_damaged_weights_of_the_base_are_not_blamed_on_a_map(
    model: Path,
    corpus: Path,
    tmp_path: Path,
    name: str,
    said: tuple[str, str],
    how: tuple[str, ...],
) -> None:
    """NaN equals nothing: what is compared with itself would look like something that the
    model's class does.
    """
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    arguments = (
        "--data",
        corpus,
        "--trims",
        "1:3",
        "--tokens",
        "2000",
        "--precision",
        "fp32",
        *how,
        "-q",
    )
    done = forked_dus("probe", damaged, *map(str, arguments))
    done.assert_one_line_error("the base itself", *said, "are damaged")


def test_a_weight_that_is_read_for_one_token_only_is_named_as_well(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = math.inf
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    arguments = (
        "--data",
        corpus,
        "--trims",
        "1:2",
        "--tokens",
        "2000",
        "--precision",
        "fp32",
        "-q",
    )
    done = forked_dus("probe", damaged, *arguments)
    done.assert_one_line_error("the base itself", "before layer 0", "model.embed_tokens.weight")
