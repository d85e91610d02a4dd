"""What `dus probe` says of a map is what the checkpoint that `dus upscale` writes for it does; nothing is guessed."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import forked_dus

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import zoo  # noqa: E402  (it imports both)

from dus_cli.errors import ProbeError  # noqa: E402
from dus_cli.heal.sample import Packed, read_sample  # noqa: E402
from dus_cli.heal.tokenise import Tokeniser  # noqa: E402
from dus_cli.planning import MapRequest  # noqa: E402
from dus_cli.probe.maps import Asked  # noqa: E402
from dus_cli.probe.replay import Replay  # noqa: E402
from dus_cli.probe.verb import Options, Probe, probe  # noqa: E402
from dus_cli.progress import NoProgress  # noqa: E402
from dus_cli.reference import ModelRef  # noqa: E402
from dus_cli.upscaling import upscale  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about its tiny models

LETTERS = "abcdefghijklmnopqrstuvwxyz ."

# Of each way in which layers differ, or are called, or what is behind them: dense; names of GPT-2; caps and sliding
# windows; scaled logits; experts, merged while they are loaded; dense layers before experts; mamba, and convolutions,
# beside attention; parallel attention; a head that is left to the model.
TYPES = (
    "llama gpt2 gemma2 gemma3_text cohere2 qwen3_moe deepseek_v3 granitemoehybrid lfm2 gpt_neox falcon minicpm3".split()
)


def write_model(folder: Path, model_type: str) -> Path:
    """A tiny random model of seven layers with a tokenizer of letters, all ids below its vocabulary of 96."""
    from tokenizers import Tokenizer, models

    zoo.tiny_model(model_type).save_pretrained(folder)
    vocab = {"<unk>": 0, "<eos>": 2} | {letter: 3 + index for index, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("data") / "text.jsonl", 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


def measured(model: Path, corpus: Path, asked: Asked | None = None, **options: Any) -> Probe:
    """100 tokens in rows of 24, which is longer than the sliding windows."""
    settings = Options((str(corpus),), tokens=100, seq_length=24)
    for name, value in options.items():
        object.__setattr__(settings, name, value)
    ref = ModelRef.parse(str(model))
    return probe(ref, asked or Asked((2, 3)), settings, NoProgress(), dry_run=False, quiet=True)


def own_loss(folder: Path, corpus: Path) -> float:
    """Of the model in a folder, as transformers computes it on the same rows."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokeniser = Tokeniser(folder, 96)
    rows = Packed(read_sample([str(corpus)], tokeniser, 100).texts, tokeniser, 24, document_mask=False)
    total, count = 0.0, 0
    for row in rows:
        labels = torch.from_numpy(row.labels)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(row.input_ids)[None]).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("model_type", TYPES)
def test_the_loss_is_that_of_the_checkpoint_that_upscale_writes(model_type: str, corpus: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", model_type)
    found = measured(base, corpus)
    upscale(ModelRef.parse(str(base)), tmp_path / "out", MapRequest(trim=2))
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
    together = measured(model, corpus, Asked(trims=(0, None), layers=layers))
    assert [m.candidate.layer_map.trim for m in together.maps] == [0, 1, 2, 3, None, None, None, None]
    for found in together.maps:
        (alone,) = measured(model, corpus, Asked(layers=(str(found.candidate.layer_map),))).maps
        assert found.loss == pytest.approx(alone.loss, abs=1e-6)
        assert found.seams == alone.seams
    assert together.maps[2].loss == together.maps[4].loss  # one map, asked for in two ways
    assert together.layer_passes < sum(len(m.candidate.layer_map) for m in together.maps)


def test_more_copies_are_measured(model: Path, corpus: Path, tmp_path: Path) -> None:
    (found,) = measured(model, corpus, Asked(trims=(2, 3), copies=3)).maps
    upscale(ModelRef.parse(str(model)), tmp_path / "out", MapRequest(trim=2, copies=3))
    assert found.candidate.options == "--trim 2 --copies 3"
    assert found.loss == pytest.approx(own_loss(tmp_path / "out", corpus), abs=1e-4)


def test_seams_have_the_distance_of_the_hidden_states_that_meet(model: Path, corpus: Path) -> None:
    (found,) = measured(model, corpus, Asked(layers=("0:5,2:7",))).maps
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokeniser = Tokeniser(model, 96)
    rows = Packed(read_sample([str(corpus)], tokeniser, 100).texts, tokeniser, 24, document_mask=False)
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
    found = measured(base, corpus, Asked(trims=(1, 3)))
    refused = [m.candidate.refused for m in found.maps]
    assert [reason is None for reason in refused] == [False, True]
    assert all("layer_period" in reason for reason in refused if reason)
    assert [m.loss is None for m in found.maps] == [True, False]


def test_layers_that_hand_on_more_than_hidden_states_are_refused_by_name(corpus: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "zaya")
    with pytest.raises(ProbeError, match="zaya: layer 1 is handed more from other layers"):
        measured(base, corpus, Asked(trims=(2, 3)))


def test_what_happens_between_layers_is_noticed() -> None:
    model = zoo.tiny_model("llama")
    layers, ids = model.model.layers, zoo.tokens(model)

    def scaled(_module: Any, args: Any) -> Any:
        return (args[0] * 1.5, *args[1:])

    with (
        layers[3].register_forward_pre_hook(scaled),
        pytest.raises(ProbeError, match="before layer 3"),
        torch.no_grad(),
    ):
        Replay(model, 7, ids, lambda _: nullcontext())


def test_rows_that_do_not_fit_at_once_give_the_same_figures(model: Path, corpus: Path) -> None:
    whole, parts = measured(model, corpus), measured(model, corpus, max_memory=900_000_000, tokens=100)
    assert whole.base_loss == parts.base_loss


def test_every_field_of_the_report_is_documented(model: Path, corpus: Path) -> None:
    """Of the real command, in a terminal and as JSON."""
    layout = (Path(__file__).parent.parent / "docs/layout.md").read_text()
    options = ("--data", corpus, "--tokens", "100", "--seq-length", "24", "--trims", "1:4")
    report = forked_dus("probe", model, *options, "--json").report
    for record in (report, report["base"], report["maps"][0], report["maps"][0]["seams"][0], *report["distances"]):
        for field in record if isinstance(record, dict) else (record,):
            assert f"`{field}`" in layout, field
    assert [found["trim"] for found in report["maps"]] == [1, 2, 3]
    assert report["maps"][0]["layer_map"] == [0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6]
    run = forked_dus("probe", model, *options)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.split()[:3] for line in lines[2:5]] == [["trim", str(m), str(2 * (7 - m))] for m in (1, 2, 3)]
    assert all(len(line) <= 80 for line in lines if not line.startswith("  dus upscale"))
    assert "layer passes" in run.stderr
