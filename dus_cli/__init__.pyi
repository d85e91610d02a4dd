# The package's names for type checkers; __init__.py imports each on first use.
from dus_cli.api import evaluate, heal, plan, probe, push, upscale, verify
from dus_cli.errors import DusError, UsageError
from dus_cli.evaluation.options import ScoringOptions, TaskOptions, TextOptions
from dus_cli.evaluation.report import EvalReport, Gates
from dus_cli.heal.options import (
    BudgetOptions,
    DataOptions,
    FitOptions,
    LaunchOptions,
    RecipeOptions,
    SavingOptions,
)
from dus_cli.probe.found import Probe, ProbePlan
from dus_cli.probe.options import ProbeOptions
from dus_cli.progress import Progress
from dus_cli.push.options import PushOptions
from dus_cli.push.report import PushReport
from dus_cli.upscaling.options import UpscaleOptions
from dus_cli.upscaling.report import UpscaleReport
from dus_cli.verification.options import VerifyOptions
from dus_cli.verification.report import Verification

__version__: str

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
