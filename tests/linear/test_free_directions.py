"""Arguments that change which directions of a solution are free: there is no derivative, and reverse mode says so as forward mode does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import bilevel
from bilevel import Status

F64, F32 = torch.float64, torch.float32
dtypes = pytest.mark.parametrize("dtype", [F64, F32])
NONE = "no derivative: an argument changes which directions of the solution are free"


def dependent(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Two equations for the difference alone: they have a solution only where t[1] = 2 t[0]."""
    return torch.stack([x[0] - x[1] - t[0], 2 * (x[0] - x[1]) - t[1]])


DEPENDENT = bilevel.root(dependent)


def difference(t: torch.Tensor, layer: Callable[..., torch.Tensor] = DEPENDENT) -> torch.Tensor:
    x = layer(torch.zeros(2, dtype=t.dtype), t)
    return x[0] - x[1]


def squares(w: torch.Tensor, X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((X @ w - y) ** 2).sum()


def duplicated(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    return torch.cat([X, X[:, :1]], 1).to(dtype), torch.linspace(-1, 1, 8, dtype=dtype)


def plain(
    function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, *, create_graph: bool = False
) -> torch.Tensor:
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, create_graph=create_graph)[0]


MODES: dict[str, Callable[..., torch.Tensor]] = {
    "autograd": plain,
    "autograd, create_graph": lambda f, at: plain(f, at, create_graph=True),
    "grad": lambda f, at: grad(f)(at),
    "jacrev": lambda f, at: jacrev(f)(at),
    "vmap of grad": lambda f, at: vmap(grad(f))(torch.stack([at, at])),
    "hessian": lambda f, at: hessian(f)(at),
    "jacobian of batched grads": lambda f, at: torch.autograd.functional.jacobian(lambda t: f(t)[None], at, vectorize=True),
}  # fmt: skip
# Forward mode, which a Hessian begins with, refuses in other words.
SAID = {"hessian": "outside the range of a matrix that is singular"}
modes = pytest.mark.parametrize("mode", MODES)


@dtypes
@modes
def test_dependent_equations_whose_right_hand_sides_are_free(mode: str, dtype: torch.dtype) -> None:
    t = torch.tensor([1.3, 2.6], dtype=dtype)
    with pytest.raises(bilevel.SolveError, match=SAID.get(mode, f"{NONE}.* remedy: put an equation that pins one")):
        MODES[mode](difference, t)
    with pytest.raises(bilevel.SolveError):
        jacfwd(difference)(t)


@dtypes
@modes
def test_least_squares_with_a_duplicated_column(mode: str, dtype: torch.dtype) -> None:
    (X, y), layer = duplicated(dtype), bilevel.argmin(squares)
    fitted = lambda X, y: (X @ layer(torch.zeros(4, dtype=dtype), X, y)) @ y
    with pytest.raises(bilevel.SolveError, match=SAID.get(mode, f"{NONE}.* remedy: pin one unknown, add a small")):
        MODES[mode](lambda X: fitted(X, y), X)
    by_y = MODES[mode](lambda y: fitted(X, y), y)
    hat = X.double() @ torch.linalg.pinv(X.double(), rtol=1e-6)
    right = 2 * (hat if mode == "hessian" else hat @ y.double())
    torch.testing.assert_close(by_y.double(), right.expand_as(by_y), atol=1e-10 if dtype == F64 else 1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["autograd", "autograd, create_graph", "grad", "jacrev", "hessian"])
def test_what_is_made_redundant_outside_has_its_derivative(mode: str) -> None:
    # By each argument alone there is none; by what they were computed from there is.
    found = MODES[mode](lambda s: difference(torch.stack([s, 2 * s])) ** 2, torch.tensor(1.3, dtype=F64))
    torch.testing.assert_close(found, torch.tensor(2.0 if mode == "hessian" else 2.6, dtype=F64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("create_graph", [False, True])
def test_what_arguments_were_computed_from_is_asked_likewise(create_graph: bool) -> None:
    with pytest.raises(bilevel.SolveError, match=NONE):
        plain(lambda s: difference(s + 1.0), torch.tensor([0.3, 1.6], dtype=F64), create_graph=create_graph)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_shift_that_changes_nothing_is_no_change_of_directions(dtype: torch.dtype) -> None:
    # All of the derivative of the equations by b is rounding.
    target = torch.softmax(torch.arange(5.0, dtype=dtype), 0)
    layer = bilevel.argmin(lambda x, b: torch.logsumexp(x + b, 0) - ((x + b) * target).sum())

    def outcome(b: torch.Tensor) -> torch.Tensor:
        x = layer(torch.zeros(5, dtype=dtype), b)
        return x[0] - x[1]

    for b in (0.7, -3.0, 0.0):
        assert abs(float(plain(outcome, torch.tensor(b, dtype=dtype)))) < 100 * torch.finfo(dtype).eps


def test_one_problem_of_a_batch_and_every_policy() -> None:
    X, y = duplicated(F64)
    regular = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    batch = torch.stack([regular, X, -regular])

    def slopes(layer: Callable[..., torch.Tensor], X: torch.Tensor) -> torch.Tensor:
        return plain(lambda X: (vmap(lambda X: layer(torch.zeros(4, dtype=F64), X, y))(X) ** 2).sum(1)[::2].sum(), X)

    def fits(layer: Callable[..., torch.Tensor]) -> torch.Tensor:
        return vmap(grad(lambda X: (X @ layer(torch.zeros(4, dtype=F64), X, y)) @ y))(batch)

    nan = fits(bilevel.argmin(squares, on_failure="nan"))
    assert nan.isfinite().all(-1).all(-1).tolist() == [True, False, True]
    alone = grad(lambda X: (X @ bilevel.argmin(squares)(torch.zeros(4, dtype=F64), X, y)) @ y)(regular)
    torch.testing.assert_close(nan[0], alone)
    with bilevel.record() as reports:
        assert bool(fits(bilevel.argmin(squares, on_failure="ignore")).isfinite().all())
    assert reports.backward[0].status == (Status.CONVERGED, Status.SINGULAR, Status.CONVERGED)
    with pytest.warns(bilevel.SolveWarning, match=f"{NONE} in 1 of 3 problems, first in number 1"):
        fits(bilevel.argmin(squares, on_failure="warn"))
    assert slopes(bilevel.argmin(squares, on_failure="nan"), batch).isfinite().all(-1).all(-1).tolist() == [
        True,
        False,
        True,
    ]


def test_the_remedies_work() -> None:
    t, (X, y) = torch.tensor([1.3, 2.6], dtype=F64), duplicated(F64)
    pinned = bilevel.root(lambda x, t: torch.stack([x[0] - x[1] - t[0], x[0] - 3.0]))
    torch.testing.assert_close(grad(lambda t: difference(t, pinned))(t), torch.tensor([1.0, 0.0], dtype=F64))
    start = torch.zeros(4, dtype=F64)
    ridge = bilevel.argmin(lambda w, X, y: squares(w, X, y) + 1e-3 * ((w - start) ** 2).sum())
    torch.testing.assert_close(
        jacrev(lambda X: ridge(start, X, y))(X), jacfwd(lambda X: ridge(start, X, y))(X), atol=1e-6, rtol=1e-6
    )
    layer, weights = bilevel.argmin(squares), y.clone().requires_grad_()
    design = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad((X @ layer(start, design.detach(), weights)) @ y, weights)
    torch.testing.assert_close(slope, X @ torch.linalg.pinv(X) @ y, atol=1e-10, rtol=0)


def test_complex_and_sparse_arguments() -> None:
    layer = bilevel.root(lambda x, z: dependent(x, torch.stack([z.real, z.imag])))
    for mode in ("autograd", "grad"):
        with pytest.raises(bilevel.SolveError, match=NONE):
            MODES[mode](
                lambda z: difference(z.real, lambda start, _: layer(start, z)),
                torch.tensor(1.3 + 2.6j, dtype=torch.complex128),
            )
    scaled = bilevel.root(
        lambda x, S: dependent(
            torch.stack([x[0] - x[1], torch.zeros_like(x[0])]), (S @ torch.tensor([[1.3], [2.6]], dtype=F64))[:, 0]
        )
    )
    sparse = torch.eye(2, dtype=F64).to_sparse().requires_grad_()
    x = scaled(torch.zeros(2, dtype=F64), sparse)
    with pytest.raises(bilevel.SolveError, match=NONE):
        torch.autograd.grad(x[0] - x[1], sparse)


def repeated_equations(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.stack([x.sum() - t, 2 * x.sum() - 2 * t])


def one_pinned(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.stack([x.sum() - t, x[0] - 0.3])


def drifting_mapping(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[0], 0.5 * x[1] + t])


def constant_first(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.full_like(t, 0.3), 0.5 * x[1] + t])


@pytest.mark.parametrize(
    ("kind", "singular", "words", "remedied", "slope"),
    [
        (bilevel.root, repeated_equations, "put an equation that pins one unknown", one_pinned, 1.0),
        (bilevel.fixed_point, drifting_mapping, "let the mapping return a constant", constant_first, 2.0),
    ],
    ids=["root", "fixed_point"],
)
def test_equations_have_a_remedy_of_their_own(
    kind: Any, singular: Any, words: str, remedied: Any, slope: float
) -> None:
    t = torch.tensor(1.0, dtype=F64, requires_grad=True)
    with pytest.raises(bilevel.SolveError, match=words) as caught:
        kind(singular)(torch.zeros(2, dtype=F64), t)[0].backward()
    assert caught.value.report.status == bilevel.Status.SINGULAR and "objective" not in str(caught.value)
    x = kind(remedied)(torch.zeros(2, dtype=F64), t)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), t)[0], torch.tensor(slope, dtype=F64))
