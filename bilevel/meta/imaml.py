"""iMAML: learn the initialisation of proximal adaptation by implicit gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

import bilevel
from bilevel.meta.convexity import is_convex
from bilevel.meta.learner_settings import SHARED, refuse_running_statistics, register_lam, released_solvers
from bilevel.meta.proximal import half_square
from bilevel.meta.safeguarded import SafeguardedCG
from bilevel.meta.task_losses import example_losses, task_loss
from bilevel.meta.tasks import Tasks, as_support, as_tasks, by_parts

__all__ = ["IMAML"]


class IMAML(bilevel.BilevelProblem):
    r"""Learn an initialisation θ by differentiating through the adaptation of each task (Algorithms 1 and 2 of the paper).

    .. math::
        \min_θ \frac1T \sum_i L_i(φ_i^*(θ)), \qquad
        φ_i^*(θ) = \operatorname{argmin}_φ \hat L_i(φ) + \frac{λ}{2} \|φ - θ\|^2

    The learner is an ordinary module, and θ are the model's own parameters. Calling it adapts all tasks of a batch
    together, and returns the mean query loss. ``loss.backward()`` fills their ``grad`` with the mean of gᵢ = (I +
    ∇²L̂ᵢ/λ)⁻¹ ∇Lᵢ(φᵢ).

    Parameters
    ----------
    model
        A module. Its trainable parameters are learned and adapted; frozen parameters and buffers are used as they are.
        Batch norm has to use batch statistics (``track_running_stats=False``).
    loss
        (prediction, target) ↦ scalar, the mean over a task's examples.
    lam
        λ > 0: a number, or a dict with a number or a tensor (of the parameter's shape) for each trainable parameter by
        name.
    solver
        The inner solver, which begins at θ. None: 16 steps of gradient descent with a line search that begins at step 0.1.
        ``bilevel.GradientDescent(lr=0.1, max_steps=16)`` is the paper's; its fixed step is too long for some tasks.
        ``bilevel.Newton(max_steps=..., dense_limit=0)`` is the paper's Hessian-free variant.
    linear_solver
        The linear solver. None: 5 steps of conjugate gradients, damped for a task in which H + λI is not positive definite.
        ``bilevel.CG(max_steps=5)`` is the paper's, which fails on such a task.
    tolerance
        None: run for the given numbers of steps, as in the paper. No accuracy check, no warning. Otherwise δ bounds ‖φᵢ −
        φᵢ*‖, and δ′ bounds the error of gᵢ at that φᵢ, as in Algorithm 2. ``strong_convexity`` is the least eigenvalue of
        ∇²L̂ᵢ + λI: λ if L̂ᵢ is convex, λ − β if it is only β-smooth.
    on_failure
        ``"raise"``, ``"warn"``, ``"nan"`` or ``"ignore"``, forward and backward.
    mode
        ``"paper"``, or ``"released"`` for the procedure of the authors' code. That code descends without the proximal term
        and takes one step on the term at the end. It solves ((1 + c) I + H/(λ + d)) g = ∇L with c = 1, d = 10. It needs
        ``GradientDescent``, ``CG`` and one number λ.
    learn_lam
        Whether λ is learned too. Its logarithm is then a parameter, so that λ stays positive.
    tasks_per_pass
        The largest number of tasks adapted as one set of kernels; None: all tasks of the batch. It does not change the
        results.

    Raises
    ------
    bilevel.ArgumentError
        If a setting cannot be used: λ not positive, batch norm with running statistics, a model without trainable parameters.

    References
    ----------
    Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit Gradients", NeurIPS 2019.

    Examples
    --------
    >>> import torch, bilevel
    >>> _ = torch.manual_seed(0)
    >>> learner = bilevel.IMAML(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, lam=1.0)
    >>> x, y = torch.randn(3, 5, 2), torch.randn(3, 5, 1)  # three tasks of five examples
    >>> loss = learner((x, y, x, y))
    >>> loss.backward()
    >>> learner.model.weight.grad.shape
    torch.Size([1, 2])
    >>> adapted = learner.adapt((x, y))
    >>> adapted["weight"].shape, learner.predict(adapted, x).shape
    (torch.Size([3, 1, 2]), torch.Size([3, 5, 1]))
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], torch.Tensor],
        lam: float | Mapping[str, float | torch.Tensor] = 2.0,
        solver: Any = None,
        linear_solver: Any = None,
        tolerance: bilevel.Tolerance | None = None,
        *,
        on_failure: Literal["raise", "warn", "nan", "ignore"] = "raise",
        mode: Literal["paper", "released"] = "paper",
        learn_lam: bool = False,
        tasks_per_pass: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise bilevel.ArgumentError(
                f"IMAML: expected model to be a torch.nn.Module, got {type(model).__name__}; wrap the function in one"
            )
        if not callable(loss):
            raise bilevel.ArgumentError(
                f"IMAML: expected loss to be a function of (prediction, target), got {loss!r}; for example "
                "torch.nn.functional.cross_entropy"
            )
        if tasks_per_pass is not None and (not isinstance(tasks_per_pass, int) or tasks_per_pass < 1):
            raise bilevel.ArgumentError(
                f"IMAML: expected tasks_per_pass to be a whole number > 0 or None, got {tasks_per_pass!r}; pass None for "
                "all tasks at once"
            )
        paper = mode == "paper"
        if solver is None:
            solver = bilevel.GradientDescent(lr=0.1, max_steps=16, line_search=paper)
        if linear_solver is None:
            linear_solver = SafeguardedCG(max_steps=5) if paper else bilevel.CG(max_steps=5)
        if mode == "released":
            solver, linear_solver = released_solvers(solver, linear_solver, lam, learn_lam)
        elif mode != "paper":
            raise bilevel.ArgumentError(
                f'IMAML: expected mode to be "paper" or "released", got {mode!r}; "paper" is the default'
            )
        super().__init__(
            solver=solver,
            linear_solver=linear_solver,
            tolerance=bilevel.Tolerance(delta=None, delta_prime=None) if tolerance is None else tolerance,
            on_failure=on_failure,
            batch_dims={"support": 0, "query": 0, "fixed": None},
            warm_start=False,  # tasks change from call to call, and adaptation begins at θ
        )
        self.inner_layer.backward_messages = _curvature_words(linear_solver)
        self.model = model
        self.loss = loss
        self.mode = mode
        self.tasks_per_pass = tasks_per_pass
        self._lam_names = register_lam(self, _trainable(model), lam, learn_lam)
        self._loss_is_a_mean = False
        refuse_running_statistics(model)

    @property
    def lam(self) -> torch.Tensor | dict[str, torch.Tensor]:
        """The strength λ, one scalar tensor or one tensor for each trainable parameter by name; with a graph where it is learned."""
        values = {
            name: getattr(self, f"log_lam_{key}").exp() if self.learns_lam else getattr(self, f"lam_{key}")
            for name, key in self._lam_names.items()
        }
        return values.get(SHARED, values)

    @property
    def learns_lam(self) -> bool:
        """Whether λ is a parameter."""
        return any(name.startswith("log_lam_") for name in self._parameters)

    def forward(self, batch: Any, *, predictions: bool = False) -> Any:  # type: ignore[override]  # θ is the module's own
        """Adapt every task and return the mean query loss, differentiable with respect to the module's parameters.

        Parameters
        ----------
        batch
            (support_x, support_y, query_x, query_y), each (T, examples, ...), as a tuple, a dict of these names or
            :class:`bilevel.meta.Tasks`; inputs and targets may be pytrees.
        predictions
            Return (loss, predictions) with the model's outputs (T, examples, ...) for the query, without a graph.

        Raises
        ------
        bilevel.SolveError
            If an inner solve failed and the policy is ``"raise"``; in ``backward``, if a linear solve did.
        bilevel.ShapeError
            If the axes of tasks and examples do not agree.
        bilevel.ArgumentError
            If padded tasks meet a model with batch norm, or a loss that is not a mean over examples.
        """
        tasks = self._checked(as_tasks(batch, self.where))
        if self.tolerance.has_goal and torch.is_grad_enabled():
            raise bilevel.ArgumentError(
                f"{self.where}: expected Tolerance(delta=..., delta_prime=...) for the loss of a batch of tasks, got "
                f"{self.tolerance!r}; call hypergradient(batch), which meets such a goal, and hand on its grad"
            )
        outer, losses, made = self.outer, [], []
        tolerance = self.tolerance_of(outer, self._data(tasks))  # of the mean over all tasks, in every pass
        for number, part in enumerate(self._passes(tasks)):
            data = self._data(part)
            adapted = self.solve(outer, data, inspect=number == 0, tolerance=tolerance).value
            loss, prediction = by_parts(functools.partial(self._judge, data["fixed"]), adapted, data["query"])
            losses.append(loss)
            made.append(pytree.tree_map(torch.Tensor.detach, prediction))
        loss = torch.cat(losses).mean()
        return (loss, pytree.tree_map(lambda *parts: torch.cat(parts), *made)) if predictions else loss

    def hypergradient(self, batch: Any) -> bilevel.Hypergradient:  # type: ignore[override]
        """Return value, gradient, adapted parameters, reports per task and error bound; leave ``grad`` alone.

        ``grad`` in it is a dict with ``"parameters"``, by name, and ``"lam"``. See
        :meth:`bilevel.BilevelProblem.hypergradient`.
        """
        tasks = self._checked(as_tasks(batch, self.where))
        return super().hypergradient(self.outer, self._data(tasks))

    def adapt(self, support: Any) -> dict[str, torch.Tensor]:
        """Return adapted parameters for use, by name, one set for each of the T tasks on axis 0, without a graph.

        Parameters
        ----------
        support
            (support_x, support_y), each (T, examples, ...), or a whole batch of tasks.
        """
        x, y, weight = as_support(support, self.where)
        tasks = self._checked(Tasks(x, y, x, y, weight, weight))
        with torch.no_grad():
            passes = enumerate(self._passes(tasks))
            parts = [self.solve(self.outer, self._data(part), inspect=number == 0).value for number, part in passes]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def predict(self, adapted: Mapping[str, torch.Tensor], x: Any) -> Any:
        """Return the model's outputs (T, examples, ...) for ``x`` with each task's ``adapted`` parameters."""
        expected = sorted(self.outer["parameters"])
        if not isinstance(adapted, Mapping) or sorted(adapted) != expected:
            got = sorted(adapted) if isinstance(adapted, Mapping) else type(adapted).__name__
            raise bilevel.ArgumentError(
                f"{self.where}.predict: expected adapted to hold the parameters {expected}, got {got}; pass what adapt(...) returned"
            )
        fixed = self._fixed()
        return vmap(lambda parameters, x: self._call(parameters, fixed, x))(dict(adapted), x)

    def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        """Return L̂(φ) + (λ/2) ‖φ − θ‖² of one task."""
        fit, _ = self._judge(data["fixed"], inner, data["support"])
        theta, lam = outer["parameters"], outer["lam"]
        if isinstance(lam, torch.Tensor):
            # One vector in place of many tensors: a small network's step is as long as its number of operations.
            return fit + lam * half_square(bilevel.ravel(inner) - bilevel.ravel(theta))
        return fit + 0.5 * sum((lam[name] * (inner[name] - theta[name]) ** 2).sum() for name in theta)

    def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        """Return L(φ) of one task, on its query examples."""
        return self._judge(data["fixed"], inner, data["query"])[0]

    def objective_arguments(self, batch: Any) -> tuple[Any, Any]:  # type: ignore[override]  # θ is the module's own
        """Return θ and λ, and the batch's support and query, for the objectives."""
        return self.outer, self._data(self._checked(as_tasks(batch, self.where)))

    def initial(self, outer: Any, data: Any) -> Any:
        """Return θ for every task."""
        count = len(pytree.tree_leaves(data["support"])[0])
        return {name: value.detach().expand(count, *value.shape) for name, value in outer["parameters"].items()}

    def tolerance_of(self, outer: Any, data: Any) -> bilevel.Tolerance:
        """Return the tolerance with δ′, which is meant for g = λq, in the units of q."""
        tolerance = super().tolerance_of(outer, data)
        if not isinstance(tolerance.delta_prime, (int, float)):
            return tolerance
        largest = max(float(value.detach().max()) for value in pytree.tree_leaves(outer["lam"]))
        return replace(tolerance, delta_prime=tolerance.delta_prime / largest)

    def constants(self, outer: Any, data: Any) -> bilevel.Constants:
        """Return the constants that hold for every learner, and μ = λ for a convex loss.

        B consists of −λ for θ and of φ − θ for λ; the query loss depends on neither. L̂ is known to be convex for a model with
        one linear layer and nothing else, and a torch loss that is convex in the prediction.
        """
        least = min(float(value.detach().min()) for value in pytree.tree_leaves(outer["lam"]))
        convex = is_convex(self.model, self.loss) and self.mode == "paper"
        return bilevel.Constants(
            strong_convexity=least if convex else None, convex=convex, cross_lipschitz=1.0, outer_cross_lipschitz=0.0
        )

    @property
    def outer(self) -> dict[str, Any]:
        """θ and λ, for the objectives."""
        return {"parameters": _trainable(self.model), "lam": self.lam}

    def extra_repr(self) -> str:
        """Return the settings, for ``repr``."""
        lam = self.lam
        shown = f"{float(lam.detach()):g}" if isinstance(lam, torch.Tensor) else "per tensor"
        learned = ", learned" if self.learns_lam else ""
        return f"lam={shown}{learned}, mode={self.mode!r}, {super().extra_repr()}"

    def _goes_by(self, method: Any) -> tuple[Any, ...] | None:
        """Return the objects on which :meth:`inner_objective` depends besides its arguments, the model's tensors included; None if unknown."""
        loss: Any = self.loss
        own = isinstance(loss, nn.Module) and any(True for _ in (*loss.parameters(), *loss.buffers()))
        return None if own or type(self) is not IMAML or method is not IMAML.inner_objective else (self.model, loss)

    def _data(self, tasks: Tasks) -> dict[str, Any]:
        support = (tasks.support_x, tasks.support_y, *_present(tasks.support_weight))
        query = (tasks.query_x, tasks.query_y, *_present(tasks.query_weight))
        return {"support": support, "query": query, "fixed": self._fixed()}

    def _fixed(self) -> dict[str, torch.Tensor]:
        frozen = {name: value for name, value in self.model.named_parameters() if not value.requires_grad}
        return {**frozen, **{name: value.detach() for name, value in self.model.named_buffers()}}

    def _passes(self, tasks: Tasks) -> list[Tasks]:
        most = self.tasks_per_pass
        count = len(pytree.tree_leaves(tasks.support_y)[0])
        if most is None or count <= most:
            return [tasks]

        def cut(begin: int) -> Tasks:
            return pytree.tree_map_only(torch.Tensor, lambda leaf: leaf[begin : begin + most], tasks)

        return [cut(begin) for begin in range(0, count, most)]

    def _call(self, parameters: Any, fixed: Any, x: Any) -> Any:
        if isinstance(x, Mapping):
            return functional_call(self.model, {**parameters, **fixed}, (), dict(x))
        return functional_call(self.model, {**parameters, **fixed}, tuple(x) if isinstance(x, (tuple, list)) else (x,))

    def _judge(self, fixed: Any, parameters: Any, part: tuple[Any, ...]) -> tuple[torch.Tensor, Any]:
        """Return the mean loss over one task's examples ``part``, (x, y) or (x, y, weight), and the predictions."""
        x, y, *weight = part
        prediction = self._call(parameters, fixed, x)
        if not weight:
            return task_loss(self.where, self.loss, prediction, y), prediction
        return (weight[0] * example_losses(self.where, self.loss, prediction, y)).sum() / weight[0].sum(), prediction

    def _checked(self, tasks: Tasks) -> Tasks:
        """Raise on what the model cannot do with these tasks."""
        refuse_running_statistics(self.model)
        if tasks.support_weight is None and tasks.query_weight is None:
            return tasks
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
                raise bilevel.ArgumentError(
                    f"{self.where}: expected tasks without padding for a model with batch norm, and {name or 'model'} would "
                    "count the padding in its batch statistics; call the learner once for each size of task, or use "
                    "GroupNorm"
                )
        if not self._loss_is_a_mean:
            self._check_mean(tasks)
            self._loss_is_a_mean = True
        return tasks

    def _check_mean(self, tasks: Tasks) -> None:
        weight = tasks.support_weight if tasks.support_weight is not None else tasks.query_weight
        x, y = (
            (tasks.support_x, tasks.support_y) if tasks.support_weight is not None else (tasks.query_x, tasks.query_y)
        )
        assert weight is not None
        count = int(weight[0].count_nonzero())
        x, y = pytree.tree_map(lambda leaf: leaf[0, :count], (x, y))
        with torch.no_grad():
            prediction = self._call(_trainable(self.model), self._fixed(), x)
            together, apart = self.loss(prediction, y), example_losses(self.where, self.loss, prediction, y).mean()
        if not torch.allclose(together, apart, rtol=1e-3, equal_nan=True):
            raise bilevel.ArgumentError(
                f"{self.where}: expected loss to be the mean over the examples of a task, which padding needs, and over "
                f"{count} examples it is {float(together):.6g} where the mean of their losses is {float(apart):.6g}; use "
                "reduction='mean' without class weights, or call the learner once for each size of task"
            )


def _curvature_words(linear_solver: Any) -> dict[bilevel.Status, tuple[str, str]]:
    """Return the message for negative curvature in the linear solve of these problems."""
    plain = (
        ""
        if isinstance(linear_solver, SafeguardedCG)
        else "leave linear_solver out, for the default damps such tasks; "
    )
    words = (
        "met negative curvature: I + H/lam, H being the Hessian of a task's loss where adaptation ended, is not positive definite",
        f"{plain}pass linear_solver=bilevel.Damped(bilevel.CG(5), damping=...) with a damping above the size of the negative curvature; "
        "raise lam above it; and adapt with a smaller step size or line_search=True, because an adaptation that overshoots ends where "
        "curvature is negative",
    )
    return {bilevel.Status.INDEFINITE: words, bilevel.Status.SINGULAR: words}


def _present(weight: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return () if weight is None else (weight,)


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}
