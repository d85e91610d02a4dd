"""The project's own promises: quick to start, light to import, documented as it is."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import DUS, dus
from imports import HEAVY, imported_by

from dus_cli.cli import COMMANDS, load_command

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_help_version_upscale_and_verify_import_nothing_heavy(base: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for command in (
        ("--help",),
        ("--version",),
        ("upscale", str(base), "-o", out, "--json", "--verify", "full", "--checksums"),
        ("upscale", str(base), "-o", out + "2", "--dry-run"),
        ("verify", out, "--base", str(base)),
        ("heal", "--help"),
        ("push", "--help"),
        ("eval", "--help"),
        ("probe", "--help"),
    ):
        assert not imported_by(*command) & HEAVY, command
    assert (tmp_path / "out/dus.json").exists()


def test_the_cli_reference_is_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs/generate.py", "--check"], check=False, capture_output=True
    )
    assert done.returncode == 0, "run `make docs` and commit the result"


def test_the_manual_page_has_every_option_and_roff_has_nothing_to_say() -> None:
    page = ROOT / "docs/dus.1"
    source = page.read_text(encoding="ascii")
    for option in set(re.findall(r"--[a-z][a-z-]+", (ROOT / "docs/cli.md").read_text())):
        assert option.replace("-", "\\-") in source, option
    assert '"docs/dus.1" = "share/man/man1/dus.1"' in (ROOT / "pyproject.toml").read_text()
    if shutil.which("groff") is None:
        pytest.skip("the words are there; that roff reads them takes groff")
    done = subprocess.run(["groff", "-man", "-ww", "-Tutf8", page], capture_output=True, check=True)
    assert done.stderr == b""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_in_the_docs_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
    for target in re.findall(r'(?:src|srcset)="(?!https?://)([^"]+)"', page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_in_the_docs_exists(page: Path) -> None:
    known = set(re.findall(r"--[a-z][a-z-]+", (ROOT / "docs/cli.md").read_text()))
    for line in re.findall(
        r"^\s*(?:\$ )?dus (?:upscale|verify|heal|eval|probe|push).*$",
        page.read_text(),
        re.MULTILINE,
    ):
        used = set(re.findall(r"(?<!\S)--[a-z][a-z-]+", line.split("|")[0]))
        assert used <= known, (line, used - known)


def test_every_field_of_the_reports_is_documented(base: Path, tmp_path: Path) -> None:
    layout = (ROOT / "docs/layout.md").read_text()
    upscaled = dus("upscale", base, "-o", tmp_path / "out", "--json").report
    verified = dus("verify", tmp_path / "out", "--json").report
    lineage = json.loads((tmp_path / "out/dus.json").read_text())
    for record in (upscaled, verified, lineage):
        for field in record:
            assert f"`{field}`" in layout, field


def test_the_page_for_developers_draws_every_module_in_its_room() -> None:
    tree = (ROOT / "docs/development.md").read_text().split("\ndus_cli/\n")[1].split("\ntests/ ")[0]
    drawn, room = [], ""
    for indent, name in re.findall(r"^( +)([a-z0-9_/]+(?:\.py|/)) ", tree, re.MULTILINE):
        room = "" if len(indent) == 2 else room
        if name.endswith("/"):
            room = name
        else:
            drawn.append(room + name)
    package = ROOT / "dus_cli"
    assert sorted(drawn) == sorted(
        str(path.relative_to(package)) for path in package.rglob("[!_]*.py")
    )


# The floors of the house, from the ground up: a room imports from itself and from those below it.
FLOORS = (
    "errors progress common maps source pictures planning console writing hub data release models "
    "verification evaluation push upscaling probe heal api commands cli __main__"
).split()


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere in its text, for type checkers alone
    or not.
    """
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "dus_cli"
        ):
            names = {f"{node.module}.{name.name}" for name in node.names}
            modules |= {name if module_file(name) else node.module for name in names}
        elif isinstance(node, ast.Import):
            modules |= {name.name for name in node.names if name.name.startswith("dus_cli.")}
    return modules - {"dus_cli"}


def module_file(name: str) -> Path | None:
    path = ROOT / name.replace(".", "/")
    return next(
        (file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None
    )


def test_a_room_imports_nothing_from_a_floor_above_it() -> None:
    for path in sorted((ROOT / "dus_cli").rglob("*.py")):
        room = path.relative_to(ROOT / "dus_cli").parts[0].removesuffix(".py")
        if room == "__init__":
            assert not imported_modules(path), "importing the package costs nothing"
            continue
        for module in imported_modules(path):
            assert FLOORS.index(module.split(".")[1]) <= FLOORS.index(room), (path, module)


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        name: imported_modules(path)
        for path in (ROOT / "dus_cli").rglob("*.py")
        if (name := str(path.relative_to(ROOT).with_suffix("")).replace("/", "."))
        != "dus_cli.__init__"
    }
    assert tuple(TopologicalSorter(graph).static_order())


def test_the_top_level_has_six_modules_at_most() -> None:
    assert len(list((ROOT / "dus_cli").glob("*.py"))) <= 6


def test_no_call_of_ours_has_seven_positional_arguments() -> None:
    of_libraries = {"pack_into"}  # struct's
    for path in sorted((ROOT / "dus_cli").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") not in of_libraries:
                names_alone = all(isinstance(argument, ast.Constant) for argument in node.args)
                assert len(node.args) < 7 or names_alone, (path, node.lineno)


def test_no_test_is_a_helper_of_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        assert not re.findall(r"^ *(?:from|import) test_\w+", path.read_text(), re.MULTILINE), path


def test_every_command_and_option_has_help() -> None:
    for command in ((), ("upscale",), ("verify",), ("heal",), ("eval",), ("probe",), ("push",)):
        text = subprocess.run(
            [*DUS, *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "200", "PATH": ""},
        ).stdout
        options = [line for line in text.splitlines() if re.match(r"^[│|]\s+\*?\s*--", line)]
        assert options
        for line in options:
            assert len(line.strip("│ ").split("  ")[-1].strip()) > 3, line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_is_a_sentence(command: str) -> None:
    for parameter in load_command(command).params:
        text = getattr(parameter, "help", None) or ""
        assert re.fullmatch(r"(?s)[A-Z].*\.\)?", text), f"{parameter.name}: {text}"


def test_no_two_classes_have_one_name() -> None:
    found: dict[str, Path] = {}
    for path in sorted((ROOT / "dus_cli").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                assert node.name not in found, f"{node.name}: {found[node.name]} and {path}"
                found[node.name] = path


def test_the_summary_of_each_command_is_how_its_own_help_begins() -> None:
    for name, (_, summary) in COMMANDS.items():
        assert load_command(name).help.split("\n\n")[0] == summary  # type: ignore[union-attr]


def test_a_command_is_imported_when_it_is_named_and_no_other() -> None:
    for name, (target, _) in COMMANDS.items():
        code = (
            "import contextlib, sys\nfrom dus_cli.cli import main\n"
            f"sys.argv = ['dus', {name!r}, '--help']\nwith contextlib.suppress(SystemExit): "
            "main()\n"
            "print('\\n', *(m for m in sys.modules if m.startswith('dus_cli.commands.')))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        loaded = {
            module.removeprefix("dus_cli.commands.")
            for module in done.stdout.splitlines()[-1].split()
        }
        assert loaded & {other.split(".")[0] for other, _ in COMMANDS.values()} == {
            target.split(".")[0]
        }


def test_the_help_of_heal_begins_with_an_example_and_the_options_that_most_need() -> None:
    text = dus("heal", "--help", COLUMNS="80").stdout
    beginning = text.partition("╭")[0]
    assert "Example: dus heal out/ --data corpus.jsonl --until base -o healed/" in beginning
    for option in ("--data", "-o", "--tokens", "--until", "--dry-run"):
        assert f"{option} " in beginning
    assert "an ordinary checkpoint with its loss curve. The same command run" in beginning, (
        "one paragraph"
    )


def test_ctrl_c_while_the_command_still_loads_is_one_line() -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'dus_cli.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from dus_cli.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "error: ended by SIGINT; nothing was left behind\n"


def test_dus_alone_prints_the_help_and_is_a_usage_error() -> None:
    done = dus()
    assert done.returncode == 2
    assert "upscale" in done.stdout + done.stderr
    assert "error" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_offered_for_each_shell(shell: str) -> None:
    assert "_DUS_COMPLETE" in dus(_DUS_COMPLETE=f"source_{shell}").stdout


def test_the_changelog_has_the_version() -> None:
    version = dus("--version").stdout.split()[1]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
