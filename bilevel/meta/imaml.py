"""iMAML: the initialisation from which proximal adaptation does well, learned by implicit gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

import bilevel
from bilevel.meta.proximal import half_square
from bilevel.meta.released import ReleasedDescent, ReleasedLinearSolve
from bilevel.meta.safeguarded import SafeguardedCG
from bilevel.meta.tasks import Tasks, as_support, as_tasks

__all__ = ["IMAML"]

_SHARED = "all"
# The most numbers of input for one set of kernels on the CPU: a convolutional network makes some hundred times as many of them.
_NUMBERS_AT_ONCE = 2**16


class IMAML(bilevel.BilevelProblem):
    r"""Learn an initialisation θ by differentiating through the adaptation of each task (Algorithms 1 and 2 of the paper).

    .. math::
        \min_θ \frac1T \sum_i L_i(φ_i^*(θ)), \qquad
        φ_i^*(θ) = \arg\min_φ \hat L_i(φ) + \tfrac{λ}{2} \|φ - θ\|^2

    An ordinary module: θ are the model's own parameters, calling it adapts all tasks of a batch together and returns the
    mean query loss, and ``loss.backward()`` fills their ``grad`` with the mean of gᵢ = (I + ∇²L̂ᵢ/λ)⁻¹ ∇Lᵢ(φᵢ).

    Parameters
    ----------
    model
        A module whose trainable parameters are learned and adapted; frozen ones and buffers are used as they are.
        Batch norm has to use batch statistics (``track_running_stats=False``).
    loss
        (prediction, target) ↦ scalar, the mean over a task's examples.
    lam
        λ > 0: a number, or a dict with a number, or a tensor of the parameter's shape, for each of the model's trainable
        parameters by name.
    solver
        The inner solver; by default 16 steps of gradient descent with a line search that begins at step 0.1. It begins at θ.
        ``bilevel.GradientDescent(lr=0.1, max_steps=16)`` is the paper's, whose fixed step is too long for some tasks;
        ``bilevel.Newton(max_steps=..., dense_limit=0)`` is the paper's Hessian-free variant.
    linear_solver
        By default 5 steps of conjugate gradients, on the damped system for a task where H + λI is not positive definite.
        ``bilevel.CG(max_steps=5)`` is the paper's, which fails on such a task.
    tolerance
        By default no accuracy is asked and the step counts are meant, as is the paper's practice. Otherwise δ bounds
        ‖φᵢ − φᵢ*‖, and δ′ the error of gᵢ itself at that φᵢ, as in Algorithm 2, with ``strong_convexity`` the least
        eigenvalue of ∇²L̂ᵢ + λI: λ if L̂ᵢ is convex, λ − β if it is only β-smooth.
    on_failure
        ``"raise"``, ``"warn"``, ``"nan"`` or ``"ignore"``, forward and backward.
    mode
        ``"paper"``, or ``"released"`` for what the authors' code does instead: descent without the proximal term and one step
        on it at the end, and ((1 + c) I + H/(λ + d)) g = ∇L with c = 1, d = 10. Takes ``GradientDescent``, ``CG`` and one
        number λ.
    learn_lam
        Learn λ too: its logarithm becomes a parameter, so that it stays positive.
    tasks_per_pass
        The most tasks adapted as one set of kernels; None for all of the batch. What is computed does not depend on it.

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
            solver, linear_solver = _released(solver, linear_solver, lam, learn_lam)
        elif mode != "paper":
            raise bilevel.ArgumentError(f'IMAML: expected mode to be "paper" or "released", got {mode!r}')
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
        self._lam_names = _register_lam(self, _trainable(model), lam, learn_lam)
        self._loss_is_a_mean = False
        _refuse_running_statistics(model)

    @property
    def lam(self) -> torch.Tensor | dict[str, torch.Tensor]:
        """The strength λ, one scalar tensor or one tensor for each trainable parameter by name; with a graph where it is learned."""
        values = {
            name: getattr(self, f"log_lam_{key}").exp() if self.learns_lam else getattr(self, f"lam_{key}")
            for name, key in self._lam_names.items()
        }
        return values.get(_SHARED, values)

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
            loss, prediction = _by_parts(functools.partial(self._judge, data["fixed"]), adapted, data["query"])
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
        """Return θ and λ, and the batch's support and query, as the objectives see them."""
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
        """Return what holds of every learner, and of convex ones μ = λ.

        B consists of −λ for θ and of φ − θ for λ, the query loss depends on neither. Whether L̂ is convex is known of a model with one
        linear layer and nothing else, and a loss of torch's that is convex in the prediction.
        """
        least = min(float(value.detach().min()) for value in pytree.tree_leaves(outer["lam"]))
        convex = _is_convex(self.model, self.loss) and self.mode == "paper"
        return bilevel.Constants(
            strong_convexity=least if convex else None, convex=convex, cross_lipschitz=1.0, outer_cross_lipschitz=0.0
        )

    @property
    def outer(self) -> dict[str, Any]:
        """θ and λ as the objectives see them."""
        return {"parameters": _trainable(self.model), "lam": self.lam}

    def extra_repr(self) -> str:
        """Return the settings, for ``repr``."""
        lam = self.lam
        shown = f"{float(lam.detach()):g}" if isinstance(lam, torch.Tensor) else "per tensor"
        learned = ", learned" if self.learns_lam else ""
        return f"lam={shown}{learned}, mode={self.mode!r}, {super().extra_repr()}"

    def _goes_by(self, method: Any) -> tuple[Any, ...] | None:
        """Return what :meth:`inner_objective` goes by besides its arguments, the model's tensors among these; None if that is not known."""
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
            return self.loss(prediction, y), prediction
        return (weight[0] * self._losses(prediction, y)).sum() / weight[0].sum(), prediction

    def _losses(self, prediction: Any, y: Any) -> torch.Tensor:
        """Return the loss of each example as that of a task of one, (examples,)."""

        def alone(prediction: Any, y: Any) -> torch.Tensor:
            one = pytree.tree_map(lambda leaf: leaf[None], (prediction, y))
            return self.loss(*one)

        return vmap(alone)(prediction, y)

    def _checked(self, tasks: Tasks) -> Tasks:
        """Raise on what the model cannot do with these tasks."""
        _refuse_running_statistics(self.model)
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
            together, apart = self.loss(prediction, y), self._losses(prediction, y).mean()
        if not torch.allclose(together, apart, rtol=1e-3, equal_nan=True):
            raise bilevel.ArgumentError(
                f"{self.where}: expected loss to be the mean over the examples of a task, which padding needs, and over "
                f"{count} examples it is {float(together):.6g} where the mean of their losses is {float(apart):.6g}; use "
                "reduction='mean' without class weights, or call the learner once for each size of task"
            )


def _curvature_words(linear_solver: Any) -> dict[bilevel.Status, tuple[str, str]]:
    """Return what a linear solve says that met negative curvature, in the terms of these problems."""
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


def _by_parts(judge: Callable[..., Any], adapted: Any, query: tuple[Any, ...]) -> Any:
    """Return ``judge`` of every task, as many at once as keep what a kernel reads and writes near the processor."""
    leaves, structure = pytree.tree_flatten((adapted, query))
    count, numbers = len(leaves[0]), sum(leaf.numel() for leaf in pytree.tree_leaves(query))
    together = count if leaves[0].device.type != "cpu" else max(1, _NUMBERS_AT_ONCE * count // max(1, numbers))
    if together >= count:
        return vmap(judge)(adapted, query)
    alone = together == 1
    # Cut once for all: the gradient of each slice would be zeros of the whole size with a part filled in, and all of them added up.
    cuts = zip(*(leaf.unbind() if alone else leaf.split(together) for leaf in leaves), strict=True)
    parts = [pytree.tree_unflatten(list(cut), structure) for cut in cuts]
    made = [judge(*part) if alone else vmap(judge)(*part) for part in parts]
    join = torch.stack if alone else torch.cat
    return pytree.tree_map(lambda *leaves: join(leaves), *made)


def _is_convex(model: nn.Module, loss: Any) -> bool:
    """Return whether the loss of ``model`` is known to be convex in its parameters: linear in them, then a convex loss."""
    # A layer that stands in two places is met twice: linear in its parameters once, it is not in their product.
    parts = [part for _, part in model.named_modules(remove_duplicate=False)]
    linear = [part for part in parts if type(part) is nn.Linear]
    plain = all(type(part) in (nn.Sequential, nn.Linear, nn.Flatten, nn.Identity) for part in parts)
    own = [*parts, loss] if isinstance(loss, nn.Module) else parts
    given = type(loss) if isinstance(loss, nn.Module) else loss
    return plain and len(linear) == 1 and given in _CONVEX_LOSSES and not any(_is_altered(part) for part in own)


def _is_altered(module: nn.Module) -> bool:
    """Return whether something takes part in calls of this module beside its class, such as a hook or the older weight norm."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


_CONVEX_LOSSES = (
    nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.HuberLoss, nn.SmoothL1Loss, F.mse_loss, F.cross_entropy,
    F.binary_cross_entropy_with_logits, F.huber_loss, F.smooth_l1_loss,
)  # fmt: skip


def _present(weight: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return () if weight is None else (weight,)


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _register_lam(
    learner: nn.Module, parameters: Mapping[str, torch.Tensor], lam: Any, learned: bool
) -> dict[str, str]:
    """Register λ, or log λ if it is learned, beside the model; return the name of each under its parameter's name."""
    if not parameters:
        raise bilevel.ArgumentError(
            "IMAML: expected model to have parameters that require grad, and it has none; they are what is learned"
        )
    given: dict[str, Any] = dict(lam) if isinstance(lam, Mapping) else {_SHARED: lam}
    if isinstance(lam, Mapping) and set(given) != set(parameters):
        raise bilevel.ArgumentError(
            f"IMAML: expected lam to name the model's trainable parameters, {sorted(parameters)}, got {sorted(given)}; give "
            "each of them a number or a tensor"
        )
    like = next(iter(parameters.values()))
    keys = {}
    for name, value in given.items():
        number = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
        shape = parameters[name].shape if name != _SHARED else torch.Size()
        fits = number.ndim == 0 or (name != _SHARED and number.shape == shape)
        if not fits or not bool(((number > 0) & torch.isfinite(number)).all()):
            what = "lam" if name == _SHARED else f"lam[{name!r}]"
            got = f"shape {tuple(number.shape)}" if not fits else f"{value!r}"
            raise bilevel.ArgumentError(
                f"IMAML: expected {what} to be a positive finite number{'' if name == _SHARED else f' or a tensor {tuple(shape)}'}"
                f", got {got}; the proximal term pulls towards the initialisation"
            )
        keys[name] = name.replace(".", "/")
        if learned:
            learner.register_parameter(f"log_lam_{keys[name]}", nn.Parameter(number.log().clone()))
        else:
            learner.register_buffer(f"lam_{keys[name]}", number.clone())
    return keys


def _refuse_running_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.training and module.running_mean is not None:
            raise bilevel.ArgumentError(
                f"IMAML: expected normalisation by batch statistics, and {name or 'model'} ({type(module).__name__}) keeps running "
                "ones, which every step of every task would change in place, so that one task's adaptation would depend "
                "on another's; construct it with track_running_stats=False, or put it in .eval() to use them as constants"
            )


def _released(solver: Any, linear_solver: Any, lam: Any, learned: bool) -> tuple[Any, Any]:
    plain = isinstance(solver, bilevel.GradientDescent) and not solver.momentum and not solver.line_search
    if not plain or not isinstance(linear_solver, bilevel.CG) or linear_solver.max_steps is None:
        raise bilevel.ArgumentError(
            "IMAML: expected mode='released' with solver=GradientDescent(lr, max_steps) and linear_solver=CG(max_steps), got "
            f"{solver!r} and {linear_solver!r}; the released code has no others"
        )
    if learned or isinstance(lam, Mapping) or not math.isfinite(float(lam)) or float(lam) <= 0:
        raise bilevel.ArgumentError(
            f"IMAML: expected one positive number as lam in mode='released', got {lam!r}{', learned' if learned else ''}; the "
            "released code's linear system is not that of a λ for each tensor, nor its derivative λ's"
        )
    return (
        ReleasedDescent(solver.lr, solver.max_steps, float(lam)),
        ReleasedLinearSolve(linear_solver.max_steps, float(lam)),
    )
