"""Fixed points and proximal points: distances from one residual, and which entries of a sparse solution are decided."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import solve
from bilevel.setting_checks import check_number

__all__ = ["Support", "contraction_distance", "identify_support", "newton_on_support", "proximal_distance"]


def contraction_distance(residual_norm: torch.Tensor, factor: float) -> torch.Tensor:
    """Return ‖x − T(x)‖/(1 − c) ≥ ‖x − x*‖ for a T with Lipschitz constant c < 1.

    Because ‖x − x*‖ ≤ ‖x − T(x)‖ + ‖T(x) − T(x*)‖.

    Parameters
    ----------
    residual_norm
        ‖x − T(x)‖, any shape, or an upper bound of it.
    factor
        c in [0, 1), in the norm that the residual is measured in.

    Returns
    -------
    torch.Tensor
        The bound, in the shape of ``residual_norm``.

    Raises
    ------
    ArgumentError
        If the factor is not in [0, 1).

    References
    ----------
    Banach 1922.

    Examples
    --------
    >>> import torch
    >>> contraction_distance(torch.tensor(0.1), 0.5)
    tensor(0.2000)
    """
    check_number("contraction_distance", "factor", factor, below=1.0, closed=True)
    return residual_norm / (1 - factor)


def proximal_distance(
    residual_norm: torch.Tensor, step: float | torch.Tensor, strong_convexity: float | torch.Tensor
) -> torch.Tensor:
    r"""Return ‖x − T(x)‖/(μ step) ≥ ‖x − x*‖ for the proximal gradient map T(x) = prox(x − step ∇f(x)).

    A proximal map is nonexpansive. The map x ↦ x − step ∇f(x) contracts by 1 − step μ for a step ≤ 2/(L + μ). T therefore has this factor, and
    :func:`contraction_distance` applies. With step 1/L the bound is (L/μ)‖x − T(x)‖.

    Parameters
    ----------
    residual_norm
        ‖x − T(x)‖, any shape, or an upper bound of it.
    step
        The step of the map: at most 2/(L + μ), with L a Lipschitz constant of ∇f. A step of at most 1/L is allowed too. A number, or a tensor in
        the shape of ``residual_norm``.
    strong_convexity
        μ > 0 of f, the smooth part: a number, or a tensor in the shape of ``residual_norm``.

    Returns
    -------
    torch.Tensor
        The bound, in the shape of ``residual_norm``.

    References
    ----------
    Bauschke, Combettes, "Convex Analysis and Monotone Operator Theory in Hilbert Spaces", 2nd ed., Springer 2017, Proposition 12.28 (proximal maps
    are nonexpansive).

    Examples
    --------
    >>> import torch
    >>> proximal_distance(torch.tensor(0.01), step=0.25, strong_convexity=2.0)
    tensor(0.0200)
    """
    return residual_norm / (step * strong_convexity)


@dataclass(frozen=True, eq=False)
class Support:
    """Which entries of the solution of an ℓ₁-penalised problem are proven to be zero, or not to be.

    Parameters
    ----------
    inside
        Bool, in the shape of x: proven to be nonzero, with the sign of x.
    outside
        Bool, in the shape of x: proven to be zero.

    Examples
    --------
    >>> import torch
    >>> from bilevel.certificates import Support
    >>> support = Support(inside=torch.tensor([True, False, False]), outside=torch.tensor([False, True, False]))
    >>> support.decided, int(support.inside.sum())
    (tensor(False), 1)
    """

    inside: torch.Tensor
    outside: torch.Tensor

    @property
    def decided(self) -> torch.Tensor:
        """Bool, over all but the last axis: every entry is decided, so that the solution's derivative is the classical one.

        Where it is not, the solution may sit at a kink, and what comes out is one of several conservative derivatives.
        """
        return (self.inside | self.outside).all(dim=-1)


def identify_support(
    x: torch.Tensor,
    gradient: torch.Tensor,
    strength: torch.Tensor,
    distance: torch.Tensor,
    lipschitz: torch.Tensor,
) -> Support:
    """Return what a distance to the solution of min f(x) + λ‖x‖₁ proves of its support.

    If abs(x_j) > e, then x*_j is not zero and has the sign of x_j. If abs(∇_j f(x)) + L_j e < λ, then x*_j = 0. If every entry is decided, and x
    vanishes where x* does, x and x* lie on one smooth piece.

    Parameters
    ----------
    x
        (..., n).
    gradient
        ∇f(x) (..., n).
    strength
        λ, of a shape that broadcasts against x.
    distance
        e ≥ ‖x − x*‖ (...,), as :func:`proximal_distance` gives it.
    lipschitz
        L_j, of a shape that broadcasts against x: the Lipschitz constant of ∇_j f. For a quadratic, the norm of a row of ∇²f.

    Returns
    -------
    Support
        The entries that are proven to be nonzero, and those that are proven to be zero.

    References
    ----------
    Ndiaye, Fercoq, Gramfort, Salmon, "Gap Safe screening rules for sparsity enforcing penalties", JMLR 18, 2017, for bounds that prove zeros from a
    distance to the solution.

    Examples
    --------
    >>> import torch
    >>> x, gradient = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([-0.5, 0.1, 0.499])
    >>> support = identify_support(x, gradient, torch.tensor(0.5), torch.tensor(0.01), torch.ones(3))
    >>> support.inside.nonzero().tolist(), support.outside.nonzero().tolist()  # entry 2 is not decided
    ([[0]], [[1]])
    """
    e = distance.unsqueeze(-1)
    inside = x.abs() > e
    outside = (gradient.abs() + lipschitz * e < strength) & ~inside
    return Support(inside, outside)


def newton_on_support(
    x: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor, strength: torch.Tensor
) -> torch.Tensor:
    """Return the minimiser of the quadratic model of f(x) + λ‖x‖₁ on the support and signs of ``x``.

    If f is quadratic and the support is right, the result x⁺ is the solution, up to rounding. The distance of ``x`` to the solution is
    then at most ‖x − x⁺‖ plus the :func:`proximal_distance` of x⁺.

    Parameters
    ----------
    x
        (..., n).
    gradient, hessian
        ∇f(x) (..., n) and ∇²f(x) (..., n, n), the latter positive definite on the support.
    strength
        λ, of a shape that broadcasts against x.

    Returns
    -------
    torch.Tensor
        x⁺ (..., n).

    References
    ----------
    Lee, Sun, Saunders, "Proximal Newton-type methods for minimizing composite functions", SIAM J. Optim. 24, 2014: a proximal Newton step
    with the support held fixed.

    Examples
    --------
    >>> import torch
    >>> x, H = torch.tensor([0.4, 0.0]), torch.eye(2)
    >>> newton_on_support(x, H @ x - torch.tensor([1.0, 0.2]), H, torch.tensor(0.5))
    tensor([0.5000, 0.0000])
    """
    on = (x != 0).to(x)
    matrix = hessian * on.unsqueeze(-1) * on.unsqueeze(-2) + torch.diag_embed(1 - on)
    slope = on * (gradient + strength * x.sign())
    return x - solve(matrix, slope.unsqueeze(-1)).squeeze(-1)
