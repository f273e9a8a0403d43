"""What the strategies draw is what they say, and a profile of the command line takes effect."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import bilevel
from bilevel.testing import strategies as draw
from bilevel.testing.strategies import RandomBatch, RandomProblem

FAMILIES = {
    "strongly_convex": draw.strongly_convex(),
    "merely_convex": draw.merely_convex(),
    "nonconvex": draw.nonconvex(),
    "ill_conditioned": draw.ill_conditioned(),
    "badly_scaled": draw.badly_scaled(),
    "roots": draw.roots(),
    "contractions": draw.contractions(),
}


def residual(problem: RandomProblem, x: torch.Tensor) -> torch.Tensor:
    if problem.make is bilevel.argmin:
        return torch.func.grad(problem.function)(x, *problem.args)
    value = problem.function(x, *problem.args)
    return x - value if problem.make is bilevel.fixed_point else value


@pytest.mark.parametrize("name", FAMILIES)
@given(st.data())
def test_the_closed_form_solves_the_problem_at_the_stated_condition(name: str, data: st.DataObject) -> None:
    problem = data.draw(FAMILIES[name])
    x = problem.solution(*problem.args)
    J = torch.func.jacrev(lambda at: residual(problem, at))(x)
    size = float(torch.linalg.matrix_norm(J, 2) * (1 + x.norm()))
    assert float(residual(problem, x).norm()) <= 1e-12 * size * problem.condition**0.5
    kappa = float(torch.linalg.cond(J))
    assert kappa <= 1.2 * problem.condition
    if name == "ill_conditioned":
        assert 1e4 * 0.9 <= kappa <= 1.1e8
    if name == "badly_scaled":
        root = J.diagonal().sqrt()
        assert float(torch.linalg.cond(J / root / root.unsqueeze(-1))) < 30
    if problem.make is bilevel.argmin:
        assert float(torch.linalg.eigvalsh(0.5 * (J + J.mT))[0]) > 0
    assert str(problem.size) in repr(problem) and problem.to(torch.float32).dtype == torch.float32


def test_nonconvex_problems_are_and_convex_ones_flatten_out() -> None:
    problem = find(draw.nonconvex(), lambda _: True)
    H = torch.func.hessian(problem.function)(torch.zeros(problem.size, dtype=torch.float64), *problem.args)
    assert float(torch.linalg.eigvalsh(H)[-1]) < 0
    flat = find(draw.merely_convex(), lambda _: True)
    far = torch.full((flat.size,), 1e3, dtype=torch.float64)
    assert 0 < float(torch.linalg.eigvalsh(torch.func.hessian(flat.function)(far, *flat.args))[0]) < 1e-6


@given(st.integers(0, 6), st.data())
def test_trees_hold_as_many_numbers_as_asked(size: int, data: st.DataObject) -> None:
    tree = data.draw(draw.trees(size=size, dtype=torch.float32))
    leaves = pytree.tree_leaves(tree)
    assert sum(leaf.numel() for leaf in leaves) == size
    assert all(leaf.dtype == torch.float32 for leaf in leaves)


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        (draw.shapes(), lambda shape: shape == ()),
        (draw.shapes(), lambda shape: 0 in shape),
        (draw.shapes(), lambda shape: 1 in shape and len(shape) == 3),
        (draw.trees(), lambda tree: isinstance(tree, dict) and any(isinstance(v, (list, tuple)) for v in tree.values())),
        (draw.trees(), lambda tree: isinstance(tree, torch.Tensor)),
        (draw.trees(size=5), lambda tree: any(leaf.ndim == 0 for leaf in pytree.tree_leaves(tree))),
        (draw.tensors((2, 3), scale=10.0), lambda t: t.shape == (2, 3) and float(t.abs().max()) > 3),
        (draw.tensors(draw.shapes(empty=False)), lambda t: t.ndim == 2),
        (draw.problems(regular=True), lambda p: p.make is bilevel.fixed_point),
        (draw.problems(), lambda p: p.condition > 1e7),
        (draw.batches(draw.roots()), lambda b: b.size > 1 and None in b.in_dims and b.in_dims[0] == 2),
    ],
)  # fmt: skip
def test_corners_are_drawn(strategy: st.SearchStrategy, wanted) -> None:
    find(strategy, wanted, settings=settings(max_examples=3000, suppress_health_check=list(HealthCheck)))


@given(draw.batches(draw.problems(regular=True)))
def test_members_of_a_batch_are_problems_too(batch: RandomBatch) -> None:
    for number in range(batch.size):
        args = batch.single(number)
        assert [a.shape for a in args] == [a.shape for a in batch.problem.args]
        x = batch.problem.layer()(batch.problem.init, *args)
        torch.testing.assert_close(x, batch.problem.solution(*args), atol=1e-6, rtol=1e-6)


def test_a_pytree_of_another_size_is_refused() -> None:
    problem = find(draw.roots(), lambda p: p.size == 2)
    with pytest.raises(bilevel.ShapeError, match=r"trees\(size=\.\.\.\)"):
        problem.in_terms_of({"a": torch.zeros(3)})


def test_the_profile_of_the_command_line_takes_effect(tmp_path: Path) -> None:
    # `make test-long` rests on it, and tests/conftest.py loads a profile of its own first.
    conftest = (Path(__file__).resolve().parents[1] / "conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_one.py").write_text(
        "from hypothesis import settings\ndef test_it():\n    print('examples', settings().max_examples)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(tmp_path)]
    command.append("--hypothesis-profile=long")
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "examples 1000" in done.stdout
