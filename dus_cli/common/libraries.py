"""Libraries that an extra brings: asked for here before they are imported, so that one line says
what to install.

They are imported inside functions, where they are needed: `dus --help` and `dus upscale` do without
them.
"""

from __future__ import annotations

from importlib.util import find_spec

from dus_cli.errors import MissingExtraError, listed, reason_of

_HEAL, _EVAL, _STORES = "'dus-cli[heal]'", "'dus-cli[eval]'", "'dus-cli[stores]'"

# What to install for a module; one that is not listed comes in a package of its own name.
_BROUGHT_BY = {
    "accelerate": _HEAL,
    "gcsfs": _STORES,
    "lm_eval": _EVAL,
    "numpy": "numpy",
    "pyarrow": _HEAL,
    "s3fs": _STORES,
    "torch": _HEAL,
    "transformers": _HEAL,
    "zstandard": _HEAL,
}


def require(what: str, *modules: str) -> None:
    """Check that libraries are installed, without importing them.

    >>> require("dus upscale", "json", "pathlib")

    Args:
        what: the command, option or file that needs them, as a user knows it.
        modules: by the names that `import` knows them by.

    Raises:
        MissingExtraError: some are not; it names them and what to install.
    """
    missing = [module for module in modules if not _is_installed(module)]
    if missing:
        raise MissingExtraError(f"{what} needs {listed(missing)}; pip install {_packages(missing)}")


def broken_import(error: ImportError) -> MissingExtraError:
    """What to say of an import that failed all the same: a library that is incomplete, too old,
    or was not foreseen.
    """
    module = (error.name or "").partition(".")[0]
    if not module:
        return MissingExtraError(f"a library cannot be imported: {reason_of(error)}")
    packages = _packages([module])
    if not _is_installed(module):
        return MissingExtraError(f"{module} is needed and not installed; pip install {packages}")
    return MissingExtraError(
        f"{module} {_version(module)} cannot be imported: {reason_of(error)}; "
        f"it is damaged or of the wrong version: pip install --upgrade --force-reinstall {packages}"
    )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a module that is half there
        return False


def _version(module: str) -> str:
    # it reads the parser of e-mails, which is a quarter of what `dus --version` imports
    import importlib.metadata

    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "(of an unknown version)"


def _packages(modules: list[str]) -> str:
    """The arguments of pip: each extra or package once."""
    return " ".join(dict.fromkeys(_BROUGHT_BY.get(module, module) for module in modules))
