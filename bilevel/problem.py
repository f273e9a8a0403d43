"""Bilevel problems: an outer loss at the argmin of an inner objective, its hypergradient, and how wrong that is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from bilevel._guards import (
    FirstLook,
    Watch,
    check_captures,
    check_connection,
    check_dependence,
    disconnected,
    no_dependence,
)
from bilevel._hypergradient import Hypergradient, HypergradientReport
from bilevel._knowledge import Knowledge
from bilevel._layer import Layer, Solution
from bilevel._problem import Problem
from bilevel._repeatable import Repeatable
from bilevel._seek import Promised, seek
from bilevel._seen import learn
from bilevel._system import ArgminSystem
from bilevel._transforms import autocast_to, saving_hooked, transforms_active, unhooked
from bilevel._tree import Raveler, flatten_arguments
from bilevel.certificates._certificate import Certificate
from bilevel.certificates._point import Point
from bilevel.certificates.bound import Bound
from bilevel.certificates.constants import Constants
from bilevel.errors import ArgumentError, ShapeError, TransformError
from bilevel.linear._base import LinearSolverLike
from bilevel.reports import Basis, OnFailure
from bilevel.solvers._base import InnerSolverLike
from bilevel.tolerance import Tolerance

__all__ = ["BilevelProblem"]


class BilevelProblem(torch.nn.Module, ABC):
    """min_θ F(φ*(θ), θ) with φ*(θ) = argmin_φ G(φ, θ): override the two objectives.

    Calling the problem gives the outer loss, differentiable with respect to ``outer``. It is an ordinary module, and
    remembers the last inner solution and adjoint, from which the next solves begin.

    Parameters
    ----------
    solver
        An inner solver, or a function (objective, init, outer, data) -> inner. By default chosen from the size.
    linear_solver
        A linear solver, or a function (operator, rhs) -> x. By default chosen from the size.
    tolerance
        δ and δ′.
    on_failure
        ``"raise"``, ``"warn"``, ``"nan"`` or ``"ignore"``, forward and backward.
    batch_dims
        None for one inner problem. Otherwise, in the manner of ``torch.func.vmap``'s ``in_dims``, which axis of each tensor
        of ``data`` numbers K inner problems (None where all share one): they share ``outer``, are solved and differentiated
        as one batch, and the outer loss is their mean. Inner variables then have a leading axis K.
    warm_start
        Begin from the last solution where no ``init`` is given, and the linear solve from the last adjoint. A start only
        changes the work, not the accuracy.

    Raises
    ------
    ArgumentError
        If a setting cannot be used.

    Examples
    --------
    >>> import torch, bilevel
    >>> class Ridge(bilevel.BilevelProblem):
    ...     def inner_objective(self, inner, outer, data):
    ...         X, y, _, _ = data
    ...         return ((X @ inner - y) ** 2).sum() + outer.exp() * (inner**2).sum()
    ...     def outer_objective(self, inner, outer, data):
    ...         _, _, X, y = data
    ...         return ((X @ inner - y) ** 2).mean()
    >>> t = lambda *rows: torch.tensor(rows, dtype=torch.float64)
    >>> data = (t([1.0, 0.0], [0.0, 2.0]), t(1.0, 2.0), t([1.0, 1.0]), t(1.5))
    >>> problem = Ridge(tolerance=bilevel.Tolerance(strong_convexity=2.0))
    >>> result = problem.hypergradient(torch.tensor(0.0, dtype=torch.float64), data, init=t(0.0, 0.0))
    >>> round(result.value.item(), 6), round(result.grad.item(), 6)
    (0.04, 0.164)
    >>> result.certified, result.error_bound < 1e-10
    (True, True)
    """

    def __init__(
        self,
        *,
        solver: InnerSolverLike | None = None,
        linear_solver: LinearSolverLike | None = None,
        tolerance: Tolerance | None = None,
        on_failure: OnFailure = "raise",
        batch_dims: Any = None,
        warm_start: bool = True,
    ) -> None:
        super().__init__()
        self.batch_dims = batch_dims
        self.warm_start = warm_start
        self._layer = Layer(
            ArgminSystem,
            self._inner_objective,
            solver=solver,
            linear_solver=linear_solver,
            tolerance=tolerance,
            on_failure=on_failure,
        )
        self._layer.where = self.where
        self._tolerance = self._layer.tolerance
        self._layer.adjoint.warm = warm_start
        self._last: Any = None
        self._looked = False
        self._known: Knowledge | None = None

    @property
    def where(self) -> str:
        """The name used in messages."""
        return f"`{type(self).__name__}`"

    @property
    def inner_layer(self) -> Layer:
        """The inner problem as a layer of (init, outer, data), with the settings of this problem."""
        return self._layer

    @property
    def tolerance(self) -> Tolerance:
        """The accuracy asked for; it may be set to another between calls."""
        return self._tolerance

    @tolerance.setter
    def tolerance(self, tolerance: Tolerance) -> None:
        if not isinstance(tolerance, Tolerance):
            raise ArgumentError(f"{self.where}: expected a bilevel.Tolerance, got {tolerance!r}; wrap it in one")
        self._tolerance = self._layer.tolerance = tolerance

    def memory(self) -> dict[str, Any]:
        """Return what the next call begins from: the last inner solution and adjoint, and what goals have learned.

        With it a run can be resumed bit for bit; the tensors are copies, all of it can be loaded without running code.
        """
        kept = self._known.state_dict() if self._known is not None else None
        state = {"inner": self._last, "adjoint": self._layer.adjoint.value, "known": kept}
        return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, state)

    def recall(self, state: dict[str, Any]) -> None:
        """Begin the next call from :meth:`memory`."""
        state = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, state)
        self._last, self._layer.adjoint.value = state["inner"], state["adjoint"]
        self._known = None if state["known"] is None else Knowledge.of(state["known"])

    def begin_at(self, inner: Any, adjoint: Any) -> None:
        """Begin the next call from ``inner`` and ``adjoint``, as a :class:`Hypergradient` holds them, in place of the last ones."""
        if self.batch_dims is None:
            flat = Raveler.of(adjoint, self._layer.where).ravel(adjoint)[None]
        else:
            one = Raveler.of(pytree.tree_map(lambda leaf: leaf[0], adjoint), self._layer.where)
            flat = vmap(one.ravel)(adjoint)
        self._last = inner
        self._layer.adjoint.value = flat / max(1, len(flat))  # as for the mean's cotangents

    @abstractmethod
    def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        """Return G(φ, θ), a scalar tensor, for one problem."""

    @abstractmethod
    def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        """Return F(φ, θ), a scalar tensor, for one problem."""

    def objective_arguments(self, outer: Any, data: Any) -> tuple[Any, Any]:
        """Return (outer, data) as the two objectives see them, of what a call of the problem is given.

        Override it, as :meth:`forward`, in a problem that owns its outer variables.
        """
        return outer, data

    def initial(self, outer: Any, data: Any) -> Any:
        """Return where the first inner solve begins; override it, or pass ``init``."""
        raise ArgumentError(
            f"{self._layer.where}: expected init to be given for the first solve, and it was not; pass init=..., or "
            "override initial(outer, data)"
        )

    def tolerance_of(self, outer: Any, data: Any) -> Tolerance:
        """Return the accuracy that the solves of this call aim for.

        By default the tolerance given, with δ′ meant for each problem's own adjoint: the mean over K problems hands each
        of them 1/K of its right-hand side. Override it where δ and δ′ are promises about something else than φ and q.
        """
        given, count = self._tolerance, self._count(data)
        if isinstance(given.delta_prime, (int, float)) and count:
            return replace(given, delta_prime=given.delta_prime / count)
        return given

    def constants(self, outer: Any, data: Any) -> Constants:
        """Return what is known of G and F (see :class:`Constants`); override it to get certified bounds."""
        return Constants()

    def forward(self, outer: Any, data: Any, *, init: Any = None) -> torch.Tensor:
        """Return the outer loss F(φ*(θ), θ), differentiable with respect to every tensor of ``outer``.

        Parameters
        ----------
        outer
            θ: a tensor or a pytree.
        data
            Passed on to the objectives; a pytree.
        init
            Where the inner solve begins. Without it, the last solution if there is one of the same
            problem size, else :meth:`initial`.

        Raises
        ------
        SolveError
            If the inner solve failed and the policy is ``"raise"``.
        StochasticObjectiveError, CapturedTensorError, ArgumentError
            If an objective is random, changes its arguments, reaches a tensor that would receive no gradient, or nothing
            leads to ``outer`` (policy ``"raise"``).
        TransformError, ArgumentError
            If the tolerance is a goal for the hypergradient, and more than one first ``backward`` to ``outer`` is wanted.

        Notes
        -----
        A goal, ``Tolerance(hypergradient=...)``, is met here, in the forward pass, for the gradient that ``backward`` then hands to
        ``outer``: once, and by ``backward`` or ``torch.autograd.grad`` alone. Without a gradient to promise anything of,
        under ``torch.no_grad``, the inner solve goes as far as the dtype allows.
        """
        tolerance = self.tolerance_of(outer, data)
        if tolerance.has_goal and torch.is_grad_enabled():
            promised = self._promised(outer, data, init, tolerance)
            if promised is not None:
                return promised
        solution = self.solve(outer, data, init=init)
        loss = self._outer_losses(solution.value, outer, data).mean()
        theta = [leaf for leaf in pytree.tree_leaves(outer) if isinstance(leaf, torch.Tensor)]
        spoiled = check_dependence(self.where, loss, theta, self._layer.on_failure)
        if not self._looked and torch.is_grad_enabled() and not transforms_active():
            # Once: what leads to what is a property of the objectives, and costs an evaluation of both.
            self._looked = True
            among = [leaf.requires_grad for leaf in theta if leaf.is_floating_point()]
            with unhooked():
                cut = self._disconnected(solution.value, outer, data, among) if any(among) else []
            spoiled |= bool(check_connection(self.where, outer, cut, self._layer.on_failure))
        return loss * float("nan") if spoiled else loss

    def solve(self, outer: Any, data: Any, *, init: Any = None, inspect: bool = True) -> Solution[Any]:
        """Return φ*(θ), differentiable, with the report of the inner solve.

        Parameters
        ----------
        outer, data, init
            See :meth:`forward`.
        inspect
            Look first for what would make gradients wrong (random numbers, captured tensors, wrong shapes), which costs two gradients of
            one problem. One of several calls with the same objective tells it for all.
        """
        count = self._count(data)
        self._layer.tolerance = self.tolerance_of(outer, data)
        start = self._start(outer, data, count) if init is None else init
        if count is not None:
            self._check_start(start, count)
        with nullcontext() if inspect else self._layer.trusted():
            if self.batch_dims is None:
                solution = self._layer.solve(start, outer, data)
            else:
                solution = vmap(self._layer.solve, in_dims=(0, None, self.batch_dims))(start, outer, data)
        if self.warm_start:
            last = pytree.tree_map(_cut, solution.value)
            # What a transform outside maps or differentiates is not this problem's own solution to go on from.
            if not transforms_active() and all(bool(torch.isfinite(leaf).all()) for leaf in pytree.tree_leaves(last)):
                self._last = last
        return solution

    def hypergradient(self, outer: Any, data: Any, *, init: Any = None) -> Hypergradient:
        """Return the outer value, its gradient with respect to ``outer``, and how they were come by.

        Parameters
        ----------
        outer, data, init
            See :meth:`forward`.

        Returns
        -------
        Hypergradient
            Everything in it is cut from any graph.

        Raises
        ------
        SolveError
            If a solve failed and the policy is ``"raise"``.
        StochasticObjectiveError, CapturedTensorError, ArgumentError
            As in :meth:`forward`, and if no graph leads to one of the tensors of ``outer`` (policy ``"raise"``).
        """
        leaves, structure = pytree.tree_flatten(outer)
        moving = [_moves(leaf) for leaf in leaves]
        if not any(moving):
            raise ArgumentError(
                f"{self._layer.where}: expected outer to hold a floating-point tensor, got {outer!r}; pass tensors to "
                "differentiate with respect to"
            )
        tolerance = self.tolerance_of(outer, data)
        if tolerance.has_goal:
            return self._to_goal(outer, data, init, tolerance)
        fresh = [
            leaf.detach().requires_grad_(True) if move else leaf for leaf, move in zip(leaves, moving, strict=True)
        ]
        theta = pytree.tree_unflatten(fresh, structure)
        adjoint = self._layer.adjoint
        warm, adjoint.warm = adjoint.warm, True  # the adjoint is wanted; where it begins is decided here
        if not warm:
            adjoint.value = None
        try:
            with torch.enable_grad():
                solution = self.solve(theta, data, init=init)
                value = self._outer_losses(solution.value, theta, data).mean()
                wanted = [leaf for leaf, move in zip(fresh, moving, strict=True) if move]
                adjoint.report = None
                if not value.requires_grad:
                    raise no_dependence(self.where)
                spoiled = check_captures(self.where, value, wanted, (data, init), self._layer.on_failure)
                found = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
        finally:
            adjoint.warm = warm
        plain = pytree.tree_unflatten([_cut(leaf) for leaf in fresh], structure)
        inner = pytree.tree_map(_cut, solution.value)
        lower, x = self._flat_problem(self.inner_objective, inner, plain, data)
        upper, _ = self._flat_problem(self.outer_objective, inner, plain, data)
        if spoiled:
            found = tuple(torch.full_like(gradient, float("nan")) for gradient in found)
        flat = torch.cat([part.reshape(-1) for part in self._connected(found, inner, outer, data)])
        backward = adjoint.report
        if backward is None or adjoint.value is None:  # F does not depend on φ: the adjoint is zero
            q, backward = torch.zeros_like(x), solution.report
        else:
            q = adjoint.value * lower.batch  # the mean's cotangents are 1/K of each problem's own
        assert adjoint.residual is not None
        corrected = value.detach() - (q * adjoint.residual).sum(dim=-1).mean()
        point = Point(lower, upper, x, q, _wanted(plain, lower))
        report = HypergradientReport(solution.report, backward)
        return self._package(plain, data, inner, point, value.detach(), corrected, flat, report)

    def reset(self) -> None:
        """Forget the last inner solution and adjoint."""
        self._last = self._known = None
        self._layer.adjoint.value = None

    def extra_repr(self) -> str:
        layer = self._layer
        return f"solver={layer.solver!r}, linear_solver={layer.linear_solver!r}, tolerance={layer.tolerance!r}"

    def _package(
        self,
        outer: Any,
        data: Any,
        inner: Any,
        point: Point,
        value: torch.Tensor,
        corrected: torch.Tensor,
        flat: torch.Tensor,
        report: HypergradientReport,
    ) -> Hypergradient:
        """Return what was found at ``point``, ĝ being ``flat`` (p,), with what its bounds are computed from."""
        leaves, structure = pytree.tree_flatten(outer)
        lower, upper, x = point.lower, point.upper, point.x
        mu = self._layer.tolerance.strong_convexity
        products = 0 if self._layer.tolerance.has_goal else self._layer.tolerance.bound_products

        def constants() -> Constants:
            return self.constants(outer, data).with_mu(mu)

        def restore(flat: torch.Tensor) -> Any:
            parts = iter(torch.split(flat, [leaf.numel() for leaf in leaves if _moves(leaf)]))
            filled = [next(parts).reshape(leaf.shape).to(leaf.dtype) if _moves(leaf) else None for leaf in leaves]
            return pytree.tree_unflatten(filled, structure)

        def rebuild(at: Point, before: Hypergradient) -> Hypergradient:
            there = Point(lower, upper, at.x.to(x), at.q.to(x), point.wanted)
            flat = at.gradient.mean(0).to(before._certificate.gradient)
            # In the problem's dtype, as any other result; the certificate then measures what rounding made of it.
            worth = at.corrected_value.mean().to(value)
            certificate = Certificate(there, flat, worth, constants, self.where, self._layer.on_failure, products)
            return Hypergradient(
                there.upper.value(there.x).mean().to(value), worth, restore(flat), self._unravel(there.x, inner),
                self._unravel(there.q, inner), before.report.moved(at), certificate, rebuild, restore,
            )  # fmt: skip

        return Hypergradient(
            value, corrected, restore(flat), inner, self._unravel(point.q, inner), report,
            Certificate(point, flat, corrected, constants, self.where, self._layer.on_failure, products), rebuild, restore,
        )  # fmt: skip

    def _to_goal(self, outer: Any, data: Any, init: Any, tolerance: Tolerance) -> Hypergradient:
        """Return a hypergradient as accurate as ``tolerance`` asks: both solves go as far as that needs."""
        layer, warm = self._layer, self.warm_start
        layer.tolerance = tolerance
        given = (data, init)
        outer, data = pytree.tree_map(_cut, outer), pytree.tree_map(_cut, data)
        start = self._start(outer, data, self._count(data)) if init is None else init
        start = pytree.tree_map(_cut, start)
        lower, x = self._flat_problem(self.inner_objective, start, outer, data)
        upper, _ = self._flat_problem(self.outer_objective, start, outer, data)
        wanted = _wanted(outer, lower)

        known: list[Constants] = []

        def certify(x: torch.Tensor, q: torch.Tensor, flat: torch.Tensor, corrected: torch.Tensor) -> Bound:
            if not known:
                known.append(self.constants(outer, data).with_mu(tolerance.strong_convexity))
            point = Point(lower, upper, x, q, wanted)
            certificate = Certificate(point, flat, corrected, lambda: known[0], self.where, layer.on_failure)
            bound = certificate.bound
            known[0] = certificate.constants  # what quadratic objectives determine holds at every φ, and is found once
            return bound

        kept = layer.adjoint.value if warm else None
        begin = kept * lower.batch if kept is not None and kept.shape == x.shape else None
        learned = self._known if begin is not None else None
        look = FirstLook(upper, self.outer_objective, given, layer.on_failure)
        sought = seek(layer, lower, upper, x, begin, wanted, learned, certify, look)
        found = sought.found
        inner = self._unravel(found.x, start)
        if warm and sought.finite:
            self._last, self._known = inner, found.known
            layer.adjoint.value = found.q / lower.batch  # as for the mean's cotangents
        value = found.values.mean()
        corrected = value - torch.linalg.vecdot(found.q, found.residual).mean()
        report = HypergradientReport(sought.forward, sought.backward, found.report)
        point = Point(lower, upper, found.x, found.q, wanted)
        parts = torch.split(found.gradient, [leaf.numel() for leaf in pytree.tree_leaves(outer) if _moves(leaf)])
        flat = torch.cat(self._connected(parts, inner, outer, data))
        result = self._package(outer, data, inner, point, value, corrected, flat, report)
        result.__dict__["bound"] = found.bound  # what decided, which asking for the bound shows
        if tolerance.estimates:
            result.__dict__["value_bound"] = Bound(found.value_error, Basis.ESTIMATED)
        return result

    def _promised(self, outer: Any, data: Any, init: Any, tolerance: Tolerance) -> torch.Tensor | None:
        """Return the outer loss with a gradient that meets the goal, or None where no tensor of ``outer`` wants one."""
        where, call = (
            self._layer.where,
            f"{tolerance!r} holds for hypergradient(...) and for the first backward of the loss",
        )
        if transforms_active():
            raise TransformError(
                f"{where}: expected no transform of torch.func around a problem with a goal, and there is one; {call}; "
                "inside a transform pass Tolerance(delta=..., delta_prime=...)"
            )
        if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(data)):
            raise ArgumentError(
                f"{where}: expected data not to require grad for a problem with a goal, and it does; {call} to outer; "
                "put what is to be differentiated into outer, or pass Tolerance(delta=..., delta_prime=...)"
            )
        leaves = [leaf for leaf in pytree.tree_leaves(outer) if _moves(leaf)]
        if not any(leaf.requires_grad for leaf in leaves):
            return None
        with unhooked():
            result = self._to_goal(outer, data, init, tolerance)
        gradients = [leaf for leaf in pytree.tree_leaves(result.grad) if leaf is not None]
        promised: torch.Tensor = Promised.apply(result.value, gradients, *leaves)
        return promised

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Called by .to(), .double() and their like: what the next solve begins from follows, as buffers do.
        if self._last is not None:
            self._last = pytree.tree_map(fn, self._last)
        self._known = None
        return super()._apply(fn, recurse)

    def _connected(self, parts: Sequence[torch.Tensor], inner: Any, outer: Any, data: Any) -> list[torch.Tensor]:
        """Return the gradients of the tensors of ``outer``; treat those that are zero because no objective uses the tensor."""
        # A gradient that is not zero came from somewhere.
        zero = [bool((part == 0).all()) and part.numel() > 0 for part in parts]
        if not any(zero):
            return list(parts)
        cut = check_connection(self.where, outer, self._disconnected(inner, outer, data, zero), self._layer.on_failure)
        return [torch.full_like(part, float("nan")) if number in cut else part for number, part in enumerate(parts)]

    def _disconnected(self, inner: Any, outer: Any, data: Any, among: Sequence[bool]) -> list[int]:
        """Return which floating-point tensors of ``outer``, of those ``among``, no objective's graph leads to."""
        plain, at = pytree.tree_map(_cut, outer), pytree.tree_map(_cut, inner)
        lower, x = self._flat_problem(self.inner_objective, at, plain, data)
        upper, _ = self._flat_problem(self.outer_objective, at, plain, data)
        return disconnected(lower, upper, x, _wanted(plain, lower), among)

    def _inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return self.inner_objective(inner, outer, data)

    def _count(self, data: Any) -> int | None:
        """Return K, the number of problems in ``data``; None for a single one."""
        if self.batch_dims is None:
            return None
        dims = _broadcast(self.batch_dims, data, self._layer.where)
        numbering = [(leaf, dim) for leaf, dim in zip(pytree.tree_leaves(data), dims, strict=True) if dim is not None]
        for leaf, dim in numbering:
            if not (isinstance(dim, int) and isinstance(leaf, torch.Tensor) and -leaf.ndim <= dim < leaf.ndim):
                got = f"shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
                raise ShapeError(
                    f"{self._layer.where}: expected batch_dims to name an axis of each tensor of data that numbers problems, "
                    f"got {dim!r} for one of {got}; give an axis that it has, or None where all problems share it"
                )
        sizes = {leaf.shape[dim] for leaf, dim in numbering}
        if len(sizes) != 1:
            raise ShapeError(
                f"{self._layer.where}: expected the axes that batch_dims={self.batch_dims!r} names to have one length, the "
                f"number of problems, got {sorted(sizes)}; check batch_dims and the shapes in data"
            )
        return int(sizes.pop())

    def _check_start(self, start: Any, count: int) -> None:
        for leaf in pytree.tree_leaves(start):
            if isinstance(leaf, torch.Tensor) and (not leaf.ndim or len(leaf) != count):
                raise ShapeError(
                    f"{self._layer.where}: expected init to have a leading axis of {count}, one start for each problem that "
                    f"batch_dims finds in data, got a leaf of shape {tuple(leaf.shape)}; expand it, for example with "
                    f"init.expand({count}, *init.shape)"
                )

    def _start(self, outer: Any, data: Any, count: int | None) -> Any:
        last = self._last
        fits = last is not None and (count is None or all(len(leaf) == count for leaf in pytree.tree_leaves(last)))
        if fits and type(self).initial is BilevelProblem.initial:
            return last
        cold = pytree.tree_map(_cut, self.initial(outer, data))
        return last if fits and _same_shapes(last, cold) else cold

    def _outer_losses(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        def one(inner: Any, outer: Any, data: Any) -> torch.Tensor:
            loss = self.outer_objective(inner, outer, data)
            if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
                got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
                raise ShapeError(
                    f"{self._layer.where}: expected outer_objective to return a scalar tensor of shape (), got {got}; "
                    "reduce it, for example with .mean()"
                )
            return loss

        def every() -> torch.Tensor:
            with Repeatable.around(self.outer_objective):
                if self.batch_dims is None:
                    return one(inner, outer, data)
                # Randomness would be refused by vmap in words about vmap; let it through to our own check.
                losses: torch.Tensor = vmap(one, in_dims=(0, None, self.batch_dims), randomness="different")(
                    inner, outer, data
                )
                return losses

        watch = Watch(self.where, self.outer_objective, (inner, outer, data))
        given = [leaf for leaf in pytree.tree_leaves((inner, outer, data)) if isinstance(leaf, torch.Tensor)]
        if saving_hooked():
            # A checkpoint takes it for granted that what is computed again saves what was saved first.
            with unhooked():
                learn(self.outer_objective, every(), given)
            losses = every()
        else:
            losses = every()
            if learn(self.outer_objective, losses, given):
                losses = every()
        return losses * float("nan") if watch.ended(self._layer.on_failure) else losses

    def _flat_problem(
        self, objective: Callable[..., torch.Tensor], inner: Any, outer: Any, data: Any
    ) -> tuple[Problem, torch.Tensor]:
        """Return ``objective`` as a batch of flat problems, and the inner variables as (K, n), K = 1 for a single one."""
        tensors, arguments = flatten_arguments((outer, data), {})
        if self.batch_dims is None:
            raveler = Raveler.of(inner, self._layer.where)
            precision = autocast_to(raveler.device)
            system = ArgminSystem(self._layer.where, objective, raveler, arguments, autocast=precision)
            return Problem.of(system, tensors), raveler.ravel(inner)[None]
        raveler = Raveler.of(pytree.tree_map(lambda leaf: leaf[0], inner), self._layer.where)
        # One dimension for each leaf of data, as vmap itself reads a prefix of in_dims.
        dims = pytree.tree_leaves(pytree.tree_map(lambda _: None, outer), is_leaf=lambda x: x is None)
        dims += _broadcast(self.batch_dims, data, self._layer.where)
        of_tensors = [dim for dim, flag in zip(dims, arguments.is_tensor, strict=True) if flag]
        moved = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, of_tensors, strict=True)]
        x = vmap(raveler.ravel)(inner)
        precision = autocast_to(raveler.device)
        system = ArgminSystem(self._layer.where, objective, raveler, arguments, autocast=precision)
        return Problem.of(system.lift(len(x), tuple(dim is not None for dim in of_tensors)), moved), x

    def _unravel(self, q: torch.Tensor, inner: Any) -> Any:
        if self.batch_dims is None:
            return Raveler.of(inner, self._layer.where).unravel(q[0])
        return vmap(Raveler.of(pytree.tree_map(lambda leaf: leaf[0], inner), self._layer.where).unravel)(q)


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _wanted(outer: Any, problem: Problem) -> tuple[bool, ...]:
    """Return which of the problem's tensors, those of ``outer`` first, are differentiated with respect to."""
    flags = [_moves(leaf) for leaf in pytree.tree_leaves(outer) if isinstance(leaf, torch.Tensor)]
    return (*flags, *[False] * (len(problem.tensors) - len(flags)))


def _cut(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _same_shapes(one: Any, other: Any) -> bool:
    (leaves, structure), (others, another) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return structure == another and all(a.shape == b.shape for a, b in zip(leaves, others, strict=True))


def _broadcast(dims: Any, tree: Any, where: str) -> list[int | None]:
    """Return one entry of the prefix ``dims`` for each leaf of ``tree``."""
    structure = pytree.tree_structure(tree)
    flat = pytree._broadcast_to_and_flatten(dims, structure, is_leaf=lambda dim: dim is None)
    if flat is None:
        raise ArgumentError(
            f"{where}: expected batch_dims to be a prefix of data's structure, got batch_dims={dims!r} for {structure}; give an "
            "axis or None for each part of data, as in torch.func.vmap's in_dims"
        )
    return flat
