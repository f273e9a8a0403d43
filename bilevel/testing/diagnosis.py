"""A diagnosis: its findings, the facts behind them, one page of text, and a dict."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from bilevel.testing.defects import Defect

__all__ = ["Advice", "Cost", "Curvature", "Diagnosis", "Finding", "InnerSolve", "LinearSolve", "OuterTensor"]


@dataclass(frozen=True)
class Finding:
    """One defect that was found, with the evidence.

    Parameters
    ----------
    defect
        The kind of defect.
    sentence
        The evidence, with figures.
    remedy
        The remedy.

    Examples
    --------
    >>> import torch, bilevel
    >>> saddle = bilevel.argmin(lambda x, a: (x[0] - a) ** 2 - (x[1] - a) ** 2)
    >>> t = torch.ones(2, dtype=torch.float64)
    >>> found = bilevel.testing.diagnose(saddle, t, t[0]).findings[0]
    >>> print(f"{found.defect.name}: {found.sentence}")
    SADDLE: Newton met negative curvature: the matrix is not positive definite at the start (residual 0.0e+00, asked 0.0e+00, 0 steps)
    """

    defect: Defect
    sentence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.defect.name}: {self.sentence}; {self.remedy}."


@dataclass(frozen=True)
class InnerSolve:
    """The end of the inner solve; for a batch, of the worst problem.

    Parameters
    ----------
    solver, status
        Names.
    iterations, seconds
        The number of iterations, and the time.
    residual, asked
        ‖R‖ and its threshold.
    newton_step
        ‖J⁻¹R‖ / ‖x‖, an estimate of the relative error of x; None where J was not formed or is singular.

    Examples
    --------
    >>> import torch, bilevel
    >>> square = bilevel.argmin(lambda x, a: (x - a) ** 2)
    >>> inner = bilevel.testing.diagnose(square, torch.zeros(()), torch.ones(())).inner
    >>> inner.solver, inner.iterations
    ('Newton', 1)
    """

    solver: str
    status: str
    iterations: int
    seconds: float
    residual: float
    asked: float
    newton_step: float | None = None


@dataclass(frozen=True)
class Curvature:
    """The extreme eigenvalues of the Hessian, or singular values of a Jacobian; for a batch, of the worst problem.

    Parameters
    ----------
    smallest, largest
        The extreme values.
    condition
        The ratio of the largest to the smallest absolute value.
    condition_scaled
        The same ratio after every unknown is scaled to unit diagonal; None if the matrix was not formed.
    asymmetry
        ‖J − Jᵀ‖ / ‖J‖.
    exact
        Whether the matrix was formed. Otherwise the values come from Lanczos: the true largest is at least ``largest``, the
        true smallest at most ``smallest``.

    Examples
    --------
    >>> import torch, bilevel
    >>> bowl = bilevel.argmin(lambda x, a: (x[0] - a) ** 2 + 5 * x[1] ** 2)
    >>> curvature = bilevel.testing.diagnose(bowl, torch.zeros(2), torch.ones(())).curvature
    >>> curvature.smallest, curvature.largest, curvature.condition
    (2.0, 10.0, 5.0)
    """

    smallest: float
    largest: float
    condition: float
    condition_scaled: float | None
    asymmetry: float
    exact: bool


@dataclass(frozen=True)
class OuterTensor:
    """One tensor with respect to which is differentiated.

    Parameters
    ----------
    name, shape
        The name and the shape of the tensor.
    in_inner, in_outer
        Whether the inner residual depends on it, and whether the outer loss depends on it directly.
    gradient
        The norm of its gradient; None if it was not computed.

    Examples
    --------
    >>> import torch, bilevel
    >>> square = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum())
    >>> [a] = bilevel.testing.diagnose(square, torch.zeros(2), torch.ones(2)).outer
    >>> a.name, a.shape, a.in_inner, a.in_outer
    ('a', (2,), True, False)
    """

    name: str
    shape: tuple[int, ...]
    in_inner: bool
    in_outer: bool
    gradient: float | None


@dataclass(frozen=True)
class LinearSolve:
    """The end of the linear solve of the derivative; for a batch, of the worst problem.

    Parameters
    ----------
    solver, status
        Names.
    products, seconds
        The number of products with the matrix, and the time.
    relative_residual
        ‖b − A q‖ / ‖b‖.

    Examples
    --------
    >>> import torch, bilevel
    >>> square = bilevel.argmin(lambda x, a: (x - a) ** 2)
    >>> solve = bilevel.testing.diagnose(square, torch.zeros(()), torch.ones(())).linear
    >>> solve.solver, solve.status, round(solve.relative_residual, 5)
    ('Exact', 'reached the tolerance', 0.0)
    """

    solver: str
    status: str
    products: int
    seconds: float
    relative_residual: float


@dataclass(frozen=True)
class Cost:
    """The measured cost of one problem's parts.

    Parameters
    ----------
    gradient_seconds, product_seconds
        The time of one residual, and of one product with J over a retained graph.
    dense_numbers
        K n², the number of entries of the matrices.
    cg_products
        The number of products in which conjugate gradients gain 6 digits: ½ √κ ln(2e6), at most n.

    Examples
    --------
    >>> import torch, bilevel
    >>> square = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum())
    >>> bilevel.testing.diagnose(square, torch.zeros(3), torch.ones(())).cost.dense_numbers
    9
    """

    gradient_seconds: float
    product_seconds: float
    dense_numbers: int
    cg_products: int


@dataclass(frozen=True)
class Advice:
    """The recommended solvers and tolerance, as code, with their cost.

    Parameters
    ----------
    solver, linear_solver, tolerance
        Python expressions, such as ``"Newton()"``.
    cost
        One sentence on what they cost.

    Examples
    --------
    >>> import torch, bilevel
    >>> square = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum())
    >>> advice = bilevel.testing.diagnose(square, torch.zeros(3), torch.ones(())).advice
    >>> advice.solver, advice.linear_solver, advice.tolerance
    ('Newton()', 'Exact()', 'Tolerance(delta=2e-06, delta_prime=1e-06, strong_convexity=1) for 6 digits, Tolerance() for all')
    """

    solver: str
    linear_solver: str
    tolerance: str
    cost: str


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`diagnose`; ``print`` it for one page of text.

    Parameters
    ----------
    where
        The layer or problem.
    kind
        ``"argmin"``, ``"root"`` or ``"fixed_point"``.
    unknowns, problems
        The number n of unknowns of each problem, and the number of problems.
    dtype
        The dtype of the unknown.
    findings
        The defects; empty for a healthy problem.
    inner, curvature, outer, linear, cost, advice
        The measurements; None for one that failed.
    deterministic
        Whether two evaluations agreed; None if there was no evaluation.
    unexamined
        The parts that could not be examined, with the reasons.

    Examples
    --------
    >>> import torch, bilevel
    >>> square = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum())
    >>> found = bilevel.testing.diagnose(square, torch.zeros(3), torch.ones(()))
    >>> found.healthy, found.unknowns, found.curvature.largest
    (True, 3, 2.0)
    """

    where: str
    kind: str
    unknowns: int
    problems: int
    dtype: str
    findings: tuple[Finding, ...]
    inner: InnerSolve | None
    curvature: Curvature | None
    outer: tuple[OuterTensor, ...]
    linear: LinearSolve | None
    cost: Cost | None
    advice: Advice | None
    deterministic: bool | None
    unexamined: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether there is no finding and everything was examined."""
        return not self.findings and not self.unexamined

    @property
    def defects(self) -> tuple[Defect, ...]:
        """The names of the findings."""
        return tuple(finding.defect for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as a dict of plain values, for JSON: None for numbers that are not finite."""
        document = asdict(self)
        document["findings"] = [
            {"defect": finding.defect.name, "sentence": finding.sentence, "remedy": finding.remedy}
            for finding in self.findings
        ]
        document["outer"] = [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in self.outer]
        plain = {**document, "unexamined": list(self.unexamined), "healthy": self.healthy}
        return {name: _finite(value) for name, value in plain.items()}

    def __str__(self) -> str:
        count = len(self.findings)
        verdict = "no finding" if not count else "1 finding" if count == 1 else f"{count} findings"
        lines = [f"{self.where}: {verdict}"]
        lines += [f"  {number}. {finding}" for number, finding in enumerate(self.findings, 1)]
        lines += [f"  not examined: {what}" for what in self.unexamined]
        many = "" if self.problems == 1 else f", {self.problems} problems"
        lines.append(_line("problem", f"{self.kind}, {self.unknowns} unknowns{many}, {self.dtype}"))
        if self.deterministic is not None:
            lines.append(_line("function", "deterministic" if self.deterministic else "random"))
        lines += self._solves()
        for number, tensor in enumerate(self.outer[:_MOST_LINES]):
            lines.append(_line("outer" if number == 0 else "", _described(tensor)))
        if len(self.outer) > _MOST_LINES:
            lines.append(_line("", f"and {len(self.outer) - _MOST_LINES} more"))
        if self.cost is not None:
            lines.append(
                _line(
                    "cost",
                    f"a gradient {_time(self.cost.gradient_seconds)}, a product with the matrix {_time(self.cost.product_seconds)}, "
                    f"its entries {_memory(self.cost.dense_numbers)}, {self.cost.cg_products} products by conjugate gradients",
                )
            )
        if self.advice is not None:
            chosen = f"solver={self.advice.solver}, linear_solver={self.advice.linear_solver}"
            lines += [
                _line("choose", chosen),
                _line("", f"tolerance={self.advice.tolerance}"),
                _line("", self.advice.cost),
            ]
        return "\n".join(lines)

    def _solves(self) -> list[str]:
        lines = []
        if self.inner is not None:
            inner = self.inner
            near = "" if inner.newton_step is None else f"; a Newton step from there is {inner.newton_step:.1g} of x"
            lines.append(
                _line(
                    "inner solve",
                    f"{inner.solver}: {inner.status}, {inner.iterations} steps, {_time(inner.seconds)}, residual "
                    f"{inner.residual:.1e} (asked {inner.asked:.1e}){near}",
                )
            )
        if self.curvature is not None:
            curve = self.curvature
            what = "eigenvalues" if self.kind == "argmin" else "singular values"
            how = "" if curve.exact else " (estimated by Lanczos)"
            scaled = "" if curve.condition_scaled is None else f", {curve.condition_scaled:.1e} once scaled"
            lines.append(
                _line(
                    "curvature",
                    f"{what} {curve.smallest:.2e} to {curve.largest:.2e}, condition {curve.condition:.1e}{scaled}{how}",
                )
            )
        if self.linear is not None:
            linear = self.linear
            lines.append(
                _line(
                    "linear solve",
                    f"{linear.solver}: {linear.status}, {linear.products} products, {_time(linear.seconds)}, residual "
                    f"{linear.relative_residual:.1e} of the right-hand side",
                )
            )
        return lines


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_MOST_LINES = 8


def _line(head: str, text: str) -> str:
    return f"{head:<14}{text}"


def _described(tensor: OuterTensor) -> str:
    parts = [part for part, used in (("inner problem", tensor.in_inner), ("outer loss", tensor.in_outer)) if used]
    use = f"in the {' and the '.join(parts)}" if parts else "not used"
    size = "" if tensor.gradient is None else f", gradient of norm {tensor.gradient:.2e}"
    return f"{tensor.name} {tuple(tensor.shape)}: {use}{size}"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.2g} s"
        if seconds >= 1
        else f"{seconds * 1e3:.2g} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.0f} µs"
    )


def _memory(numbers: int) -> str:
    size = float(numbers) * 8
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
