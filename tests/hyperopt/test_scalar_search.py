"""The search of one strength, on functions whose minima are known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel
from bilevel.hyperopt.grid import LOG_RANGE
from bilevel.hyperopt.scalar_search import minimise_scalar


def test_a_cubic_takes_one_evaluation_after_the_probes() -> None:
    search = minimise_scalar(lambda x: (x**3 - 3 * x, 3 * x**2 - 3), 0.3, 2.0, probes=2)
    assert search.best.x == pytest.approx(1.0, abs=1e-12)
    assert len(search.points) == 3
    assert search.stopped == "no interval promises a lower value"


@given(st.floats(-6, 6), st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=50, deadline=None)
def test_one_basin_is_found_to_the_tolerance(where: float, scale: float, level: float) -> None:
    def function(x: float) -> tuple[float, float]:
        return level + scale * math.log(math.cosh(x - where)), scale * math.tanh(x - where)

    search = minimise_scalar(function, -8, 8)
    assert search.best.value - level <= 1e-8 * max(scale, abs(level))
    assert len(search.points) <= 24
    assert not search.at_end


def test_the_deeper_of_two_basins_is_found() -> None:
    def function(x: float) -> tuple[float, float]:
        first, second = math.exp(-((x + 4) ** 2)), 1.2 * math.exp(-((x - 5.3) ** 2))
        return -first - second, 2 * (x + 4) * first + 2 * (x - 5.3) * second

    search = minimise_scalar(function, -8, 8)
    assert search.best.x == pytest.approx(5.3, abs=1e-4)


@pytest.mark.parametrize(("sign", "end"), [(1, -3.0), (-1, 3.0)])
def test_a_minimum_at_an_end_is_said_to_be_there(sign: int, end: float) -> None:
    search = minimise_scalar(lambda x: (math.exp(sign * x), sign * math.exp(sign * x)), -3, 3)
    assert search.best.x == end
    assert search.at_end
    assert len(search.points) == 9


@pytest.mark.parametrize(("sign", "end"), [(1, 0), (-1, 1)])
def test_an_end_is_known_again_where_its_number_is_not_round(sign: int, end: int) -> None:
    search = minimise_scalar(lambda x: (math.exp(sign * x), sign * math.exp(sign * x)), *LOG_RANGE)
    assert search.best.x == LOG_RANGE[end]
    assert search.at_end


def test_points_that_fail_are_left_out() -> None:
    def function(x: float) -> tuple[float, float]:
        return (math.inf, math.nan) if x < -2 else (x * x, 2 * x)

    search = minimise_scalar(function, -4, 3.7)
    assert abs(search.best.x) < 1e-3


def test_the_budget_holds() -> None:
    search = minimise_scalar(lambda x: (abs(x - 0.1234), math.copysign(1, x - 0.1234)), -1, 1, max_evaluations=12)
    assert len(search.points) == 12
    assert "budget" in search.stopped


def test_probes_go_from_right_to_left_so_that_warm_starts_are_near() -> None:
    search = minimise_scalar(lambda x: (x * x, 2 * x), -1, 1, probes=5)
    assert [point.x for point in search.points[:5]] == [1, 0.5, 0, -0.5, -1]


def test_misuse_is_refused() -> None:
    with pytest.raises(bilevel.ArgumentError, match="low < high"):
        minimise_scalar(lambda x: (x, 1.0), 1, 1)
    with pytest.raises(bilevel.ArgumentError, match="at least 2 probes"):
        minimise_scalar(lambda x: (x, 1.0), 0, 1, probes=1)
