"""An option is said once: a field of a dataclass that the verb takes is the option of its
command.
"""

from __future__ import annotations

import dataclasses
import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from forked import dus

from dus_cli.cli import COMMANDS as NAMES
from dus_cli.cli import load_command
from dus_cli.commands.signature import takes_options
from dus_cli.common.options import Option, option_fields
from dus_cli.common.units import parse_share, share_text
from dus_cli.evaluation.options import ScoringOptions, TaskOptions, TextOptions
from dus_cli.evaluation.report import Gates
from dus_cli.heal.options import (
    BudgetOptions,
    DataOptions,
    FitOptions,
    LaunchOptions,
    RecipeOptions,
    SavingOptions,
)
from dus_cli.probe.options import ProbeOptions
from dus_cli.push.options import PushOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Letters:
    """Options of a command that is made up here."""

    names: Annotated[tuple[str, ...], Option("Whom to write to.", name="name")]
    jobs: Annotated[int, Option("How many at a time.", short="-j", metavar="J")] = 4
    folder: Annotated[Path | None, Option("Where to write.")] = None
    loud: Annotated[bool, Option("In capitals.")] = True
    gap: Annotated[float, Option("Share of a page.", parse=parse_share, show=share_text)] = 0.5


COMMANDS: Any = {name: load_command(name) for name in NAMES}

TAKEN: dict[str, tuple[type, ...]] = {
    "probe": (ProbeOptions,),
    "eval": (TextOptions, ScoringOptions, TaskOptions, Gates),
    "push": (PushOptions,),
    "heal": (DataOptions, BudgetOptions, RecipeOptions, FitOptions, LaunchOptions, SavingOptions),
}

FIELDS = [
    (command, kind, option)
    for command, kinds in TAKEN.items()
    for kind in kinds
    for option in option_fields(kind)
]


@pytest.mark.parametrize(
    "kind", [kind for kinds in TAKEN.values() for kind in kinds], ids=lambda kind: kind.__name__
)
def test_options_are_frozen_and_given_by_name_and_every_field_is_one(kind: Any) -> None:
    assert kind.__dataclass_params__.frozen
    fields = dataclasses.fields(kind)
    assert all(field.kw_only for field in fields)
    assert [option.field for option in option_fields(kind)] == [field.name for field in fields]


@pytest.mark.parametrize(
    ("command", "kind", "option"), FIELDS, ids=[f"{c} {o.name}" for c, _, o in FIELDS]
)
def test_a_field_is_an_option_of_its_command_with_the_same_default(
    command: str, kind: Any, option: Any
) -> None:
    parameters = {parameter.opts[0]: parameter for parameter in COMMANDS[command].params}
    found = parameters[f"--{option.name}"]
    assert found.help == option.option.help
    assert found.required == (option.default is dataclasses.MISSING)
    typed = option.typed_default
    if option.default in (dataclasses.MISSING, None, ()) and not option.option.auto:
        assert found.default is None
        return
    value = (
        option.parse(typed)
        if isinstance(typed, str) and not isinstance(typed, Enum) and option.parse
        else typed
    )
    assert value == option.default


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("upscale", "--layers", ["0:3", "1:4"]),
        ("upscale", "--double", ["0:3", "1:4"]),
        ("probe", "--trims", ["0:3", "5"]),
        ("heal", "--lr-scale", ["new=1", "base=0.1"]),
    ],
)
def test_a_list_in_one_option_is_not_replaced_by_a_second(
    command: str, option: str, values: list[str], tmp_path: Path
) -> None:
    first, second = values
    done = dus(command, tmp_path, option, first, f"{option}={second}")
    assert (done.returncode, done.stdout) == (2, "")
    advice = "give one range" if option == "--trims" else "give all (ranges|groups) in one, with"
    assert re.fullmatch(
        rf"error: Invalid value for '{option}': it is given twice; {advice}.*\n", done.stderr
    )


def test_an_option_of_one_value_may_be_given_again(tmp_path: Path) -> None:
    done = dus("upscale", tmp_path / "none", "--trim", "2", "--trim", "3", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "does not exist" in done.stderr


def test_a_command_is_made_of_the_fields_and_called_with_their_values() -> None:
    given: list[tuple[Letters, bool]] = []
    program = typer.Typer()

    @program.command()
    @takes_options("last")
    def write(
        letters: Letters, *, last: Annotated[bool, Option("After all others.")] = False
    ) -> None:
        """Write letters."""
        given.append((letters, last))

    command: Any = typer.main.get_command(program)
    spellings = [
        parameter.opts
        for parameter in command.params
        if parameter.name in hints_of(Letters) | {"last"}
    ]
    assert spellings == [
        ["--last"],
        ["--name"],
        ["--jobs", "-j"],
        ["--folder"],
        ["--loud"],
        ["--gap"],
    ]
    command.main(
        ["--name", "a", "--name", "b", "-j", "8", "--folder", "~/x", "--no-loud"],
        standalone_mode=False,
    )
    home = Path("~/x").expanduser()
    assert given == [(Letters(names=("a", "b"), jobs=8, folder=home, loud=False, gap=0.5), False)]
    for arguments, says in (
        (["--name", "a", "-j", "65"], "from 1 to 64"),
        (["--loud"], "Missing parameter: names"),
    ):
        with pytest.raises(Exception, match=says):
            command.main(arguments, standalone_mode=False)


def hints_of(kind: type) -> set[str]:
    return {option.field for option in option_fields(kind)}
