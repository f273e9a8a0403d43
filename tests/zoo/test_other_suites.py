"""The problems of optimistix's and jaxopt's test suites from their own starts, solved and differentiated at the default settings."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import bilevel

from .problems import FIXED_POINTS, JAXOPT, MINIMISATION, Case, network_fit
from .support import ACCURACY, DTYPES, F32, as_dtype, check, flat


def of(cases: tuple[Case, ...]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name.replace(" ", "-") for case in cases])


def check_case(layer: Any, function: Any, case: Case, dtype: torch.dtype) -> None:
    check(
        layer,
        function,
        case.init,
        *case.args,
        solution=case.solution,
        dtype=dtype,
        scale=case.scale,
        several=case.several,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@of(tuple(case for case in MINIMISATION if not case.singular))
def test_minimisation(case: Case, dtype: torch.dtype) -> None:
    if case.stiff and dtype == F32:
        with contextlib.suppress(bilevel.SolveError):
            check_case(bilevel.argmin, case.function, case, dtype)
        return
    check_case(bilevel.argmin, case.function, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@of(tuple(case for case in MINIMISATION if case.singular))
def test_singular_minimisation(case: Case, dtype: torch.dtype) -> None:
    """The right value, or a refusal by name; never another value that is called a success."""
    init, args = as_dtype(case.init, dtype), as_dtype(case.args, dtype)
    found = bilevel.argmin(case.function, on_failure="ignore").solve(init, *args)
    if not bool(found.report.success):
        return
    if case.function is network_fit:
        assert float(network_fit(found.value, *args)) <= 1e-4
    else:
        error = (flat(found.value).double() - flat(case.solution)).abs().max()
        assert float(error) <= ACCURACY[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@of(FIXED_POINTS)
def test_root(case: Case, dtype: torch.dtype) -> None:
    def residual(y: Any, *args: Any) -> Any:
        return pytree.tree_map(torch.sub, case.function(y, *args), y)

    check_case(bilevel.root, residual, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@of((*FIXED_POINTS, *JAXOPT))
def test_fixed_point(case: Case, dtype: torch.dtype) -> None:
    check_case(bilevel.fixed_point, case.function, case, dtype)


def test_the_zoo_is_complete() -> None:
    assert len(MINIMISATION) >= 15
    assert len(FIXED_POINTS) == 10
