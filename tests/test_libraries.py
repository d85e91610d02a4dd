"""What an extra brings and is not there, and what the environment tells a library wrongly: one
line that names it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import llama_config, llama_tensors
from conftest import Run, dus
from pickled import write_pickled

ROOT = Path(__file__).parent.parent
HEAL = "pip install 'dus-cli[heal]'"


def dus_without(modules: str, folder: Path, *arguments: str | Path) -> Run:
    """The command in a Python that lacks these modules."""
    folder.mkdir(exist_ok=True)
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in modules.split())]
    (folder / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    return dus(*arguments, PYTHONPATH=f"{folder}:{ROOT}")


@pytest.mark.parametrize("verb", ["heal", "probe", "eval"])
@pytest.mark.parametrize(
    ("missing", "names", "packages"),
    [
        ("torch", "torch", "'dus-cli[heal]'"),
        ("transformers", "transformers", "'dus-cli[heal]'"),
        ("torch transformers", "torch and transformers", "'dus-cli[heal]'"),
        ("numpy", "numpy", "numpy"),  # dus itself brings it
        ("numpy torch", "numpy and torch", "numpy 'dus-cli[heal]'"),
    ],
)
def test_a_verb_names_what_it_lacks_and_what_brings_it(
    verb: str, missing: str, names: str, packages: str, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("Some words to read.")
    run = dus_without(missing, tmp_path / "site", verb, base, "--data", tmp_path / "text.txt")
    run.assert_one_line_error(f"dus {verb} needs {names}; pip install {packages}\n")


def test_an_option_or_a_file_that_takes_torch_names_the_extra(base: Path, tmp_path: Path) -> None:
    pickled = write_pickled(tmp_path / "pickled", llama_tensors(4), llama_config(4))
    run = dus_without(
        "torch", tmp_path / "site", "upscale", base, "--dtype", "fp16", "-q", "-o", tmp_path / "out"
    )
    run.assert_one_line_error(f"--dtype needs torch; {HEAL}")
    run = dus_without(
        "torch", tmp_path / "site", "upscale", pickled, "--trim", "1", "-q", "-o", tmp_path / "out"
    )
    run.assert_one_line_error("pytorch_model.bin, a pickle", f"needs torch; {HEAL}")


def test_a_library_that_cannot_be_imported_is_named_with_its_reason(
    base: Path, tmp_path: Path
) -> None:
    (tmp_path / "site/numpy").mkdir(parents=True)
    (tmp_path / "site/numpy/__init__.py").write_text(
        "raise ImportError('libblas.so.3: no such file', name='numpy')\n"
    )
    (tmp_path / "text.txt").write_text("Some words to read.")
    run = dus_without("", tmp_path / "site", "eval", base, "--data", tmp_path / "text.txt")
    run.assert_one_line_error(
        "numpy", "cannot be imported: libblas.so.3: no such file", "--force-reinstall numpy"
    )


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            "HF_HUB_DOWNLOAD_TIMEOUT",
            "10s",
            "HF_HUB_DOWNLOAD_TIMEOUT is '10s', and a library reads it as a number",
        ),
        ("HF_HUB_ETAG_TIMEOUT", "", "HF_HUB_ETAG_TIMEOUT is ''"),
        (
            "HF_ENDPOINT",
            "hub.example.org",
            "HF_ENDPOINT is 'hub.example.org', and must begin with https://",
        ),
        ("HTTPS_PROXY", "proxy:80:80", "HTTPS_PROXY is no address of a proxy"),
        (
            "SSL_CERT_FILE",
            "/no/such/file.pem",
            "SSL_CERT_FILE is '/no/such/file.pem', which does not exist",
        ),
    ],
)
def test_a_variable_that_a_library_cannot_use_is_named(
    name: str, value: str, says: str, tmp_path: Path
) -> None:
    run = dus(
        "upscale",
        "org/name",
        "-o",
        tmp_path / "out",
        cwd=tmp_path,
        **{"HF_HUB_OFFLINE": "", name: value},
    )
    run.assert_one_line_error(f"the environment variable {says}")


def test_a_model_that_needs_no_library_does_not_care_for_their_variables(
    base: Path, tmp_path: Path
) -> None:
    run = dus(
        "upscale",
        base,
        "-o",
        tmp_path / "out",
        "--json",
        HF_HUB_DOWNLOAD_TIMEOUT="10s",
        HF_ENDPOINT="none",
    )
    assert run.report["status"] == "written"
