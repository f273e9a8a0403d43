"""The types that users see: ``mypy --strict`` on a sample project has nothing to say."""

import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import bilevel

SAMPLE = Path(__file__).parent / "typing" / "sample.py"


@pytest.mark.slow
def test_strict_mypy_accepts_the_sample(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    settings = tmp_path / "mypy.ini"
    # An installed package's own errors are not shown, so they are not here, where it is found as source.
    # (torch's Tensor.backward has no types.)
    settings.write_text(
        "[mypy]\nstrict = true\nuntyped_calls_exclude = torch\n\n[mypy-bilevel.*]\nfollow_imports = silent\n"
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(settings),
        "--cache-dir",
        str(tmp_path / "cache"),
        str(SAMPLE),
    ]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=SAMPLE.parents[2], check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_sample_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SAMPLE), run_name="__main__")
    assert "torch.Size([2])" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "inner_objective",
        "outer_objective",
        "prepare",
        "inner_prox",
        "inner_constraints",
        "objective_arguments",
        "initial",
        "tolerance_of",
        "constants",
    ],
)
def test_overrides_may_name_their_arguments(name: str) -> None:
    # Type checkers refuse an override with other names if the arguments can be passed by name.
    parameters = inspect.signature(getattr(bilevel.BilevelProblem, name)).parameters.values()
    assert all(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters)
