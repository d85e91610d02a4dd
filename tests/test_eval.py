"""`dus eval`: losses that are transformers' own, the same text for every model, gates, and what
it says.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from forked import dus

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402

from dus_cli.common.reference import ModelRef  # noqa: E402
from dus_cli.errors import EvaluationError, LoadError  # noqa: E402
from dus_cli.evaluation import intervals, scorer  # noqa: E402
from dus_cli.evaluation.options import ScoringOptions, TextOptions  # noqa: E402
from dus_cli.evaluation.report import LossReport  # noqa: E402
from dus_cli.evaluation.verb import evaluate  # noqa: E402
from dus_cli.evaluation.windows import Window, batches, windows  # noqa: E402
from dus_cli.models.losses import Head  # noqa: E402
from dus_cli.models.precision import Precision  # noqa: E402
from dus_cli.progress import NoProgress  # noqa: E402

LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"
BOS, EOS, UNKNOWN = 0, 1, 2


def write_letters(
    folder: Path, *, pairs: bool = False, bos: bool = True, without: str = ""
) -> None:
    """A tokenizer of letters, or of letters and some pairs of them; `without` are letters that it
    does not know.

    With `bos` it puts <s> before a text; without it puts nothing there.
    """
    from tokenizers import Tokenizer, models, processors

    vocab = {"<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN}
    for token in [letter for letter in LETTERS if letter not in without] + (
        ["th", "he", "e "] if pairs else []
    ):
        vocab[token] = len(vocab)
    merges = [("t", "h"), ("h", "e"), ("e", " ")] if pairs else []
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<s>"}))


def write_text(path: Path, lengths: list[int], seed: int = 0) -> Path:
    chance = random.Random(seed)
    texts = [
        "".join(chance.choice(LETTERS[:27]) for _ in range(length - 1)) + "." for length in lengths
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def texts_in(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def zoo_model(folder: Path, model_type: str, **tokenizer: Any) -> Path:
    """A random model of a type, tokenizer and all, some of whose weights are large enough to
    matter.
    """
    import zoo

    model = zoo.tiny_model(model_type)
    model.save_pretrained(folder)
    write_letters(folder, **tokenizer)
    return folder


def found(
    models: list[Path], data: Path, *, text: dict[str, Any] | None = None, **options: Any
) -> LossReport:
    """The verb, in this process, in fp32."""
    settings: dict[str, Any] = {"precision": Precision.fp32, "seq_length": 16} | options
    scoring = ScoringOptions(**settings)
    refs = [ModelRef.parse(str(model)) for model in models]
    with_base = (text or {}).pop("with_base", False)
    report, _ = evaluate(
        refs,
        TextOptions(data=(str(data),), **(text or {})),
        scoring,
        NoProgress(),
        with_base=with_base,
    )
    assert report is not None
    return report


def reference(
    folder: Path, texts: list[str], length: int, stride: int, *, before: tuple[int, ...] = (BOS,)
) -> list[float]:
    """Nats of each document by transformers' own loss: window by window, each alone, labels as its
    docs have them.

    Where nothing stands `before` a document, its first token is not asked for.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sums = []
    span = length + 1 - len(before)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        total, end = 0.0, 0 if before else 1
        length, stride = span, min(stride, span)
        while end < len(ids):
            start = 0 if end <= 1 else end - length + stride
            stop = min(start + length, len(ids))
            row = torch.tensor([[*before, *ids[start:stop]]])
            labels = row.clone()
            labels[:, : len(before) + end - start] = -100
            with torch.no_grad():
                total += float(model(input_ids=row, labels=labels).loss) * (stop - end)
            end = stop
        sums.append(total)
    return sums


# --- the right number ----------------------------------------------------------------------------

# Rotary, absolute and ALiBi positions, capped and scaled logits, windows, biases, experts, state
# spaces.
TYPES = "llama gpt2 opt bloom gemma2 cohere granite gpt_neox qwen3_moe mamba phi".split()


@pytest.mark.parametrize("model_type", TYPES)
def test_the_loss_is_transformers_own_on_the_same_tokens(tmp_path: Path, model_type: str) -> None:
    data = write_text(tmp_path / "text.jsonl", [1, 40, 16, 17, 5, 33])
    folder = zoo_model(tmp_path / "model", model_type)
    report = found([folder], data, stride=6, batch_tokens=48)
    expected = reference(folder, texts_in(data), 16, 6)
    (model,) = report.models
    assert model.tokens == report.num_bytes == 112
    assert model.loss.value == pytest.approx(sum(expected) / 112, rel=2e-5)
    assert model.bits_per_byte.value == pytest.approx(sum(expected) / 112 / math.log(2), rel=2e-5)
    assert model.perplexity == pytest.approx(math.exp(sum(expected) / 112), rel=1e-4)
    tokens = [len(text) for text in texts_in(data)]
    assert model.loss.margin == pytest.approx(intervals.ratio(expected, tokens).margin, rel=1e-3)


def test_the_fast_way_to_the_loss_is_taken_and_a_strange_one_goes_by_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = zoo_model(tmp_path / "model", "gemma2")
    data = write_text(tmp_path / "text.jsonl", [30, 7])
    usual = found([folder], data).models[0].loss.value
    loaded = scorer.load(folder, "model", "fp32", torch.device("cpu"))
    assert scorer.scorer_of(loaded, 7, (BOS,))._decoder is not None
    monkeypatch.setattr("dus_cli.models.decoder.head_of", lambda _: Head(scale=3.0))
    assert scorer.scorer_of(loaded, 7, (BOS,))._decoder is None
    assert scorer.scorer_of(loaded, 99, (BOS,))._decoder is None
    assert found([folder], data).models[0].loss.value == pytest.approx(usual, rel=1e-6)


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("way", ["tokenizer", "option"])
def test_where_nothing_stands_before_a_text_its_first_token_is_not_asked_for(
    tmp_path: Path, way: str, stride: int
) -> None:
    data = write_text(tmp_path / "text.jsonl", [9, 30, 1, 17])
    folder = zoo_model(tmp_path / "model", "llama", bos=way == "option")
    (model,) = found([folder], data, stride=stride, special_tokens=way == "tokenizer").models
    nats = sum(reference(folder, texts_in(data), 16, stride, before=()))
    assert (model.tokens, model.before) == (8 + 29 + 0 + 16, ())
    assert model.loss.value == pytest.approx(nats / 53, rel=2e-5)
    num_words = load_config(folder)["vocab_size"]  # a token that nothing predicts may be any
    code = nats + 4 * math.log(num_words)
    assert model.bits_per_byte.value == pytest.approx(code / 57 / math.log(2), rel=2e-5)


def load_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def test_models_with_different_tokenizers_are_compared_on_the_same_bytes(tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    texts = ["the other then.", "he hoped the theme was theirs", "é a letter of two bytes the"]
    texts = [text.replace("é", "e") for text in texts]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    letters = zoo_model(tmp_path / "letters", "llama")
    pairs = zoo_model(tmp_path / "pairs", "gpt2", pairs=True)
    report = found([letters, pairs], data, stride=8)
    one, other = report.models
    num_bytes = sum(map(len, texts))
    assert (one.tokens, one.has_same_tokens) == (num_bytes, True)
    assert other.tokens < num_bytes
    assert not other.has_same_tokens
    nats = [sum(reference(folder, texts, 16, 8)) for folder in (letters, pairs)]
    assert other.loss.value == pytest.approx(nats[1] / other.tokens, rel=1e-4)
    assert other.bits_per_byte.value == pytest.approx(nats[1] / num_bytes / math.log(2), rel=1e-4)
    assert other.difference is not None
    assert other.difference_bits is not None
    assert other.difference.value == pytest.approx((nats[1] - nats[0]) / one.tokens, rel=1e-3)
    assert other.difference_bits.value == pytest.approx(
        other.bits_per_byte.value - one.bits_per_byte.value, rel=1e-6
    )


def test_bytes_are_those_of_the_text_and_tokens_that_are_not_known_are_told(tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "né 日本"}\n{"text": "zz"}\n', encoding="utf-8")
    report = found([zoo_model(tmp_path / "model", "llama", without="z")], data)
    assert report.num_bytes == len("né 日本".encode()) + 2 == 12
    assert report.models[0].unknown_tokens == 5


def test_the_base_inside_an_up_scaled_model_has_the_bases_own_loss(home: Path) -> None:
    report = found(
        [home / "scaled"], home / "corpus.jsonl", text={"with_base": True, "max_documents": 20}
    )
    alone = found([home / "base"], home / "corpus.jsonl", text={"max_documents": 20})
    within, scaled = report.models
    assert (within.name, within.is_base, scaled.is_base) == ("base of scaled", True, False)
    assert within.loss == alone.models[0].loss
    assert scaled.loss.value > within.loss.value + 0.01
    assert (
        found([home / "scaled"], home / "corpus.jsonl", text={"max_documents": 20}).models[0].loss
        == scaled.loss
    )


@pytest.mark.skipif("SMOLLM2" not in __import__("os").environ, reason="SMOLLM2 names no model")
def test_a_real_model_has_transformers_loss(tmp_path: Path) -> None:
    import os

    folder = Path(os.environ["SMOLLM2"])
    data = tmp_path / "text.jsonl"
    paragraph = (Path(__file__).parent.parent / "docs/concepts.md").read_text(encoding="utf-8")[
        :900
    ]
    data.write_text(
        json.dumps({"text": paragraph}) + "\n" + json.dumps({"text": "One more."}) + "\n"
    )
    (model,) = found([folder], data, seq_length=128, stride=64, precision=Precision.fp32).models
    expected = reference(folder, texts_in(data), 128, 64, before=())
    assert model.loss.value == pytest.approx(sum(expected) / model.tokens, rel=1e-4)
    assert 1.5 < model.loss.value < 5


# --- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "length", "stride"), [(1, 4, 2), (4, 4, 4), (5, 4, 1), (97, 16, 5), (32, 16, 16)]
)
def test_every_token_is_scored_once_with_the_context_that_was_promised(
    count: int, length: int, stride: int
) -> None:
    scored = []
    for window in windows(0, range(count), length, stride):
        ids = list(window.ids)
        assert len(ids) <= length
        for position in range(len(ids) - window.num_scored, len(ids)):
            scored.append(ids[position])
            assert position >= min(ids[position], length - stride)
    assert scored == list(range(count))


def test_batches_hold_every_window_once_and_no_more_than_was_asked_for() -> None:
    chance = random.Random(1)
    source = [Window(k, range(chance.randint(1, 60)), 1) for k in range(500)]
    made = list(batches(source, 64))
    assert sorted(window.document for batch in made for window in batch) == list(range(500))
    assert all(len(batch) * max(len(window.ids) for window in batch) <= 64 for batch in made)
    assert all(len(batch[0].ids) == max(len(window.ids) for window in batch) for batch in made)
    assert len(list(batches([Window(0, range(90), 1)], 64))) == 1


def test_windows_are_read_some_batches_ahead_and_no_further() -> None:
    drawn = 0

    def source() -> Any:
        nonlocal drawn
        for k in range(100_000):
            drawn += 1
            yield Window(k, range(10), 1)

    next(batches(source(), 100))
    assert drawn == 160


# --- intervals -----------------------------------------------------------------------------------


def test_the_interval_of_equal_documents_is_the_usual_t_interval() -> None:
    chance = random.Random(3)
    values = [chance.gauss(2, 0.5) for _ in range(12)]
    estimate = intervals.ratio(values, [1.0] * 12)
    assert estimate.value == pytest.approx(statistics.mean(values))
    assert estimate.margin == pytest.approx(
        2.200985 * statistics.stdev(values) / math.sqrt(12), rel=1e-6
    )


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    chance, held = random.Random(5), 0
    for _ in range(400):
        lengths = [chance.randint(20, 400) for _ in range(40)]
        differences = [sum(0.1 * y / 4 + chance.gauss(0, 3) for _ in range(4)) for y in lengths]
        interval = intervals.ratio(differences, lengths).interval
        assert interval is not None
        held += interval[0] <= 0.1 <= interval[1]
    assert 0.92 <= held / 400 <= 0.98


def test_a_pair_on_the_same_documents_is_told_apart_where_two_samples_are_not() -> None:
    chance = random.Random(7)
    first = [chance.gauss(300, 60) for _ in range(50)]
    second = [value + 4 + chance.gauss(0, 1) for value in first]
    tokens = [100.0] * 50
    paired = intervals.ratio([b - a for a, b in zip(first, second, strict=True)], tokens)
    assert paired.interval is not None
    assert 0.03 < paired.interval[0] < 0.04 < paired.interval[1] < 0.05
    assert intervals.ratio(first, tokens).margin > 0.1  # type: ignore[operator]


def test_more_documents_than_units_share_them_and_no_sum_is_lost() -> None:
    sums, order = intervals.Sums(limit=8), list(range(100))
    random.Random(2).shuffle(order)
    for document in order:
        sums.add(document, float(document))
    assert sums.per_unit == 16
    assert list(sums) == [float(sum(range(k, min(k + 16, 100)))) for k in range(0, 100, 16)]


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has learned its corpus a little, and a model scaled up from it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("eval")
    corpus = tiny.write_corpus(folder / "corpus.jsonl", num_documents=60)
    tiny.train(tiny.write_base(folder / "base"), corpus, num_steps=120)
    tiny.upscaled(folder / "base", folder / "scaled")
    return folder


@pytest.fixture
def run(home: Path) -> Callable[..., Run]:
    """The command on the corpus's first 20 documents."""

    def evaluate(*arguments: str | Path, data: Path | None = None, **environment: str) -> Run:
        more = ("--data", data or home / "corpus.jsonl", "--max-documents", "20")
        return tiny.forked_dus("eval", *arguments, *more, **environment)

    return evaluate


def test_a_table_puts_models_side_by_side_and_the_rest_goes_to_stderr(
    home: Path, run: Callable[..., Run]
) -> None:
    picture = home / "eval.svg"
    done = run(home / "base", home / "scaled", "--plot", picture, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert "scaled" in picture.read_text(encoding="utf-8")
    assert picture.with_name("eval-dark.svg").is_file()
    assert "evaluating scaled" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("corpus.jsonl: 20 documents, ")
    assert max(map(len, lines)) <= 80
    header, base, scaled = (line.split() for line in lines[3:6])
    assert header == ["tokens", "loss", "perplexity", "bits/byte", "difference"]
    assert (base[0], base[-1]) == ("base", "baseline")
    assert scaled[0] == "scaled"
    assert float(scaled[5]) == pytest.approx(float(scaled[2]) - float(base[2]), abs=2e-4)
    assert "95% interval over 20 documents, paired" in lines[-1]


def test_json_is_one_object_with_figures_that_agree(home: Path, run: Callable[..., Run]) -> None:
    done = run(
        home / "base", home / "scaled", "--json", "--seq-length", "64", "--precision", "bf16"
    )
    report = done.report
    assert done.stderr == ""
    assert (report["documents"], report["units"], report["baseline"]) == (20, 20, "base")
    assert (report["seq_length"], report["stride"], report["precision"], report["device"]) == (
        64,
        32,
        "bf16",
        "cpu",
    )
    base, scaled = report["models"]
    # a token for each byte, and nothing predicts a document's first
    assert base["tokens"] == report["bytes"] - 20
    assert base["perplexity"] == pytest.approx(math.exp(base["loss"]))
    assert scaled["difference"] == pytest.approx(scaled["loss"] - base["loss"])
    low, high = scaled["difference_interval"]
    assert low < scaled["difference"] < high
    assert base["difference"] is None
    layout = (Path(__file__).parent.parent / "docs/layout.md").read_text(encoding="utf-8")
    for field in [*report, *base, *report["gates"]]:
        assert f"`{field}`" in layout, field


def test_a_budget_of_tokens_is_the_baselines_and_every_model_reads_the_same(home: Path) -> None:
    text = {"max_tokens": 1000}
    report = found(
        [home / "base", home / "scaled"], home / "corpus.jsonl", text=text, seq_length=64
    )
    # nothing predicts the first token
    lengths = [len(text.encode()) - 1 for text in texts_in(home / "corpus.jsonl")]
    assert (
        report.models[0].tokens
        >= 1000
        > report.models[0].tokens - lengths[report.num_documents - 1]
    )
    assert (
        report.models[1].tokens == report.models[0].tokens == sum(lengths[: report.num_documents])
    )


def test_another_baseline_comes_first_and_turns_the_sign(
    home: Path, run: Callable[..., Run]
) -> None:
    usual = run(home / "base", home / "scaled", "--json").report["models"][1]
    turned = run(home / "base", home / "scaled", "--baseline", home / "scaled", "--json").report
    assert [model["name"] for model in turned["models"]] == ["scaled", "base"]
    assert turned["models"][1]["difference"] == pytest.approx(-usual["difference"])


def test_gates_fail_with_a_line_that_says_who_missed_what_behind_the_report(
    home: Path, run: Callable[..., Run]
) -> None:
    report = run(home / "base", home / "scaled", "--json").report
    base, scaled = report["models"]
    assert report["missed"] == []
    worse = scaled["difference"]
    held = run(
        home / "base",
        home / "scaled",
        "--min-improvement",
        f"{-worse - 0.001}",
        "--max-loss",
        "9",
        "-q",
    )
    assert (held.returncode, held.stdout, held.stderr) == (0, "", "")
    missed = run(
        home / "base",
        home / "scaled",
        "--min-improvement",
        "0",
        "--max-loss",
        f"{base['loss']}",
        "--json",
    )
    assert missed.returncode == 1
    assert len(json.loads(missed.stdout)["missed"]) == 2
    assert missed.stderr == (
        f"error: scaled: loss {scaled['loss']:.4f} is above --max-loss {base['loss']:g}; "
        f"scaled: improvement {-worse:.4f} over base is below --min-improvement 0\n"
    )
    confident = run(
        home / "base",
        home / "scaled",
        "--min-improvement",
        f"{-worse - 0.001}",
        "--confident",
        "--json",
    )
    assert confident.returncode == 1
    assert "by its interval" in confident.stderr


def test_results_go_into_the_card_of_every_directory_but_the_baselines(
    home: Path, tmp_path: Path, run: Callable[..., Run]
) -> None:
    from huggingface_hub import ModelCard

    model = shutil.copytree(home / "scaled", tmp_path / "scaled")
    report = run(home / "base", model, "--update-card", "--json").report
    assert report["cards"] == [str(model / "README.md")]
    assert not (home / "base/README.md").exists()
    read = vars(ModelCard.load(model / "README.md").data)["eval_results"]
    values = {result.metric_type: result.metric_value for result in read}
    assert values["loss"] == pytest.approx(report["models"][1]["loss"], abs=1e-4)


def test_a_baseline_is_not_judged_and_a_model_alone_is(home: Path, run: Callable[..., Run]) -> None:
    loss = run(home / "scaled", "--json").report["models"][0]["loss"]
    assert run(home / "scaled", home / "base", "--max-loss", f"{loss - 0.01}", "-q").returncode == 0
    assert run(home / "scaled", "--max-loss", f"{loss - 0.01}", "-q").returncode == 1


def test_standard_input_is_read_once_and_evaluated_by_all(home: Path) -> None:
    import subprocess

    from conftest import DUS

    done = subprocess.run(
        [*DUS, "eval", home / "base", home / "scaled", "--data", "-", "--json"],
        input="".join((home / "corpus.jsonl").read_text().splitlines(keepends=True)[:5]),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["documents"] == 5
    assert len(json.loads(done.stdout)["models"]) == 2


# --- errors --------------------------------------------------------------------------------------


def test_usage_errors_are_two(home: Path, run: Callable[..., Run]) -> None:
    run(home / "base", "--min-improvement", "0.1").assert_one_line_error(
        "give its base as the first MODEL", code=2
    )
    run(home / "base", "--confident").assert_one_line_error("--confident", code=2)
    tiny.forked_dus("eval", home / "base").assert_one_line_error("--data", code=2)
    tiny.forked_dus("eval", "--data", home / "corpus.jsonl").assert_one_line_error("MODEL", code=2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seq_length": 129}, "longer than the context length of base, 128"),
        ({"stride": 17}, "--stride 17 is longer than the window of 16 tokens"),
        ({"device": "cuda:7"}, "--device cuda:7"),
        ({"device": "sofa"}, "--device sofa"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(
    home: Path, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(EvaluationError, match=text):
        found([home / "base"], home / "corpus.jsonl", **options)


def test_a_model_that_makes_no_sense_is_named(home: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(home / "base", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        EvaluationError, match="broken: its loss on document 1 is nan; its weights are damaged"
    ):
        found([home / "base", broken], home / "corpus.jsonl")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        LoadError, match=r"no weights for model\.norm\.weight and would make them up"
    ):
        found([broken], home / "corpus.jsonl")


def test_unfinished_unknown_and_doubled_models_are_one_line_each(
    home: Path, tmp_path: Path, run: Callable[..., Run]
) -> None:
    healing = tmp_path / "healing"
    healing.mkdir()
    (healing / "run.json").write_text("{}")
    run(healing, "-q").assert_one_line_error("is a healing that has not finished")
    run(tmp_path / "nothing", "-q").assert_one_line_error("does not exist")
    run(home / "base", home / "base", "-q").assert_one_line_error("is given twice")
    odd = shutil.copytree(home / "base", tmp_path / "odd")
    (odd / "config.json").write_text(
        (odd / "config.json").read_text().replace('"llama"', '"unheard_of"')
    )
    run(odd, "-q").assert_one_line_error("transformers cannot load odd")
    (odd / "tokenizer.json").unlink()
    run(odd, "-q").assert_one_line_error("cannot load the tokenizer")
    run(home / "base", "--with-base", "-q").assert_one_line_error("base does not hold its base")


def test_text_that_is_none_is_one_line(home: Path, tmp_path: Path, run: Callable[..., Run]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": " "}\n')
    run(home / "base", "-q", data=empty).assert_one_line_error("--data holds no text")
    run(home / "base", "-q", data=tmp_path / "no.jsonl").assert_one_line_error(
        "is not a file, a folder or a pattern"
    )
    run(home / "base", "-q", data=Path(f"{home / 'corpus.jsonl'}:0.7")).assert_one_line_error(
        "leave out the weight"
    )


def test_memory_that_runs_out_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 "
            "bytes"
        ),
        MemoryError(),
    ):

        def fail(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(scorer.Scorer, "losses", fail)
        with pytest.raises(
            EvaluationError, match="out of memory while base was evaluated; lower --batch-tokens"
        ):
            found([home / "base"], home / "corpus.jsonl")


def test_text_that_changes_between_two_models_is_noticed(home: Path, tmp_path: Path) -> None:
    data = write_text(tmp_path / "text.jsonl", [20, 20])

    class Changing(NoProgress):
        def start(self, what: str, *_: Any) -> None:
            if "scaled" in what:
                write_text(data, [20, 20], seed=9)

    refs = [ModelRef.parse(str(home / name)) for name in ("base", "scaled")]
    with pytest.raises(Exception, match="changed while it was read"):
        evaluate(refs, TextOptions(data=(str(data),)), ScoringOptions(seq_length=32), Changing())


def test_the_table_of_one_model_and_of_long_names() -> None:
    from dus_cli.evaluation.report import table

    rows = [["", "loss", "difference"], ["a" * 90, "2.5", "+0.1 ± 0.2"], ["b", "12.5", "baseline"]]
    lines = table(rows, 40)
    assert {len(line) for line in lines} == {40}
    assert lines[1].startswith("aaaaaaaaaaa…aaaaaaaaaa  ")


def test_a_model_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    dus("eval", tmp_path / "no", "--data", tmp_path / "x.jsonl").assert_one_line_error(
        "does not exist"
    )
