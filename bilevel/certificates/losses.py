r"""Constants of the losses of linear models, from their data alone.

For L(s) = Σ w_i ℓ_i(s_i)/Σ w_i with scores s_i linear in φ, a row's score being x̃_i·φ (x̃ with a one for an intercept), and with C
and T such that ‖ℓ″‖ ≤ C and ℓ″ has Lipschitz constant T,

.. math:: \nabla^2 L \preceq C M, \qquad
   \lVert \nabla^2 L(φ) - \nabla^2 L(φ') \rVert \le T \max_i \lVert \tilde x_i \rVert \lVert M \rVert \lVert φ - φ' \rVert

where M = X̃ᵀ diag(w) X̃/Σ w. The numbers are

=========  ======  ==============================================================================================
loss       C       T
=========  ======  ==============================================================================================
squares    1       0
logistic   1/4     1/(6√3), the largest third moment of a coin, p(1 − p)(1 − 2p)
softmax    1/2     √6/9: the third derivative is the third central moment of u_c, c drawn from the softmax, |u| = 1; a
                   variable that varies by no more than R has at most R³/(6√3), and R ≤ √2
=========  ======  ==============================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import eigvalsh
from bilevel.errors import ShapeError

__all__ = ["LossConstants", "logistic_constants", "softmax_constants", "squares_constants"]


@dataclass(frozen=True, eq=False)
class LossConstants:
    """Lipschitz constants of a loss as a function of the linear model's parameters.

    Parameters
    ----------
    smoothness
        () or (K,): the Lipschitz constant of the gradient. It is L_F if the loss is the outer one.
    hessian_lipschitz
        () or (K,): the Lipschitz constant of the Hessian. It is L_H if the loss is the inner one; a ridge term does not change it.

    Examples
    --------
    >>> import torch
    >>> from bilevel.certificates import squares_constants
    >>> constants = squares_constants(2 * torch.eye(3))
    >>> round(constants.smoothness.item(), 4), constants.hessian_lipschitz.item()
    (1.3333, 0.0)
    """

    smoothness: torch.Tensor
    hessian_lipschitz: torch.Tensor


def squares_constants(
    inputs: torch.Tensor, weights: torch.Tensor | None = None, *, intercept: bool = False
) -> LossConstants:
    """Return the constants of the mean of ½(y − x·φ)².

    Parameters
    ----------
    inputs
        The design matrix (rows, p), or (K, rows, p) for K problems.
    weights
        (rows,), or (K, rows) for K problems that weigh the rows differently; all one if left out.
    intercept
        Whether the model has one.

    Returns
    -------
    LossConstants
        Scalars, or (K,).

    Raises
    ------
    ShapeError
        If the weights do not fit the rows.

    Examples
    --------
    >>> import torch
    >>> squares_constants(torch.eye(2)).smoothness
    tensor(0.5000)
    """
    return _constants(inputs, weights, intercept, 1.0, 0.0)


def logistic_constants(
    inputs: torch.Tensor, weights: torch.Tensor | None = None, *, intercept: bool = False
) -> LossConstants:
    """Return the constants of the mean log loss of a logistic model, Σ wᵢ log(1 + exp(−yᵢ xᵢᵀφ)) / Σ wᵢ.

    Parameters
    ----------
    inputs
        The design matrix (rows, p), or (K, rows, p) for K problems.
    weights
        w (rows,), or (K, rows) for K problems that weigh the rows differently; None: all one. The loss is divided by
        their sum. For a loss Σ wᵢ ℓᵢ / rows multiply the constants by ``weights.mean()``.
    intercept
        Whether the model has an intercept.

    Returns
    -------
    LossConstants
        Scalars (), or (K,).

    Examples
    --------
    >>> import torch
    >>> logistic_constants(torch.eye(2)).smoothness
    tensor(0.1250)
    """
    return _constants(inputs, weights, intercept, 0.25, 1 / (6 * math.sqrt(3)))


def softmax_constants(
    inputs: torch.Tensor, weights: torch.Tensor | None = None, *, intercept: bool = False
) -> LossConstants:
    """Return the constants of the mean log loss of a softmax model, in an orthonormal parametrisation of its class scores.

    The parameters are the weights and intercepts of the classes, or their coordinates in the subspace where they sum to zero.

    Parameters
    ----------
    inputs
        The design matrix (rows, p), or (K, rows, p) for K problems.
    weights
        (rows,), or (K, rows) for K problems that weigh the rows differently; None: all one.
    intercept
        Whether the model has an intercept.

    Returns
    -------
    LossConstants
        Scalars (), or (K,).

    Examples
    --------
    >>> import torch
    >>> softmax_constants(torch.eye(2)).smoothness
    tensor(0.2500)
    """
    return _constants(inputs, weights, intercept, 0.5, math.sqrt(6) / 9)


def _constants(
    inputs: torch.Tensor, weights: torch.Tensor | None, intercept: bool, curvature: float, third: float
) -> LossConstants:
    rows = inputs.shape[-2]
    x = inputs.detach().double()
    if intercept:
        x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
    w = x.new_ones(rows) if weights is None else weights.detach().to(x)
    if w.ndim not in (1, 2) or w.shape[-1] != rows or x.ndim not in (2, 3):
        raise ShapeError(
            f"constants of a loss: expected inputs (rows, p) or (K, rows, p) with weights (rows,) or (K, rows), got "
            f"{tuple(inputs.shape)} with {tuple(w.shape)}; reshape them"
        )
    share = w / w.sum(-1, keepdim=True)
    root = share.clamp_min(0).sqrt().unsqueeze(-1) * x
    # The smaller of the two Gram matrices, which have the same largest eigenvalue.
    gram = root.mT @ root if root.shape[-1] <= rows else root @ root.mT
    # Sums of so many terms round; a bound must not.
    slack = 1 + 8 * (rows + x.shape[-1]) * torch.finfo(x.dtype).eps
    norm = eigvalsh(gram)[..., -1] * slack
    longest = torch.where(share > 0, x.norm(dim=-1), torch.zeros_like(share)).amax(-1) * slack
    scale = inputs if inputs.dtype.is_floating_point else x
    return LossConstants(_up(curvature * norm, scale), _up(third * longest * norm, scale))


def _up(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``value`` in the dtype of ``like``, not below what it is."""
    return (value * (1 + torch.finfo(like.dtype).eps)).to(like.dtype)
