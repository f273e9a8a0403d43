"""Runs that several tests look at."""

from __future__ import annotations

import pytest

from bilevel.hyperopt.data import load_bundled
from bilevel.hyperopt.outcome import Outcome, Penalty, TuneSettings
from bilevel.hyperopt.tune import tune


@pytest.fixture(scope="package")
def diabetes() -> Outcome:
    return tune(load_bundled("diabetes"))


@pytest.fixture(scope="package")
def wine_per_feature() -> Outcome:
    return tune(load_bundled("wine"), TuneSettings(penalty=Penalty.FEATURE, folds=3, seed=2))
