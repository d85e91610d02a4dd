"""A sample holds what `dus heal` would hold out, in the rows that it would make of it, and no
more than was asked.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

np = pytest.importorskip("numpy")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from dus_cli.data.sample import Packed, read_sample  # noqa: E402
from dus_cli.data.shelf import Shelf, prepare  # noqa: E402
from dus_cli.data.sources import parse_sources  # noqa: E402
from dus_cli.data.streams import IGNORED, heldout_rows  # noqa: E402
from dus_cli.data.tokeniser import Tokeniser, open_tokeniser  # noqa: E402
from dus_cli.errors import DataError  # noqa: E402

VOCAB = 260


@pytest.fixture(scope="module")
def tokeniser(tmp_path_factory: pytest.TempPathFactory) -> Tokeniser:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return open_tokeniser(folder, VOCAB)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("document_mask", [True, False])
def test_rows_are_those_of_evaluation_data_of_a_run(
    tokeniser: Tokeniser, tmp_path: Path, *, document_mask: bool
) -> None:
    corpus = tiny.write_corpus(tmp_path / "eval.jsonl", 20)
    other = tiny.write_corpus(tmp_path / "train.jsonl", 5, seed=1)
    train, held = (parse_sources([str(path)], tmp_path) for path in (other, corpus))
    prepared = prepare(Shelf(tmp_path / "tokens", tokeniser.folder, VOCAB), train, held)
    theirs = heldout_rows(prepared, tmp_path / "tokens", 32, document_mask=document_mask)
    sample = read_sample([str(corpus)], tokeniser, 10**6)
    ours = Packed(sample.texts, tokeniser, 32, document_mask=document_mask)
    assert len(ours) == len(theirs) > 10
    for mine, row in zip(ours, theirs, strict=True):
        for name in mine._fields:
            assert np.array_equal(getattr(mine, name), getattr(row, name)), name


def test_with_a_share_the_documents_are_those_that_a_run_holds_out(
    tokeniser: Tokeniser, tmp_path: Path
) -> None:
    corpus = tiny.write_corpus(tmp_path / "corpus.jsonl", 60)
    sources = parse_sources([str(corpus)], tmp_path)
    prepared = prepare(
        Shelf(tmp_path / "tokens", tokeniser.folder, VOCAB), sources, (), holdout=0.25
    )
    theirs = heldout_rows(prepared, tmp_path / "tokens", 32)
    ours = Packed(read_sample([str(corpus)], tokeniser, 10**6, holdout=0.25).texts, tokeniser, 32)
    assert 0 < ours.num_documents == prepared.num_heldout_documents < 60
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(DataError, match="none of 60 documents is in the held-out share"):
        read_sample([str(corpus)], tokeniser, 10**6, holdout=0.0)


@pytest.mark.parametrize("max_tokens", [3, 40, 1000])
def test_a_sample_is_never_larger_than_asked_and_hardly_smaller(
    tokeniser: Tokeniser, tmp_path: Path, max_tokens: int
) -> None:
    path = write(tmp_path / "a.jsonl", ["a" * 30, "b" * 5000])
    packed = Packed(read_sample([str(path)], tokeniser, max_tokens).texts, tokeniser, 16)
    assert max_tokens * 0.95 <= packed.num_tokens <= max_tokens


def test_weights_share_out_the_tokens(tokeniser: Tokeniser, tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{name}.jsonl", [name * 9] * 1000) for name in "ab")
    texts = read_sample([f"{first}:1", f"{second}:3"], tokeniser, 2000).texts
    assert sum(text.startswith("a") for text in texts) == 50
    assert sum(text.startswith("b") for text in texts) == 150


def test_each_label_knows_its_document(tokeniser: Tokeniser, tmp_path: Path) -> None:
    texts = ["ab", "c", "defgh"]
    packed = Packed(texts, tokeniser, 4)
    seen: dict[int, list[int]] = {}
    for index, row in enumerate(packed):
        for number, label in zip(packed.document_numbers(index), row.labels, strict=True):
            assert (number == -1) == (label == IGNORED)
            seen.setdefault(int(number), []).append(int(label))
    for number, text in enumerate(texts):  # a document's first token has nothing before it
        assert seen[number] == [*next(iter(tokeniser.encode([text])))[1:], tiny.EOS]


def test_standard_input_is_read(tokeniser: Tokeniser, monkeypatch: pytest.MonkeyPatch) -> None:
    class Standard(io.TextIOWrapper):
        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdin", Standard(io.BytesIO(b'{"text": "from a pipe"}\n')))
    assert read_sample(["-"], tokeniser, 100).texts == ("from a pipe",)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "the files are empty"),
        ('{"text": " "}\n', "left out: 1 empty"),
        ("nonsense\n", "line 1: not JSON"),
    ],
)
def test_data_without_documents_are_refused(
    tokeniser: Tokeniser, tmp_path: Path, lines: str, said: str
) -> None:
    path: Any = tmp_path / "a.jsonl"
    path.write_text(lines)
    with pytest.raises(DataError, match=said):
        read_sample([str(path)], tokeniser, 100)
