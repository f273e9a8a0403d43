r"""Ridge, logistic and softmax regression as inner problems whose strengths are hyperparameters.

All three minimise, over weights β and an intercept that is not penalised,

.. math:: G(φ, θ) = \frac{\sum_i w_i\, ℓ_i(φ)}{\sum_i w_i} + \frac12 \sum_j e^{θ_j} \lVert β_j \rVert^2

where w are example weights and θ are *log-strengths*: one shared by all features (a scalar) or one per
feature. K cross-validation folds are one batch of such problems that differ in their weights alone, so that
they share the design matrix: ``FOLD_DIMS`` says so.

The mean over examples makes a strength mean the same for any number of rows n. In scikit-learn's terms, with
n the rows of weight one,

=====================  ==========================================  =====================
model                  scikit-learn                                setting
=====================  ==========================================  =====================
:class:`Ridge`         ``Ridge(alpha=alpha)``                      alpha = n e^θ
:class:`Logistic`      ``LogisticRegression(C=C)``, two classes    C = 1 / (n e^θ)
:class:`Softmax`       ``LogisticRegression(C=C)``, more classes   C = 1 / (n e^θ)
=====================  ==========================================  =====================

A strength e^θ_j of one feature equals strength 1 on that column divided by e^(θ_j / 2), its weight multiplied
by it.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

import bilevel

__all__ = ["FOLD_DIMS", "LinearModel", "Logistic", "Parameters", "Ridge", "Softmax", "WeightedData", "fold_weights"]

Parameters: TypeAlias = dict[str, torch.Tensor]
"""``weights`` and ``intercept``."""


class WeightedData(NamedTuple):
    """A data set, with the weight of each row in training and in validation.

    Parameters
    ----------
    inputs
        Design matrix (rows, features).
    targets
        (rows,): floating-point for :class:`Ridge`, 0 or 1 in floating point for :class:`Logistic`, class
        numbers in int64 for :class:`Softmax`.
    training
        Weights (rows,), or (K, rows) for K folds.
    validation
        Weights (rows,), or (K, rows) for K folds.

    Examples
    --------
    >>> import torch
    >>> rows = torch.ones(3)
    >>> data = WeightedData(torch.eye(3), torch.arange(3.0), rows, 0 * rows)
    >>> float(data.training.sum()), float(data.validation.sum())
    (3.0, 0.0)
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    training: torch.Tensor
    validation: torch.Tensor


FOLD_DIMS: Any = WeightedData(None, None, 0, 0)  # type: ignore[arg-type]  # axes, in the structure of the data
"""``batch_dims`` of K folds: they share inputs and targets, and each has its own weights."""


def fold_weights(
    folds: Iterable[tuple[Any, Any]], rows: int, *, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row weights for K folds of any sizes: 1 for a row that a fold trains on, or validates on, else 0.

    The folds then share the data and differ in their weights alone, so that all of them are one batch: ``batch_dims`` has an axis 0 for
    the two results and None for the data. An objective is to be a weighted mean, ``(weight * losses).sum() / weight.sum()``; the mean
    over the folds is what scikit-learn's ``cross_val_score`` averages.

    Parameters
    ----------
    folds
        Pairs of row numbers, or of masks, to train and to validate on, as ``KFold(...).split(X)`` yields them.
    rows
        The number of rows.
    dtype
        The dtype of the weights.

    Returns
    -------
    tuple of torch.Tensor
        Weights for training and for validation, (K, rows) each.

    Raises
    ------
    bilevel.ArgumentError
        If there is no fold, or one without rows, or with rows that do not exist.

    Examples
    --------
    >>> training, validation = fold_weights([([2], [0, 1]), ([0, 1], [2])], rows=3)
    >>> training.tolist(), validation.tolist()
    ([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    """
    found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for number, fold in enumerate(folds):
        for part, numbers in zip(found, fold, strict=True):
            weights = torch.zeros(rows, dtype=dtype)
            try:
                weights[torch.as_tensor(numbers)] = 1.0
            except (IndexError, TypeError, ValueError, RuntimeError) as error:
                raise bilevel.ArgumentError(
                    f"fold_weights: expected the numbers of rows below {rows}, or masks of {rows}, in fold {number}, got {numbers!r}; "
                    "pass what KFold(...).split(X) yields"
                ) from error
            if not bool(weights.any()):
                raise bilevel.ArgumentError(
                    f"fold_weights: expected fold {number} to have rows to train on and rows to validate on, got none of one kind; "
                    "take fewer folds"
                )
            part.append(weights)
    if not found[0]:
        raise bilevel.ArgumentError("fold_weights: expected at least one fold, got none; pass list(KFold(5).split(X))")
    return torch.stack(found[0]), torch.stack(found[1])


@dataclass(frozen=True)
class LinearModel(ABC):
    """A linear model with a ridge penalty; the module's page gives the objective.

    Parameters
    ----------
    features
        p, the columns of the design matrix.
    """

    features: int

    def __post_init__(self) -> None:
        if self.features < 1:
            raise bilevel.ArgumentError(
                f"{type(self).__name__}: expected at least one feature, got {self.features}; pass a design "
                "matrix "
                "with columns"
            )

    @abstractmethod
    def initial(self, folds: int | None = None, *, dtype: torch.dtype = torch.float64) -> Parameters:
        """Return zero parameters: for one problem, or with a leading axis for ``folds`` of them."""

    @abstractmethod
    def scores(self, parameters: Parameters, inputs: torch.Tensor) -> torch.Tensor:
        """Return the linear predictor of ``inputs`` (rows, p): (rows,), or (rows, classes) for softmax."""

    @abstractmethod
    def losses(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return each row's loss ℓ (rows,)."""

    @abstractmethod
    def coefficients(self, parameters: Parameters) -> Parameters:
        """Return the parameters in scikit-learn's form, one weight per feature (and class)."""

    def training_objective(
        self, parameters: Parameters, log_strengths: torch.Tensor, data: WeightedData
    ) -> torch.Tensor:
        """Return G: the weighted mean training loss plus the penalty.

        Parameters
        ----------
        parameters
            φ: ``weights`` and ``intercept`` of one problem.
        log_strengths
            θ: () for one shared strength e^θ, or (p,) for one per feature.
        data
            The data of one problem.

        Returns
        -------
        torch.Tensor
            Scalar.
        """
        losses = self.losses(self.scores(parameters, data.inputs), data.targets)
        squares = parameters["weights"].square().reshape(self.features, -1).sum(1)  # (p,)
        return _mean(losses, data.training) + 0.5 * (log_strengths.exp() * squares).sum()

    def validation_loss(self, parameters: Parameters, data: WeightedData) -> torch.Tensor:
        """Return the weighted mean loss on the validation rows, without a penalty: scalar.

        It is the mean squared error for :class:`Ridge` and the mean log loss otherwise, as
        ``sklearn.metrics`` has them.
        """
        return self.metric_scale * _mean(
            self.losses(self.scores(parameters, data.inputs), data.targets), data.validation
        )

    @abstractmethod
    def loss_constants(self, inputs: torch.Tensor, weights: torch.Tensor) -> bilevel.certificates.LossConstants:
        """Return the Lipschitz constants of the weighted mean of ℓ, from the rows' ``inputs`` and ``weights``."""

    def constants(self, log_strengths: torch.Tensor, data: WeightedData) -> bilevel.Constants:
        """Return the known constants of G and F at these strengths, for each of K folds.

        μ is unknown: the intercept is not penalised, and G is flat far from the data. Bounds then use the curvature at the
        computed solution.
        """
        training = self.loss_constants(data.inputs, data.training)
        validation = self.loss_constants(data.inputs, data.validation)
        return bilevel.Constants(
            outer_smoothness=self.metric_scale * validation.smoothness,
            hessian_lipschitz=training.hessian_lipschitz,
            cross_lipschitz=float(log_strengths.detach().exp().max()),  # B holds e^θ_j β_j
            outer_cross_lipschitz=0.0,
            convex=True,
        )

    @property
    def metric_scale(self) -> float:
        """The factor from the training loss ℓ to the usual metric: 2 for half squares, else 1."""
        return 1.0


@dataclass(frozen=True)
class Ridge(LinearModel):
    """Least squares: ℓ = ½ (y − xβ − b)².

    Parameters
    ----------
    features
        p, the columns of the design matrix.

    Examples
    --------
    >>> import torch
    >>> model = Ridge(features=2)
    >>> model.scores({"weights": torch.tensor([1.0, 2.0]), "intercept": torch.tensor(0.5)}, torch.eye(2))
    tensor([1.5000, 2.5000])
    """

    def initial(self, folds: int | None = None, *, dtype: torch.dtype = torch.float64) -> Parameters:
        """Return zero ``weights`` (p,) and ``intercept`` ()."""
        lead = () if folds is None else (folds,)
        return {
            "weights": torch.zeros(*lead, self.features, dtype=dtype),
            "intercept": torch.zeros(lead, dtype=dtype),
        }

    def scores(self, parameters: Parameters, inputs: torch.Tensor) -> torch.Tensor:
        """Return xβ + b (rows,)."""
        return inputs @ parameters["weights"] + parameters["intercept"]

    def losses(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return half the squared residuals (rows,)."""
        return 0.5 * (targets - scores).square()

    def loss_constants(self, inputs: torch.Tensor, weights: torch.Tensor) -> bilevel.certificates.LossConstants:
        """Return those of squares."""
        return bilevel.certificates.squares_constants(inputs, weights, intercept=True)

    def coefficients(self, parameters: Parameters) -> Parameters:
        """Return the parameters as they are."""
        return dict(parameters)

    @property
    def metric_scale(self) -> float:
        """Two, because the metric is the whole squared residual."""
        return 2.0


@dataclass(frozen=True)
class Logistic(Ridge):
    """Binary logistic regression: ℓ = log(1 + e^s) − y s with s = xβ + b and y in {0, 1}.

    Parameters
    ----------
    features
        p, the columns of the design matrix.

    Examples
    --------
    >>> import torch
    >>> Logistic(features=2).losses(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))
    tensor([0.6931, 0.3133])
    """

    def losses(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the log loss of each row (rows,)."""
        # Not torch's softplus, which is the identity above 20, 2e-9 short there, and has no curvature.
        return torch.logaddexp(scores, scores.new_zeros(())) - targets * scores

    def loss_constants(self, inputs: torch.Tensor, weights: torch.Tensor) -> bilevel.certificates.LossConstants:
        """Return those of the logistic loss."""
        return bilevel.certificates.logistic_constants(inputs, weights, intercept=True)

    @property
    def metric_scale(self) -> float:
        """One, because the metric is the training loss."""
        return 1.0


@dataclass(frozen=True)
class Softmax(LinearModel):
    """Multinomial logistic regression, symmetric in the classes: ℓ = log Σ_c e^(s_c) − s_y.

    Adding a constant to every class's score changes no probability, so that intercepts would be determined
    only up to a constant and the Hessian would be singular. The parameters live where class scores sum to
    zero, by construction: β = V Qᵀ and b = Q c with Q (classes, classes − 1) an orthonormal basis of the
    vectors that sum to zero, V = ``weights`` (p, classes − 1) and c = ``intercept`` (classes − 1,). Nothing
    is lost: the penalty makes every row of the symmetric solution sum to zero, and ‖V_j‖ = ‖β_j‖. The
    solution is the one that scikit-learn returns.

    Parameters
    ----------
    features
        p, the columns of the design matrix.
    classes
        At least 2.

    Examples
    --------
    >>> import torch
    >>> Softmax(features=2, classes=3).losses(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0]))
    tensor([0.4076])
    """

    classes: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 2:
            raise bilevel.ArgumentError(
                f"Softmax: expected at least two classes, got {self.classes}; pass data with more"
            )

    def initial(self, folds: int | None = None, *, dtype: torch.dtype = torch.float64) -> Parameters:
        """Return zero ``weights`` (p, classes − 1) and ``intercept`` (classes − 1,)."""
        lead = () if folds is None else (folds,)
        return {
            "weights": torch.zeros(*lead, self.features, self.classes - 1, dtype=dtype),
            "intercept": torch.zeros(*lead, self.classes - 1, dtype=dtype),
        }

    def scores(self, parameters: Parameters, inputs: torch.Tensor) -> torch.Tensor:
        """Return the scores of all classes, summing to zero (rows, classes)."""
        reduced = inputs @ parameters["weights"] + parameters["intercept"]  # (rows, classes - 1)
        return reduced @ _zero_sum_basis(self.classes).to(reduced).T

    def losses(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the log loss of each row (rows,)."""
        chosen = scores.gather(1, targets.unsqueeze(1)).squeeze(1)
        return scores.logsumexp(1) - chosen

    def loss_constants(self, inputs: torch.Tensor, weights: torch.Tensor) -> bilevel.certificates.LossConstants:
        """Return those of the softmax loss: the basis of the class scores is orthonormal."""
        return bilevel.certificates.softmax_constants(inputs, weights, intercept=True)

    def coefficients(self, parameters: Parameters) -> Parameters:
        """Return ``weights`` β (p, classes) and ``intercept`` b (classes,)."""
        basis = _zero_sum_basis(self.classes).to(parameters["weights"])
        return {"weights": parameters["weights"] @ basis.T, "intercept": parameters["intercept"] @ basis.T}


def _mean(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (weights * losses).sum() / weights.sum()


def _zero_sum_basis(classes: int) -> torch.Tensor:
    """Return the Helmert basis (classes, classes - 1): orthonormal columns, each summing to zero."""
    return torch.tensor(_helmert(classes), dtype=torch.float64)


@functools.cache
def _helmert(classes: int) -> tuple[tuple[float, ...], ...]:
    # Numbers are kept, not a tensor: a tensor made inside a transform must not outlive it.
    def entry(row: int, column: int) -> float:
        size = 1 / math.sqrt((column + 1) * (column + 2))
        return size if row <= column else -(column + 1) * size if row == column + 1 else 0.0

    return tuple(tuple(entry(row, column) for column in range(classes - 1)) for row in range(classes))
