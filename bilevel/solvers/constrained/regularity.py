"""The conditions for a derivative of a constrained solution: strict complementarity, independent gradients, and curvature on the tangent space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import eigh, eigvalsh, svdvals
from bilevel.solvers.constrained.active_set import Measures, Polished
from bilevel.solvers.constrained.implied import Weak, count_implied, leave_no_interior, with_strict_multipliers
from bilevel.solvers.constrained.program import Program
from bilevel.solvers.parts.shifted import try_cholesky

__all__ = ["Findings", "examine", "explained"]

Name = Callable[[str, int], str]

# Multipliers and distances below this share of the sizes of forces and of x count as zero.
_WEAK, _WEAK_UNPOLISHED = 2e-8, 1e-4
# Singular values of normalised gradients, and eigenvalues of the scaled reduced Hessian, relative to the largest.
_DEPENDENT, _FLAT = 1e-10, 1e-10
_MOST_NAMES = 3
_SMOOTHING = "perturb the arguments, or pass smoothing=1e-3 to bilevel.argmin, which takes value and derivative from the central path"
_RIDGE = (
    "add a small ridge term, such as 1e-3 * (x**2).sum(), to the objective; or, where the constraints bound the solutions, pass smoothing=1e-3 to "
    "bilevel.argmin, which takes value and derivative from the central path"
)
_NO_INTERIOR = "state inequalities that hold each other as one equality, loosen one of them, or detach the arguments that move them"
_LOOSEN = "loosen one of these constraints a little, for example by 1e-3"
_LEAVE_OUT = (
    "leave one of these equations out: it follows from the others, as the last column sum of a transport plan does"
)


@dataclass(frozen=True, eq=False)
class Findings:
    """The findings at a batch of solutions. Every tensor has a leading batch axis.

    Parameters
    ----------
    weak
        The constraints with multiplier zero of which the derivative depends on the side.
    dependent
        Whether the gradients of active constraints are linearly dependent (K,), and which take part (K, p + m).
    flat, negative
        Whether the reduced Hessian is singular, or has a negative eigenvalue (K,).
    irregular
        Whether no multipliers satisfy the KKT conditions to rounding (K,).
    repeated
        The equalities that follow from each other, bounds or not (K, p). No argument and no smoothing makes them independent.
    comparable
        Whether the derivative is one-sided because of ``weak`` alone, and each choice among these has a solution nearby (K,): see :class:`Sides`.
    """

    weak: Weak
    dependent: torch.Tensor
    members: torch.Tensor
    flat: torch.Tensor
    negative: torch.Tensor
    irregular: torch.Tensor
    repeated: torch.Tensor
    comparable: torch.Tensor

    @property
    def degenerate(self) -> torch.Tensor:
        """Where the derivative does not exist or is one-sided (K,). With dependent gradients alone it may exist."""
        return self.weak.any | self.flat | self.irregular

    def words(self, number: int, name: Name) -> tuple[str, str]:
        """Return what is degenerate about the problem at ``number``, and the remedy; ``name`` converts a kind and an index to the user's terms."""
        weak = [("inequality", self.weak.inequality), ("lower", self.weak.lower), ("upper", self.weak.upper)]
        names = [name(kind, int(i)) for kind, flags in weak for i in flags[number].nonzero().reshape(-1)]
        if names:
            verb = "is" if len(names) == 1 else "are"
            return f"{_listed(names)} {verb} active with multiplier 0, so that the derivative is one-sided", _SMOOTHING
        if bool(self.flat[number]):
            return (
                "the solution may not be unique, as the second-order condition fails: the Lagrangian is flat along a direction that the active "
                "constraints leave free",
                _RIDGE,
            )
        if bool(self.irregular[number]):
            return (
                "no finite multipliers satisfy the optimality conditions, as no constraint qualification holds there",
                f"loosen a constraint, or {_SMOOTHING}",
            )
        repeated = self.repeated[number].nonzero().reshape(-1).tolist()
        if repeated:
            names = [name("equality", i) for i in repeated]
            return f"{_listed(names)} repeat each other, and the arguments move them apart", _LEAVE_OUT
        p = self.members.shape[-1] - self.weak.inequality.shape[-1]
        places = self.members[number].nonzero().reshape(-1).tolist()
        names = [name("equality", i) if i < p else name("inequality", i - p) for i in places]
        return (
            f"the gradients of {_listed(names)} are linearly dependent, and the arguments move these constraints apart",
            _SMOOTHING,
        )


def explained(
    findings: Findings, program: Program, x: torch.Tensor, at: Measures, number: int, name: Name
) -> tuple[str, str]:
    """Return :meth:`Findings.words`, or words for constraints without an interior or without a gradient."""
    near = _WEAK_UNPOLISHED if bool(findings.irregular[number]) else _WEAK
    vanishing = _vanishing(program, x, at, near)[number].nonzero().reshape(-1).tolist()
    if vanishing:
        named = _listed([name("inequality", i) for i in vanishing])
        return (
            f"the gradient of {named} vanishes on its boundary, so that no finite multipliers exist",
            "state the same set by a constraint whose gradient does not vanish, for example x = a in place of ((x - a) ** 2).sum() <= 0, or "
            "loosen the constraint",
        )
    weights = leave_no_interior(program, x, at, number, near)
    if weights is None:
        return findings.words(number, name)
    p, m, n = program.equalities, program.inequalities, program.size
    kinds = [("equality", p), ("inequality", m), ("lower", n), ("upper", n)]
    places = [(kind, i) for kind, count in kinds for i in range(count)]
    named = _listed([name(*places[i]) for i in (weights.abs() > 1e-6).nonzero().reshape(-1).tolist()])
    return (
        f"no constraint qualification holds: {named} leave no interior to first order, and may leave no feasible point if an argument moves them",
        _LOOSEN if bool(findings.irregular[number]) else _NO_INTERIOR,
    )


def _vanishing(program: Program, x: torch.Tensor, at: Measures, near: float) -> torch.Tensor:
    """Return which inequalities (K, m) are active with a gradient that is nearly zero beside that at a point not far away."""
    aside = torch.cos(torch.arange(x.shape[-1], dtype=x.dtype, device=x.device))
    rows = program.jacobian(x + 1e-2 * at.size.unsqueeze(-1) * aside)[1]
    there = program.split(rows)[2].norm(dim=-1)
    here, c = program.split(at.rows)[2].norm(dim=-1), program.split(at.parts)[2]
    return (here <= 1e-5 * there) & (c > -near * there * at.size.unsqueeze(-1))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def examine(program: Program, point: Polished, at: Measures) -> tuple[Findings, Polished]:
    """Examine the solutions ``point``, measured as ``at`` there; return them with the weakly active constraints that others imply as active."""
    _, jh, jc = program.split(at.rows)
    weak = _weak(program, point, at)
    if bool(weak.any.any()):
        point, weak = count_implied(program, point, at, weak)
        if bool(weak.any.any()):
            point, weak = with_strict_multipliers(program, point, at, weak, _WEAK)
    # With all weakly active constraints active: what the others decide about the directions into them is in `lower_points`.
    some = weak.lower | weak.upper
    free = (~(point.at_lower | point.at_upper | some)).to(point.x)
    counted = torch.cat([torch.ones_like(jh[..., 0], dtype=torch.bool), point.active | weak.inequality], dim=-1)
    everything = torch.cat([jh, jc], dim=1)
    rows = everything * counted.unsqueeze(-1) * free.unsqueeze(1)
    dependent, members = _dependence(everything, rows, counted)
    repeated = torch.zeros_like(counted[:, : jh.shape[1]])
    if bool(dependent.any()):
        repeated = _dependence(jh, jh, torch.ones_like(repeated))[1]
    flat, negative = _curvature(at.hessian, rows, free)
    comparable = point.good & weak.any & ~(flat | negative | dependent)
    if bool(comparable.any()):  # and with none of them active
        free = ((free > 0) | some).to(point.x)
        strict = counted & ~torch.cat([torch.zeros_like(repeated), weak.inequality], dim=-1)
        bent = _curvature(at.hessian, everything * strict.unsqueeze(-1) * free.unsqueeze(1), free)
        comparable = comparable & ~(bent[0] | bent[1])
    return Findings(weak, dependent, members, flat, negative, ~point.good, repeated, comparable), point


def _weak(program: Program, point: Polished, at: Measures) -> Weak:
    c = program.split(at.parts)[2]
    share = torch.where(point.good, _WEAK, _WEAK_UNPOLISHED).to(point.x).unsqueeze(-1)
    no_force, no_gap = share * at.force.unsqueeze(-1), share * at.size.unsqueeze(-1)
    slope, loose = point.slope, ~program.fixed
    return Weak(
        (c / at.norms > -no_gap) & (point.inequality * at.norms <= no_force),
        loose & (point.x - program.lower <= no_gap) & (slope.abs() <= no_force),
        loose & (program.upper - point.x <= no_gap) & (slope.abs() <= no_force),
    )


def _dependence(whole: torch.Tensor, rows: torch.Tensor, counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether the ``counted`` (K, r) rows of (K, r, n) are linearly dependent, and which take part."""
    count, r = rows.shape[:2]
    members = torch.zeros_like(counted)
    if not r:
        return torch.zeros(count, dtype=torch.bool, device=rows.device), members
    norms = whole.norm(dim=-1, keepdim=True)
    unit = rows / torch.where(norms > 0, norms, torch.ones_like(norms))
    gram = unit @ unit.mT + torch.diag_embed((~counted).to(rows))
    factor, failed = try_cholesky(gram)
    doubtful = failed | (factor.diagonal(dim1=-2, dim2=-1).amin(-1) < 1e-4)
    if not bool(doubtful.any()):
        return doubtful, members
    # Inactive rows become unit vectors in extra dimensions.
    extended = torch.cat([unit, torch.diag_embed((~counted).to(rows))], dim=-1)
    values = svdvals(extended)
    dependent = doubtful & ~(values[..., r - 1] > _DEPENDENT * values[..., 0])
    null = eigh(gram)[1][..., 0]
    members = counted & (null.abs() > 1e-6) & dependent.unsqueeze(-1)
    return dependent, members


def _curvature(hessian: torch.Tensor, rows: torch.Tensor, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether the Hessian reduced to the null space of the rows is singular, or has a negative eigenvalue (K,)."""
    masked = hessian * free.unsqueeze(1) * free.unsqueeze(2)
    held = torch.diag_embed(1 - free)
    size = masked.abs().amax(-1)
    scale = torch.where(size > 1e-14 * size.amax(-1, keepdim=True), size, torch.ones_like(size)).rsqrt()
    scaled = scale.unsqueeze(-1) * masked * scale.unsqueeze(-2)
    jacobian = rows * scale.unsqueeze(1)
    if not rows.shape[1]:
        _, failed = try_cholesky(scaled + held)
        return _signs(scaled + held, failed)
    gram = jacobian.mT @ jacobian
    weight = 1e3 / gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-300)
    augmented = scaled + weight[:, None, None] * gram + held
    _, failed = try_cholesky(augmented)
    if not bool(failed.any()):
        return failed, failed
    values, vectors = eigh(gram + held * gram.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None])
    normal = (values > 1e-14 * values.amax(-1, keepdim=True)).to(scaled)
    tangent = vectors @ torch.diag_embed(1 - normal) @ vectors.mT
    reduced = tangent @ scaled @ tangent + vectors @ torch.diag_embed(normal) @ vectors.mT
    return _signs(reduced, failed)


def _signs(matrix: torch.Tensor, failed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not bool(failed.any()):
        return failed, failed
    least = eigvalsh(0.5 * (matrix + matrix.mT))[..., 0]
    negative = failed & (least < -1e-7)
    return failed & ~negative & ~(least > _FLAT), negative
