"""The data of `dus heal`: read, split, tokenised once, and handed out in rows."""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dus_cli.data import shelf, token_files
from dus_cli.data import texts as texts_module
from dus_cli.data.documents import BadLine, ReadCounts, Reading, documents
from dus_cli.data.holdout import parse_holdout, text_hash
from dus_cli.data.order import Order, permute
from dus_cli.data.quick import quick_encoder
from dus_cli.data.sources import parse_sources
from dus_cli.data.streams import IGNORED, Prepared, Row, Rows, RowsInOrder, Stream, heldout_rows
from dus_cli.data.tokeniser import open_tokeniser, pieces_of
from dus_cli.errors import DataError, OutputError, UsageError
from dus_cli.writing.staging import MARK

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

EOS = 256
VOCAB_SIZE = 257
REAL = os.environ.get("SMOLLM2")
needs_model = pytest.mark.skipif(
    not REAL, reason="SMOLLM2 names no checkpoint; `make test` makes one"
)


def make_tokenizer(folder: Path, *, eos: str | None = "<|end|>") -> Path:
    """Every byte is a token; the end-of-text token is number 256."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"eos_token": eos} if eos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer."""
    return make_tokenizer(tmp_path_factory.mktemp("model"))


def ids_of(model: Path, text: str) -> list[int]:
    ids: list[int] = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    return ids


def write_jsonl(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))
    )
    return path


def some_texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [
        f"{seed}.{i} " + "".join(rng.choices("abcdefgh \n", k=rng.randrange(longest))).strip()
        for i in range(count)
    ]


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(
    path: Path, field: str = "text", on_bad_line: BadLine = BadLine.error
) -> tuple[list[str], ReadCounts]:
    tally = ReadCounts()
    return list(documents(path, field, on_bad_line, tally)), tally


def run(
    model: Path,
    folder: Path,
    *data: Path | str,
    eval_data: Sequence[Path] = (),
    text_field: str = "text",
    on_bad_line: BadLine = BadLine.error,
    weight_field: str | None = None,
    vocab_size: int | None = VOCAB_SIZE,
    on_progress: Callable[[int, int], object] = lambda _done, _total: None,
    **options: Any,
) -> Prepared:
    """Prepare these files below folder/tokens. Nothing is held out unless asked for."""
    reading = Reading(text_field, on_bad_line, weight_field)
    return shelf.prepare(
        shelf.Shelf(folder / "tokens", model, vocab_size, reading=reading, on_progress=on_progress),
        parse_sources([str(name) for name in data], folder),
        parse_sources([str(name) for name in eval_data], folder),
        **{"holdout": 0.0, **options},
    )


def all_documents(prepared: Prepared, folder: Path, name: Any, model: Path) -> list[str]:
    """The texts behind the token files."""
    stream = Stream(
        folder / "tokens", [*prepared.parts, *prepared.eval_parts], name, prepared.dtype
    )
    ids = stream.read(0, stream.num_tokens)
    starts = [*stream.document_starts(0, stream.num_tokens).tolist(), stream.num_tokens]
    decode = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).decode
    assert all(ids[stop - 1] == EOS for stop in starts[1:])
    return [decode(ids[start : stop - 1].tolist()) for start, stop in pairwise(starts)]


# --- formats --------------------------------------------------------------------------------------

TEXTS = ["one", "zwei\nZeilen", "три", "四\U0001f600"]


def compress(path: Path) -> Path:
    """Write the file's content in its own compression."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(raw[: len(raw) // 2]) + gzip.compress(raw[len(raw) // 2 :]))
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        write = zstandard.ZstdCompressor().compress
        skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00pzst"
        path.write_bytes(write(raw[: len(raw) // 2]) + skippable + write(raw[len(raw) // 2 :]))
    return path


def write_parquet(path: Path, column: Any, name: str = "text") -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({name: column}), path, row_group_size=3)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_lines_of_json_are_documents_compressed_or_not(tmp_path: Path, suffix: str) -> None:
    texts, tally = read(compress(write_jsonl(tmp_path / f"a{suffix}", TEXTS)))
    assert texts == TEXTS
    assert (tally.documents, tally.skipped) == (4, {})


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_a_small_text_file_is_one_document_compressed_or_not(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text("\n\n".join(TEXTS))
    assert read(compress(path))[0] == ["\n\n".join(TEXTS)]


def test_rows_of_parquet_are_documents_whatever_type_of_text_the_column_has(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    plain = arrow.array(TEXTS * 50)
    for column in (
        plain,
        plain.cast("large_string"),
        plain.cast("binary"),
        plain.dictionary_encode(),
    ):
        assert read(write_parquet(tmp_path / "a.parquet", column))[0] == TEXTS * 50


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("on_bad_line", BadLine)
def test_a_compressed_file_cut_short_is_an_error_that_names_it(
    tmp_path: Path, suffix: str, on_bad_line: BadLine
) -> None:
    path = compress(write_jsonl(tmp_path / f"cut{suffix}", some_texts(1000)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        DataError, match=rf"cut{suffix}: .*ended before.*; copy or download it again"
    ):
        read(path, on_bad_line=on_bad_line)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_that_is_not_what_its_name_says_is_an_error_that_names_it(
    tmp_path: Path, suffix: str
) -> None:
    path = write_jsonl(tmp_path / f"wrong{suffix}", TEXTS)
    with pytest.raises(DataError, match=f"cannot read .*wrong{suffix}: "):
        read(path)


def test_a_byte_order_mark_blank_lines_and_dos_line_ends_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two"}')
    assert read(path)[0] == ["one", "two"]
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone")
    assert read(path)[0] == ["one"]


def test_empty_texts_are_counted_and_left_out(tmp_path: Path) -> None:
    texts, tally = read(write_jsonl(tmp_path / "a.jsonl", ["", "one", " \n"]))
    assert (texts, tally.skipped) == (["one"], {"empty": 2})


# --- bad lines ------------------------------------------------------------------------------------

BAD_LINES = [
    (b'{"text": "cut', "malformed_json", "not JSON"),
    (b"[" * 100_000, "malformed_json", "JSON"),
    (b'{"text": ' + b"9" * 5000 + b"}", "malformed_json", "JSON"),
    (b"\x00" * 100, "malformed_json", "not JSON"),
    (
        b'{"body": "one", "id": 1}',
        "missing_field",
        "the object has no field text; its fields are body, id",
    ),
    (b'["text"]', "missing_field", "not an object with a field text"),
    (b'{"text": ["one"]}', "not_a_string", 'is not a string: \\["one"\\]'),
    (b'{"text": null}', "not_a_string", "is not a string: null"),
    (b'{"text": "caf\xe9"}', "invalid_utf8", "not UTF-8 \\(byte 0xe9"),
    (b'{"text": "\\ud83d"}', "invalid_utf8", "half of a character"),
    (b'{"text": "' + b"x" * 2_000_000 + b'"}', "too_long", "longer than 1 MiB"),
]


@pytest.mark.parametrize(
    ("line", "reason", "words"), BAD_LINES, ids=[f"{b[1]}{i}" for i, b in enumerate(BAD_LINES)]
)
def test_a_bad_line_is_named_by_number_or_counted_by_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, reason: str, words: str
) -> None:
    monkeypatch.setattr(texts_module, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n' + line)
    with pytest.raises(
        DataError, match=f"a.jsonl, line 3: .*{words}.*--on-bad-line skip"
    ) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    texts, tally = read(path, on_bad_line=BadLine.skip)
    assert (texts, tally.skipped) == (["one", "two"], {reason: 2})


def test_a_bad_row_of_parquet_is_named_by_number_or_counted_by_reason(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    column = arrow.array([b"one", b"two", None, b"caf\xe9", b"three"], arrow.binary())
    path = write_parquet(tmp_path / "a.parquet", column)
    with pytest.raises(DataError, match=r"a.parquet, row 3: the column text is empty"):
        read(path)
    texts, tally = read(path, on_bad_line=BadLine.skip)
    assert (texts, tally.skipped) == (
        ["one", "two", "three"],
        {"missing_field": 1, "invalid_utf8": 1},
    )


def test_a_parquet_file_without_the_column_or_with_numbers_in_it_is_an_error_in_both_modes(
    tmp_path: Path,
) -> None:
    arrow = pytest.importorskip("pyarrow")
    for on_bad_line in BadLine:
        path = write_parquet(tmp_path / "a.parquet", arrow.array(TEXTS), "body")
        with pytest.raises(
            DataError, match="has no column text; its columns are body; choose with --text-field"
        ):
            read(path, on_bad_line=on_bad_line)
        path = write_parquet(tmp_path / "a.parquet", arrow.array([1, 2]))
        with pytest.raises(DataError, match="the column holds int64, not text"):
            read(path, on_bad_line=on_bad_line)


def test_another_field_is_read_when_asked_for(tmp_path: Path) -> None:
    assert read(write_jsonl(tmp_path / "a.jsonl", TEXTS, "body"), "body")[0] == TEXTS
    arrow = pytest.importorskip("pyarrow")
    assert (
        read(write_parquet(tmp_path / "a.parquet", arrow.array(TEXTS), "body"), "body")[0] == TEXTS
    )


# --- plain text -----------------------------------------------------------------------------------


def paragraphs(count: int, seed: int = 1) -> str:
    rng = random.Random(seed)
    return "".join(
        f"é{i} " + "word " * rng.randrange(1, 2000) + rng.choice(["\n\n", "\n \r\n"])
        for i in range(count)
    )


def test_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    path, text = tmp_path / "a.txt", paragraphs(200)
    path.write_bytes(text.encode())
    pieces = read(path)[0]
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= texts_module.TEXT_PIECE for piece in pieces)
    assert all(piece.startswith("é") and piece.endswith("\n") for piece in pieces)
    assert len(pieces) < 2 * len(text.encode()) / texts_module.TEXT_PIECE + 1


def test_text_without_blank_lines_is_cut_at_lines_and_without_lines_between_characters(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.txt"
    for text, ends in (("ab é\n" * 60_000, "\n"), ("\U0001f600é" * 50_000, "")):
        path.write_bytes(text.encode())
        pieces = read(path)[0]
        assert "".join(pieces) == text
        assert len(pieces) > 3
        assert all(
            len(piece.encode()) <= texts_module.TEXT_PIECE and piece.endswith(ends)
            for piece in pieces
        )


def test_text_added_behind_changes_no_piece_but_the_last(tmp_path: Path) -> None:
    path, text = tmp_path / "a.txt", paragraphs(100)
    path.write_bytes(text.encode())
    before = read(path)[0]
    path.write_bytes((text + paragraphs(50, seed=2)).encode())
    assert read(path)[0][: len(before) - 1] == before[:-1]


def test_a_bad_line_of_text_is_named_by_number_or_left_out_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    good = [f"line {i} of a text" for i in range(20_000)]
    lines = [line.encode() for line in good]
    lines[9_000] = b"caf\xe9"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"a.txt, line 9001: not UTF-8 \(byte 0xe9 at 3\)"):
        read(path)
    pieces, tally = read(path, on_bad_line=BadLine.skip)
    assert "".join(pieces) == "\n".join(good[:9_000] + good[9_001:])
    assert tally.skipped == {"invalid_utf8": 1}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt"])
def test_memory_of_reading_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    rng = random.Random(0)
    # 16 MB; as .txt it is lines
    write_jsonl(path, [rng.randbytes(5500).hex() for _ in range(1500)])
    compress(path)
    read(write_jsonl(tmp_path / "small.jsonl", TEXTS))  # what is imported is not counted
    if suffix.endswith("zst"):
        read(compress(write_jsonl(tmp_path / "small.jsonl.zst", TEXTS)))
    tracemalloc.start()
    try:
        count = sum(1 for _ in documents(path, "text", BadLine.error, ReadCounts()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count > 200
    assert peak < 6e6


# --- sources --------------------------------------------------------------------------------------


def names(arguments: Sequence[str], folder: Path) -> list[list[str]]:
    return [[path.name for path in source.paths] for source in parse_sources(arguments, folder)]


def test_a_folder_is_all_its_data_files_below_it_in_order(tmp_path: Path) -> None:
    for name in (
        "b.jsonl",
        "a/z.txt",
        "a/c.parquet",
        "a/readme.md",
        ".hidden/x.jsonl",
        "a/.part.jsonl",
    ):
        write_jsonl(tmp_path / "data" / name, TEXTS)
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
    assert names([str(tmp_path / "data")], tmp_path) == [["c.parquet", "z.txt", "b.jsonl"]]


def test_a_pattern_is_all_that_fits_it_in_order(tmp_path: Path) -> None:
    for name in ("b2.jsonl", "b1.jsonl", "b3.md", "deep/er/b0.jsonl"):
        write_jsonl(tmp_path / name, TEXTS)
    assert names([f"{tmp_path}/b*"], tmp_path) == [["b1.jsonl", "b2.jsonl"]]
    assert names([f"{tmp_path}/**/*.jsonl"], tmp_path) == [["b1.jsonl", "b2.jsonl", "b0.jsonl"]]


def test_a_weight_follows_the_last_colon_unless_the_name_has_it(tmp_path: Path) -> None:
    a, b = (
        write_jsonl(tmp_path / "a.jsonl", TEXTS),
        write_jsonl(tmp_path / "a.jsonl:0.5.jsonl", TEXTS),
    )
    sources = parse_sources([f"{a}:0.7", f"{tmp_path}/*5.jsonl:3", f"{b}:1e-1"], tmp_path)
    assert [source.weight for source in sources] == [0.7, 3.0, 0.1]
    assert [source.paths for source in sources] == [(a,), (b,), (b,)]
    assert parse_sources([str(b)], tmp_path)[0].weight is None


def test_weights_are_for_all_or_none_and_positive(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match="has no weight but others have"):
        parse_sources([f"{a}:0.7", str(a)], tmp_path)
    for weight in ("0", "-1", "nan", "inf", "much", ""):
        with pytest.raises(UsageError, match="is not a number from"):
            parse_sources([f"{a}:{weight}"], tmp_path)


def test_what_is_not_there_or_no_data_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.doc").write_text("a,b")
    (tmp_path / "a.tar.gz").write_text("a,b")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, words in (
        ("none.jsonl", "is not a file, a folder or a pattern"),
        ("*.jsonx", "is not a file, a folder or a pattern"),
        ("empty", r"holds no data; --data reads \.jsonl"),
        ("a.doc", "has no suffix that --data reads"),
        ("a.tar.gz", "is an archive; unpack it, and give its folder"),
        ("gone.jsonl", "No such file"),
        ("pipe.jsonl", "not a regular file"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            parse_sources([f"{tmp_path}/{name}"], tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="is not a file, a folder or a pattern"):
        parse_sources([""], tmp_path)


def test_standard_input_is_stored_whole_and_read_as_lines_of_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    (source,) = parse_sources(["-"], tmp_path / "spool")
    assert source.paths == (tmp_path / "spool/stdin.jsonl",)
    assert read(source.paths[0])[0] == TEXTS
    with pytest.raises(DataError, match="standard input is empty, or was read already"):
        parse_sources(["-:0.5"], tmp_path / "spool")
    assert read(source.paths[0])[0] == TEXTS
    assert listed(tmp_path / "spool") == ["stdin.jsonl"]


def test_a_share_to_hold_out_is_a_percentage_or_a_fraction_up_to_half() -> None:
    assert [parse_holdout(text) for text in ("0.5%", "0.005", "50%", "0")] == [
        0.005,
        0.005,
        0.5,
        0.0,
    ]
    for text in ("60%", "5", "-1%", "nan", "some", ""):
        with pytest.raises(DataError, match="is not a share of documents"):
            parse_holdout(text)


def test_reading_data_needs_neither_torch_nor_transformers_nor_numpy() -> None:
    code = "import sys, dus_cli.data.documents, dus_cli.data.order; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "tokenizers", "numpy", "pyarrow", "zstandard"} & set(
        loaded
    )


# --- order ----------------------------------------------------------------------------------------


def test_the_permutation_takes_every_index_to_another_place() -> None:
    for size in [*range(1, 70), 255, 256, 257, 1000, 4097]:
        for key in (0, 1, 2**64 - 1):
            assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_the_permutation_of_a_trillion_is_as_quick_and_still_distinct() -> None:
    size = 10**12 + 39
    found = {permute(index, size, key=5) for index in range(2000)}
    assert len(found) == 2000
    assert max(found) < size
    assert 0.4 < np.mean([value / size for value in found]) < 0.6


def test_the_permutation_spreads_evenly() -> None:
    """Each of 8 places is hit equally often, over many keys, to within 5 standard deviations."""
    hits = Counter(permute(3, 8, key * 2654435761) for key in range(8000))
    assert all(abs(hits[place] - 1000) < 5 * 1000**0.5 for place in range(8))


def test_an_epoch_is_every_row_once_and_the_next_one_another_order() -> None:
    order = Order([5, 0, 12, 1], seed=3)
    assert order.rows_per_epoch == 18
    epochs = [[order.locate(epoch * 18 + i) for i in range(18)] for epoch in range(3)]
    rows = sorted((source, row) for source, size in enumerate([5, 0, 12, 1]) for row in range(size))
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Order([5, 0, 12, 1], seed=4).locate(i) for i in range(18)] != epochs[0]


@pytest.mark.parametrize("weights", [None, [0.5, 0.3, 0.2]])
def test_the_order_does_not_depend_on_who_asks_when(weights: list[float] | None) -> None:
    order = Order([50, 40, 30], weights, seed=1)
    expected = [order.locate(index) for index in range(300)]
    shuffled = random.Random(0).sample(range(300), 300)
    again = Order([50, 40, 30], weights, seed=1)
    assert {index: again.locate(index) for index in shuffled} == dict(enumerate(expected))


def test_a_mixture_has_the_proportions_of_its_weights_and_no_row_twice_in_an_epoch() -> None:
    order = Order([1000, 1000, 60], [5, 3, 2], seed=9)  # the third is used up after 60 of 300 rows
    assert order.rows_per_epoch == 300
    seen: list[Counter[int]] = [Counter(), Counter(), Counter()]
    for epoch in range(20):
        rows = [order.locate(epoch * 300 + i) for i in range(300)]
        assert Counter(source for source, _ in rows) == {0: 150, 1: 90, 2: 60}
        assert len(set(rows)) == 300
        for source, row in rows:
            seen[source][row] += 1
    # 20 epochs of 150 of 1000 rows: round and round, none is passed over
    assert set(seen[0].values()) == {3}
    assert set(seen[1].values()) == {1, 2}
    assert set(seen[2].values()) == {20}


def test_the_proportions_hold_within_an_epoch_too() -> None:
    order = Order([100_000, 100_000], [0.9, 0.1])
    first = Counter(order.locate(index)[0] for index in range(2000))
    assert 140 < first[1] < 260


def test_too_few_rows_is_one_line() -> None:
    for num_rows, weights in (([0, 0], None), ([5, 0], [1.0, 1.0])):
        with pytest.raises(DataError, match="too few tokens for one row"):
            Order(num_rows, weights)


# --- token files ----------------------------------------------------------------------------------


def test_the_token_files_hold_every_document_and_its_end(model: Path, tmp_path: Path) -> None:
    texts = [*some_texts(300), "the <|end|> of", TEXTS[3]]
    prepared = run(model, tmp_path, write_jsonl(tmp_path / "a.jsonl", texts))
    stream = Stream(tmp_path / "tokens", prepared.parts, "train", prepared.dtype)
    expected = [id_ for text in texts for id_ in [*ids_of(model, text), EOS]]
    assert stream.read(0, stream.num_tokens).tolist() == expected
    assert prepared.num_train_tokens == len(expected)
    assert prepared.num_train_documents == len(texts)
    assert prepared.dtype == "uint16"
    assert (prepared.eos, prepared.holdout, prepared.num_heldout_tokens) == (EOS, 0.0, 0)


def test_a_large_vocabulary_takes_wider_ids(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert run(model, tmp_path, path, vocab_size=65536).dtype == "uint16"
    assert run(model, tmp_path, path, vocab_size=65537).dtype == "uint32"
    assert (
        all_documents(run(model, tmp_path, path, vocab_size=65537), tmp_path, "train", model)
        == TEXTS
    )


def test_prepared_survives_json(model: Path, tmp_path: Path) -> None:
    a, b = (
        write_jsonl(tmp_path / "a.jsonl", some_texts(50)),
        write_jsonl(tmp_path / "b.jsonl", ["", "b"]),
    )
    prepared = run(model, tmp_path, f"{a}:1", f"{b}:2", holdout=0.3)
    assert Prepared.from_json(json.loads(json.dumps(prepared.to_json()))) == prepared
    assert [(source.name, source.weight) for source in prepared.sources] == [
        (f"{a}:1", 1.0),
        (f"{b}:2", 2.0),
    ]
    assert prepared.skipped == {"empty": 1}


def test_a_stream_crosses_parts_as_if_they_were_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = some_texts(120)
    for i in range(6):
        write_jsonl(tmp_path / f"data/{i}.jsonl", texts[20 * i : 20 * i + 20])
    (tmp_path / "data/3a.jsonl").write_text("")
    whole = run(model, tmp_path, tmp_path / "data")
    monkeypatch.setattr(shelf, "_SHARED_PART", 1)
    monkeypatch.setattr("dus_cli.data.streams._MOST_OPEN", 2)
    cut = run(model, tmp_path, tmp_path / "data")
    assert (len(whole.parts), len(cut.parts)) == (1, 7)
    one, many = (Stream(tmp_path / "tokens", p.parts, "train", p.dtype) for p in (whole, cut))
    assert one.num_tokens == many.num_tokens
    rng = random.Random(0)
    for _ in range(300):
        start, stop = sorted(rng.choices(range(one.num_tokens + 1), k=2))
        assert one.read(start, stop).tolist() == many.read(start, stop).tolist()
        assert (
            one.document_starts(start, stop).tolist() == many.document_starts(start, stop).tolist()
        )


@pytest.mark.parametrize("weights", ["", ":1"])
def test_every_token_is_predicted_once_in_an_epoch_apart_from_the_tail(
    model: Path, tmp_path: Path, weights: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(100))
    prepared = run(model, tmp_path, f"{path}{weights}")
    stream = Stream(tmp_path / "tokens", prepared.parts, "train", prepared.dtype)
    rows = Rows(prepared, tmp_path / "tokens", 16, seed=1, document_mask=False)
    tokens = stream.read(0, stream.num_tokens)
    assert rows.num_rows == ((stream.num_tokens - 1) // 16,)
    epoch = [rows.row(index) for index in range(rows.rows_per_epoch)]
    labels = sorted(tuple(row.labels.tolist()) for row in epoch)
    expected = sorted(
        tuple(tokens[1 + 16 * i : 17 + 16 * i].tolist()) for i in range(rows.num_rows[0])
    )
    assert labels == expected
    assert (stream.num_tokens - 1) - 16 * rows.num_rows[0] < 16
    for row in epoch:
        assert row.input_ids[1:].tolist() == row.labels[:-1].tolist()
        assert row.position_ids.tolist() == list(range(16))
        assert {array.dtype for array in row} == {np.dtype(np.int64)}


def test_with_the_mask_documents_do_not_see_each_other(model: Path, tmp_path: Path) -> None:
    prepared = run(model, tmp_path, write_jsonl(tmp_path / "a.jsonl", ["abc", "de", "f" * 20, "g"]))
    a, b, c, d, e, f = ids_of(model, "abcdef")
    rows = Rows(prepared, tmp_path / "tokens", 8, seed=0)
    by_start = {
        row.input_ids[0].item(): row for row in (rows.row(i) for i in range(rows.rows_per_epoch))
    }
    assert by_start[a].input_ids.tolist() == [a, b, c, EOS, d, e, EOS, f]
    assert by_start[a].labels.tolist() == [b, c, EOS, IGNORED, e, EOS, IGNORED, f]
    assert by_start[a].position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert by_start[f].position_ids.tolist() == list(range(8))  # of the two rows of f either


def test_a_label_beyond_the_row_is_masked_where_a_document_begins_there(
    model: Path, tmp_path: Path
) -> None:
    prepared = run(model, tmp_path, write_jsonl(tmp_path / "a.jsonl", ["abc", "defg"]))
    a, b, c = ids_of(model, "abc")
    rows = Rows(prepared, tmp_path / "tokens", 4, seed=0)
    row = next(row for row in map(rows.row, range(rows.rows_per_epoch)) if row.input_ids[0] == a)
    assert row.input_ids.tolist() == [a, b, c, EOS]
    assert row.labels.tolist() == [b, c, EOS, IGNORED]


def test_held_out_rows_are_in_stored_order_and_the_last_is_filled_up(
    model: Path, tmp_path: Path
) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", ["something else"])
    prepared = run(
        model, tmp_path, train, eval_data=[write_jsonl(tmp_path / "e.jsonl", ["abcd", "efg"])]
    )
    a, b, c, d, e, f, g = ids_of(model, "abcdefg")
    rows = heldout_rows(prepared, tmp_path / "tokens", 6)
    assert isinstance(rows, RowsInOrder)
    assert len(rows) == 2
    assert rows[0].input_ids.tolist() == [a, b, c, d, EOS, e]
    assert rows[0].labels.tolist() == [b, c, d, EOS, IGNORED, f]
    assert rows[0].position_ids.tolist() == [0, 1, 2, 3, 4, 0]
    assert rows[1].input_ids.tolist() == [f, g, EOS, EOS, EOS, EOS]
    assert rows[1].labels.tolist() == [g, EOS, IGNORED, IGNORED, IGNORED, IGNORED]
    assert rows[1].position_ids.tolist() == [0, 1, 0, 1, 2, 3]
    plain = heldout_rows(prepared, tmp_path / "tokens", 6, document_mask=False)
    assert plain[1].position_ids.tolist() == [0, 1, 2, 3, 4, 5]
    few = heldout_rows(prepared, tmp_path / "tokens", 2, max_tokens=3)
    assert [row.labels.tolist() for row in few] == [[b, c], [d, IGNORED]]
    assert [len(list(row)) for row in rows[:]] == [3, 3]


def test_fewer_tokens_than_a_row_is_one_line(model: Path, tmp_path: Path) -> None:
    prepared = run(model, tmp_path, write_jsonl(tmp_path / "a.jsonl", ["abc"]))
    with pytest.raises(DataError, match="too few tokens for one row"):
        Rows(prepared, tmp_path / "tokens", 4, seed=0)
    assert Rows(prepared, tmp_path / "tokens", 3, seed=0).num_rows == (1,)


# --- held out -------------------------------------------------------------------------------------


def test_a_part_of_a_mixture_without_a_row_is_named(model: Path, tmp_path: Path) -> None:
    much = write_jsonl(tmp_path / "much.jsonl", some_texts(50))
    little = write_jsonl(tmp_path / "little.jsonl", ["x"])
    prepared = run(model, tmp_path, f"{much}:0.5", f"{little}:0.5")
    with pytest.raises(DataError, match=r"little\.jsonl:0\.5 has too few tokens for one row of 64"):
        Rows(prepared, tmp_path / "tokens", 64, 0)


def test_held_out_documents_are_apart_from_training_and_stay_when_data_is_added(
    model: Path, tmp_path: Path
) -> None:
    texts = some_texts(1000)
    write_jsonl(tmp_path / "data/b.jsonl", [*texts, *texts[:100]])  # some of them twice
    small = run(model, tmp_path, tmp_path / "data", holdout=0.05)
    train, heldout = (
        set(all_documents(small, tmp_path, name, model)) for name in ("train", "heldout")
    )
    assert train | heldout == set(texts)
    assert not train & heldout
    assert 20 < len(heldout) < 100
    write_jsonl(tmp_path / "data/a.jsonl", some_texts(1000, seed=5))
    large = run(model, tmp_path, tmp_path / "data", holdout=0.05)
    assert set(all_documents(large, tmp_path, "heldout", model)) & set(texts) == heldout
    assert set(all_documents(large, tmp_path, "train", model)) & set(texts) == train


def test_the_share_is_doubled_until_it_holds_a_document(model: Path, tmp_path: Path) -> None:
    texts = some_texts(12)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    prepared = run(model, tmp_path, path, holdout=0.001)
    hashes = sorted(text_hash(text.encode()) / 2**64 for text in texts)
    assert prepared.holdout / 0.001 == pytest.approx(2 ** round(np.log2(prepared.holdout / 0.001)))
    assert prepared.holdout / 2 <= hashes[0] < prepared.holdout
    assert prepared.num_heldout_documents == sum(h < prepared.holdout for h in hashes) > 0
    assert prepared.num_train_documents + prepared.num_heldout_documents == 12
    assert run(model, tmp_path, path, holdout=0.001) == prepared


def test_the_only_document_is_trained_on(model: Path, tmp_path: Path) -> None:
    for i in range(6):  # some hash below a half, some above
        prepared = run(
            model, tmp_path, write_jsonl(tmp_path / f"{i}.jsonl", [f"text {i}"]), holdout=0.005
        )
        assert (prepared.num_train_documents, prepared.num_heldout_documents, prepared.holdout) == (
            1,
            0,
            0.0,
        )


def test_evaluation_data_is_left_out_of_training_and_counted(model: Path, tmp_path: Path) -> None:
    texts = some_texts(50)
    train = write_jsonl(tmp_path / "a.jsonl", texts)
    own = write_jsonl(tmp_path / "e.jsonl", [*texts[10:13], "another"])
    prepared = run(model, tmp_path, train, eval_data=[own], holdout=0.2)
    assert all_documents(prepared, tmp_path, "heldout", model) == [*texts[10:13], "another"]
    assert all_documents(prepared, tmp_path, "train", model) == texts[:10] + texts[13:]
    assert prepared.skipped == {"in_eval_data": 3}
    assert prepared.holdout == 0.0
    assert run(model, tmp_path, train, eval_data=[own], holdout=0.2) == prepared
    other = run(model, tmp_path, train, eval_data=[write_jsonl(tmp_path / "f.jsonl", texts[20:25])])
    assert all_documents(other, tmp_path, "train", model) == texts[:20] + texts[25:]


# --- what cannot be prepared ----------------------------------------------------------------------


def test_nothing_to_train_on_is_one_line_that_says_why(model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"body": "one"}\n' * 3)
    one = write_jsonl(tmp_path / "one.jsonl", ["one"])
    with pytest.raises(
        DataError, match=r"empty.jsonl has no documents to train on: the files are empty"
    ):
        run(model, tmp_path, empty)
    with pytest.raises(DataError, match=r"no documents to train on: left out: 3 missing_field"):
        run(model, tmp_path, bad, on_bad_line=BadLine.skip)
    with pytest.raises(DataError, match=r"no documents to train on: left out: 1 in_eval_data"):
        run(model, tmp_path, one, eval_data=[one])
    with pytest.raises(DataError, match=r"empty.jsonl has no documents to evaluate on"):
        run(model, tmp_path, one, eval_data=[empty])
    low = next(text for text in some_texts(50) if text_hash(text.encode()) < 2**62)
    with pytest.raises(
        DataError, match=r"the held-out set has all of them \(1 document\); lower --holdout"
    ):
        run(model, tmp_path, write_jsonl(tmp_path / "low.jsonl", [low]), holdout=0.5)
    weightless = tmp_path / "weightless.jsonl"
    weightless.write_text("".join(f'{{"text": "text {i}", "w": 0}}\n' for i in range(20)))
    with pytest.raises(DataError, match=r"left out: \d+ by_weight, \d+ held out; check the data"):
        run(model, tmp_path, weightless, weight_field="w", holdout=0.5)


def test_an_id_beyond_the_vocabulary_is_one_line_before_and_after_it_is_stored(
    model: Path, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    words = "gives id 256, but the model's vocabulary has 256; use the tokenizer that belongs to the model"
    with pytest.raises(DataError, match=words):
        run(model, tmp_path, path, vocab_size=256)
    run(model, tmp_path, path)
    with pytest.raises(DataError, match=words):
        run(model, tmp_path, path, vocab_size=256)


def test_an_id_beyond_the_vocabulary_in_the_midst_of_a_text_leaves_nothing(tmp_path: Path) -> None:
    model = make_tokenizer(tmp_path / "model", eos="a")
    with pytest.raises(DataError, match="gives id 256, but the model's vocabulary has 256"):
        run(
            model,
            tmp_path,
            write_jsonl(tmp_path / "a.jsonl", ["one", "<|end|>", "two"]),
            vocab_size=256,
        )
    assert listed(tmp_path / "tokens") == [".lock", "sources.jsonl"]


def test_a_part_is_on_the_disk_before_it_has_its_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(token_files, "sync_file", synced.append)
    prepared = run(model, tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    part = listed(tmp_path / "tokens" / prepared.parts[0].key)
    assert sorted(path.name for path in synced) == sorted([*part, MARK])
    assert {path.parent.name for path in synced} == {f".{prepared.parts[0].key}.partial"}


def test_a_tokenizer_that_is_missing_broken_or_without_an_end_of_text_is_one_line(
    tmp_path: Path,
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"has no tokenizer; copy tokenizer\.json"):
        run(tmp_path / "none", tmp_path, path)
    with pytest.raises(
        DataError, match=r"no end-of-text token .*; name its eos_token in tokenizer_config\.json"
    ):
        run(make_tokenizer(tmp_path / "endless", eos=None), tmp_path, path)
    broken = make_tokenizer(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot load the tokenizer") as caught:
        run(broken, tmp_path, path)
    assert "\n" not in str(caught.value)
    # transformers loads it, with no token but the end-of-text
    empty = make_tokenizer(tmp_path / "empty")
    (empty / "tokenizer.json").unlink()
    (empty / "config.json").write_text('{"model_type": "qwen2"}')
    fields = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    (empty / "tokenizer_config.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"has no vocabulary; copy tokenizer\.json"):
        run(empty, tmp_path, path)


def test_a_bad_line_stops_preparing_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nnothing\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2: not JSON"):
        run(model, tmp_path, path)
    assert listed(tmp_path / "tokens") == [".lock", "sources.jsonl"]


# --- kept -----------------------------------------------------------------------------------------


def test_the_second_run_reads_no_source_and_loads_no_tokenizer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(100))
    first = run(model, tmp_path, path, holdout=0.001)
    before = path.stat()
    with open(path, "r+b") as file:  # the same size, inode and time, but no text
        file.write(b"\0" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    monkeypatch.setattr(shelf, "open_tokeniser", None)
    assert run(model, tmp_path, path, holdout=0.001) == first
    os.utime(path)
    with pytest.raises(TypeError):  # now it was looked at
        run(model, tmp_path, path, holdout=0.001)


def test_the_same_content_by_another_name_is_not_tokenised_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(model, tmp_path, write_jsonl(tmp_path / "a.jsonl", some_texts(100)))
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "some.other.jsonl")
    monkeypatch.setattr(shelf, "open_tokeniser", None)
    assert run(model, tmp_path, tmp_path / "some.other.jsonl").content_key == first.content_key


def test_the_key_changes_with_all_that_changes_tokens(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text, "body": text}) + "\n" for text in some_texts(100))
    )
    other = make_tokenizer(tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    as_text = shutil.copy(path, tmp_path / "a.txt")
    keys = [
        run(model, tmp_path, path).content_key,
        run(other, tmp_path, path).content_key,
        run(model, tmp_path, path, text_field="body").content_key,
        run(model, tmp_path, path, on_bad_line=BadLine.skip).content_key,
        run(model, tmp_path, path, holdout=0.1).content_key,
        run(model, tmp_path, path, holdout=0.2).content_key,
        run(model, tmp_path, path, vocab_size=100_000).content_key,
        run(
            model, tmp_path, path, eval_data=[write_jsonl(tmp_path / "e.jsonl", ["one"])]
        ).content_key,
        run(
            model, tmp_path, path, eval_data=[write_jsonl(tmp_path / "f.jsonl", ["two"])]
        ).content_key,
        run(model, tmp_path, path, write_jsonl(tmp_path / "g.jsonl", ["three"])).content_key,
        run(model, tmp_path, as_text).content_key,
    ]
    path.write_text(path.read_text().replace("a", "b"))
    keys.append(run(model, tmp_path, path).content_key)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "meta.json", "hashes.bin"])
def test_a_damaged_part_is_built_anew(model: Path, tmp_path: Path, name: str) -> None:
    texts = some_texts(100)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    eval_data = [write_jsonl(tmp_path / "e.jsonl", ["one"])]
    first = run(model, tmp_path, path, eval_data=eval_data)
    folder = (
        tmp_path / "tokens" / (first.eval_parts if name == "hashes.bin" else first.parts)[0].key
    )
    os.truncate(folder / name, (folder / name).stat().st_size - 2)
    if name.startswith("train"):
        with pytest.raises(
            DataError,
            match=rf"token file {name} in .* is damaged \(\d+ bytes instead of \d+\); start again",
        ):
            Rows(first, tmp_path / "tokens", 4, seed=0).row(0)
    assert run(model, tmp_path, path, eval_data=eval_data) == first
    assert all_documents(first, tmp_path, "train", model) == texts
    assert [p.name for p in (tmp_path / "tokens").glob(".*")] == [".lock"]


def test_a_torn_record_of_digests_is_read_over(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = run(model, tmp_path, path)
    record = tmp_path / "tokens/sources.jsonl"
    record.write_bytes(b'[1]\n"x"\n\xff\n{"path": 1}\n' + record.read_bytes()[:-20])
    assert run(model, tmp_path, path) == first
    size = record.stat().st_size
    assert run(model, tmp_path, path) == first
    assert record.stat().st_size == size


def test_progress_ends_at_the_whole(model: Path, tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", some_texts(200, seed=i)) for i in range(3)]
    told: list[tuple[int, int]] = []
    run(model, tmp_path, *paths, on_progress=lambda done, total: told.append((done, total)))
    size = sum(path.stat().st_size for path in paths)
    assert told[-1] == (2 * size, 2 * size)  # once for the digest, once for the text
    assert told == sorted(told)


def test_the_real_tokenizers_ids_are_those_of_transformers() -> None:
    if not REAL:
        pytest.skip("SMOLLM2 names no checkpoint; `make test` makes one")
    ours = open_tokeniser(Path(REAL), 49152)
    texts = [*TEXTS, "", "def f(x):\n    return x<|im_end|>", "a  b \n\n c" * 50]
    theirs = transformers.AutoTokenizer.from_pretrained(REAL)(texts, add_special_tokens=False)[
        "input_ids"
    ]
    assert list(ours.encode(texts)) == theirs
    fast, ours._fast = ours._fast, None
    assert fast is not None
    assert list(ours.encode(texts)) == theirs


@needs_model
def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert REAL is not None
    readme = Path(__file__).parent.parent / "README.md"
    text = "\n\n".join([readme.read_text(), Path(__file__).read_text()])
    monkeypatch.setattr("dus_cli.data.tokeniser._LONGEST_PIECE", 2000)
    pieces = list(pieces_of(text))
    assert len(pieces) > len(text) // 2000
    assert "".join(piece for piece, _ in pieces) == text
    assert [is_last for _, is_last in pieces] == [False] * (len(pieces) - 1) + [True]
    path = write_jsonl(tmp_path / "a.jsonl", [text])
    prepared = run(Path(REAL), tmp_path, path, vocab_size=49152)
    stream = Stream(tmp_path / "tokens", prepared.parts, "train", prepared.dtype)
    whole = next(iter(open_tokeniser(Path(REAL), 49152).encode([text])))
    assert stream.read(0, stream.num_tokens).tolist() == [*whole, prepared.eos]
    assert prepared.num_train_documents == 1


# --- killed, raced, full --------------------------------------------------------------------------

CHILD = """
import json, sys
from pathlib import Path
from dus_cli.data import shelf, token_files
from dus_cli.data.sources import parse_sources

model, folder, data = sys.argv[1:]
token_files._BATCH = 1 << 15
said, built, write_part = [], [], shelf.write_part
shelf.write_part = lambda *a, **k: built.append(1) or write_part(*a, **k)
prepared = shelf.prepare(
    shelf.Shelf(Path(folder) / "tokens", Path(model), 257), parse_sources([data], Path(folder)), (), holdout=0.1,
    say=said.append,
)
print(json.dumps({"said": said, "built": len(built), "prepared": prepared.to_json()}))
"""


class StandInFastokens:
    """fastokens, with tokenizers inside, that refuses texts with the byte 4 and may err in others."""

    def __init__(self, tokenizer: Any, wrong: str | None) -> None:
        self.tokenizer, self.wrong = tokenizer, wrong
        self.num_texts = 0

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[Any]:
        self.num_texts += len(texts)
        if any("\x04" in text for text in texts):
            raise ValueError("model error: byte 0x04 has no token in vocabulary")
        read = [text.replace(self.wrong, "!") if self.wrong else text for text in texts]
        encodings: list[Any] = self.tokenizer.encode_batch_fast(
            read, add_special_tokens=add_special_tokens
        )
        return encodings

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]


def stand_in(monkeypatch: pytest.MonkeyPatch, wrong: str | None = None) -> list[StandInFastokens]:
    """Let `import fastokens` give a stand-in; returns those that were opened."""
    opened: list[StandInFastokens] = []

    class Tokenizer:
        @staticmethod
        def from_json_str(content: str) -> StandInFastokens:
            opened.append(StandInFastokens(tokenizers.Tokenizer.from_str(content), wrong))
            return opened[-1]

    monkeypatch.setitem(sys.modules, "fastokens", SimpleNamespace(Tokenizer=Tokenizer))
    return opened


MANY = ["some words, 1234 and \u00e9\n" * 100 + str(number) for number in range(200)]


def test_fastokens_is_used_for_much_text_and_gives_the_same_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [*MANY, "a byte \x04 without a token"])
    monkeypatch.setitem(sys.modules, "fastokens", None)  # not installed
    without = run(model, tmp_path / "without", data)
    opened = stand_in(monkeypatch)
    prepared = run(model, tmp_path / "with", data)
    assert prepared == without
    assert opened[0].num_texts >= len(MANY)
    (key,) = (part.key for part in prepared.parts)
    for name in ("train.bin", "train.idx"):
        files = [tmp_path / which / "tokens" / key / name for which in ("with", "without")]
        assert files[0].read_bytes() == files[1].read_bytes()
    opened.clear()
    run(model, tmp_path / "little", write_jsonl(tmp_path / "b.jsonl", MANY[:9]))
    assert not opened


def test_fastokens_is_left_alone_where_it_errs_and_an_error_later_ends_the_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", MANY)
    opened = stand_in(monkeypatch, wrong="日本語")  # among the hard texts
    prepared = run(model, tmp_path, data)
    assert opened[0].num_texts < len(MANY)
    assert prepared.num_train_documents == len(MANY)
    stand_in(monkeypatch, wrong="some words, 1234")
    with pytest.raises(DataError, match=r"^fastokens gives other tokens .*; uninstall fastokens"):
        run(model, tmp_path / "other", data)
    assert listed(tmp_path / "other" / "tokens") == [".lock", "sources.jsonl"]


@needs_model
def test_the_real_fastokens_gives_the_ids_of_tokenizers_for_every_character() -> None:
    pytest.importorskip("fastokens")
    assert REAL is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(REAL).backend_tokenizer
    quick = quick_encoder(tokenizer)
    assert quick is not None
    characters = [chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000]
    assert quick.is_same([f"a{each} {each}{each}1\n{each}" for each in characters])


def start(model: Path, folder: Path, data: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(model), str(folder), str(data)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def much(tmp_path: Path) -> Path:
    """Text of 1.5 MB: tokenising it takes long enough to be killed."""
    for i, count in enumerate((20, 20, 3_000)):
        write_jsonl(tmp_path / f"much/{i}.jsonl", some_texts(count, seed=i, longest=1000))
    return tmp_path / "much"


def test_of_two_processes_one_builds_and_the_other_waits_and_says_so(
    model: Path, much: Path, tmp_path: Path
) -> None:
    processes = [start(model, tmp_path, much) for _ in range(2)]
    outcomes = [json.loads(process.communicate()[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(outcome["built"] for outcome in outcomes) == [0, 1]
    assert outcomes[0]["prepared"] == outcomes[1]["prepared"]
    waited = next(outcome["said"] for outcome in outcomes if not outcome["built"])
    assert [line.partition(" in ")[0] for line in waited] in (
        [],
        ["waiting for another run to prepare the data"],
    )


def test_who_finds_the_lock_held_waits_says_so_once_or_fails_when_told_to(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "tokens").mkdir()
    lock = os.open(tmp_path / "tokens/.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.write(lock, b"node7, process 42")
    with pytest.raises(
        DataError, match=r"another run is preparing .*\(node7, process 42\); wait for it"
    ):
        run(model, tmp_path, path, wait=False)
    said: list[str] = []
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            os.close(lock)

    monkeypatch.setattr(time, "sleep", sleep)
    prepared = run(model, tmp_path, path, say=said.append)
    assert prepared.num_train_documents == 4
    assert len(slept) == 3
    assert len(said) == 1
    assert "waiting for another run" in said[0]
    assert "node7, process 42" in said[0]
    # nothing to build: no lock is asked for
    assert run(model, tmp_path, path, wait=False) == prepared


def test_kill_9_leaves_nothing_half_written_and_a_rerun_goes_on(
    model: Path, much: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(model, tmp_path, much)
    tokens = tmp_path / "tokens"
    while not any(path.stat().st_size for path in tokens.glob(".*.partial/train.bin")):
        assert process.poll() is None, "it was over before it was killed: the test shows nothing"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(tokens.glob(".*.partial"))
    assert not [
        path for path in tokens.iterdir() if path.is_dir() and not path.name.startswith(".")
    ]
    (tokens / ".of-another-key.partial").mkdir()
    prepared = run(model, tmp_path, much, holdout=0.1)
    assert not list(tokens.glob(".*.partial"))
    texts = [text for path in sorted(much.iterdir()) for text in read(path)[0]]
    found = [
        *all_documents(prepared, tmp_path, "train", model),
        *all_documents(prepared, tmp_path, "heldout", model),
    ]
    assert sorted(found) == sorted(texts)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_and_nothing_stays(
    model: Path, much: Path, small_disk: Path
) -> None:
    with pytest.raises(
        OutputError, match=r"cannot write train\.bin: No space left on device; free some space"
    ):
        run(model, small_disk, much)
    assert listed(small_disk / "tokens") == [".lock", "sources.jsonl"]
    write_jsonl(small_disk / "a.jsonl", TEXTS)
    assert run(model, small_disk, small_disk / "a.jsonl").num_train_documents == 4


def test_a_file_that_changes_while_it_is_read_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(100))

    def and_change(*arguments: Any, **options: Any) -> Any:
        meta = token_files.write_part(*arguments, **options)
        with open(path, "a") as file:
            file.write("\n")
        return meta

    monkeypatch.setattr(shelf, "write_part", and_change)
    with pytest.raises(DataError, match=r"a.jsonl changed while it was read; start again"):
        run(model, tmp_path, path)
    monkeypatch.undo()
    assert run(model, tmp_path, path).num_train_documents == 100


def test_a_file_that_vanishes_before_it_is_read_is_one_line(model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", some_texts(9))
    sources = parse_sources([str(data)], tmp_path)
    data.unlink()
    with pytest.raises(
        DataError, match=r"^cannot read .*a\.jsonl: No such file .*; check the disk"
    ):
        shelf.prepare(shelf.Shelf(tmp_path / "tokens", model, VOCAB_SIZE), sources, ())


def test_a_row_is_three_arrays_of_one_length(model: Path, tmp_path: Path) -> None:
    prepared = run(model, tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    row = Rows(prepared, tmp_path / "tokens", 5, seed=0).row(10**9)  # any epoch
    assert isinstance(row, Row)
    assert [array.shape for array in row] == [(5,)] * 3
