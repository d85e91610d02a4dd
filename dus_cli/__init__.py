"""dus: depth up-scaling of Hugging Face checkpoints (SOLAR 10.7B, arXiv:2312.15166).

    from dus_cli import upscale, plan, verify, push, heal, probe, evaluate

Each name is imported on first use (PEP 562), so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_MODULES = {
    "plan": "api",
    "upscale": "api",
    "verify": "api",
    "evaluate": "api",
    "ProbeOptions": "probe.options",
    "TextOptions": "evaluation.options",
    "TaskOptions": "evaluation.options",
    "ScoringOptions": "evaluation.options",
    "Gates": "evaluation.report",
    "PushOptions": "push.options",
    "DataOptions": "heal.options",
    "BudgetOptions": "heal.options",
    "RecipeOptions": "heal.options",
    "FitOptions": "heal.options",
    "LaunchOptions": "heal.options",
    "SavingOptions": "heal.options",
    "EvalReport": "evaluation.report",
    "Probe": "probe.found",
    "ProbePlan": "probe.found",
    "PushReport": "push.report",
    "DusError": "errors",
    "UsageError": "errors",
    "Progress": "progress",
    "UpscaleReport": "upscaling.report",
    "Verification": "verification.report",
    "VerifyOptions": "verification.options",
    "UpscaleOptions": "upscaling.options",
}


# Verbs that share their name with a subpackage, which is therefore callable (common/rooms.py).
_ROOMS = ("heal", "probe", "push")


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "BudgetOptions",
    "DataOptions",
    "DusError",
    "EvalReport",
    "FitOptions",
    "Gates",
    "LaunchOptions",
    "Probe",
    "ProbeOptions",
    "ProbePlan",
    "Progress",
    "PushOptions",
    "PushReport",
    "RecipeOptions",
    "SavingOptions",
    "ScoringOptions",
    "TaskOptions",
    "TextOptions",
    "UpscaleOptions",
    "UpscaleReport",
    "UsageError",
    "Verification",
    "VerifyOptions",
    "__version__",
    "evaluate",
    "heal",
    "plan",
    "probe",
    "push",
    "upscale",
    "verify",
]
