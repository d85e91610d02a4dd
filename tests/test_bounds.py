"""Every number of every command has its bounds, in one table; what is outside of them is a usage
error.
"""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from forked import dus

from dus_cli import UsageError, plan
from dus_cli.cli import COMMANDS, app, load_command
from dus_cli.common.bounds import BOUNDS, check_fields, check_numbers, parse_number
from dus_cli.heal.options import (
    BudgetOptions,
    RecipeOptions,
    SavingOptions,
    parse_endpoint,
    parse_every,
)

NO_NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "1e999",
    "9" * 30,
    "-1e30",
    "9" * 5000,
    "x",
    "",
    "0x10",
    "1/2",
    "5 GB B",
]


def numeric_options() -> list[tuple[str, Any]]:
    """Command and option of everything that becomes a number."""
    found = []
    for name in COMMANDS:
        command: Any = load_command(name)
        hints = get_type_hints(inspect.unwrap(command.callback))
        for parameter in command.params:
            hint = hints.get(parameter.name)
            if {int, float} & {hint, *get_args(hint)}:
                found.append((name, parameter))
    return found


OPTIONS = numeric_options()

# What a command must be given before its options are looked at.
NEEDS = {"upscale": ["model", "-o", "out"], "verify": ["out"], "push": ["out", "org/name"]}
NEEDS |= {name: ["model", "--data", "text.txt"] for name in ("heal", "eval", "probe")}


def test_there_are_numbers_in_every_command() -> None:
    assert {name for name, _ in OPTIONS} == {"upscale", "verify", "heal", "eval", "probe", "push"}
    assert len(OPTIONS) > 35


@pytest.mark.parametrize(
    ("command", "option"), OPTIONS, ids=[f"{name} {o.opts[0]}" for name, o in OPTIONS]
)
def test_a_number_of_a_command_is_in_the_table_and_held_to_it(command: str, option: Any) -> None:
    name = option.opts[0].removeprefix("--")
    bounds = BOUNDS[name if name in BOUNDS else f"{name}-seconds"]  # of a time
    beyond = [str(bounds.least - 1), str(int(bounds.most) + 1)]
    for text in [*NO_NUMBERS, *beyond]:
        with pytest.raises(typer.BadParameter) as caught:
            typer.main.get_command(app).main(
                [command, *NEEDS[command], option.opts[0], text], standalone_mode=False
            )
        assert caught.value.param is not None
        assert caught.value.param.opts[0] == option.opts[0]


@pytest.mark.parametrize(
    ("command", "option", "value", "says"),
    [
        ("heal", "--epochs", "0", "'--epochs': 0 is not a number above 0, at most 1,000,000"),
        ("heal", "--epochs", "inf", "'--epochs': inf is not a number above 0"),
        (
            "heal",
            "--seed",
            "99999999999999999999999",
            "is not a whole number from 0 to 4,294,967,295",
        ),
        ("heal", "--lr", "inf", "'--lr': inf is not a number from 0 to 1"),
        ("heal", "--lr", "nan", "'--lr': nan is not a number from 0 to 1"),
        (
            "heal",
            "--nproc-per-node",
            "0",
            "'--nproc-per-node': 0 is not a whole number from 1 to 1,024",
        ),
        ("heal", "--save-every", "0.001s", "--save-every"),
        ("heal", "--rdzv-endpoint", "host:99999", "port from 1 to 65,535"),
        ("eval", "--max-loss", "nan", "'--max-loss': nan is not a number above 0, at most 1,000"),
        ("probe", "--best", "0", "'--best': 0 is not a whole number from 1"),
    ],
)
def test_what_is_out_of_bounds_is_one_line_with_the_option_and_its_bounds(
    command: str, option: str, value: str, says: str
) -> None:
    run = dus(command, "model", "--data", "text.txt", option, value)
    run.assert_one_line_error(option, says, f"see dus {command} --help", code=2)


def test_the_weight_of_a_mixture_has_bounds_too(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    run = dus("eval", "model", "--data", f"{tmp_path}/text.txt:inf")
    assert run.returncode != 0
    with pytest.raises(ValueError, match="inf is not a number from"):
        parse_number("weight", "inf")


def test_the_api_holds_numbers_to_the_same_table(base: Path, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"trim": -1},
        {"trim": 1.5},
        {"trim": True},
        {"trim": "two"},
        {"copies": 1},
        {"copies": 10**9},
        {"max_shard_size": 10**18},
    ]
    for numbers in wrong:
        with pytest.raises(UsageError, match=next(iter(numbers))):
            plan(base, tmp_path / "out", **numbers)


def test_a_group_of_options_is_held_to_the_table_by_its_fields() -> None:
    check_fields(RecipeOptions())
    check_numbers(unheard_of=math.nan)
    for options in (
        BudgetOptions(epochs=math.nan),
        RecipeOptions(seed=-1),
        RecipeOptions(lr=math.inf),
        SavingOptions(keep=0),
    ):
        with pytest.raises(UsageError):
            check_fields(options)


def test_an_interval_of_no_time_and_a_port_that_none_has_are_refused() -> None:
    for text in ("0", "0.5s", "0s", "999999999999h", "1.5"):
        with pytest.raises(ValueError, match="is not"):
            parse_every(text)
    for text in ("", ":29500", "host:0", "host:65536", "a:b:c", "http://host"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            parse_endpoint(text)
