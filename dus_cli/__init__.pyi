# The package's names for type checkers; __init__.py loads each when it is first asked for.
from dus_cli.api import plan, upscale, verify
from dus_cli.errors import DusError, UsageError
from dus_cli.progress import Progress
from dus_cli.upscaling.report import UpscaleReport
from dus_cli.verification.report import Verification

__version__: str

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
