"""Linear operators on batches of vectors: linearised once, applied many times.

An operator here is a batch of ``batch`` square matrices of order ``size`` that acts on tensors of shape
``(batch, size)``, one vector for each matrix. Those made from a function (:func:`hessian`, :func:`jacobian`,
:func:`gauss_newton`) keep one gradient graph from construction and use it again for each product.
"""

from bilevel.operators._around import DampedOperator, RepeatedOperator
from bilevel.operators._base import LinearOperator, ScaledOperator, SumOperator, TransposedOperator
from bilevel.operators._given import DenseOperator, FunctionOperator
from bilevel.operators._graph import (
    GaussNewtonOperator,
    HessianOperator,
    JacobianOperator,
    gauss_newton,
    hessian,
    jacobian,
)

__all__ = [
    "DampedOperator",
    "DenseOperator",
    "FunctionOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "JacobianOperator",
    "LinearOperator",
    "RepeatedOperator",
    "ScaledOperator",
    "SumOperator",
    "TransposedOperator",
    "gauss_newton",
    "hessian",
    "jacobian",
]
