"""Settings shared by all tests: hypothesis profiles, seeds, and the data that may lie beside the repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples at every run, so that a red test is a change of the code and not of the dice.
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("long", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Many small problems: more threads only make them wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--replay", action="store_true",
        help="replay what a function does from its second evaluation on, so that every test is one of replays too",
    )  # fmt: skip
    parser.addoption("--long", action="store_true", help="run the tests marked long too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "counts: counts evaluations of the function itself, or compares them with replays"
    )
    config.addinivalue_line("markers", "long: one of many alike; runs only with --long, as `make test-long` does")
    if config.getoption("--replay"):
        _replay_at_once()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    if config.getoption("--replay"):
        for item in items:
            if item.get_closest_marker("counts"):
                item.add_marker(pytest.mark.skip(reason="counts evaluations of the function itself"))


def _replay_at_once() -> None:
    """Let a layer's first call note what its function does, and trust it without another look."""
    from bilevel.layers.inspector import Inspector
    from bilevel.replay.cache import ReplayCache

    inspect_once, attempt = Inspector.inspect_once, ReplayCache._try

    def trusting(cache: Any, entry: Any, *args: Any) -> None:
        attempt(cache, entry, *args)
        entry.trusted = not entry.given_up

    def eager(self: Any, problem: Any, x: Any, function: Any, *, captures: bool, again: bool = False) -> Any:
        first = inspect_once(self, problem, x, function, captures=captures, again=again)
        if first.found is None:
            return first
        return first._replace(replays=self.reuse_inspection(problem, x, function, captures=captures))

    ReplayCache._try = trusting
    Inspector.inspect_once = eager


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository; tests that need it are skipped where it is absent."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the data folder beside the repository (../shared/data) is absent")
    return path
