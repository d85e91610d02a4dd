"""--config: options out of a file mean what they mean on the command line, which wins over them."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from forked import dus

from dus_cli import UsageError
from dus_cli.cli import COMMANDS, load_command
from dus_cli.commands.config import read_file

FILES = {
    "options.toml": """\
model = "base"
output = "out"
trim = 1
max_shard_size = "200KB"
assume = ["vocab_size=keep", "hidden_size=keep"]
""",
    "options.yaml": """\
model: base
output: out
trim: 1
max-shard-size: 200KB
assume: [vocab_size=keep, hidden_size=keep]
layers:
""",
    "options.json": json.dumps(
        {
            "model": "base",
            "output": "out",
            "trim": "1",
            "max-shard-size": 200_000,
            "assume": ["vocab_size=keep", "hidden_size=keep"],
        }
    ),
}


def plan(folder: Path, *arguments: str | Path) -> dict[str, Any]:
    report = dus("upscale", *arguments, "--dry-run", "--json", cwd=folder).report
    del report["seconds"], report["space"]
    return report


@pytest.fixture
def desk(base: Path, tmp_path: Path) -> Path:
    assert base == tmp_path / "base"
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_what_the_command_line_would(desk: Path, name: str) -> None:
    (desk / name).write_text(FILES[name])
    options = (
        "--trim",
        "1",
        "--max-shard-size",
        "200KB",
        "--assume",
        "vocab_size=keep",
        "--assume",
        "hidden_size=keep",
    )
    assert plan(desk, "--config", name) == plan(desk, "base", "-o", "out", *options)


def test_the_command_line_wins_and_a_list_there_takes_the_place_of_the_files(desk: Path) -> None:
    (desk / "options.toml").write_text(FILES["options.toml"] + "identity = true\n")
    found = plan(desk, "--config", "options.toml", "--trim", "2", "--assume", "hidden_size=keep")
    assert found == plan(desk, "base", "-o", "out", "-t", "2", "--identity", *OTHERS)
    assert found["trim"] == 2


OTHERS = ("--max-shard-size", "200KB", "--assume", "hidden_size=keep")

REFUSED: dict[str, tuple[str | bytes | None, str]] = {
    "a.toml": (
        "layrs = '0:3'\nmax = 1\n",
        "dus upscale has no option layrs, max; do you mean layers?",
    ),
    "b.toml": ("zzz = 1", "dus upscale has no option zzz; see dus upscale --help"),
    "c.toml": ("trim = true", "trim: true is no value of this option; write a text or a number"),
    "d.toml": ("trim = 'x'", "trim: x is not a whole number from 0 to 100,000"),
    "e.toml": ("trim = 1.5", "trim: 1.5 is not a whole number"),
    "f.toml": ("identity = 'yes'", 'identity: "yes" is neither true nor false'),
    "g.toml": (
        "revision = 1",
        "revision: 1 is a number, and this option takes a text; write it in quotes",
    ),
    "h.toml": ("[trim]\nm = 1", 'trim: {"m": 1} is no value'),
    "i.toml": ("assume = [1]", "assume: '1' is not of the form FIELD=keep or FIELD=map"),
    "j.toml": ("assume = [['a=keep']]", 'assume: ["a=keep"] is no value of this option'),
    "k.toml": ("copy-mode = 'teleport'", "copy-mode: "),
    "l.toml": ("copy-mode = 'auto'\ncopy_mode = 'copy'", "copy_mode is there twice"),
    "m.toml": ("config = 'x.toml'", "has no option config"),
    "n.toml": ("trim =", "it is no TOML ("),
    "o.toml": (b"recipe = '\xff'", "it is not UTF-8 (byte 10)"),
    "p.yaml": ("- trim", "it is no list of options"),
    "q.yaml": ("trim: 1\ntrim: 2", "trim is there twice; leave one out"),
    "r.yaml": ("trim: [", "it is no YAML ("),
    "s.yaml": ("trim: 2026-01-01", 'trim: "2026-01-01" is no value'),
    "t.json": ('{"trim": 1, "trim": 2}', "the name 'trim' occurs twice"),
    "u.json": ("[1]", "the file"),
    "v.ini": ("trim = 1", "its name must end in .toml, .yaml, .yml or .json"),
    "w.toml": (b"#" * 1_000_001, "it is larger than 1,000,000 bytes"),
    "x.toml": (None, "cannot be read (No such file or directory)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_in_a_file_is_one_line_that_names_file_and_key(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, says = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as raised:
        load_command("upscale").main(
            ["base", "-o", "out", "--config", name], "dus upscale", standalone_mode=False
        )
    assert str(raised.value).startswith(f"--config {name}")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_may_hold_what_from_records_no_more_than_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("trim: 1\n")
    run = dus(
        "upscale", "--from", "dus.json", "-o", "out", "--config", "options.yaml", cwd=tmp_path
    )
    run.assert_one_line_error("--from gives --trim as recorded", code=2)


def test_events_that_a_file_asks_for_are_written_to_the_last(tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text('progress = "json"\n')
    failed = dus("verify", "nowhere", "--config", "options.toml", cwd=tmp_path)
    (event,) = map(json.loads, failed.stderr.splitlines())
    assert (event["event"], event["exit_code"]) == ("exit", 1)
    dus(
        "verify", "nowhere", "--config", "options.toml", "--progress", "plain", cwd=tmp_path
    ).assert_one_line_error()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_has_a_key_of_its_own(command: str) -> None:
    parameters = load_command(command).params
    assert [parameter.name for parameter in parameters][-1] == "config"
    names = [
        spelling
        for parameter in parameters
        for spelling in parameter.opts
        if not spelling.startswith("-o")
    ]
    assert len(names) == len(set(names))


def test_where_python_reads_no_toml_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.toml").write_text("trim = 1")
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UsageError, match=r"takes Python 3\.11 or tomli \(pip install tomli\); or write YAML"
    ):
        read_file(tmp_path / "a.toml")


# --- dus heal -------------------------------------------------------------------------------------

OF_HEAL = (
    "--until base --holdout 0.7% --betas 0.8,0.99 --warmup 7 --decay 12.5% --distill 0.3:80% "
    "--save-every 90s --micro-batch 4 --nproc-per-node auto --no-document-mask --train new --lr "
    "1e-05 --eval-data ä.txt --tokens 1.5M --lr-scale base=0.5 --chat-field talk --export-every 9 "
    "--stream --shuffle-window 2M --token-cache kept --token-cache-size 5GB --weight-field quality "
    "--track wandb --track-project p --track-run r --track-group g --push-every 18 --push-to "
    "org/name@try --eval-tasks arc_easy --eval-tasks-every 2 --eval-tasks-limit 50 "
    "--include-path tasks"
)


def printed(folder: Path, *arguments: str | Path) -> str:
    run = dus("heal", *arguments, "--print-config", cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_printed_config_gives_the_same_options_back(tmp_path: Path) -> None:
    command = (
        "out",
        "--data",
        "a.jsonl",
        "b c.jsonl:0.5",
        "--seq-length",
        "64",
        *shlex.split(OF_HEAL),
    )
    text = printed(tmp_path, *command)
    (tmp_path / "heal.toml").write_text(text, encoding="utf-8")
    assert printed(tmp_path, "--config", "heal.toml") == text
    found = read_file(tmp_path / "heal.toml")
    expected = {
        "model": "out",
        "data": ["a.jsonl", "b c.jsonl:0.5"],
        "tokens": 1_500_000,
        "holdout": "0.7%",
    }
    expected |= {
        "warmup": "7",
        "decay": "12.5%",
        "save-every": "90s",
        "betas": "0.8,0.99",
        "micro-batch": 4,
    }
    expected |= {
        "document-mask": False,
        "eval-data": ["ä.txt"],
        "distill": "30%:80%",
        "lr": 1e-5,
        "lr-scale": "new=1,base=0.5,embeddings=1",
        "chat-field": "talk",
        "export-every": 9,
        "until": "base",
        "stream": True,
        "shuffle-window": 2_000_000,
        "token-cache-size": "5GB",
        "weight-field": "quality",
        "track-group": "g",
        "push-to": "org/name@try",
        "eval-tasks": ["arc_easy"],
    }
    assert expected.items() <= found.items()
    options = {parameter.opts[0].removeprefix("--") for parameter in load_command("heal").params}
    left_out = (
        "more_data steps epochs batch-tokens rdzv-endpoint eval-every eval-tokens token-field "
        "average compile config"
    ).split()
    not_of_the_run = (
        "dry-run pilot print-command print-job print-config progress json quiet".split()
    )
    assert options - found.keys() == {*left_out, *not_of_the_run}
    assert not (tmp_path / "out-healed").exists()


def test_the_run_json_of_a_run_is_a_config_of_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    tiny.write_corpus(tmp_path / "corpus.jsonl")
    tiny.upscaled(tiny.write_base(tmp_path / "base"), tmp_path / "scaled")
    options = (
        "--seq-length 32 --steps 8 --batch-tokens 128 --distill 0.3:80% --warmup 7% --train new "
        "--save-every 2h"
    )
    here = f"import os; os.chdir({str(tmp_path)!r})"
    command = [
        "heal",
        "scaled",
        "--data",
        "corpus.jsonl",
        *options.split(),
        "--print-command",
        "-q",
    ]
    assert tiny.forked_dus(*command, "-o", "one", first=here).returncode == 0
    again = ("heal", "--config", "one/run.json", "-o", "two", "--print-command", "-q")
    assert tiny.forked_dus(*again, first=here).returncode == 0
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two"))
    assert one | {"output": ""} == two | {"output": ""}
    one["options"]["recipe.colour"] = "blue"
    (tmp_path / "one/run.json").write_text(json.dumps(one))
    tiny.forked_dus(*again, first=here).assert_one_line_error(
        "--config one/run.json", "colour", code=2
    )
