"""A test kit for C-LoRA: what the core and the task life must give, on any array library and in any framework.

Needs the extra ``testing`` (pytest, Hypothesis, array-api-strict). docs/testing.md shows how to add a backend.
"""

from __future__ import annotations

import importlib.util

from clora_core.errors import MissingDependencyError, message

_missing = [name for name in ("hypothesis", "pytest", "array_api_strict") if importlib.util.find_spec(name) is None]
if _missing:
    raise MissingDependencyError(
        message(
            "clora.testing",
            f"{', '.join(_missing)} not installed",
            got="import clora.testing",
            needed="hypothesis, pytest, array-api-strict",
            cause="an install without the extra",
            fix="python -m pip install 'clora[testing]'",
        )
    )

from ._agreement import Ledger, agree, compare
from ._backends import Backend, backends, run
from ._calls import Call, NearTie, make_call
from ._cases import Case, Leads, Sizes, cases, leading
from ._drivers import ArrayDriver, Base, Driver, JaxDriver, TorchDriver, drivers
from ._fleet import Fleet
from ._life import Life, lives
from ._lives import attach, live, machine
from ._suite import FunctionSuite, LifeSuite, check_function, check_lives, check_verbs

__all__ = [
    "ArrayDriver",
    "Backend",
    "Base",
    "Call",
    "Case",
    "Driver",
    "Fleet",
    "FunctionSuite",
    "JaxDriver",
    "Leads",
    "Ledger",
    "Life",
    "LifeSuite",
    "NearTie",
    "Sizes",
    "TorchDriver",
    "agree",
    "attach",
    "backends",
    "cases",
    "check_function",
    "check_lives",
    "check_verbs",
    "compare",
    "drivers",
    "leading",
    "live",
    "lives",
    "machine",
    "make_call",
    "run",
]
