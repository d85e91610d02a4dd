"""dus: depth up-scaling of Hugging Face checkpoints (SOLAR 10.7B, arXiv:2312.15166).

    from dus_cli import upscale, plan, verify

These and their results are loaded when they are first asked for (PEP 562), so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dus_cli.api import plan, upscale, verify
    from dus_cli.errors import DusError, UsageError
    from dus_cli.progress import Progress
    from dus_cli.report import UpscaleReport
    from dus_cli.verification import Verification
else:
    _MODULES = {
        "plan": "api",
        "upscale": "api",
        "verify": "api",
        "DusError": "errors",
        "UsageError": "errors",
        "Progress": "progress",
        "UpscaleReport": "report",
        "Verification": "verification",
    }

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

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
