"""Any iterative method of scipy.sparse.linalg, one problem at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bilevel.errors import ArgumentError
from bilevel.linear._base import LinearSolver
from bilevel.linear._solution import LinearSolution
from bilevel.operators import LinearOperator
from bilevel.reports import Status
from bilevel.setting_checks import FrozenOptions

__all__ = ["ScipyLinear"]


@dataclass(frozen=True)
class ScipyLinear(LinearSolver):
    """A method of ``scipy.sparse.linalg`` as a linear solver. It works in float64 on the CPU, one problem after another.

    Parameters
    ----------
    function
        For example ``scipy.sparse.linalg.minres``: a function ``(A, b, x0=..., **options)`` that returns x first.
    options
        Passed to the function. If the function has ``rtol`` and ``atol`` (or ``tol``) and they are not given, they are
        set from the tolerance.

    Raises
    ------
    ArgumentError
        If ``function`` is not a function.

    References
    ----------
    Virtanen et al., "SciPy 1.0", Nature Methods 17, 2020.

    Examples
    --------
    >>> import scipy.sparse.linalg, torch
    >>> from bilevel.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[4.0, 1.0], [1.0, -3.0]]), symmetric=True)
    >>> ScipyLinear(scipy.sparse.linalg.minres)(A, torch.tensor([[1.0, 2.0]]))
    tensor([[ 0.3846, -0.5385]])
    """

    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ArgumentError(
                f"ScipyLinear: expected a function of scipy.sparse.linalg, got {self.function!r}; pass the function itself, "
                "such as scipy.sparse.linalg.minres"
            )
        object.__setattr__(self, "options", FrozenOptions(self.options))

    @property
    def has_budget(self) -> bool:
        return bool({"maxiter", "iter_lim"} & set(self.options))

    @property
    def name(self) -> str:
        return f"ScipyLinear({getattr(self.function, '__name__', self.function)})"

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        import scipy.sparse.linalg  # imported here because it takes long, and not every program needs it

        takes = set(inspect.signature(self.function).parameters)
        x = torch.zeros_like(rhs)
        iterations = torch.zeros(rhs.shape[0], dtype=torch.int64, device=rhs.device)
        status = torch.full_like(iterations, int(Status.NOT_CONVERGED))
        for k in range(rhs.shape[0]):
            options = dict(self.options)
            norm = float(rhs[k].norm())
            if "rtol" in takes and "atol" in takes:
                options.setdefault("rtol", 0.0)
                options.setdefault("atol", 0.5 * float(threshold[k]))
            elif "btol" in takes:  # lsqr and lsmr also compare with norms of A
                for bound in ("atol", "btol"):
                    options.setdefault(bound, 1e-3 * float(threshold[k]) / norm if norm else 0.0)
            elif "rtol" in takes or "tol" in takes:
                # These also compare with other norms. A tenth of the tolerance covers the difference.
                options.setdefault(
                    "rtol" if "rtol" in takes else "tol", 0.1 * float(threshold[k]) / norm if norm else 0.0
                )
            if start is not None and "x0" in takes:
                options.setdefault("x0", start[k].detach().double().numpy(force=True))
            products = 0

            def apply(product: Callable[[torch.Tensor], torch.Tensor], vector: np.ndarray, k: int = k) -> np.ndarray:
                nonlocal products
                products += 1
                whole = torch.zeros_like(rhs)
                whole[k] = torch.as_tensor(np.ravel(vector), dtype=rhs.dtype, device=rhs.device)
                return np.asarray(product(whole)[k].detach().double().numpy(force=True))

            matrix = scipy.sparse.linalg.LinearOperator(
                (operator.size, operator.size),
                matvec=lambda vector, apply=apply: apply(operator.matvec, vector),
                rmatvec=lambda vector, apply=apply: apply(operator.rmatvec, vector),
                dtype=np.float64,
            )
            try:
                found = self.function(matrix, rhs[k].detach().double().numpy(force=True), **options)
            except np.linalg.LinAlgError:
                iterations[k], status[k] = products, Status.BREAKDOWN
                continue
            answer, info = (found[0], found[1]) if isinstance(found, tuple) else (found, 0)
            x[k] = torch.as_tensor(np.ravel(answer), dtype=rhs.dtype, device=rhs.device)
            iterations[k] = products
            if isinstance(info, (int, np.integer)) and info > 0 and self.has_budget:
                status[k] = Status.MAX_STEPS
            elif isinstance(info, (int, np.integer)) and info < 0:
                status[k] = Status.BREAKDOWN
        return LinearSolution(x, iterations, status)
