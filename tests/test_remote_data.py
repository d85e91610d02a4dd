"""Data that lie elsewhere: a stand-in Hub, a web server and fsspec's stores, with connections that
break.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import Run, dus
from hub_server import HANG_UP, READER, StandInHub, StandInRepo, commit_of, only_hub

from dus_cli.common.reports import public
from dus_cli.data import remote as remote_data
from dus_cli.data.documents import BadLine, ReadCounts, documents
from dus_cli.data.sources import Source, parse_sources
from dus_cli.errors import DataError, MissingExtraError, UsageError
from dus_cli.hub import remote

_RANDOM = random.Random(0)
TEXTS = [f"document {number}: words {_RANDOM.getrandbits(400):x}" for number in range(119)]
CARD = """---
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: [data/test-0.jsonl]
- config_name: whole
  data_files: data/*.parquet
---
# A data set
"""
FIRST, SECOND = commit_of("first"), commit_of("second")


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_data_set(folder: Path, texts: list[str], card: str = CARD) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(card)
    (folder / ".gitattributes").write_text("*.gz lfs")
    (folder / "data/train-0.jsonl.gz").write_bytes(gzip.compress(lines(texts), mtime=0))
    (folder / "data/test-0.jsonl").write_bytes(lines(texts[:9]))
    parquet.write_table(pyarrow.table({"text": texts}), folder / "data/all.parquet")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A data set with a card, one without, and one of strangers'."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    first = write_data_set(tmp_path / "first", TEXTS)
    plain = write_data_set(tmp_path / "plain", TEXTS, card="# Nothing said")
    (plain / "data/all.parquet").unlink()
    second = write_data_set(tmp_path / "second", TEXTS[50:])
    repos = {
        "datasets/org/name": StandInRepo({FIRST: first, SECOND: second}, {"main": FIRST}),
        "datasets/org/plain": StandInRepo({FIRST: plain}, {"main": FIRST}),
        "datasets/org/private": StandInRepo({FIRST: first}, {"main": FIRST}, private=True),
    }
    longer = write_data_set(tmp_path / "long", [text * 9 for text in TEXTS])
    repos["datasets/org/long"] = StandInRepo({FIRST: longer}, {"main": FIRST})
    repos["buckets/org/corpus"] = StandInRepo({FIRST: first}, {"main": FIRST})
    with only_hub(repos, tmp_path / "hf", monkeypatch) as running:
        # huggingface_hub read them when it was imported
        template = f"{running.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running


def source(argument: str, folder: Path) -> Source:
    (found,) = parse_sources([argument], folder)
    return found


def texts(found: Source) -> list[str]:
    return [
        text
        for path in found.paths
        for text in documents(path, "text", BadLine.error, ReadCounts())
    ]


@pytest.mark.parametrize(
    ("argument", "files", "num_texts"),
    [
        ("hf://datasets/org/name", ["train-0.jsonl.gz"], 119),
        ("hf://datasets/org/name:0.5", ["train-0.jsonl.gz"], 119),
        ("hf://datasets/org/name@main?split=test", ["test-0.jsonl"], 9),
        ("hf://datasets/org/name?config=whole", ["all.parquet"], 119),
        ("hf://datasets/org/name/data", ["all.parquet", "test-0.jsonl", "train-0.jsonl.gz"], 247),
        ("hf://datasets/org/name/data/t*", ["test-0.jsonl", "train-0.jsonl.gz"], 128),
        (f"hf://datasets/org/name@{SECOND}/data/all.parquet", ["all.parquet"], 69),
        ("hf://datasets/org/plain", ["train-0.jsonl.gz"], 119),
        ("hf://datasets/org/plain?split=test", ["test-0.jsonl"], 9),
        ("hf://buckets/org/corpus/data/train-0.jsonl.gz", ["train-0.jsonl.gz"], 119),
        ("hf://buckets/org/corpus/data/t*:0.5", ["test-0.jsonl", "train-0.jsonl.gz"], 128),
        ("hf://buckets/org/corpus", ["all.parquet", "test-0.jsonl", "train-0.jsonl.gz"], 247),
    ],
)
def test_a_data_set_is_read_where_it_lies(
    hub: StandInHub, tmp_path: Path, argument: str, files: list[str], num_texts: int
) -> None:
    found = source(argument, tmp_path)
    assert [path.name for path in found.paths] == files
    assert len(texts(found)) == num_texts
    assert found.weight == (0.5 if argument.endswith(":0.5") else None)
    assert not list((tmp_path / "hf").rglob("*.parquet")), "nothing is kept on the disk"


def test_the_files_of_other_splits_are_told(hub: StandInHub, tmp_path: Path) -> None:
    unread = source("hf://datasets/org/name", tmp_path).unread
    assert unread.names == ("data/all.parquet", "data/test-0.jsonl")


def test_what_is_read_is_of_the_commit_that_was_found(hub: StandInHub, tmp_path: Path) -> None:
    found = source("hf://datasets/org/name", tmp_path)
    name = "datasets/org/name"
    hub.repos = {name: StandInRepo(hub.repos[name].commits, {"main": SECOND})}
    assert texts(found) == TEXTS
    assert texts(source("hf://datasets/org/name", tmp_path)) == TEXTS[50:]


@pytest.mark.parametrize("split", ["", "?split=test", "?config=whole"])
def test_a_connection_that_breaks_goes_on_where_it_broke(
    hub: StandInHub, tmp_path: Path, split: str
) -> None:
    whole = texts(source(f"hf://datasets/org/name{split}", tmp_path))
    hub.faults.broken_after = 700
    before = len(hub.log)
    assert texts(source(f"hf://datasets/org/name{split}", tmp_path)) == whole
    ranges = [request.byte_range or "" for request in hub.log[before:]]
    starts = {int(text.removeprefix("bytes=").partition("-")[0]) for text in ranges if text}
    assert {0, 700} <= starts


def test_a_busy_server_is_asked_again_and_a_dead_one_is_told_of(
    hub: StandInHub, tmp_path: Path
) -> None:
    found = source("hf://datasets/org/name", tmp_path)
    hub.faults.busy = [503, 429, 500]
    assert texts(found) == TEXTS
    hub.failures["*"] = HANG_UP
    with pytest.raises(DataError, match=r"^cannot read hf://.*train-0\.jsonl\.gz: ") as caught:
        texts(found)
    assert "\n" not in str(caught.value)


def test_a_store_that_does_not_answer_is_told_of_once_while_it_is_tried_again(
    hub: StandInHub, tmp_path: Path
) -> None:
    said: list[str] = []
    argument = "hf://datasets/org/name/data/test-0.jsonl"
    hub.failures["*"] = 503
    with pytest.raises(DataError, match="its server answered 503"):
        parse_sources([argument], tmp_path, say=said.append)
    (line,) = said
    assert line.startswith("hf://datasets/org/name/data/test-0.jsonl does not answer (")
    assert line.endswith("; trying again …")
    del hub.failures["*"]
    (found,) = parse_sources([argument], tmp_path, say=said.append)
    assert texts(found) == TEXTS[:9]
    assert len(said) == 1
    hub.failures["*"] = HANG_UP
    with pytest.raises(DataError, match=r"^cannot read hf://"):
        texts(found)
    assert len(said) == 2


class Unreliable:
    """A store that gives a part of at most `longest` bytes, and of a longer one nothing at all."""

    def __init__(self, longest: int) -> None:
        self.content, self.longest, self.num_requests = (
            random.Random(1).randbytes(3 << 20),
            longest,
            0,
        )

    def chunks(self, start: int, end: int) -> Iterator[bytes]:
        self.num_requests += 1
        if end - start > self.longest:
            raise RuntimeError("the connection broke off")
        yield self.content[start:end]

    def file(self) -> remote_data.StoreFile:
        return remote_data.StoreFile("s3://bucket/a", len(self.content), "1", self.chunks)


def test_parts_that_break_off_are_asked_for_in_shorter_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    store = Unreliable(300_000)
    assert store.file().read(5, 3 << 20) == store.content[5:]
    assert store.num_requests < 20


def test_a_store_whose_client_waits_for_minutes_itself_is_not_tried_eight_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    dead = Unreliable(0)
    with pytest.raises(DataError, match=r"^cannot read s3://bucket/a: the connection broke off"):
        dead.file().read(0, 9)
    assert dead.num_requests == 8
    monkeypatch.setattr(remote_data, "_PATIENCE", -1.0)  # every attempt has taken longer
    with pytest.raises(DataError, match="the connection broke off"):
        dead.file().read(0, 9)
    assert dead.num_requests == 9


def test_a_token_reaches_what_is_private_and_no_other_origin(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in refuses a token at the address that the Hub redirects to."""
    with pytest.raises(DataError, match="is not there; check the address, or is private: set HF_"):
        source("hf://datasets/org/private", tmp_path)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert texts(source("hf://datasets/org/private", tmp_path)) == TEXTS


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("hf://datasets/org/none", "is not there; check the address"),
        ("hf://datasets/org/name@gone", "has no such revision"),
        ("hf://datasets/org/name/none.jsonl", "none.jsonl is not there"),
        ("hf://datasets/org/name?split=dev", "it has no split dev; choose one of train, test"),
        ("hf://datasets/org/name?config=de", "it has no configuration de; choose one of en, whole"),
        (
            "hf://datasets/org/plain?config=de",
            "its card names no configurations; leave ?config=de out",
        ),
        ("hf://datasets/org/plain?split=validation", "there are test, train"),
        (
            "hf://datasets/org/name/data?split=test",
            "config and split need the address of a whole data set",
        ),
        ("hf://buckets/org/none", "is not there; check the address"),
        ("hf://buckets/org/corpus/dat", "corpus/dat is not there"),
        ("hf://buckets/org/corpus?split=test", "config and split need the address of a whole data"),
        ("hf://datasets/org/name/README.md", "has no suffix that --data reads"),
        ("{hub}/none.jsonl", "none.jsonl is not there"),
        ("https:///a.jsonl", "https:///a.jsonl: the address names no host; check it"),
        ("file:///nowhere/a.jsonl", "is not there"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(
    hub: StandInHub, tmp_path: Path, argument: str, said: str
) -> None:
    with pytest.raises(DataError) as caught:
        source(argument.format(hub=hub.endpoint), tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_web_address_is_read_and_its_query_kept_to_itself(
    hub: StandInHub, tmp_path: Path
) -> None:
    address = f"{hub.endpoint}/datasets/org/name/resolve/main/data/test-0.jsonl?signature=secret"
    found = source(address, tmp_path)
    assert texts(found) == TEXTS[:9]
    assert "secret" not in str(found.paths[0])
    assert public([address]) == [address.partition("?")[0]]
    assert public("docs=https://me:word@host/a.jsonl?key=1") == "docs=https://host/a.jsonl"
    missing = address.replace("test-0", "missing")
    for arguments in ([address, f"{address}:0.5"], [f"{address}:-1"], [missing]):
        with pytest.raises((DataError, UsageError)) as caught:
            parse_sources(arguments, tmp_path)
        assert "secret" not in str(caught.value), arguments


def test_a_server_without_range_requests_is_refused(hub: StandInHub, tmp_path: Path) -> None:
    hub.faults.ranges = False
    with pytest.raises(DataError, match=r"does not send parts of a file .*; download it first"):
        source(f"{hub.endpoint}/datasets/org/name/resolve/main/data/test-0.jsonl", tmp_path)


@pytest.mark.parametrize("scheme", ["http", "file", "hf"])
def test_a_file_that_changes_while_it_is_read_ends_it(
    hub: StandInHub, tmp_path: Path, scheme: str
) -> None:
    changing = tmp_path / "first/data/test-0.jsonl"
    web = f"{hub.endpoint}/datasets/org/name/resolve/main/data/test-0.jsonl"
    addresses = {"http": web, "file": f"file://{changing}"}
    addresses["hf"] = "hf://buckets/org/corpus/data/test-0.jsonl"
    found = source(addresses[scheme], tmp_path)
    content = changing.read_bytes()
    changing.write_bytes(content.replace(b"words", b"WORDS"))
    os.utime(changing, ns=(1, 1))
    with pytest.raises(DataError, match="changed while it was read; start again"):
        texts(found)


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_a_file_that_vanishes_before_it_is_read_ends_it(
    hub: StandInHub, tmp_path: Path, scheme: str
) -> None:
    vanishing = tmp_path / "first/data/test-0.jsonl"
    web = f"{hub.endpoint}/datasets/org/name/resolve/main/data/test-0.jsonl"
    found = source(web if scheme == "http" else f"file://{vanishing}", tmp_path)
    vanishing.unlink()
    with pytest.raises(DataError, match=r"test-0\.jsonl is not there; check the address$"):
        texts(found)


def test_a_store_without_its_client_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dus_cli.common.libraries.find_spec", lambda _: None)
    with pytest.raises(
        MissingExtraError, match=r"reading s3:// needs s3fs; pip install 'dus-cli\["
    ):
        source("s3://bucket/a.jsonl:0.5", tmp_path)


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    """The module, whose server is started before a test's Hub is in the environment."""
    pytest.importorskip("torch")
    module: ModuleType = pytest.importorskip("tiny")
    assert module.forked_dus("--version").returncode == 0
    return module


def test_heal_tokenises_from_the_hub_what_it_would_from_the_disk(
    tiny: ModuleType, hub: StandInHub, tmp_path: Path
) -> None:
    """The same tokens by the same key, so that a run goes on with either."""
    model = tiny.write_base(tmp_path / "base")
    length = ("--seq-length", "64", "--steps", "2", "--holdout", "20%", "--print-command", "-q")

    def prepared(run: Callable[..., Run], name: str, argument: str) -> dict[str, object]:
        out = tmp_path / name
        done = run("heal", model, "-o", out, "--data", argument, *length)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        data: dict[str, object] = json.loads((out / "run.json").read_text())["data"]
        return data

    hub.faults.broken_after = 1000
    there = prepared(dus, "there", "hf://datasets/org/name")
    here = prepared(tiny.forked_dus, "here", str(tmp_path / "first/data/train-0.jsonl.gz"))
    assert there["content_key"] == here["content_key"]
    assert not list((tmp_path / "there/tokens").rglob("*.gz"))


def test_heal_streams_from_the_hub_what_it_would_from_the_disk(
    tiny: ModuleType, hub: StandInHub, tmp_path: Path
) -> None:
    """Its text is tokenised while the model trains, over connections that break."""
    model = tiny.write_base(tmp_path / "base")
    few = "--seq-length 64 --batch-tokens 256 --steps 20 --holdout 20% --precision fp32 -q".split()
    stream = ("--stream", "--shuffle-window", "2000")

    def curve(run: Callable[..., Run], name: str, argument: str) -> object:
        done = run("heal", model, "-o", tmp_path / name, "--data", argument, *few, *stream)
        assert (done.returncode, done.stderr) == (0, "")
        return tiny.curve(tmp_path / name)

    hub.faults.broken_after = 1000
    there = curve(dus, "there", "hf://datasets/org/long")
    here = curve(tiny.forked_dus, "here", str(tmp_path / "long/data/train-0.jsonl.gz"))
    assert there == here


def test_a_store_that_dies_while_a_run_streams_is_told_of_and_ends_it_with_a_checkpoint(
    hub: StandInHub, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    tiny, runs = pytest.importorskip("tiny"), pytest.importorskip("runs")
    tiny.write_corpus(tmp_path / "plain/corpus.jsonl", 20_000)
    tiny.write_corpus(tmp_path / "heldout.jsonl", 10)
    tiny.upscaled(tiny.write_base(tmp_path / "base"), tmp_path / "scaled")
    out, log = tmp_path / "out", tmp_path / "log"
    url = f"{hub.endpoint}/datasets/org/plain/resolve/main/corpus.jsonl"
    options = "--stream --shuffle-window 2000 --steps 9999 --seq-length 64 --batch-tokens 512 "
    options += "--precision fp32"
    data = ("--data", f"{url}?signature=secret", "--eval-data", tmp_path / "heldout.jsonl")
    launcher = tiny.start_dus(log, "heal", tmp_path / "scaled", *data, *options.split(), "-o", out)
    said = Path(f"{log}.err")
    assert runs.until(lambda: runs.processes(out)["tokenising"])
    (builder,) = runs.processes(out)["tokenising"]
    os.kill(builder, signal.SIGSTOP)
    assert runs.until(lambda: runs.last_step(out) >= 2)
    hub.failures["*"] = 503
    os.kill(builder, signal.SIGCONT)
    assert runs.until(lambda: "trying again" in said.read_text())
    hub.failures["*"] = 404
    assert tiny.wait(launcher) == 1
    notes = [line for line in said.read_text().splitlines() if "trying again" in line]
    assert "secret" not in said.read_text()
    assert notes == [f"{url} does not answer (its server answered 503); trying again …"]
    error = said.read_text().splitlines()[-1]
    assert error.startswith(f"error: {url} is not there; check the address (the run ended with a ")
    (checkpoint,) = (out / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert f"checkpoint at step {step}; the same command goes on from there)" in error


def test_an_object_store_is_read_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An S3 server on the loopback interface, where moto and s3fs are installed."""
    pytest.importorskip("s3fs")
    boto3 = pytest.importorskip("boto3")
    servers = pytest.importorskip("moto.server")
    server = servers.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="corpus")
    folder = write_data_set(tmp_path / "first", TEXTS)
    for path in (folder / "data").iterdir():
        client.upload_file(str(path), "corpus", f"data/{path.name}")
    assert texts(source("s3://corpus/data/*.gz", tmp_path)) == TEXTS
    assert len(texts(source("s3://corpus/data", tmp_path))) == 247
    found = source("s3://corpus/data/all.parquet:2", tmp_path)
    assert (texts(found), found.weight) == (TEXTS, 2)
    with pytest.raises(DataError, match=r"s3://corpus/none\.jsonl is not there"):
        source("s3://corpus/none.jsonl", tmp_path)
    server.stop()
