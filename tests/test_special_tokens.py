"""A document begins as the model's own tokenizer begins a text: in training, held out, in a
probe and in eval alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dus_cli.data.sample import Packed, read_sample  # noqa: E402
from dus_cli.data.shelf import Shelf, prepare  # noqa: E402
from dus_cli.data.sources import parse_sources  # noqa: E402
from dus_cli.data.special_tokens import SpecialTokens, special_tokens_of  # noqa: E402
from dus_cli.data.streams import IGNORED, Prepared, Rows, Stream, heldout_rows  # noqa: E402
from dus_cli.data.tokeniser import open_tokeniser  # noqa: E402
from dus_cli.errors import DataError  # noqa: E402

SPECIAL = ["<eos>", "<s>", "<gmask>", "<sop>", "[CLS]", "[SEP]"]
EOS, BOS, GMASK, SOP, CLS, SEP = range(256, 262)
VOCAB = 264


def write_tokenizer(folder: Path, template: str | None, **settings: Any) -> Path:
    """One id for each byte, and a template such as "<s> $A"; `settings` go into
    tokenizer_config.json.

    Where they have add_bos_token there is no tokenizer.json with a template of its own, which would
    be stronger.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if "add_bos_token" in settings and template is None:
        words = [*letters, *SPECIAL]
        (folder / "vocab.json").write_text(
            json.dumps({word: index for index, word in enumerate(words)})
        )
        (folder / "merges.txt").write_text("#version: 0.2\n")
        named = {
            "tokenizer_class": "GPT2Tokenizer",
            "eos_token": "<eos>",
            "bos_token": "<s>",
            "unk_token": "<eos>",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(named | settings))
        return folder
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if template is not None:
        used = [(token, 256 + index) for index, token in enumerate(SPECIAL) if token in template]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=used
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "bos_token": "<s>"}
    content = {key: value for key, value in {**named, **settings}.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


# Name, template, settings, and what is expected: before a text, and at its end.
KINDS: dict[str, tuple[str | None, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "none, as GPT-2, Qwen and SmolLM": (None, {}, (), (EOS,)),
    "<s>, as Llama, Mistral and Gemma": ("<s> $A", {}, (BOS,), (EOS,)),
    "two, as ChatGLM": ("<gmask> <sop> $A", {}, (GMASK, SOP), (EOS,)),
    "an end-of-text alone": ("$A <eos>", {}, (), (EOS,)),
    "<s> and an end-of-text": ("<s> $A <eos>", {}, (BOS,), (EOS,)),
    "[CLS] and [SEP], and an end-of-text besides": ("[CLS] $A [SEP]", {}, (CLS,), (SEP, EOS)),
    "[CLS] and [SEP] alone": ("[CLS] $A [SEP]", {"eos_token": None}, (CLS,), (SEP,)),
    "add_bos_token": (None, {"add_bos_token": True}, (BOS,), (EOS,)),
    "add_bos_token and add_eos_token": (
        None,
        {"add_bos_token": True, "add_eos_token": True},
        (BOS,),
        (EOS,),
    ),
    "add_bos_token that is false": (None, {"add_bos_token": False}, (), (EOS,)),
    "a template beside add_bos_token, which transformers does not read then": (
        "<s> $A",
        {"add_bos_token": False},
        (BOS,),
        (EOS,),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_stands_between_what_its_tokenizer_puts_around_it(tmp_path: Path, kind: str) -> None:
    template, settings, before, ending = KINDS[kind]
    folder = write_tokenizer(tmp_path / "model", template, **settings)
    ours = open_tokeniser(folder, VOCAB)
    assert (ours.before, ours.ending) == (before, ending)
    users = transformers.AutoTokenizer.from_pretrained(folder)("some text")["input_ids"]
    (plain,) = ours.encode(["some text"])
    assert [*ours.before, *plain] == users[: len(before) + len(plain)]
    assert ours.ending[: len(users) - len(before) - len(plain)] == tuple(
        users[len(before) + len(plain) :]
    )
    if settings.get("eos_token", "<eos>"):
        without = open_tokeniser(folder, VOCAB, special_tokens=False)
        assert (without.before, without.ending) == ((), (EOS,))


def test_a_tokenizer_without_a_fast_one_is_asked_too(tmp_path: Path) -> None:
    tokenizer = transformers.CanineTokenizer()
    assert not tokenizer.is_fast
    cls, *_, sep = tokenizer("some text")["input_ids"]
    assert special_tokens_of(tokenizer) == SpecialTokens((cls,), (sep,))


def test_special_tokens_that_change_with_the_text_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tokenizer(tmp_path / "model", "<s> $A")
    usual = transformers.PreTrainedTokenizerFast.__call__

    def strange(self: Any, text: str, **options: Any) -> Any:
        found = usual(self, text, **options)
        if options["add_special_tokens"] and text == "1":
            found["input_ids"] = [SOP, *found["input_ids"]]
        return found

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__call__", strange)
    with pytest.raises(
        DataError, match=r"change with the text; leave them out with --no-special-tokens"
    ):
        open_tokeniser(folder, VOCAB)
    assert open_tokeniser(folder, VOCAB, special_tokens=False).before == ()


# --- rows -----------------------------------------------------------------------------------------


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepared_of(
    model: Path, folder: Path, texts: Sequence[str], *, special_tokens: bool = True
) -> Prepared:
    """The texts as training data, and as held-out data of their own."""
    train = write_texts(folder / "train.jsonl", [f"{text}!" for text in texts])
    held = write_texts(folder / "held.jsonl", texts)
    sources, eval_sources = (parse_sources([str(path)], folder) for path in (train, held))
    shelf = Shelf(folder / "tokens", model, VOCAB, special_tokens=special_tokens)
    return prepare(shelf, sources, eval_sources)


def ids(text: str, *more: int) -> list[int]:
    return [*write_ids(text), *more]


def write_ids(text: str) -> list[int]:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [letters.index(letter) for letter in text.replace(" ", "Ġ")]


def test_a_row_that_begins_within_a_document_begins_as_one_too(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model", "<s> $A")
    prepared = prepared_of(model, tmp_path, ["abcdef", "gh"])
    rows = heldout_rows(prepared, tmp_path / "tokens", 6)
    assert prepared.before == (BOS,)
    # <s>abcdef<eos> is longer than a row.
    assert [row.input_ids.tolist() for row in rows] == [
        [BOS, *ids("abcde")],
        [BOS, *ids("f", EOS, BOS), *ids("gh")],
    ]
    assert [row.labels.tolist() for row in rows] == [
        ids("abcdef"),
        [IGNORED, EOS, IGNORED, *ids("gh"), EOS],
    ]
    assert rows[1].position_ids.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_held_out_document_that_a_row_can_hold_is_not_cut(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model", "<s> $A")
    rows = heldout_rows(prepared_of(model, tmp_path, ["ab", "cdef", "g"]), tmp_path / "tokens", 7)
    assert [row.input_ids.tolist() for row in rows] == [
        [BOS, *ids("ab", EOS), EOS, EOS, EOS],
        [BOS, *ids("cdef", EOS), EOS],
        [BOS, *ids("g"), EOS, EOS, EOS, EOS, EOS],
    ]
    assert [label for row in rows for label in row.labels if label != IGNORED] == [
        *ids("ab", EOS),
        *ids("cdef", EOS),
        *ids("g", EOS),
    ]


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_a_text_is_predicted_once_behind_its_beginning_and_no_special_token_before_it_is(
    tmp_path: Path, kind: str, *, document_mask: bool
) -> None:
    template, settings, before, ending = KINDS[kind]
    model = write_tokenizer(tmp_path / "model", template, **settings)
    texts = ["abc", "a", "the end of it all", "xy" * 30, "0123456789"]
    prepared = prepared_of(model, tmp_path, texts)
    rows = heldout_rows(prepared, tmp_path / "tokens", 8, document_mask=document_mask)
    asked = [token for row in rows for token in row.labels.tolist() if token != IGNORED]
    expected = [[*write_ids(text), *ending] for text in texts]
    if not before:  # nothing predicts the first token of all, with the mask of none
        expected = [
            document[1:] if document_mask or not index else document
            for index, document in enumerate(expected)
        ]
    assert asked == [token for document in expected for token in document]
    for row in rows:
        assert len(row.input_ids) == len(row.labels) == len(row.position_ids) == 8
        assert tuple(row.input_ids[: len(before)]) == before
        if document_mask:
            begins = [at for at, position in enumerate(row.position_ids) if position == 0]
            filled = max((at for at, label in enumerate(row.labels) if label != IGNORED), default=0)
            for at in begins:
                if at <= filled:
                    assert tuple(row.input_ids[at : at + len(before)]) == before[: 8 - at]


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_reads_the_rows_that_a_run_holds_out(tmp_path: Path, kind: str) -> None:
    template, settings, _, _ = KINDS[kind]
    model = write_tokenizer(tmp_path / "model", template, **settings)
    prepared = prepared_of(model, tmp_path, ["abc", "a", "the end of it all", "xy" * 30])
    tokeniser = open_tokeniser(model, VOCAB)
    ours = Packed(read_sample([str(tmp_path / "held.jsonl")], tokeniser, 10**6).texts, tokeniser, 8)
    theirs = heldout_rows(prepared, tmp_path / "tokens", 8)
    assert len(ours) == len(theirs)
    for mine, row in zip(ours, theirs, strict=True):
        for name in mine._fields:
            assert np.array_equal(getattr(mine, name), getattr(row, name)), name
    few = read_sample([str(tmp_path / "held.jsonl")], tokeniser, 20)
    assert Packed(few.texts, tokeniser, 8).num_tokens <= 20


def test_training_rows_are_made_in_the_same_way_and_none_is_lost(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model", "<gmask> <sop> $A")
    prepared = prepared_of(model, tmp_path, ["abc" * k for k in range(1, 30)])
    rows = Rows(prepared, tmp_path / "tokens", 16, seed=0)
    found = {rows.place(index)[1]: rows.row(index) for index in range(rows.rows_per_epoch)}
    assert sorted(found) == list(range(0, 14 * len(found), 14))
    assert all(tuple(row.input_ids[:2]) == (GMASK, SOP) for row in found.values())
    stream = Stream(tmp_path / "tokens", prepared.parts, "train", prepared.dtype)
    asked = [
        token for at in sorted(found) for token in found[at].labels.tolist() if token != IGNORED
    ]
    whole = stream.read(1, 14 * len(found) + 1).tolist()
    assert asked == [token for token in whole if token not in {GMASK, SOP}]


def test_a_document_in_pieces_begins_and_ends_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dus_cli.data.tokeniser._LONGEST_PIECE", 40)
    model = write_tokenizer(tmp_path / "model", "<s> $A [SEP]")
    prepared = prepared_of(model, tmp_path, ["some words " * 30, "short"])
    stream = Stream(tmp_path / "tokens", prepared.eval_parts, "heldout", prepared.dtype)
    found = stream.read(0, stream.num_tokens).tolist()
    assert (found.count(BOS), found.count(SEP), found.count(EOS)) == (2, 2, 2)
    assert found[0] == found[stream.document_starts(1, stream.num_tokens)[0]] == BOS
    assert found[-2:] == [SEP, EOS]
    assert (SEP, EOS) in set(pairwise(found[:-2]))


def test_a_row_too_short_for_its_beginning_is_one_line(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model", "<gmask> <sop> $A")
    prepared = prepared_of(model, tmp_path, ["some text", "more text"])
    with pytest.raises(
        DataError,
        match="a row of 2 tokens has no place after the 2 with which the tokenizer begins",
    ):
        heldout_rows(prepared, tmp_path / "tokens", 2)


def test_token_files_with_and_without_are_two_and_run_json_says_which(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model", "<s> $A")
    other = write_tokenizer(tmp_path / "other", None, add_bos_token=False)
    usual = prepared_of(model, tmp_path, ["some text", "more text"])
    without = prepared_of(model, tmp_path, ["some text", "more text"], special_tokens=False)
    switched = prepared_of(other, tmp_path, ["some text", "more text"])
    assert len({usual.content_key, without.content_key, switched.content_key}) == 3
    assert (usual.before, without.before, switched.before) == ((BOS,), (), ())
    assert Prepared.from_json(json.loads(json.dumps(usual.to_json()))) == usual
    assert without.num_heldout_tokens == usual.num_heldout_tokens - 2
