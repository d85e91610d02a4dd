"""A subpackage that has the same name as a function of the package."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


class Verb(ModuleType):
    """A subpackage that can also be called, as the verb of its name.

    `dus_cli.probe` is the subpackage as soon as anything in it is imported, and `from dus_cli
    import probe` should give the function. So it is both.
    """

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The function; `inspect.signature` and `help` show it."""
        package, _, name = self.__name__.rpartition(".")
        function: Callable[..., Any] = getattr(import_module(f"{package}.api"), name)
        return function

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.__wrapped__(*arguments, **options)
