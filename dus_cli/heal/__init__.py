"""Continued pretraining: the launcher (`dus heal`), the worker that torchrun starts, and what they
share.

`run.json` is all that passes between the two; torch and transformers are imported below this folder
only.
"""

from __future__ import annotations

import sys

from dus_cli.common.rooms import Verb

sys.modules[__name__].__class__ = Verb
