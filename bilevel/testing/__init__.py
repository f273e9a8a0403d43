"""Checks for your own problems: whether their gradients are right, and what is the matter with them.

:func:`check_gradients` compares the library's derivatives with references that know nothing of it,
:func:`assert_gradients` is the same for a test suite. :func:`diagnose` examines a problem and names its defects.
:mod:`bilevel.testing.strategies` draws random problems for property-based tests; it needs ``hypothesis``, and is
imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from bilevel.testing._diagnose import diagnose
from bilevel.testing.comparisons import Allowance, Comparison, GradientCheck, Verdict
from bilevel.testing.defects import Defect
from bilevel.testing.diagnosis import Advice, Cost, Curvature, Diagnosis, Finding, InnerSolve, LinearSolve, OuterTensor
from bilevel.testing.gradients import assert_gradients, check_gradients

__all__ = [
    "Advice",
    "Allowance",
    "Comparison",
    "Cost",
    "Curvature",
    "Defect",
    "Diagnosis",
    "Finding",
    "GradientCheck",
    "InnerSolve",
    "LinearSolve",
    "OuterTensor",
    "Verdict",
    "assert_gradients",
    "check_gradients",
    "diagnose",
]


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module("bilevel.testing.strategies")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
