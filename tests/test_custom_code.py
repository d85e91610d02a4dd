"""Bases with their own code and types that dus does not know: nothing is run, nothing is guessed
in silence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama_config, llama_tensors, write_checkpoint
from tiny import forked_dus as dus

AUTO_MAP = {
    "AutoConfig": "configuration_ours.OurConfig",
    "AutoModelForCausalLM": "modeling_ours.OurModel",
}


def write_custom(folder: Path, **fields: Any) -> Path:
    """Eight layers of an unknown type whose code leaves a file `ran` beside itself when it is
    imported.
    """
    config = (
        llama_config(8)
        | {"model_type": "ours", "architectures": ["OurModel"], "auto_map": AUTO_MAP}
        | fields
    )
    write_checkpoint(folder, llama_tensors(8), config)
    for name in ("configuration_ours.py", "modeling_ours.py"):
        (folder / name).write_text(
            "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
        )
    return folder


def test_custom_code_comes_along_and_is_never_run(tmp_path: Path) -> None:
    base, out = write_custom(tmp_path / "base"), tmp_path / "out"
    environment = {"PYTHONPATH": str(base)}  # where an import would find it
    assert dus("upscale", base, "-o", out, "--verify", "full", "-q", **environment).returncode == 0
    assert dus("verify", out, "--base", base, "-q", **environment).returncode == 0
    for name in ("configuration_ours.py", "modeling_ours.py"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert not list(tmp_path.rglob("ran"))
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_type_that_dus_does_not_know_is_said_in_report_and_card(tmp_path: Path) -> None:
    base, out = write_custom(tmp_path / "base"), tmp_path / "out"
    (warning,) = dus("upscale", base, "-o", out, "--json").report["warnings"]
    assert "'ours' is not one dus knows" in warning
    assert "'ours' is not one dus knows" in " ".join((out / "README.md").read_text().split())


SUSPICIOUS: dict[str, Any] = {"attention_pattern": "SSFFSSFF", "skip_layers": [1, 5]}


@pytest.mark.parametrize("name", SUSPICIOUS)
def test_a_suspicious_field_is_refused_with_the_option_that_decides(
    name: str, tmp_path: Path
) -> None:
    base = write_custom(tmp_path / "base", **{name: SUSPICIOUS[name]})
    run = dus("upscale", base, "-o", tmp_path / "out", "-q")
    run.assert_one_line_error(f"config.json: {name} looks like", f"--assume {name}=keep, or =map")
    assert not (tmp_path / "out").exists()


def test_what_a_person_decides_is_done_recorded_and_verified(tmp_path: Path) -> None:
    base, out = write_custom(tmp_path / "base", **SUSPICIOUS), tmp_path / "out"
    options = ("--assume", "attention_pattern=map", "--assume", "skip_layers=keep")
    report = dus("upscale", base, "-t", "2", "-o", out, *options, "--json").report
    config = json.loads((out / "config.json").read_text())
    assert config["attention_pattern"] == "SSFFSS" + "FFSSFF"
    assert config["skip_layers"] == [1, 5]
    assert json.loads((out / "dus.json").read_text())["assume"] == {
        "attention_pattern": "map",
        "skip_layers": "keep",
    }
    assert sum("as --assume says" in warning for warning in report["warnings"]) == 2
    card = (out / "README.md").read_text()
    assert "--assume attention_pattern=map --assume skip_layers=keep" in card
    assert dus("verify", out, "--base", base, "-q").returncode == 0


def test_verify_holds_the_config_to_what_was_decided(tmp_path: Path) -> None:
    base, out = write_custom(tmp_path / "base", attention_pattern="SSFFSSFF"), tmp_path / "out"
    assert (
        dus(
            "upscale", base, "-t", "2", "-o", out, "--assume", "attention_pattern=map", "-q"
        ).returncode
        == 0
    )
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"attention_pattern": "SSFFSSFF"}))
    verified = dus("verify", out, "--base", base, "-q")
    assert verified.returncode == 1
    assert "attention_pattern" in verified.stdout
