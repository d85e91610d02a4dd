"""Continued pretraining: the launcher (`dus heal`), the worker that torchrun starts, and the code
that both use.

The launcher passes everything to the worker in `run.json`.
"""

from __future__ import annotations

import sys

from dus_cli.common.rooms import Verb

sys.modules[__name__].__class__ = Verb
