"""Do the certified bounds hold, and how tight are they? At least 20,000 random problems against references in extended precision.

Each problem is solved, inner and adjoint, to an accuracy drawn at random between crude and rounding, in float32 or float64, with
a condition number between 1 and 1e6. The true errors are measured against the solution of the same numbers found by Newton steps whose
residuals are computed in numpy's long double (80 bits on x86). Families of ``hard_families.py`` begin further away, and declare little or nothing.

Small Hessians are factorised. ``--by-products`` forbids that, and the bounds are found as those of a large problem are: by conjugate
gradients, in as many products as ``--products`` allows.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import hard_families
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import bilevel
from bilevel.certificates import _inner_point
from bilevel.certificates._certificate import Certificate
from bilevel.certificates._errors import errors_at, through
from bilevel.certificates._point import Point
from bilevel.certificates.fixed_points import identify_support, newton_on_support, proximal_distance
from bilevel.certificates.losses import logistic_constants, softmax_constants, squares_constants
from bilevel.certificates.refuting import observed
from bilevel.equations.problem import Problem
from bilevel.equations.system import ArgminSystem
from bilevel.linear._base import solve_linear
from bilevel.pytree import Raveler, flatten_arguments
from bilevel.reports import Basis
from bilevel.solvers.judging.judge import solve_inner
from bilevel.tolerance import Target

Array = np.ndarray
LD = np.longdouble
CLASSES = 3
DECLARED = ("squares", "logistic", "softmax", "proximal network", "lasso")
FAMILIES = (*DECLARED, *hard_families.FAMILIES)


@dataclass
class Case:
    """A batch of K problems: objectives of one problem, θ (K, p), data with leading axes K, constants, and a reference."""

    inner: Callable[..., torch.Tensor]
    outer: Callable[..., torch.Tensor]
    theta: torch.Tensor
    data: tuple[torch.Tensor, ...]
    constants: bilevel.Constants
    gradient: Callable[[Array], Array]
    hessian: Callable[[Array], Array]
    outer_gradient: Callable[[Array], Array]
    pulled: Callable[[Array, Array], Array]  # (φ, q) ↦ Bᵀq
    outer_value: Callable[[Array], Array]
    size: int
    start: torch.Tensor
    valid: torch.Tensor | None = None
    minimum: Callable[[], Array] | None = None
    # Of a Lasso alone: bounds of ‖φ − φ*‖ by the formula and as shown, φ, and (X, y, strengths).
    distance: tuple[torch.Tensor, ...] = ()
    beta: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    design: tuple[Array, ...] = ()


def extended(*tensors: torch.Tensor) -> tuple[Array, ...]:
    return tuple(t.double().numpy().astype(LD) for t in tensors)


def spectrum(generator: torch.Generator, k: int, n: int) -> torch.Tensor:
    """Singular values (K, n) whose squares have a ratio drawn between 1 and 1e6, with the ratio attained."""
    log_ratio = 3 * torch.rand(k, 1, generator=generator, dtype=torch.float64)
    inside = torch.rand(k, n, generator=generator, dtype=torch.float64)
    inside[:, 0], inside[:, -1] = 0.0, 1.0
    return 10 ** (-log_ratio * inside)


def designs(generator: torch.Generator, k: int, rows: int, n: int) -> torch.Tensor:
    """Design matrices (K, rows, n) with such a spectrum."""
    x = torch.randn(k, rows, n, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return math.sqrt(rows) * (u * spectrum(generator, k, n).unsqueeze(-2)) @ vh


def linear_model(loss: str, generator: torch.Generator, k: int, dtype: torch.dtype) -> Case:
    """Mean loss of a linear model with a ridge strength for each feature; the outer loss is that of other rows."""
    rows, n = 24, int(torch.randint(2, 7, (), generator=generator))
    width = CLASSES if loss == "softmax" else 1
    X, Xv = designs(generator, k, rows, n).to(dtype), designs(generator, k, rows, n).to(dtype)
    common = -14 * torch.rand(k, 1, generator=generator, dtype=torch.float64)
    theta = (common + 2 * torch.rand(k, n, generator=generator, dtype=torch.float64) - 1).to(dtype)
    if loss == "squares":
        y, yv = (torch.randn(k, rows, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    else:
        y, yv = (torch.randint(0, max(2, width), (k, rows), generator=generator) for _ in range(2))
        if loss == "logistic":
            y, yv = y.to(dtype), yv.to(dtype)

    def fit(phi, X, y):
        if loss == "squares":
            return 0.5 * ((X @ phi - y) ** 2).mean()
        if loss == "logistic":
            s = X @ phi
            return (torch.logaddexp(s, s.new_zeros(())) - y * s).mean()  # torch's softplus drops terms of 2e-9
        s = X @ phi.reshape(n, width)
        return (s.logsumexp(1) - s.gather(1, y[:, None])[:, 0]).mean()

    def inner(phi, theta, X, y, Xv, yv):
        return fit(phi, X, y) + 0.5 * (theta.exp() * (phi.reshape(n, width) ** 2).sum(1)).sum()

    def outer(phi, theta, X, y, Xv, yv):
        return fit(phi, Xv, yv)

    make = {"squares": squares_constants, "logistic": logistic_constants, "softmax": softmax_constants}[loss]
    of_train, of_test = ([make(x) for x in both.double()] for both in (X, Xv))
    strengths = theta.double().exp()
    mu, l_h = strengths.amin(1), torch.stack([c.hessian_lipschitz for c in of_train])
    smoothness = torch.stack([c.smoothness for c in of_test])
    if loss == "squares":
        gram = X.double().mT @ X.double() / rows + torch.diag_embed(strengths)
        mu = torch.linalg.eigvalsh(gram)[:, 0] * (1 - 1e-9)
        smoothness = torch.linalg.matrix_norm(Xv.double().mT @ Xv.double() / rows, 2) * (1 + 1e-12)
    constants = bilevel.Constants(
        strong_convexity=mu * (1 - 1e-12), outer_smoothness=smoothness, hessian_lipschitz=l_h,
        cross_lipschitz=strengths.amax(1) * (1 + 1e-12), outer_cross_lipschitz=0.0,
    )  # fmt: skip
    Xe, Xve, te = extended(X, Xv, theta)
    hot = [F.one_hot(t.long(), width).double().numpy() if loss == "softmax" else t.double().numpy() for t in (y, yv)]
    ye, yve = (h.astype(LD) for h in hot)
    ridge = np.repeat(np.exp(te), width, axis=1)

    def residuals(phi, X, y):  # ℓ′ (K, rows, width)
        s = X @ phi.reshape(k, n, width)
        if loss == "squares":
            return s - y[..., None]
        if loss == "logistic":
            return 1 / (1 + np.exp(-s)) - y[..., None]
        e = np.exp(s - s.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True) - y

    def slope(phi, X, y):
        return (np.swapaxes(X, 1, 2) @ residuals(phi, X, y)).reshape(k, -1) / rows

    def hessian(phi):
        if loss == "squares":
            blocks = np.swapaxes(Xe, 1, 2) @ Xe / rows
        elif loss == "logistic":
            p = residuals(phi, Xe, 0 * ye)
            blocks = np.swapaxes(Xe, 1, 2) @ (p * (1 - p) * Xe) / rows
        else:
            p = residuals(phi, Xe, 0 * ye)
            curve = p[..., None] * np.eye(width, dtype=LD) - p[..., None] * p[..., None, :]
            blocks = np.einsum("kri,krab,krj->kiajb", Xe, curve, Xe).reshape(k, n * width, n * width) / rows
        return blocks + ridge[:, :, None] * np.eye(n * width, dtype=LD)

    def pulled(phi, q):
        return (ridge * phi * q).reshape(k, n, width).sum(-1)

    def value(phi):
        s = Xve @ phi.reshape(k, n, width)
        if loss == "squares":
            return 0.5 * ((s[..., 0] - yve) ** 2).mean(-1)
        if loss == "logistic":
            return (np.logaddexp(0, s[..., 0]) - yve * s[..., 0]).mean(-1)
        top = s.max(-1)
        return (top + np.log(np.exp(s - top[..., None]).sum(-1)) - (s * yve).sum(-1)).mean(-1)

    return Case(
        inner, outer, theta, (X, y, Xv, yv), constants,
        lambda phi: slope(phi, Xe, ye) + ridge * phi, hessian, lambda phi: slope(phi, Xve, yve), pulled, value,
        n * width, torch.zeros(k, n * width, dtype=dtype),
    )  # fmt: skip


def proximal_network(generator: torch.Generator, k: int, dtype: torch.dtype) -> Case:
    """A two-layer tanh network whose hidden weights φ are held near θ by (λ/2)‖φ − θ‖², λ above its smoothness β."""
    rows, inputs, hidden = 12, 2, 3
    n = inputs * hidden

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(k, *shape, generator=generator, dtype=torch.float64).to(dtype)

    X, Xv, a, theta = draw(rows, inputs), draw(rows, inputs), draw(hidden), 0.5 * draw(n)
    y, yv = draw(rows), draw(rows)
    # With f = Σ a_j tanh(w_j·x): ‖∇f‖ ≤ ‖a‖‖x‖, ‖∇²f‖ ≤ t₂ max|a|‖x‖², ‖∇³f‖ ≤ 2 max|a|‖x‖³, |f − y| ≤ ‖a‖₁ + |y|.
    t2 = 4 / (3 * math.sqrt(3))

    def sizes(X, y):
        length, big = X.double().norm(dim=-1), a.double().abs().amax(-1, keepdim=True)
        first = a.double().norm(dim=-1, keepdim=True) * length
        off = a.double().abs().sum(-1, keepdim=True) + y.double().abs()
        return first, t2 * big * length**2, 2 * big * length**3, off

    first, second, third, off = sizes(X, y)
    beta = (off * second).mean(-1)
    lam = (beta * (1 + 10 ** (torch.rand(k, generator=generator, dtype=torch.float64) * 3 - 2))).to(dtype)
    firstv, secondv, _, offv = sizes(Xv, yv)
    constants = bilevel.Constants(
        strong_convexity=(lam.double() - beta) * (1 - 1e-9),
        outer_smoothness=(firstv**2 + offv * secondv).mean(-1) * (1 + 1e-12),
        hessian_lipschitz=(3 * first * second + off * third).mean(-1) * (1 + 1e-12),
        cross_lipschitz=0.0, outer_cross_lipschitz=0.0, cross_norm=lam.double(),
    )  # fmt: skip

    def fit(phi, X, y, a):
        return 0.5 * ((torch.tanh(X @ phi.reshape(hidden, inputs).T) @ a - y) ** 2).mean()

    def inner(phi, theta, X, y, Xv, yv, a, lam):
        return fit(phi, X, y, a) + 0.5 * lam * ((phi - theta) ** 2).sum()

    def outer(phi, theta, X, y, Xv, yv, a, lam):
        return fit(phi, Xv, yv, a)

    Xe, Xve, ye, yve, ae, te, le = extended(X, Xv, y, yv, a, theta, lam)

    def layer(phi, X):
        return np.tanh(X @ np.swapaxes(phi.reshape(k, hidden, inputs), 1, 2))

    def slope(phi, X, y):
        t = layer(phi, X)
        r = (t * ae[:, None]).sum(-1) - y
        return np.einsum("kr,krj,kri->kji", r, ae[:, None] * (1 - t * t), X).reshape(k, n) / rows

    def hessian(phi):
        t = layer(phi, Xe)
        s, r = 1 - t * t, (t * ae[:, None]).sum(-1) - ye
        jac = np.einsum("krj,kri->krji", ae[:, None] * s, Xe).reshape(k, rows, n)
        h = np.einsum("kra,krb->kab", jac, jac) / rows
        bend = np.einsum("kr,krj,kri,krl->kjil", r, ae[:, None] * -2 * t * s, Xe, Xe) / rows
        for j in range(hidden):
            at = slice(j * inputs, (j + 1) * inputs)
            h[:, at, at] += bend[:, j]
        return h + le[:, None, None] * np.eye(n, dtype=LD)

    return Case(
        inner, outer, theta, (X, y, Xv, yv, a, lam), constants,
        lambda phi: slope(phi, Xe, ye) + le[:, None] * (phi - te), hessian, lambda phi: slope(phi, Xve, yve),
        lambda phi, q: -le[:, None] * q,
        lambda phi: 0.5 * (((layer(phi, Xve) * ae[:, None]).sum(-1) - yve) ** 2).mean(-1),
        n, theta.clone(),
    )  # fmt: skip


def lasso(generator: torch.Generator, k: int, dtype: torch.dtype) -> Case:
    """min ½‖Xβ − y‖²/m + e^θ‖β‖₁ by proximal steps; where the support is proven, the smooth problem on it is certified."""
    rows, n = 24, int(torch.randint(3, 9, (), generator=generator))
    X, Xv = designs(generator, k, rows, n).to(dtype), designs(generator, k, rows, n).to(dtype)
    truth = torch.randn(k, n, generator=generator, dtype=torch.float64) * (
        torch.rand(k, n, generator=generator, dtype=torch.float64) < 0.6
    )
    y = (X.double() @ truth[..., None])[..., 0] + 0.3 * torch.randn(k, rows, generator=generator, dtype=torch.float64)
    yv = (Xv.double() @ truth[..., None])[..., 0].to(dtype)
    y = y.to(dtype)
    largest = ((X.double().mT @ y.double()[..., None])[..., 0] / rows).abs().amax(1)
    theta = (largest.log() - 4 * torch.rand(k, generator=generator, dtype=torch.float64))[:, None].to(dtype)
    gram = X.double().mT @ X.double() / rows
    eigenvalues = torch.linalg.eigvalsh(gram)
    step = (1 / (eigenvalues[:, -1:] * (1 + 1e-6))).to(dtype)
    strength = theta.exp()

    def gradient_of(beta):
        return (X.mT @ ((X @ beta[..., None])[..., 0] - y)[..., None])[..., 0] / rows

    beta, going = torch.zeros(k, n, dtype=dtype), torch.ones(k, 1, dtype=torch.bool)
    accuracy = 10 ** (-1 - (7 if dtype == torch.float64 else 4) * torch.rand(k, 1, generator=generator))
    for _ in range(3000):
        moved = beta - step * gradient_of(beta)
        mapped = moved.sign() * (moved.abs() - step * strength).clamp_min(0)
        going = going & ((mapped - beta).norm(dim=1, keepdim=True) > step * accuracy * largest[:, None].to(dtype))
        beta = torch.where(going, mapped, beta)
    # The certificate, in float64: the distance from one proximal step, directly and by way of the solution on the support found.
    lam, mu = theta.double().exp(), eigenvalues[:, 0] * (1 - 1e-9)
    eps = torch.finfo(torch.float64).eps

    def distance(x):
        slope = (X.double().mT @ ((X.double() @ x[..., None])[..., 0] - y.double())[..., None])[..., 0] / rows
        moved = x - step.double() * slope
        mapped = moved.sign() * (moved.abs() - step.double() * lam).clamp_min(0)
        size = slope.norm(dim=1) + (gram @ x[..., None])[..., 0].norm(dim=1) + largest
        noise = 16 * eps * (step[:, 0].double() * size + x.norm(dim=1))
        return proximal_distance((x - mapped).norm(dim=1) + noise, step[:, 0].double(), mu), slope, mapped

    direct, _, mapped = distance(beta.double())
    better = newton_on_support(mapped, distance(mapped)[1], gram, lam)
    remainder = distance(better)[0]
    e = torch.minimum(direct, (beta.double() - better).norm(dim=1) + remainder)
    support = identify_support(better, distance(better)[1], lam, remainder, gram.norm(dim=-1))
    valid = (
        support.decided & ((beta != 0) == support.inside).all(1) & ((beta.sign() == better.sign()) | (beta == 0)).all(1)
    )
    mask, sign = support.inside.to(dtype), beta.sign()

    def inner(phi, theta, X, y, Xv, yv, mask, sign):
        fit = 0.5 * ((X @ (mask * phi) - y) ** 2).mean()
        return fit + theta.exp()[0] * (mask * sign * phi).sum() + 0.5 * ((1 - mask) * phi**2).sum()

    def outer(phi, theta, X, y, Xv, yv, mask, sign):
        return 0.5 * ((Xv @ (mask * phi) - yv) ** 2).mean()

    masked = mask.double()[:, :, None] * mask.double()[:, None, :] * gram + torch.diag_embed(1 - mask.double())
    constants = bilevel.Constants(
        strong_convexity=torch.linalg.eigvalsh(masked)[:, 0] * (1 - 1e-9),
        outer_smoothness=torch.linalg.matrix_norm(Xv.double().mT @ Xv.double() / rows, 2) * (1 + 1e-12),
        hessian_lipschitz=0.0, cross_lipschitz=0.0, outer_cross_lipschitz=0.0,
    )  # fmt: skip
    Xe, Xve, ye, yve, te, me, se = extended(X, Xv, y, yv, theta, mask, sign)
    strong = np.exp(te)

    def hessian(phi):
        h = np.swapaxes(Xe, 1, 2) @ Xe / rows * me[:, :, None] * me[:, None, :]
        return h + (1 - me)[:, :, None] * np.eye(n, dtype=LD)

    def gradient(phi):
        r = (Xe @ (me * phi)[..., None])[..., 0] - ye
        return me * (np.swapaxes(Xe, 1, 2) @ r[..., None])[..., 0] / rows + strong * me * se + (1 - me) * phi

    def outer_gradient(phi):
        r = (Xve @ (me * phi)[..., None])[..., 0] - yve
        return me * (np.swapaxes(Xve, 1, 2) @ r[..., None])[..., 0] / rows

    case = Case(
        inner, outer, theta, (X, y, Xv, yv, mask, sign), constants, gradient, hessian, outer_gradient,
        lambda phi, q: (strong * me * se * q).sum(1, keepdims=True),
        lambda phi: 0.5 * (((Xve @ (me * phi)[..., None])[..., 0] - yve) ** 2).mean(-1),
        n, beta, valid,
    )  # fmt: skip
    return replace(case, distance=(direct, e), beta=beta, design=(Xe, ye, strong))


def lasso_solution(case: Case) -> Array:
    """Coordinate descent in float64, then the smooth problem on its support in extended precision."""
    Xe, ye, strong = case.design
    X, y, lam = (a.astype(np.float64) for a in (Xe, ye, strong[:, 0]))
    rows, n = X.shape[1:]
    gram, target = np.swapaxes(X, 1, 2) @ X / rows, (np.swapaxes(X, 1, 2) @ y[..., None])[..., 0] / rows
    beta = case.beta.double().numpy().copy()
    for _ in range(20000):
        before = beta.copy()
        for j in range(n):
            z = target[:, j] - (gram[:, j] * beta).sum(1) + gram[:, j, j] * beta[:, j]
            beta[:, j] = np.sign(z) * np.maximum(np.abs(z) - lam, 0) / gram[:, j, j]
        if np.abs(beta - before).max() < 1e-15:
            break
    on, sign = (beta != 0).astype(LD), np.sign(beta).astype(LD)
    h = np.swapaxes(Xe, 1, 2) @ Xe / rows * on[:, :, None] * on[:, None, :]
    h = h + (1 - on)[:, :, None] * np.eye(n, dtype=LD)
    right = on * ((np.swapaxes(Xe, 1, 2) @ ye[..., None])[..., 0] / rows - strong * sign)
    return refined_solve(h, right)


def hard(family: str, generator: torch.Generator, k: int, dtype: torch.dtype) -> Case:
    """Problems on which evidence from samples misleads."""
    made = hard_families.draw(family, generator, k, dtype)
    return Case(
        made.inner, made.outer, made.theta, made.data, made.constants, made.gradient, made.hessian, made.outer_gradient,
        made.pulled, made.outer_value, made.start.shape[1], made.start,
        minimum=lambda: hard_families.minimise(made, refined_solve),
    )  # fmt: skip


def refined_solve(matrix: Array, right: Array) -> Array:
    """Return A⁻¹b in extended precision: a float64 factorisation, and residuals in long double."""
    plain = matrix.astype(np.float64)
    x = np.zeros_like(right)
    for _ in range(6):
        left = right - (matrix @ x[..., None])[..., 0]
        try:
            x = x + np.linalg.solve(plain, left.astype(np.float64)[..., None])[..., 0]
        except np.linalg.LinAlgError:  # far from a solution, on the way to it
            size = np.abs(plain).max((-2, -1), keepdims=True)
            plain = plain + 1e-14 * size * np.eye(plain.shape[-1])
    return x


def reference(case: Case, start: torch.Tensor) -> tuple[Array, Array, Array, Array]:
    """Return φ*, q*, g and F(φ*) in extended precision, from a float64 solution ``start``."""
    phi = start.double().numpy().astype(LD)
    for _ in range(8):
        phi = phi - refined_solve(case.hessian(phi), case.gradient(phi))
    q = refined_solve(case.hessian(phi), case.outer_gradient(phi))
    return phi, q, -case.pulled(phi, q), case.outer_value(phi)


def flat_problem(case: Case, objective: Callable[..., torch.Tensor], widen: bool) -> Problem:
    tensors, arguments = flatten_arguments((case.theta, *case.data), {})
    if widen:
        tensors = pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, tensors)
    raveler = Raveler.of(case.start[0].double() if widen else case.start[0], "benchmark")
    system = ArgminSystem("benchmark", objective, raveler, arguments)
    return Problem.of(system.lift(len(case.theta), (True,) * len(tensors)), tensors)


@dataclass
class Tally:
    """Counts and ratios bound/error of one family and dtype."""

    problems: int = 0
    certified: dict[str, int] = field(default_factory=dict)
    violations: dict[str, int] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    conditions: list[float] = field(default_factory=list)
    spent: list[int] = field(default_factory=list)
    rounding: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, bound: Array, error: Array, floor: Array) -> None:
        known = np.isfinite(bound)
        self.certified[name] = self.certified.get(name, 0) + int(known.sum())
        # The reference has an error of its own, of which ``floor`` is a generous account.
        self.violations[name] = self.violations.get(name, 0) + int((known & (error > bound + floor)).sum())
        self.ratios.setdefault(name, []).extend(
            (bound[known] / np.maximum(error[known], floor[known] + 1e-300)).tolist()
        )


def allowance_used(case: Case, point: Point) -> dict[str, float]:
    """Return the largest part, over the problems, of the rounding allowed for that ∇G, ρ, ĝ and the corrected value really have."""
    x, q, residual, rho, gradient, value = extended(
        point.x, point.q, point.inner.residual, point.rho, point.gradient, point.corrected_value
    )
    slope = case.gradient(x)
    true = {
        "∇G": (length(residual - slope), point.rounding.residual),
        "ρ": (
            length(rho - (case.outer_gradient(x) - (case.hessian(x) @ q[..., None])[..., 0])),
            point.rounding.rho,
        ),
        "ĝ": (length(gradient + case.pulled(x, q)), point.rounding.gradient),
        "value": (np.abs(value - (case.outer_value(x) - (q * slope).sum(-1))).astype(float), point.rounding.value),
    }
    # What is lost below the smallest normal number is no rounding of a measurable kind.
    return {name: float((off / (allowed.numpy() + 1e-300)).max()) for name, (off, allowed) in true.items()}


def length(a: Array) -> Array:
    return np.sqrt((a * a).sum(-1)).astype(np.float64)


def run_batch(family: str, generator: torch.Generator, k: int, dtype: torch.dtype, tally: Tally, products: int) -> None:
    if family == "lasso":
        case = lasso(generator, k, dtype)
    elif family == "proximal network":
        case = proximal_network(generator, k, dtype)
    elif family in hard_families.FAMILIES:
        case = hard(family, generator, k, dtype)
    else:
        case = linear_model(family, generator, k, dtype)
    lower, upper = (flat_problem(case, f, False) for f in (case.inner, case.outer))
    most = 8.0 if dtype == torch.float64 else 4.0

    def target() -> Target:
        return Target(relative=float(10 ** (-0.5 - (most - 0.5) * torch.rand((), generator=generator))), silent=True)

    solvers = (bilevel.LBFGS(max_steps=200), bilevel.Newton(max_steps=30), bilevel.GradientDescent(0.5, max_steps=60))
    most_solvers = 2 if family == "proximal network" else 3  # no step size fits all networks
    solver = solvers[int(torch.randint(0, most_solvers, (), generator=generator))]
    x = case.start
    if case.minimum is not None:
        # As it is, or after a few steps: far away in any case.
        steps = int(torch.randint(0, 4, (), generator=generator))
        solver = (bilevel.LBFGS, bilevel.Newton)[steps % 2](max_steps=max(1, steps))
        x = solve_inner(solver, lower, case.start, target()).x if steps else x
    elif family != "lasso":
        x = solve_inner(solver, lower, case.start, target()).x
    point = Point.at(lower, upper, x, torch.zeros_like(x), (True, *[False] * (len(lower.tensors) - 1)))
    linear = (bilevel.CG(), bilevel.Exact())[int(torch.rand((), generator=generator) < 0.3)]
    q = solve_linear(linear, point.inner.linear.operator, point.inner.v, target()).x
    point = point.with_q(q)
    found = point.gradient.detach()
    corrected = point.corrected_value.detach()
    certificate = Certificate(point, found.mean(0), corrected.mean(), lambda: case.constants, products=products)
    exact = certificate.exact

    if family == "lasso":
        begin = torch.tensor(lasso_solution(case).astype(np.float64))
    elif case.minimum is not None:
        begin = torch.tensor(case.minimum().astype(np.float64))
    else:
        wide = flat_problem(case, case.inner, True)
        begin = solve_inner(bilevel.Newton(), wide, case.start.double(), Target(relative=1e-12, silent=True)).x
    phi, adjoint, g, value = reference(case, begin)
    xe, qe, ge, ce = extended(x, q, found, corrected)
    tally.problems += k
    tally.conditions.extend((exact.inner.eigenvalues[:, -1] / exact.inner.eigenvalues[:, 0]).tolist())
    keep = np.ones(k, bool) if case.valid is None else case.valid.numpy()
    if family == "lasso":
        solution = lasso_solution(case)
        for name, e in zip(("C1 by formula", "C1"), case.distance, strict=True):
            tally.add(name, e.numpy(), length(xe - solution), 1e-15 * length(solution))
    rounded = (found.double() - exact.gradient).norm(dim=1)
    shift = (corrected.double() - exact.corrected_value).abs()
    true = {
        "C1": (length(xe - phi), length(phi)),
        "C2": (length(qe - adjoint), length(adjoint)),
        "C3": (length(ge - g), length(g)),
        "C4": (np.abs((ce - value).astype(np.float64)), np.abs(value.astype(np.float64))),
    }
    for bounds, how in ((certificate.direct, " by formula"), (certificate.errors, "")):
        for name, bound in (
            ("C1", bounds.inner.value), ("C2", bounds.adjoint.value),
            ("C3", bounds.gradient.value + rounded), ("C4", bounds.value.value + shift),
        ):  # fmt: skip
            error, size = true[name]
            label = name + (" on the support" if family == "lasso" and name == "C1" else "") + how
            tally.add(label, bound.numpy()[keep], error[keep], 1e-15 * size[keep])
    if family != "lasso":  # what a user sees of the batch, with its label
        whole_g, whole_c = extended(found.mean(0), corrected.mean())
        shown = {
            "C1": (certificate.inner_bound, true["C1"][0].max()),
            "C2": (certificate.adjoint_bound, true["C2"][0].max()),
            "C3": (certificate.bound, length(whole_g - g.mean(0))),
            "C4": (certificate.value_bound, abs(float(whole_c - value.mean()))),
        }
        for name, (bound, error) in shown.items():
            proven = math.inf if bound.basis in (Basis.ESTIMATED, Basis.RESIDUAL) else bound.value
            numbers = (proven, error, 1e-15 * float(true[name][1].max()))
            tally.add(f"{name} as shown", *(np.array([entry], float) for entry in numbers))
    if case.minimum is not None:
        return  # 1 − σ is 0 long before it is, and estimates have no constants here
    better = certificate.refined if exact.inner.factorable else certificate._route.at
    for at in (exact, better):
        for name, used in allowance_used(case, at).items():
            tally.rounding[name] = max(tally.rounding.get(name, 0.0), used)
    if not exact.inner.factorable:
        tally.spent.append(products - certificate._route.left)
    # Estimates are of what iterations leave, not of what rounding does.
    error = true["C3"][0]
    large = keep & (error > 10 * exact.rounding.gradient.numpy() + 1e-14 * length(g))
    for name, guess in estimates(certificate, found).items():
        tally.ratios.setdefault(name, []).extend(np.nan_to_num(guess[large] / error[large], nan=math.inf).tolist())


def estimates(certificate: Certificate, found: torch.Tensor) -> dict[str, Array]:
    """Return estimates of ‖ĝ − g‖ that use no constants but those seen between φ and φ⁺.

    C5 as the library has it, which looks at how far Newton's step was from ending; the distance to one step further, whatever it
    was; and bounds with constants seen on the way: the formula at φ, and that at φ⁺ added to the distance.
    """
    exact, refined = certificate.exact, certificate.refined
    guesses = {
        "C5": (found.double() - certificate.compared.gradient).norm(dim=1),
        "one step": (found.double() - refined.gradient).norm(dim=1),
    }
    if exact.inner.factorable:
        seen = observed(exact, refined.inner).without("strong_convexity", "cross_norm")
        guesses["formula, constants seen"] = errors_at(exact, seen).gradient.value
        guesses["one step + formula there"] = through(exact, refined, errors_at(refined, seen)).gradient.value
    return {name: guess.numpy() for name, guess in guesses.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--problems", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--by-products", action="store_true", help="no Hessian is formed")
    parser.add_argument("--products", type=int, default=bilevel.Tolerance().bound_products)
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.by_products:
        _inner_point.MOST_NUMBERS = 0
    families = options.families
    each = math.ceil(options.problems / options.batch / len(families) / 2)
    began, total, violated = time.perf_counter(), 0, 0
    print(
        f"{'family':17s} {'dtype':8s} {'bound':30s} {'problems':>8s} {'certified':>9s} {'violated':>8s} {'median':>8s} {'95 %':>9s}"
    )
    for family in families:
        for dtype in (torch.float64, torch.float32):
            tally = Tally()
            for number in range(each):
                generator = torch.Generator().manual_seed(options.seed + 2 * number + (dtype == torch.float32))
                run_batch(family, generator, options.batch, dtype, tally, options.products)
            total += tally.problems
            for name, count in tally.certified.items():
                middle, high = (
                    np.quantile(tally.ratios[name], [0.5, 0.95]) if tally.ratios[name] else (math.nan, math.nan)
                )
                violated += tally.violations[name]
                print(
                    f"{family:17s} {str(dtype)[6:]:8s} {name:30s} {tally.problems:8d} {count:9d} {tally.violations[name]:8d} "
                    f"{middle:8.2f} {high:9.2f}"
                )
            low, middle, high = np.nanquantile(tally.conditions, [0, 0.5, 1])
            print(f"{family:17s} {str(dtype)[6:]:8s} condition numbers from {low:.1f} over {middle:.0f} to {high:.2g}")
            used = ", ".join(f"{name} {part:.2f}" for name, part in tally.rounding.items())
            print(f"{family:17s} {str(dtype)[6:]:8s} of the rounding allowed for there was at most: {used}")
            if tally.spent:
                print(
                    f"{family:17s} {str(dtype)[6:]:8s} products for the bounds of a batch: median {np.median(tally.spent):.0f}, "
                    f"most {max(tally.spent)}"
                )
            for name in ("C5", "one step", "formula, constants seen", "one step + formula there"):
                if name in tally.ratios:
                    ratios = np.array(tally.ratios[name])
                    within = ((ratios > 0.5) & (ratios < 2)).mean() if len(ratios) else math.nan
                    low = (ratios <= 0.5).mean() if len(ratios) else math.nan
                    print(
                        f"{family:17s} {str(dtype)[6:]:8s} estimate: {name:24s} {len(ratios):8d} within a factor 2: "
                        f"{100 * within:.1f} %, below half: {100 * low:.1f} %"
                    )
    print(f"\n{total} problems, {violated} violations, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
