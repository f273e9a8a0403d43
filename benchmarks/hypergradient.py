"""The hypergradient of per-feature logistic regression on breast cancer (30 strengths, float64), given its solution.

The floor is conjugate gradients over one retained gradient graph, written out: no checks, no report, no batch.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from timing import check, compare, rounds

import bilevel

F64 = torch.float64
COUNT = rounds(60)

features, labels = load_breast_cancer(return_X_y=True)
features = torch.tensor(StandardScaler().fit_transform(features), dtype=F64)
labels = torch.tensor(2.0 * labels - 1.0, dtype=F64)
X, y, Xv, yv = features[:400], labels[:400], features[400:], labels[400:]
theta = torch.zeros(30, dtype=F64)
start = torch.zeros(30, dtype=F64)


def inner(w, theta, X, y):
    return torch.nn.functional.softplus(-y * (X @ w)).sum() + 0.5 * (theta.exp() * w**2).sum()


def outer(w):
    return torch.nn.functional.softplus(-yv * (Xv @ w)).mean()


solution = bilevel.argmin(inner)(start, theta, X, y)


def by_hand() -> torch.Tensor:
    w = solution.detach().requires_grad_(True)
    t = theta.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(inner(w, t, X, y), w, create_graph=True)
    (v,) = torch.autograd.grad(outer(w), w)
    q, r = torch.zeros_like(v), v.clone()
    p, rr = r, r @ r
    goal = 1e-10 * rr.sqrt()
    for _ in range(300):
        (Ap,) = torch.autograd.grad(gradient, w, p, retain_graph=True)
        step = rr / (p @ Ap)
        q, r = q + step * p, r - step * Ap
        new = r @ r
        if new.sqrt() <= goal:
            break
        p, rr = r + (new / rr) * p, new
    (cross,) = torch.autograd.grad(gradient, t, q)
    return -cross


def dense() -> torch.Tensor:
    """The closed form: not a floor for a library, but the reference for the answer."""
    m = y * (X @ solution)
    curve = torch.sigmoid(m) * torch.sigmoid(-m)
    H = X.T @ (curve[:, None] * X) + torch.diag(theta.exp())
    v = -(Xv.T @ (yv * torch.sigmoid(-yv * (Xv @ solution)))) / len(yv)
    return -theta.exp() * solution * torch.linalg.solve(H, v)


def known(objective, init, *args):
    return solution


def through_a_layer(linear_solver):
    layer = bilevel.argmin(inner, solver=known, linear_solver=linear_solver, tolerance=bilevel.Tolerance(delta=1e-6))

    def run() -> torch.Tensor:
        t = theta.detach().requires_grad_(True)
        outer(layer(start, t, X, y)).backward()
        assert t.grad is not None
        return t.grad

    return run


def backward_alone(linear_solver):
    """The derivative only: the forward call, with its checks, is made anew outside the clock."""
    layer = bilevel.argmin(inner, solver=known, linear_solver=linear_solver, tolerance=bilevel.Tolerance(delta=1e-6))
    ready: list[tuple[torch.Tensor, torch.Tensor]] = []

    def refill() -> None:
        for _ in range(REPEAT * (COUNT + 2)):
            t = theta.detach().requires_grad_(True)
            ready.append((outer(layer(start, t, X, y)), t))

    def run() -> torch.Tensor:
        if not ready:
            refill()
        loss, t = ready.pop()
        loss.backward()
        assert t.grad is not None
        return t.grad

    refill()
    return run


class Tuning(bilevel.BilevelProblem):
    def inner_objective(self, w, theta, data):
        return inner(w, theta, *data)

    def outer_objective(self, w, theta, data):
        return outer(w)


def known_problem(objective, init, theta, data):
    return solution


def made() -> Tuning:
    return Tuning(solver=known_problem, tolerance=bilevel.Tolerance(delta=1e-6), warm_start=False)


TUNING = made()


def of_a_new_problem() -> torch.Tensor:
    return made().hypergradient(theta, (X, y), init=start).grad


def of_the_same_problem() -> torch.Tensor:
    return TUNING.hypergradient(theta, (X, y), init=start).grad


REPEAT = 5
CONTESTANTS = {
    "handwritten CG over one retained graph": by_hand,
    "bilevel, default, derivative alone": backward_alone(None),
    "bilevel, CG, derivative alone": backward_alone(bilevel.CG()),
    "bilevel, default, layer call and derivative": through_a_layer(None),
    "bilevel, CG, layer call and derivative": through_a_layer(bilevel.CG()),
    "bilevel, hypergradient() of a new problem": of_a_new_problem,
    "bilevel, hypergradient() of the same again": of_the_same_problem,
}

print("Agreement with the closed form")
for name, function in CONTESTANTS.items():
    check(name, function(), dense(), 1e-7)
compare(
    "Hypergradient of per-feature logistic regression, breast cancer", CONTESTANTS,
    "handwritten CG over one retained graph", COUNT, REPEAT,
)  # fmt: skip
