"""The kinds of files that training text comes in: the same documents, whatever holds them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import forked_dus, write_base, write_corpus

from dus_cli.data import texts as texts_module
from dus_cli.data.documents import BadLine, ReadCounts, documents
from dus_cli.data.sources import Unread, parse_sources
from dus_cli.errors import DataError

TEXTS = ["one", 'two, "quoted"\nand a second line', "три;\t", "四\U0001f600"]
OBJECTS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]


def read(
    path: Path, field: str = "text", on_bad_line: BadLine = BadLine.error
) -> tuple[list[str], ReadCounts]:
    tally = ReadCounts()
    return list(documents(path, field, on_bad_line, tally)), tally


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    """What is said of a file that cannot be read, the same whether bad lines stop or are
    counted.
    """
    said = set()
    for on_bad_line in BadLine:
        with pytest.raises(DataError) as caught:
            read(path, on_bad_line=on_bad_line)
        said.add(str(caught.value))
    (line,) = said
    assert "\n" not in line
    return line.replace(str(path), path.name)


def of_lines() -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in OBJECTS)


def of_csv(delimiter: str = ",") -> bytes:
    file = io.StringIO()
    table = csv.writer(file, delimiter=delimiter)
    table.writerows([["id", "text"], *([record["id"], record["text"]] for record in OBJECTS)])
    return file.getvalue().encode()


def zstd(content: bytes) -> bytes:
    packed: bytes = pytest.importorskip("zstandard").compress(content)
    return packed


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
BOM = b"\xef\xbb\xbf"
CONTAINERS = {
    "lines.jsonl": of_lines(),
    "lines.ndjson": of_lines(),
    "lines.json": of_lines(),
    "marked.json": BOM + of_lines(),
    "array.json": json.dumps(OBJECTS).encode(),
    "array.jsonl": json.dumps(OBJECTS).encode(),
    "pretty.json": json.dumps(OBJECTS, indent=2).encode(),
    "marked-pretty.json": BOM + json.dumps(OBJECTS, indent=2, ensure_ascii=False).encode(),
    "objects.json": "\n".join(json.dumps(record, indent=2) for record in OBJECTS).encode(),
    "table.csv": of_csv(),
    "marked.csv": BOM + of_csv(),
    "semicolons.csv": of_csv(";"),
    "tabs.tsv": of_csv("\t"),
}


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_holds_the_same_documents(tmp_path: Path, name: str, suffix: str) -> None:
    path = written(tmp_path / f"{name}{suffix}", COMPRESSIONS[suffix](CONTAINERS[name]))
    assert read(path)[0] == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_members_behind_each_other_are_one_file_and_upper_case_is_the_same(
    tmp_path: Path, suffix: str
) -> None:
    packed = COMPRESSIONS[suffix](of_lines()) * 2
    assert read(written(tmp_path / f"A.JSONL{suffix.upper()}", packed))[0] == TEXTS * 2
    (source,) = parse_sources([str(tmp_path)], tmp_path)
    assert len(source.paths) == 1


def write_arrow(path: Path, column: Any, name: str = "text", *, as_stream: bool = False) -> Path:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"id": list(range(len(column))), name: column})
    write = arrow.ipc.new_stream if as_stream else arrow.ipc.new_file
    with arrow.OSFile(str(path), "wb") as file, write(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return path


@pytest.mark.parametrize("as_stream", [True, False], ids=["stream", "file"])
def test_rows_of_arrow_are_documents_in_both_formats_and_all_types_of_text(
    tmp_path: Path, *, as_stream: bool
) -> None:
    arrow = pytest.importorskip("pyarrow")
    plain = arrow.array(TEXTS * 60)
    for kind in ("string", "large_string", "binary", "large_binary", "string_view", "dictionary"):
        column = plain.dictionary_encode() if kind == "dictionary" else plain.cast(kind)
        assert (
            read(write_arrow(tmp_path / "a.arrow", column, as_stream=as_stream))[0] == TEXTS * 60
        ), kind


def test_feather_is_read_compressed_as_it_mostly_is(tmp_path: Path) -> None:
    arrow, feather = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.feather")
    feather.write_feather(arrow.table({"text": TEXTS}), tmp_path / "a.feather", compression="zstd")
    assert read(tmp_path / "a.feather")[0] == TEXTS


def test_bad_rows_of_arrow_are_named_by_number_or_counted(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    path = write_arrow(
        tmp_path / "a.arrow", arrow.array([b"one", None, b"caf\xe9", b"two"], arrow.binary())
    )
    with pytest.raises(
        DataError, match=r"a\.arrow, row 2: the column text is empty; .* leave such rows out"
    ):
        read(path)
    texts, tally = read(path, on_bad_line=BadLine.skip)
    assert (texts, tally.skipped) == (["one", "two"], {"missing_field": 1, "invalid_utf8": 1})


def test_a_damaged_arrow_file_is_an_error_and_never_a_crash(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    path = write_arrow(
        tmp_path / "a.arrow", arrow.array(["word " * (number % 50) for number in range(500)])
    )
    content, chance, num_refused = path.read_bytes(), random.Random(0), 0
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[chance.randrange(8, 9000)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            read(path, on_bad_line=BadLine.skip)
        except DataError:
            num_refused += 1
    assert num_refused


# --- what is not what it should be ----------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_a_file_cut_short_damaged_or_not_compressed_is_an_error_that_names_it(
    tmp_path: Path, suffix: str
) -> None:
    packed = COMPRESSIONS[suffix](random.Random(0).randbytes(5000).hex().encode())
    for kind in (".jsonl", ".csv", ".txt"):
        cut = refusal(written(tmp_path / f"cut{kind}{suffix}", packed[:-9]))
        assert cut.startswith(f"cannot read cut{kind}{suffix}: Compressed file ended before"), cut
        assert cut.endswith("; copy or download it again")
    plain = refusal(written(tmp_path / f"plain.json{suffix}", of_lines()))
    assert plain.startswith(f"cannot read plain.json{suffix}: "), plain
    assert read(written(tmp_path / f"none.jsonl{suffix}", b""))[0] == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            gzip.compress(of_lines()),
            "its content is that of a .gz file; rename it to .gz, or unpack it",
        ),
        ("a.csv", lzma.compress(of_csv()), "its content is that of a .xz file"),
        ("a.json", b"PAR1....", "its content is that of a .parquet file"),
        ("a.jsonl", "x".encode("utf-16"), "it is UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a Git LFS pointer, not the file; fetch",
        ),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a Git LFS pointer, not the file; fetch",
        ),
        (
            "a.arrow",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a Git LFS pointer, not the file; fetch",
        ),
        ("a.arrow", b"no arrow at all, but words", "copy or download it again"),
        ("a.arrow", b"ARROW1\0\0 and no more", "copy or download it again"),
        (
            "a.csv",
            b"id,body\n1,one\n",
            "it has no column text; its columns are id, body; choose with --text-field",
        ),
        ("a.csv", b'id,text\n1,ok\n2,"cut\n3,no end', "its row on line 3 is not CSV"),
        (
            "a.json",
            json.dumps(OBJECTS, indent=1).encode()[:-30],
            "its JSON breaks off at item 4, line 16 (",
        ),
        (
            "a.json",
            b'[\n{"text": "one"}\n{"text": "two"}]',
            "at item 1, line 3 (expected ,)",
        ),
        (
            "a.json",
            b'[\n{"text": "one"}\n]\n{"text": "two"}',
            "line 4 (the array has ended, but the file has not)",
        ),
        ("a.json", b'[\n{"text":' + b"[" * 100_000, "at item 1, line 2 (brackets too deep)"),
    ],
)
def test_content_that_cannot_be_read_is_one_line_that_says_what_to_do(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    if name.endswith((".parquet", ".arrow")):
        pytest.importorskip("pyarrow")
    said = refusal(written(tmp_path / name, content))
    assert said.startswith(f"cannot read {name}: "), said
    assert words in said


def test_a_damaged_page_of_parquet_is_told_with_what_to_do(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = ["some words that are repeated " * 20] * 99
    parquet.write_table(pyarrow.table({"text": texts}), path)
    content = bytearray(path.read_bytes())
    content[40:60] = bytes(20)
    path.write_bytes(content)
    assert refusal(path).endswith("; copy or download it again")


def test_items_of_an_array_without_text_are_named_by_number_or_counted(tmp_path: Path) -> None:
    items = (
        b'[{"text": "one"}, {"text": null}, 5, "x", [], {"body": 1}, {"text": "caf\xe9"}, {"n": '
        + b"9" * 5000
        + b"}]"
    )
    path = written(tmp_path / "a.json", items)
    with pytest.raises(
        DataError,
        match=r"a\.json, item 2: the field text is not a string: null.* leave such items out",
    ):
        read(path)
    texts, tally = read(path, on_bad_line=BadLine.skip)
    assert texts == ["one"]
    assert tally.skipped == {"not_a_string": 1, "missing_field": 5, "invalid_utf8": 1}


def test_lines_of_unlike_kinds_are_lines_though_the_first_is_an_array(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", b'["one"]\n{"text": "two"}\n5\nnull\n{"text": null}\n')
    texts, tally = read(path, on_bad_line=BadLine.skip)
    assert (texts, tally.skipped) == (["two"], {"missing_field": 3, "not_a_string": 1})


def test_rows_of_csv_that_do_not_fit_are_named_by_number_or_counted(tmp_path: Path) -> None:
    rows = b'id,text\n\n1\n2,b,c\n3,"x"y\n4,caf\xe9\n5,ok\n6,\n'
    path = written(tmp_path / "a.csv", rows)
    with pytest.raises(
        DataError,
        match=r"a\.csv, row 1: 1 fields, but the first row names 2; .*leave such rows out",
    ):
        read(path)
    texts, tally = read(path, on_bad_line=BadLine.skip)
    assert (texts, tally.skipped) == (["ok"], {"malformed_csv": 3, "invalid_utf8": 1, "empty": 1})


def test_a_field_of_csv_may_be_long_but_not_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "x" * 200_000  # more than Python's csv takes by default
    assert read(written(tmp_path / "long.csv", f"text\n{long}\n".encode()))[0] == [long]
    monkeypatch.setattr(texts_module, "LONGEST_LINE", 1 << 20)
    in_a_line = refusal(written(tmp_path / "line.csv", b"text\n" + b"x" * (2 << 20) + b"\n"))
    assert "its line 2 is longer than 1 MiB" in in_a_line
    in_lines = refusal(
        written(tmp_path / "lines.csv", b'text\none\n"' + b"xxxxxxx\n" * (2 << 17) + b'"\n')
    )
    assert "its row on line 3 is not CSV" in in_lines


def test_an_item_of_an_array_may_be_long_but_not_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(
        tmp_path / "a.json", json.dumps([{"text": "x" * 3_000_000}, {"text": "two"}]).encode()
    )
    assert list(map(len, read(path)[0])) == [3_000_000, 3]
    monkeypatch.setattr(texts_module, "LONGEST_LINE", 1 << 20)
    assert "at item 1, line 1 (longer than 1 MiB)" in refusal(path)


@pytest.mark.parametrize("name", ["a.json", "pretty.json.gz", "a.csv", "a.csv.gz"])
def test_memory_of_reading_does_not_grow_with_an_array_or_a_table(
    tmp_path: Path, name: str
) -> None:
    chance = random.Random(0)
    records = [{"text": chance.randbytes(4000).hex()} for _ in range(1000)]  # 8 MB
    indent = 1 if name.startswith("pretty") else None
    content = (
        json.dumps(records, indent=indent)
        if ".json" in name
        else "\n".join(["text", *(r["text"] for r in records)])
    )
    suffix = Path(name).suffix
    path = written(tmp_path / name, COMPRESSIONS.get(suffix, bytes)(content.encode()))
    del content
    read(path)  # what is imported is not counted
    tracemalloc.start()
    try:
        count = sum(1 for _ in documents(path, "text", BadLine.error, ReadCounts()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 1000
    assert peak < 7e6


# --- what is left out -----------------------------------------------------------------------------


def some_folder(folder: Path) -> Path:
    """Data of many kinds, what clones and saved data sets have beside them, and what dus cannot
    read.
    """
    for name in ("a.jsonl", "deep/er/b.json", "c.ndjson"):
        written(folder / name, of_lines())
    written(folder / "d.json.gz", gzip.compress(of_lines()))
    written(folder / "e.jsonl.xz", lzma.compress(of_lines()))
    beside = (
        "README.md",
        "LICENSE",
        ".gitattributes",
        ".cache/x.jsonl",
        "state.json",
        "SHA256SUMS",
        "make.py",
    )
    for name in beside:
        written(folder / name, b"{}")
    written(folder / "meta.json", b'{\n "name": "some",\n "rows": [1, 2]\n}\n')
    written(folder / "empty.jsonl", b"")
    for name in ("w.warc.gz", "deep/t.tfrecord", "z.zip", "p.parquet.gz", "page.html"):
        written(folder / name, b"?")
    return folder


LEFT_OUT = [
    "empty.jsonl (empty)",
    "meta.json (one object without text)",
    "p.parquet.gz",
    "page.html",
    "t.tfrecord",
]
LEFT_OUT += ["w.warc.gz", "z.zip"]


@pytest.mark.parametrize("pattern", ["", "/*", "/**"])
def test_what_looks_like_data_and_is_not_read_is_named_and_counted(
    tmp_path: Path, pattern: str
) -> None:
    (source,) = parse_sources([f"{some_folder(tmp_path / 'data')}{pattern}"], tmp_path)
    assert sorted({path.name for path in source.paths} - {"empty.jsonl"}) == [
        "a.jsonl", "b.json", "c.ndjson", "d.json.gz", "e.jsonl.xz",
    ]  # fmt: skip
    assert sorted(set(source.unread.names)) == LEFT_OUT
    assert source.unread.count == len(LEFT_OUT)
    assert str(source.unread).startswith("7 files: ")


def test_names_of_what_is_not_read_are_few_though_the_files_are_many(tmp_path: Path) -> None:
    for number in range(30):
        written(tmp_path / f"data/{number:02}.warc", b"?")
    written(tmp_path / "data/a.jsonl", of_lines())
    sources = parse_sources([str(tmp_path / "data")] * 2, tmp_path)
    unread = sum((source.unread for source in sources), Unread())
    assert (unread.count, len(unread.names)) == (60, 20)
    assert str(unread) == "60 files: 00.warc, 01.warc, 02.warc and 57 more"
    (tmp_path / "data/a.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"holds no data but 30 files: 00\.warc, .*; --data reads \.jsonl"
    ):
        parse_sources([str(tmp_path / "data")], tmp_path)


def test_an_object_a_file_with_the_text_is_a_document_each(tmp_path: Path) -> None:
    for number, record in enumerate(OBJECTS):
        written(tmp_path / f"data/{number}.json", json.dumps(record, indent=1).encode())
    (source,) = parse_sources([str(tmp_path / "data")], tmp_path)
    assert [read(Path(str(path)))[0] for path in source.paths] == [[text] for text in TEXTS]
    with pytest.raises(DataError, match="holds no data but 4 files"):
        parse_sources([str(tmp_path / "data")], tmp_path, "body")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("allenai/c4", "a data set of the Hub is hf://datasets/allenai/c4"),
        ("allenai/c4@main", "a data set of the Hub is hf://datasets/allenai/c4@main"),
        ("nostore://bucket/a.jsonl:0.5", "Protocol not known: nostore"),
        ("data/a.jsonl", "is not a file, a folder or a pattern that matches one; check the path"),
    ],
)
def test_data_that_cannot_be_found_are_told_how_they_may_be(
    tmp_path: Path, argument: str, words: str
) -> None:
    with pytest.raises(DataError) as caught:
        parse_sources([argument], tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_heal_probe_and_eval_tell_what_was_not_read(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = write_base(tmp_path / "base")
    (tmp_path / "data").mkdir()
    write_corpus(tmp_path / "data/a.jsonl")
    written(tmp_path / "data/b.warc.gz", b"?")
    data = ("--data", tmp_path / "data")
    dry = forked_dus("heal", model, *data, "--dry-run", "--seq-length", "32", COLUMNS="80")
    assert "not read     1 file: b.warc.gz" in dry.stdout, dry.stderr
    long = [line for line in dry.stdout.splitlines() if len(line) > 80]
    assert all(" " not in line.strip() for line in long), "no word is broken but a path"
    run = forked_dus(
        "heal", model, *data, "--print-command", "--seq-length", "32", "-o", tmp_path / "out"
    )
    assert run.returncode == 0, run.stderr
    in_run = json.loads((tmp_path / "out/run.json").read_text())["data"]
    probe = ("--trims", "1:2", "--seq-length", "32", "--tokens", "200", "--json")
    in_probe = forked_dus("probe", model, *data, *probe).report["data"]
    in_eval = forked_dus("eval", model, *data, "--max-documents", "3", "--json").report
    said = in_run["unread"], in_probe["unread_files"], in_eval["unread_files"]
    assert said == ({"count": 1, "names": ["b.warc.gz"]},) * 3
