"""Which files go along with a model, which make place for another one, and which nobody touches."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import llama_config, llama_tensors, write_checkpoint
from conftest import Run
from forked import dus

from dus_cli.errors import OutputError
from dus_cli.heal.launch.verb import check_run_folder
from dus_cli.heal.run import is_of_a_run
from dus_cli.source.belonging import belongs_by_name, carried_files
from dus_cli.writing.staging import Staging

UP = ("--trim", "1", "--json")


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"of {name}")


def tree(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def refused(run: Run, *parts: str) -> None:
    assert run.returncode == 1, run.stderr
    assert run.stderr.count("\n") == 1
    for part in parts:
        assert part in run.stderr


# --- what goes along ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
        "merges.txt", "qwen.tiktoken", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja", "preprocessor_config.json", "processor_config.json",
        "generation_config.json", "configuration_x.py", "modeling_x.py", "tokenization_x.py", "LICENSE", "LICENSE.md",
        "LICENCE-2.0", "NOTICE", "USE_POLICY.md", "tekken.json", "sentencepiece.bpe.model", "quantize_config.json",
        "Gemma_License.pdf", "rwkv_vocab_v20230424.txt", "configuration.json", "tokenizer.model.v3",
    ],
)  # fmt: skip
def test_what_a_models_files_are_called_goes_along(name: str) -> None:
    assert belongs_by_name(name)


@pytest.mark.parametrize(
    "name",
    [
        ".env", "id_rsa", "wandb/debug.log", "checkpoint-500/config.json", "trainer_state.json", "latest",
        "params.json", "optimizer.pt", "rng_state.pth", "model.safetensors.part", "core", ".git/HEAD", "train.py",
        ".cache/huggingface/token", "__pycache__/modeling_x.pyc", "logs/run.txt", "model.gguf", "onnx/model.onnx",
        "original/tokenizer.model", "mergekit_config.yml", "license_key.txt", "README_zh.md", ".tokenizer.json",
        "events.out.tfevents.1", "adapter_config.json", "nohup.out", "zero_to_fp32.py", "training_args.bin",
        "all_results.json", "deploy.pem", "notes.txt", "config.json", "dus.json",
    ],
)  # fmt: skip
def test_what_nobody_knows_stays_behind(name: str) -> None:
    assert not belongs_by_name(name)


def test_what_was_left_out_is_listed_with_folders_once(base: Path, tmp_path: Path) -> None:
    put(
        base,
        "tokenizer.json",
        ".env",
        "id_rsa",
        "wandb/a/b.log",
        "wandb/c.log",
        "chat_templates/x.jinja",
    )
    put(base, "chat_templates/secret.txt", "README.md", "model.safetensors.index.json.lock")
    (base / "gone").symlink_to(tmp_path / "nowhere")
    report = dus("upscale", base, *UP, "-o", tmp_path / "out").report
    assert report["files"] == ["tokenizer.json", "chat_templates/x.jinja"]
    assert report["left_out"] == [
        ".env", "chat_templates/secret.txt", "gone", "id_rsa", "model.safetensors.index.json.lock", "wandb/",
    ]  # fmt: skip
    assert not (tmp_path / "out/.env").exists()
    text = dus("upscale", base, "--trim", "1", "-o", tmp_path / "two", "--dry-run").stdout
    assert "left out" in text
    assert ".env" in text


def test_code_goes_along_that_auto_map_names_and_what_it_imports(
    base: Path, edit_config: Callable[..., None]
) -> None:
    edit_config(
        base, auto_map={"AutoModelForCausalLM": "my_net.Net", "AutoConfig": "org/other--config_y.C"}
    )
    (base / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["cutting.Slow", None]}})
    )
    put(
        base,
        "layers.py",
        "pack/__init__.py",
        "pack/deep.py",
        "cutting.py",
        "config_y.py",
        "train.py",
        "../out.py",
    )
    (base / "my_net.py").write_text(
        "import os\nfrom .layers import (\n  Layer,\n)\nfrom .pack import deep\n"
    )
    (base / "layers.py").write_text(
        "if True:\n    from ..out import stolen\nfrom . import kernels\n"
    )
    put(base, "kernels.py", "kernel.cu")
    names = {name for name, _ in carried_files(base).files}
    assert names == {
        "tokenizer_config.json", "my_net.py", "layers.py", "pack/__init__.py", "pack/deep.py", "cutting.py",
        "kernels.py", "kernel.cu",
    }  # fmt: skip


def test_names_of_layers_in_files_beside_config_follow_the_map(base: Path, tmp_path: Path) -> None:
    quantised = {"quantization": {"exclude_modules": ["lm_head", "model.layers.7.self_attn*"]}}
    (base / "hf_quant_config.json").write_text(json.dumps(quantised))
    (base / "quantize_config.json").write_text(
        '{"bits": 4, "dynamic": {"+:model.layers.[0-3].mlp": {}}}'
    )
    (base / "params.json").write_text('{"n_layers": 8}')
    report = dus("upscale", base, "--trim", "2", "--json", "-o", tmp_path / "out").report
    written = json.loads((tmp_path / "out/hf_quant_config.json").read_text())
    assert written["quantization"]["exclude_modules"] == ["lm_head", "model.layers.11.self_attn*"]
    assert report["files"] == ["hf_quant_config.json"]
    assert report["left_out"] == ["params.json", "quantize_config.json"]
    warnings = " ".join(report["warnings"])
    assert "quantize_config.json stays behind" in warnings
    assert "params.json stays behind" in warnings


# --- what --overwrite replaces --------------------------------------------------------------------


@pytest.mark.parametrize(
    "strangers",
    [
        ["thesis.tex"],
        ["llama/model.safetensors"],
        [".env"],
        ["checkpoints/step-1/x"],
        ["tokenizer.json.bak"],
    ],
)
@pytest.mark.parametrize("kind", ["dus", "checkpoint", "other"])
def test_overwrite_touches_nothing_where_something_else_stands(
    base: Path, tmp_path: Path, kind: str, strangers: list[str]
) -> None:
    out = tmp_path / "out"
    if kind == "dus":
        assert dus("upscale", base, *UP, "-o", out).returncode == 0
    elif kind == "checkpoint":
        write_checkpoint(out, llama_tensors(4), llama_config(4))
    put(out, *strangers)
    before = tree(tmp_path)
    for dry in ([], ["--dry-run"]):
        run = dus("upscale", base, "--trim", "2", "-q", "-o", out, "--overwrite", *dry)
        if not dry:
            run.assert_one_line_error(strangers[0])
        assert tree(tmp_path) == before
    report = dus(
        "upscale", base, "--trim", "2", "--json", "-o", out, "--overwrite", "--dry-run"
    ).report
    assert strangers[0] in report["warnings"][-1]


def test_overwrite_replaces_a_downloaded_checkpoint_and_an_older_output(
    base: Path, tmp_path: Path
) -> None:
    put(base, "tokenizer.json")
    out = write_checkpoint(tmp_path / "out", llama_tensors(4), llama_config(4), num_shards=3)
    put(
        out,
        "tokenizer.json",
        "README.md",
        "LICENSE",
        ".gitattributes",
        ".cache/huggingface/download/x.json.metadata",
    )
    put(out, ".cache/huggingface/.gitignore", "additional_chat_templates/rag.jinja")
    for trim in ("1", "2"):
        assert dus("upscale", base, "--trim", trim, "-q", "-o", out, "--overwrite").returncode == 0
        assert "LICENSE" not in tree(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    assert dus("verify", out, "--base", base, "-q").returncode == 0


def test_overwrite_of_what_dus_wrote_takes_the_files_that_it_names_and_no_other(
    base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert dus("upscale", base, *UP, "-o", out).returncode == 0
    put(out, "tokenizer.json")  # a model's file, and not one that dus wrote
    dus("upscale", base, "--trim", "2", "-q", "-o", out, "--overwrite").assert_one_line_error(
        "tokenizer.json"
    )
    assert (out / "tokenizer.json").exists()


def test_a_config_without_weights_is_no_checkpoint_to_overwrite(base: Path, tmp_path: Path) -> None:
    put(tmp_path / "out", "config.json", "LICENSE")
    dus(
        "upscale", base, "--trim", "2", "-q", "-o", tmp_path / "out", "--overwrite"
    ).assert_one_line_error("no checkpoint")


def test_home_is_no_output(base: Path, tmp_path: Path) -> None:
    run = dus(
        "upscale",
        base,
        "-q",
        "-o",
        tmp_path / "home",
        "--overwrite",
        HOME=str(tmp_path / "home/me"),
    )
    run.assert_one_line_error("home directory")


def test_a_folder_with_the_name_of_the_work_in_it_is_not_cleared(
    base: Path, tmp_path: Path
) -> None:
    put(tmp_path / ".out.partial", "diary.txt")
    dus("upscale", base, "--trim", "2", "-q", "-o", tmp_path / "out").assert_one_line_error(
        "diary.txt"
    )
    assert (tmp_path / ".out.partial/diary.txt").exists()


def test_a_mark_of_somebody_else_clears_nothing(base: Path, tmp_path: Path) -> None:
    put(tmp_path / "out", "INCOMPLETE", "thesis.tex")
    dus(
        "upscale", base, "--trim", "2", "-q", "-o", tmp_path / "out", "--overwrite"
    ).assert_one_line_error("thesis.tex")
    assert set(tree(tmp_path / "out")) == {"INCOMPLETE", "thesis.tex"}


def test_an_old_output_that_cannot_be_removed_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    out = write_checkpoint(tmp_path / "out", llama_tensors(4), llama_config(4))
    out.chmod(0o555)
    dus("upscale", base, "--trim", "2", "-q", "-o", out, "--overwrite").assert_one_line_error(
        "permissions"
    )
    out.chmod(0o755)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_an_old_file_that_cannot_be_removed_is_told_with_exit_1(base: Path, tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out", llama_tensors(4), llama_config(4))
    if subprocess.run(
        ["chattr", "+i", out / "config.json"], check=False, capture_output=True
    ).returncode:
        pytest.skip("no file here can be made immutable")
    try:
        run = dus("upscale", base, "--trim", "2", "-q", "-o", out, "--overwrite")
        run.assert_one_line_error("is the new model", "config.json", ".out.partial")
        assert dus("verify", out, "--base", base, "-q").returncode == 0
    finally:
        subprocess.run(
            ["chattr", "-R", "-i", out, tmp_path / ".out.partial"], check=False, capture_output=True
        )


# --- a mount point --------------------------------------------------------------------------------


@pytest.fixture(params=["tmpfs", "bind"])
def mounted(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    out, other = tmp_path / "out dir", tmp_path / "other"
    out.mkdir()
    other.mkdir()
    what = ["-t", "tmpfs", "tmpfs"] if request.param == "tmpfs" else ["--bind", str(other)]
    command = ["mount", *what, str(out)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting takes root")
    (out / "lost+found").mkdir()
    yield out
    subprocess.run(["umount", out], check=True)


def test_a_mount_point_is_written_from_within_and_the_dry_run_says_so(
    base: Path, mounted: Path
) -> None:
    planned = dus("upscale", base, *UP, "-o", mounted, "--dry-run").report
    assert "it is a mount point" in planned["warnings"][-1]
    report = dus(
        "upscale", base, *UP, "-o", mounted, "--checksums", "--max-shard-size", "100KB"
    ).report
    assert report["published"] == "index last"
    assert dus("verify", mounted, "--base", base, "-q").returncode == 0
    assert not {".dus.partial", "INCOMPLETE", ".dus-partial"} & {
        path.name for path in mounted.iterdir()
    }
    assert (
        dus("upscale", base, *UP, "-o", mounted, "--max-shard-size", "100KB").report["status"]
        == "unchanged"
    )
    before = tree(mounted)
    dus("upscale", base, "--trim", "2", "-q", "-o", mounted, "--overwrite").assert_one_line_error(
        "one step"
    )
    assert tree(mounted) == before


def test_a_failure_leaves_a_mount_point_as_it_was(base: Path, mounted: Path) -> None:
    run = dus("upscale", base, "--trim", "1", "-q", "-o", mounted, "--copy-mode", "clone")
    assert run.returncode == 1
    assert [path.name for path in mounted.iterdir()] == ["lost+found"]


# --- what is pushed, and summed -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda _: [], "SHA256SUMS has no sum of README.md"),
        (
            lambda lines: [line for line in lines if "config.json" not in line],
            "no sum of config.json",
        ),
        (lambda lines: [*lines, "0" * 64 + "  config.json"], "two sums of config.json"),
        (lambda lines: [*lines, "0" * 64 + "  ../base/config.json"], "points outside"),
        (lambda lines: [*lines, "0" * 64 + "  gone.txt"], "gone.txt is in SHA256SUMS"),
        (lambda lines: [*lines, "abc  config.json"], "a line that is not a sum"),
        (
            lambda lines: [line.upper().replace("README.MD", "README.md") for line in lines[:1]],
            "no sum of config.json",
        ),
        (lambda lines: [f"{line[:64].upper()} *./{line[66:]}\r" for line in lines], None),
        (
            lambda lines: [
                "# by hand",
                *(f"SHA256 ({line[66:]}) = {line[:64]}" for line in lines),
                "",
            ],
            None,
        ),
        (lambda lines: [*lines, lines[0]], None),
    ],
)
def test_sums_that_do_not_cover_the_folder_are_a_problem(
    base: Path, tmp_path: Path, edit: Callable[[list[str]], list[str]], problem: str | None
) -> None:
    out = tmp_path / "out"
    assert dus("upscale", base, *UP, "-o", out, "--checksums").returncode == 0
    lines = (out / "SHA256SUMS").read_text().splitlines()
    (out / "SHA256SUMS").write_text("".join(f"{line}\n" for line in edit(lines)))
    run = dus("verify", out, "--json")
    assert run.returncode == (0 if problem is None else 1), run.stdout
    problems = json.loads(run.stdout)["problems"]
    assert (problems == []) if problem is None else any(problem in line for line in problems), (
        problems
    )


def test_a_release_is_not_made_again_against_empty_sums(base: Path, tmp_path: Path) -> None:
    assert dus("upscale", base, *UP, "-o", tmp_path / "out", "--checksums").returncode == 0
    (tmp_path / "out/SHA256SUMS").write_text("")
    again = dus("upscale", "--from", tmp_path / "out/dus.json", "-o", tmp_path / "again", "-q")
    again.assert_one_line_error("SHA256SUMS", "empty")


# --- paths as they are typed ----------------------------------------------------------------------


def test_a_tilde_is_the_home_directory_wherever_a_path_is_given(base: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    base.rename(home / "base")
    assert (
        dus("upscale", "~/base", *UP, "--output=~/out", "--checksums", HOME=str(home)).returncode
        == 0
    )
    assert dus("verify", "~/out", "--base", "~/base", "-q", HOME=str(home)).returncode == 0
    done = dus("upscale", "--from=~/out/dus.json", "-o", "~/again", "-q", HOME=str(home))
    assert done.returncode == 0, done.stderr
    dus("heal", "~/out", "--data", "~/none.jsonl", "-q", HOME=str(home)).assert_one_line_error(
        "none.jsonl"
    )
    dus("upscale", "~/base", "-q", "-o", "~nobody-here/out", HOME=str(home)).assert_one_line_error(
        "no such user", code=2
    )


def test_a_plot_replaces_no_picture_that_dus_did_not_draw(base: Path, tmp_path: Path) -> None:
    put(tmp_path, "figure-dark.svg")
    run = dus("probe", base, "--data", "x.jsonl", "--plot", tmp_path / "figure.svg", "-q")
    run.assert_one_line_error("figure-dark.svg", "no picture that dus drew")


# --- a run of dus heal ----------------------------------------------------------------------------


def test_the_folder_of_a_run_is_replaced_and_what_is_not_the_runs_moves_along(
    tmp_path: Path,
) -> None:
    out = tmp_path / "healed"
    put(
        out,
        "run.json",
        "run.json.1.partial",
        "metrics.jsonl",
        "metrics.jsonl.partial",
        "tokens/.lock",
        "checkpoints/step-00000010/state.json",
        "logs/0/torchrun.log",
    )
    put(out, "notes.txt", "wandb/offline.db", "checkpoints/mine/x", "README.md")
    with Staging(out, overwrite=True, claim=is_of_a_run) as staging:
        staging.write_text("README.md", "healed")
        staging.publish()
    assert set(tree(out)) == {
        "README.md",
        "README.md.before",
        "notes.txt",
        "wandb/offline.db",
        "checkpoints/mine/x",
    }
    assert (out / "README.md").read_text() == "healed"
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


def test_what_comes_into_an_output_while_it_is_replaced_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_checkpoint(tmp_path / "out", llama_tensors(4), llama_config(4))
    before = tree(out)
    monkeypatch.setattr(
        "dus_cli.writing.staging.check_replaceable", lambda folder: put(folder, "thesis.tex")
    )
    with Staging(out, overwrite=True) as staging:
        staging.write_text("config.json", "{}")
        with pytest.raises(OutputError, match=r"thesis\.tex appeared in"):
            staging.publish()
    assert tree(out) == before | {"thesis.tex": b"of thesis.tex"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_healing_takes_no_folder_that_has_checkpoints_or_tokens_of_somebody_else(
    tmp_path: Path,
) -> None:
    put(tmp_path / "out", "checkpoints/step-00000010/model.pt")
    put(tmp_path / "out2", "tokens/api.key")
    for name, stranger in (("out", "checkpoints"), ("out2", "tokens")):
        with pytest.raises(OutputError, match=f"holds {stranger} and no run of dus heal"):
            check_run_folder(tmp_path / name)
