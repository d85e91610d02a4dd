"""dus: depth up-scaling of Hugging Face checkpoints (SOLAR 10.7B, arXiv:2312.15166).

    from dus_cli import upscale, plan, verify

These and their results are loaded when they are first asked for (PEP 562), so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_MODULES = {
    "plan": "api",
    "upscale": "api",
    "verify": "api",
    "DusError": "errors",
    "UsageError": "errors",
    "Progress": "progress",
    "UpscaleReport": "upscaling.report",
    "Verification": "verification.report",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "DusError",
    "Progress",
    "UpscaleReport",
    "UsageError",
    "Verification",
    "__version__",
    "plan",
    "upscale",
    "verify",
]
