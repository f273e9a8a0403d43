"""Problems on which evidence from samples misleads, for ``certificates.py``: what is flat, stiff, kinked or far away where anybody looks.

.. math:: G(φ) = \\sum_j w_j h(a_j^T φ - s_j) + \\tfrac12 \\sum_i d_i (φ_i - θ_i)^2, \\qquad F(φ) = \\sum_j k(c_j^T φ - t_j)

with one h and k for each family. Nothing is declared, or strong convexity alone, or what is known of h too; all that is declared is right. Starts lie
up to a hundred solutions away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import bilevel

Array = np.ndarray
LD = np.longdouble


@dataclass(frozen=True)
class Scalar:
    """A function of one number with two derivatives, and the largest third derivative if there is one."""

    torch: Callable[[torch.Tensor], torch.Tensor]
    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    curve: Callable[[Array], Array]
    third: float | None = None


def _sigmoid(s: Array) -> Array:
    return np.where(s > 0, 1 / (1 + np.exp(-np.abs(s))), np.exp(-np.abs(s)) / (1 + np.exp(-np.abs(s))))


def _steep(s: Array) -> Array:
    return 50 * _sigmoid(50 * s) * _sigmoid(-50 * s)


SQUARE = Scalar(lambda s: 0.5 * s**2, lambda s: 0.5 * s**2, lambda s: s, np.ones_like, 0.0)
LOGCOSH = Scalar(
    lambda s: torch.logaddexp(s, -s), lambda s: np.logaddexp(s, -s), np.tanh, lambda s: 1 - np.tanh(s) ** 2, 0.7699
)
EXPONENTIAL = Scalar(torch.exp, np.exp, np.exp, np.exp)
SQUARED_HINGE = Scalar(
    lambda s: 0.5 * torch.relu(1 - s) ** 2, lambda s: 0.5 * np.maximum(1 - s, 0) ** 2,
    lambda s: -np.maximum(1 - s, 0), lambda s: (s < 1).astype(s.dtype),
)  # fmt: skip
HINGE = Scalar(torch.relu, lambda s: np.maximum(s, 0), lambda s: (s > 0).astype(s.dtype), np.zeros_like)
SIGMOID = Scalar(lambda s: torch.sigmoid(50 * s), lambda s: _sigmoid(50 * s), _steep, lambda s: _steep(s) * 0)

# By family: h, k, and whether one unknown is stiff.
FAMILIES = {
    "undeclared squares": (SQUARE, SQUARE, False),
    "stiff squares": (SQUARE, SQUARE, True),
    "stiff": (LOGCOSH, SQUARE, True),
    "saturating": (SQUARE, SIGMOID, False),
    "kinked": (SQUARED_HINGE, SQUARE, False),
    "kinked outside": (EXPONENTIAL, HINGE, False),
    "exponential": (EXPONENTIAL, EXPONENTIAL, False),
    "flat": (LOGCOSH, SIGMOID, False),
}


@dataclass(frozen=True)
class Hard:
    """A batch of K problems of a family, with what a reference needs."""

    inner: Callable[..., torch.Tensor]
    outer: Callable[..., torch.Tensor]
    theta: torch.Tensor
    data: tuple[torch.Tensor, ...]
    constants: bilevel.Constants
    gradient: Callable[[Array], Array]
    hessian: Callable[[Array], Array]
    outer_gradient: Callable[[Array], Array]
    pulled: Callable[[Array, Array], Array]
    outer_value: Callable[[Array], Array]
    value: Callable[[Array], Array]
    start: torch.Tensor


def draw(family: str, generator: torch.Generator, k: int, dtype: torch.dtype) -> Hard:
    """Return K random problems of a family."""
    h, outside, stiff = FAMILIES[family]
    n, rows = int(torch.randint(1, 6, (), generator=generator)), int(torch.randint(1, 9, (), generator=generator))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(k, *shape, generator=generator, dtype=torch.float64)

    def power(low: float, high: float, *shape: int) -> torch.Tensor:
        return 10 ** (low + (high - low) * torch.rand(k, *shape, generator=generator, dtype=torch.float64))

    A, C, shift, level = normal(rows, n) / n**0.5, normal(3, n) / n**0.5, normal(rows), 2 * normal(3)
    w, d, theta = power(-2, 0, rows), power(-3, 0, n), normal(n) * power(-0.5, 1, 1)
    if stiff:
        d[:, 0] = power(4, 13)
    A, C, shift, level, w, d, theta = (t.to(dtype) for t in (A, C, shift, level, w, d, theta))
    start = (theta.double() + normal(n) * power(-3, 2, 1)).to(dtype)

    def inner(phi, theta, A, C, shift, level, w, d):
        return (w * h.torch(A @ phi - shift)).sum() + 0.5 * (d * (phi - theta) ** 2).sum()

    def outer(phi, theta, A, C, shift, level, w, d):
        return outside.torch(C @ phi - level).sum()

    Ae, Ce, se, le, we, de, te = (t.double().numpy().astype(LD) for t in (A, C, shift, level, w, d, theta))
    lipschitz = None
    if h.third is not None:
        lipschitz = (h.third * (w.double() * A.double().norm(dim=-1) ** 3).sum(-1)) * (1 + 1e-12)
    declared = int(torch.randint(0, 4, (), generator=generator))
    constants = bilevel.Constants()
    if declared == 2:
        constants = bilevel.Constants(strong_convexity=d.double().amin(1) * (1 - 1e-12))
    elif declared == 3:
        constants = bilevel.Constants(
            strong_convexity=d.double().amin(1) * (1 - 1e-12), hessian_lipschitz=lipschitz, convex=True
        )

    def at(phi):
        return (Ae @ phi[..., None])[..., 0] - se

    def beyond(phi):
        return (Ce @ phi[..., None])[..., 0] - le

    def across(matrix, weights):
        return (np.swapaxes(matrix, 1, 2) @ weights[..., None])[..., 0]

    return Hard(
        inner, outer, theta, (A, C, shift, level, w, d), constants,
        lambda phi: across(Ae, we * h.slope(at(phi))) + de * (phi - te),
        lambda phi: np.swapaxes(Ae, 1, 2) @ ((we * h.curve(at(phi)))[..., None] * Ae) + de[..., None] * np.eye(n, dtype=LD),
        lambda phi: across(Ce, outside.slope(beyond(phi))),
        lambda phi, q: -de * q,
        lambda phi: outside.value(beyond(phi)).sum(-1),
        lambda phi: (we * h.value(at(phi))).sum(-1) + 0.5 * (de * (phi - te) ** 2).sum(-1),
        start,
    )  # fmt: skip


def minimise(case: Hard, solve: Callable[[Array, Array], Array]) -> Array:
    """Return φ* by Newton steps with halving, in extended precision, from θ, but for the last digits; ``solve`` returns A⁻¹b."""
    phi = case.theta.double().numpy().astype(LD)
    for _ in range(200):
        slope = case.gradient(phi)
        step, length, now = solve(case.hessian(phi), slope), np.ones(len(phi), LD), case.value(phi)
        if (np.abs(step) <= 1e-12 * np.abs(phi)).all():
            break
        descent = (slope * step).sum(-1)
        for _ in range(60):
            higher = ~(case.value(phi - length[:, None] * step) <= now - LD(1e-4) * length * descent)
            higher &= descent > 1e-16 * np.abs(now)  # less does not show
            if not higher.any():
                break
            length = np.where(higher, length / 2, length)
        phi = phi - length[:, None] * step
    return phi
