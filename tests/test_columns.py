"""Columns that are no text: a chat's messages and token ids, from file to token file."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

import tiny  # noqa: E402

from dus_cli.data.documents import BadLine, Column, Reading  # noqa: E402
from dus_cli.data.shelf import Shelf, prepare  # noqa: E402
from dus_cli.data.sources import parse_sources  # noqa: E402
from dus_cli.data.streams import Prepared, Stream  # noqa: E402
from dus_cli.errors import DataError  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}],
    [{"role": "system", "content": "три"}],
]
WRITTEN = ["<user>one\n<assistant>two\n", "<system>три\n"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write(path: Path, column: str, values: list[Any]) -> Path:
    records = [{column: value, "n": 1} for value in values]
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tokenised(model: Path, data: Path, column: Column, field: str, **options: Any) -> Prepared:
    folder = data.parent
    sources = parse_sources([str(data)], folder, field)
    how: dict[str, Any] = {"holdout": 0.0} | options
    reading = Reading(field, how.pop("on_bad_line", BadLine.error), how.pop("weight_field", None))
    shelf = Shelf(folder / "tokens", model, 260, reading=reading, column=column)
    return prepare(shelf, sources, (), **how)


def ids_of(prepared: Prepared, folder: Path) -> list[list[int]]:
    """The ids of each document, its end included."""
    stream = Stream(folder / "tokens", prepared.parts, "train", prepared.dtype)
    starts = [*stream.document_starts(0, stream.num_tokens).tolist(), stream.num_tokens]
    return [stream.read(start, stop).tolist() for start, stop in pairwise(starts)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_chat_is_what_the_models_template_writes(model: Path, tmp_path: Path, name: str) -> None:
    chats = tokenised(model, write(tmp_path / name, "messages", CHATS), Column.chat, "messages")
    texts = tokenised(model, write(tmp_path / "text.jsonl", "text", WRITTEN), Column.text, "text")
    assert ids_of(chats, tmp_path) == ids_of(texts, tmp_path)
    assert chats.content_key != texts.content_key


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_token_ids_are_taken_as_they_are_and_ended_once(
    model: Path, tmp_path: Path, name: str
) -> None:
    data = write(tmp_path / name, "input_ids", [[5, 6, 7], [8, tiny.EOS], [], [9]])
    prepared = tokenised(model, data, Column.tokens, "input_ids")
    assert ids_of(prepared, tmp_path) == [[5, 6, 7, tiny.EOS], [8, tiny.EOS], [9, tiny.EOS]]
    assert prepared.skipped == {"empty": 1}


def test_another_template_makes_other_tokens(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", "messages", CHATS)
    before = tokenised(model, data, Column.chat, "messages").content_key
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert tokenised(model, data, Column.chat, "messages").content_key != before


BAD = {
    "a tool": (Column.chat, [{"role": "tool", "content": "x"}], "refuses it (no tools)"),
    "no role": (
        Column.chat,
        [{"content": "x"}],
        "does not hold a list of messages with role and content",
    ),
    "a text": (Column.chat, "hello", "does not hold a list of messages with role and content"),
    "a word": (Column.tokens, ["one"], "does not hold a list of token ids"),
    "a half": (Column.tokens, [1.5], "does not hold a list of token ids"),
    "lists": (Column.tokens, [[1], [2, 3]], "does not hold a list of token ids"),
    "true": (Column.tokens, [True], "does not hold a list of token ids"),
    "below": (Column.tokens, [1, -1], "token id -1, but the model has ids from 0 to 259"),
    "beyond": (Column.tokens, [1, 260], "token id 260, but the model has ids from 0 to 259"),
}


@pytest.mark.parametrize(("column", "value", "said"), BAD.values(), ids=BAD.keys())
def test_a_row_that_holds_something_else_is_told_by_its_number_or_counted(
    model: Path, tmp_path: Path, column: Column, value: object, said: str
) -> None:
    good = CHATS[0] if column is Column.chat else [1, 2]
    data = write(tmp_path / "a.jsonl", "it", [good, value])
    with pytest.raises(DataError) as caught:
        tokenised(model, data, column, "it")
    assert "a.jsonl, line 2: " in str(caught.value)
    assert said in str(caught.value)
    skipping = tokenised(model, data, column, "it", on_bad_line=BadLine.skip)
    assert (skipping.num_train_documents, sum(skipping.skipped.values())) == (1, 1)


def test_a_model_without_a_template_and_a_file_of_text_are_refused(
    model: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "a.jsonl", "messages", CHATS)
    (model / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="has no chat template, which --chat-field needs"):
        tokenised(model, data, Column.chat, "messages")
    (tmp_path / "a.csv").write_text("input_ids\n1\n")
    with pytest.raises(DataError, match=r"a\.csv: it can hold only text, not messages or tokens"):
        tokenised(model, tmp_path / "a.csv", Column.tokens, "input_ids")


def test_heal_takes_one_of_them(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    base = tiny.write_base(tmp_path / "base")
    data = write(tmp_path / "a.jsonl", "input_ids", [[n % 250] * 40 for n in range(60)])
    what = ("--data", data, "--token-field", "input_ids", "--seq-length", "32", "--dry-run")
    plan = tiny.forked_dus("heal", base, *what, "--holdout", "20%", "--json").report
    assert plan["train_tokens"] == 41 * plan["train_documents"]
    refused = tiny.forked_dus("heal", base, *what, "--chat-field", "messages", "-q")
    refused.assert_one_line_error(
        "--chat-field and --token-field both name the field to read", code=2
    )


# --- weights --------------------------------------------------------------------------------------


def weighted(path: Path, weights: list[Any]) -> Path:
    """Documents of five ids, the number of the document, with weights."""
    records = [{"it": [n] * 5, "w": weight} for n, weight in enumerate(weights)]
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def occurrences(prepared: Prepared, folder: Path) -> list[int]:
    """The number of each document in the training data, in stored order."""
    return [ids[0] for ids in ids_of(prepared, folder)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_document_occurs_as_often_as_its_weight_says_and_its_copies_lie_apart(
    model: Path, tmp_path: Path, name: str
) -> None:
    data = weighted(tmp_path / name, [1, 3, 0, 2.0])
    prepared = tokenised(model, data, Column.tokens, "it", weight_field="w")
    assert occurrences(prepared, tmp_path) == [0, 1, 3, 1, 3, 1]
    assert (prepared.num_train_documents, prepared.num_train_tokens) == (6, 36)
    assert prepared.skipped == {"by_weight": 1}
    without = tokenised(model, data, Column.tokens, "it")
    assert occurrences(without, tmp_path) == [0, 1, 2, 3]
    assert without.content_key != prepared.content_key


def test_the_rest_of_a_weight_is_a_probability_and_the_same_in_every_run(
    model: Path, tmp_path: Path
) -> None:
    texts = [{"text": f"document {n}", "w": 1.25} for n in range(2000)]
    counts = set()
    for name, records in (("a.jsonl", texts), ("b.jsonl", texts[::-1])):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        prepared = tokenised(model, path, Column.text, "text", weight_field="w", holdout=0.25)
        counts.add((prepared.num_train_documents, prepared.num_heldout_documents))
    ((train, held_out),) = counts
    assert 450 < held_out < 550
    # the copies are not those that the held-out share would have left
    assert train == pytest.approx(1.25 * (2000 - held_out), rel=0.03)


def test_held_out_documents_count_once_whatever_they_weigh(model: Path, tmp_path: Path) -> None:
    texts = [{"text": f"document {n}", "w": n % 3} for n in range(300)]
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in texts))
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text('{"text": "another"}\n')  # it has no weights
    weighing = tokenised(model, data, Column.text, "text", weight_field="w", holdout=0.3)
    equal = tokenised(model, data, Column.text, "text", holdout=0.3)
    assert weighing.num_heldout_tokens == equal.num_heldout_tokens > 0
    apart = prepare(
        Shelf(tmp_path / "tokens", model, 260, reading=Reading(weight_field="w")),
        parse_sources([str(data)], tmp_path),
        parse_sources([str(evaluation)], tmp_path),
    )
    assert (apart.num_heldout_documents, apart.num_train_documents) == (1, 300)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (-0.5, "its weight in w is -0.5, not a number from 0 to 100"),
        (float("nan"), "its weight in w is nan, not a number"),
        (101, "its weight in w is 101, not a number from 0 to 100"),
        (10**400, "not a number from 0 to 100"),
        ("2", "its weight in w is '2', not a number"),
        (True, "its weight in w is True, not a number"),
        (None, "it has no weight in w (--weight-field)"),
    ],
)
def test_what_is_no_weight_is_told_by_its_number_or_counted(
    model: Path, tmp_path: Path, weight: object, said: str
) -> None:
    data = weighted(tmp_path / "a.jsonl", [1, weight])
    with pytest.raises(DataError) as caught:
        tokenised(model, data, Column.tokens, "it", weight_field="w")
    assert "a.jsonl, line 2: " in str(caught.value)
    assert said in str(caught.value)
    how: dict[str, Any] = {"weight_field": "w", "on_bad_line": BadLine.skip}
    skipping = tokenised(model, data, Column.tokens, "it", **how)
    reason = "no_weight" if weight is None else "bad_weight"
    assert (skipping.num_train_documents, skipping.skipped) == (1, {reason: 1})


def test_tables_may_have_weights_and_text_files_have_none(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("w,text\n2,one\n0,two\n")
    prepared = tokenised(model, tmp_path / "a.csv", Column.text, "text", weight_field="w")
    assert prepared.num_train_documents == 2
    for row, said in (("x", "is 'x', not a number"), ("", "it has no weight in w")):
        (tmp_path / "a.csv").write_text(f"w,text\n{row},one\n")
        with pytest.raises(DataError, match=r"a\.csv, row 1: ") as caught:
            tokenised(model, tmp_path / "a.csv", Column.text, "text", weight_field="w")
        assert said in str(caught.value)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt: a text file has no fields, so no weights"):
        tokenised(model, tmp_path / "a.txt", Column.text, "text", weight_field="w")
    table = pyarrow.table({"text": ["one", "two"], "w": ["1", "2"], "n": [1.5, None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    for name, said in (
        ("w", "its column w holds string, not numbers; choose another with --weight-field"),
        ("v", "it has no column v; its columns are text, w, n; choose with --weight-field"),
        ("n", "a.parquet, row 2: it has no weight in n"),
    ):
        with pytest.raises(DataError) as caught:
            tokenised(model, tmp_path / "a.parquet", Column.text, "text", weight_field=name)
        assert said in str(caught.value)


def test_heal_takes_the_weights(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    base = tiny.write_base(tmp_path / "base")
    data = weighted(tmp_path / "a.jsonl", [2] * 250)
    what: list[str | Path] = ["--data", data, "--token-field", "it", "--seq-length", "32"]
    what += ["--eval-tokens", "1M", "--dry-run", "--json"]
    once = tiny.forked_dus("heal", base, *what, "--holdout", "20%").report
    twice = tiny.forked_dus("heal", base, *what, "--holdout", "20%", "--weight-field", "w").report
    assert twice["train_documents"] == 2 * once["train_documents"]
    assert twice["heldout_documents"] == once["heldout_documents"]
    refused = tiny.forked_dus("heal", base, *what, "--weight-field", "v", "-q")
    refused.assert_one_line_error("a.jsonl, line 1: it has no weight in v (--weight-field)")
