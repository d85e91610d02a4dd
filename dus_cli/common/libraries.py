"""Optional libraries: check that they are installed before they are imported, so that the error is
one line that says what to install.

They are imported inside the functions that use them, because `dus --help` and `dus upscale` do not.
"""

from __future__ import annotations

from importlib.util import find_spec

from dus_cli.errors import MissingExtraError, listed, reason_of

_HEAL, _EVAL, _STORES = "'dus-cli[heal]'", "'dus-cli[eval]'", "'dus-cli[stores]'"

# The argument of `pip install` for a module; any other module has a package of the same name.
_PACKAGES = {
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

# What transformers raises for files that it does not take; it has no exception of its own for them.
TRANSFORMERS_REFUSALS = (
    ValueError,
    KeyError,
    OSError,
    ImportError,
    RuntimeError,
    AttributeError,
    TypeError,
)


def require(what: str, *modules: str) -> None:
    """Check that libraries are installed, without importing them.

    >>> require("dus upscale", "json", "pathlib")

    Args:
        what: the command, option or file that needs them, for the message.
        modules: their import names.

    Raises:
        MissingExtraError: some are missing; the message names them and what to install.
    """
    missing = [module for module in modules if not _is_installed(module)]
    if missing:
        raise MissingExtraError(f"{what} needs {listed(missing)}; pip install {_packages(missing)}")


def broken_import(error: ImportError) -> MissingExtraError:
    """The error for a failed import that `require` did not prevent: the library is incomplete, too
    old, or not listed there.
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
    except (ImportError, ValueError):  # a partly installed module
        return False


def _version(module: str) -> str:
    # imported here: it imports the e-mail parser, a quarter of what `dus --version` would import
    import importlib.metadata

    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "(of an unknown version)"


def _packages(modules: list[str]) -> str:
    """The arguments of `pip install`, each extra or package once."""
    return " ".join(dict.fromkeys(_PACKAGES.get(module, module) for module in modules))
