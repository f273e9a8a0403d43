"""Hyperparameters as the parameters of a module whose loss is a validation loss."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

import bilevel
from bilevel.hyperopt.linear_models import LinearModel

__all__ = ["HyperparameterOptimization", "Hyperparameters"]

Hyperparameters: TypeAlias = torch.Tensor | dict[str, torch.Tensor]
"""One tensor, or several by name."""


class HyperparameterOptimization(bilevel.BilevelProblem):
    r"""Tune hyperparameters θ by the gradient of a validation loss at the trained parameters φ*(θ).

    .. math:: \min_θ F(φ^*(θ)), \quad φ^*(θ) = \operatorname{argmin}_φ G(φ, θ)

    An ordinary module: θ are its parameters, calling it trains (the inner solve) and returns the validation
    loss, and ``loss.backward()`` fills their ``grad`` with the hypergradient −Bᵀ H⁻¹ ∇F. Any ``torch.optim``
    optimiser tunes it, or ``bilevel.minimize(tuning, tuning.outer, data)``, after which the module holds the
    values found; ``state_dict`` holds θ.

    Parameters
    ----------
    training_objective
        G(parameters, hyperparameters, data) → scalar.
    validation_loss
        F(parameters, data) → scalar; or F(parameters, hyperparameters, data), if it has three arguments without a default.
    hyperparameters
        The initial values: a floating-point tensor of any shape, or a dict of such tensors by name. They are copied.
        Nothing keeps them in bounds: for a positive hyperparameter pass its logarithm.
    init
        Where training begins: a tensor or a pytree of them, structured as the parameters φ; with
        ``batch_dims``, every tensor has a leading axis K.
    batch_dims
        None for one inner problem. Otherwise, in the manner of ``torch.func.vmap``'s ``in_dims``, which axis
        of each tensor in ``data`` numbers K inner problems (None for a tensor that all share). The K problems
        share θ, are trained and differentiated as one batch, and the loss is the mean over them: K-fold
        cross-validation. Folds of different sizes share the rows and have weights, which :func:`~bilevel.hyperopt.linear_models.fold_weights` makes.
    constants
        (hyperparameters, data) → :class:`bilevel.Constants`: what is known of G and F, for certified error bounds. Left out, a
        linear model's own, if the training objective and the validation loss are one's.
    solver, linear_solver, tolerance, on_failure, warm_start
        As for :class:`bilevel.BilevelProblem`.

    Attributes
    ----------
    hyperparameters
        θ: an ``nn.Parameter``, or an ``nn.ParameterDict``, in whose names "/" stands for the dots that torch does not allow there.

    Raises
    ------
    bilevel.DtypeError
        If a hyperparameter is not a floating-point tensor.

    Notes
    -----
    The base class takes θ as an argument of the call. Here θ belongs to the module, and the call takes
    ``data`` alone. Use :class:`bilevel.BilevelProblem` itself to keep θ outside.

    Examples
    --------
    One log-strength of a ridge penalty, tuned by L-BFGS:

    >>> import torch, bilevel
    >>> x = torch.linspace(-1, 1, 20, dtype=torch.float64)
    >>> inputs, targets = torch.stack([x, x**3], 1), x + 0.1 * torch.cos(20 * x)
    >>> def training_objective(weights, log_strength, data):
    ...     inputs, targets = data
    ...     loss = ((inputs[::2] @ weights - targets[::2]) ** 2).mean()
    ...     return loss + log_strength.exp() * (weights**2).sum()
    >>> def validation_loss(weights, data):
    ...     inputs, targets = data
    ...     return ((inputs[1::2] @ weights - targets[1::2]) ** 2).mean()
    >>> start, init = torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    >>> tuning = bilevel.HyperparameterOptimization(training_objective, validation_loss, start, init)
    >>> optimizer = torch.optim.LBFGS(tuning.parameters(), line_search_fn="strong_wolfe")
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = tuning((inputs, targets))
    ...     loss.backward()
    ...     return loss
    >>> before = tuning((inputs, targets)).item()
    >>> _ = optimizer.step(closure)
    >>> round(before, 4), round(tuning((inputs, targets)).item(), 4)
    (0.1543, 0.005)
    >>> sorted(tuning.state_dict())
    ['hyperparameters']
    """

    def __init__(
        self,
        training_objective: Callable[[Any, Any, Any], torch.Tensor],
        validation_loss: Callable[..., torch.Tensor],
        hyperparameters: torch.Tensor | Mapping[str, torch.Tensor],
        init: Any,
        *,
        batch_dims: Any = None,
        constants: Callable[[Any, Any], bilevel.Constants] | None = None,
        solver: Any = None,
        linear_solver: Any = None,
        tolerance: bilevel.Tolerance | None = None,
        on_failure: Literal["raise", "warn", "nan", "ignore"] = "raise",
        warm_start: bool = True,
    ) -> None:
        super().__init__(
            solver=solver,
            linear_solver=linear_solver,
            tolerance=tolerance,
            on_failure=on_failure,
            batch_dims=batch_dims,
            warm_start=warm_start,
        )
        _check_form("training_objective", training_objective, "(inner, hyperparameters, data)", (3,))
        _check_form("validation_loss", validation_loss, "(inner, data) or (inner, hyperparameters, data)", (2, 3))
        self._training_objective = training_objective
        self._constants = constants
        self._validation_loss = validation_loss
        self._validation_sees_outer = _required(validation_loss) == 3
        self._names = _keys(hyperparameters)
        self.hyperparameters: nn.Parameter | nn.ParameterDict = _as_parameters(hyperparameters, self._names)
        leaves, structure = pytree.tree_flatten(init)
        # Buffers follow .to(device) and .double(); they are not part of the state, which is θ alone.
        for number, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                raise bilevel.DtypeError(
                    "HyperparameterOptimization: expected init to be a tensor or a pytree of them, got "
                    f"{type(leaf).__name__} in it; write for example torch.zeros(n, dtype=torch.float64)"
                )
            self.register_buffer(f"_init_{number}", leaf.detach().clone(), persistent=False)
        # Names in place of tensors: unlike torch's description of a structure, these can be copied and pickled.
        self._init_names = pytree.tree_unflatten([f"_init_{number}" for number in range(len(leaves))], structure)

    @property
    def outer(self) -> Hyperparameters:
        """θ as the objectives see it: a tensor or a dict of them."""
        if isinstance(self.hyperparameters, nn.ParameterDict):
            return {name: self.hyperparameters[key] for name, key in self._names.items()}
        return self.hyperparameters

    def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        """Return G, the training objective."""
        return self._training_objective(inner, outer, data)

    def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        """Return F, the validation loss, which depends on θ through the trained parameters, and directly if it takes θ."""
        return (
            self._validation_loss(inner, outer, data)
            if self._validation_sees_outer
            else self._validation_loss(inner, data)
        )

    def constants(self, outer: Any, data: Any) -> bilevel.Constants:
        """Return what is known of G and F."""
        if self._constants is not None:
            return self._constants(outer, data)
        models = {getattr(f, "__self__", None) for f in (self._training_objective, self._validation_loss)}
        model = models.pop() if len(models) == 1 else None
        return model.constants(outer, data) if isinstance(model, LinearModel) else bilevel.Constants()

    def objective_arguments(self, data: Any) -> tuple[Any, Any]:  # type: ignore[override]  # θ is the module's own
        """Return (θ, data) as the objectives see them."""
        return self.outer, data

    def initial(self, outer: Any, data: Any) -> Any:
        """Return where training begins when there is nothing warm to begin from."""
        return pytree.tree_map(lambda name: getattr(self, name), self._init_names)

    # The signatures of calls differ from the base class's on purpose, as those of modules do: θ is the
    # module's own.
    def forward(self, data: Any, *, init: Any = None) -> torch.Tensor:  # type: ignore[override]
        """Train, and return the validation loss, differentiable with respect to the module's parameters.

        Parameters
        ----------
        data
            What the two objectives take.
        init
            Where training begins, instead of the warm start.
        """
        return super().forward(self.outer, data, init=init)

    def hypergradient(self, data: Any, *, init: Any = None) -> bilevel.Hypergradient:  # type: ignore[override]
        """Train and differentiate at once, and bound the error; leave the parameters' ``grad`` alone.

        See :meth:`bilevel.BilevelProblem.hypergradient`.
        """
        return super().hypergradient(self.outer, data, init=init)


def _check_form(name: str, function: Any, form: str, counts: tuple[int, ...]) -> None:
    """Raise unless ``function`` can be called with one of ``counts`` arguments."""
    if callable(function):
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return
        for count in counts:
            with contextlib.suppress(TypeError):
                signature.bind(*range(count))
                return
    raise bilevel.ArgumentError(
        f"HyperparameterOptimization: expected {name} to be a function of {form}, got {function!r}; wrap it in a lambda that takes these arguments"
    )


def _required(function: Callable[..., Any]) -> int:
    """Return how many arguments by position ``function`` needs; 0 if that cannot be told."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 0
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in places and each.default is inspect.Parameter.empty for each in parameters)


def _keys(hyperparameters: Any) -> dict[str, str]:
    """Return under which key of a ``ParameterDict``, which neither takes dots nor its own methods' names, each name is kept."""
    if not isinstance(hyperparameters, Mapping):
        return {}
    taken, keys = nn.ParameterDict(), {}
    for name in hyperparameters:
        if not isinstance(name, str):
            raise bilevel.ArgumentError(
                f"HyperparameterOptimization: expected the names of hyperparameters to be text, got {name!r}; pass a dict by name"
            )
        key = name.replace(".", "/")
        keys[name] = key if key and not hasattr(taken, key) else f"/{key}"
    if len(set(keys.values())) < len(keys):
        raise bilevel.ArgumentError(
            f"HyperparameterOptimization: expected names of hyperparameters that differ in more than '.' and '/', got {list(keys)}; rename one"
        )
    return keys


def _as_parameters(
    hyperparameters: torch.Tensor | Mapping[str, torch.Tensor],
    keys: Mapping[str, str],
) -> nn.Parameter | nn.ParameterDict:
    if isinstance(hyperparameters, torch.Tensor):
        return _as_parameter("hyperparameters", hyperparameters)
    if isinstance(hyperparameters, Mapping) and hyperparameters:
        return nn.ParameterDict(
            {keys[name]: _as_parameter(f"hyperparameters[{name!r}]", value) for name, value in hyperparameters.items()}
        )
    raise bilevel.ArgumentError(
        f"HyperparameterOptimization: expected hyperparameters to be a tensor or a dict of tensors, got "
        f"{hyperparameters!r}; write for example torch.zeros((), dtype=torch.float64)"
    )


def _as_parameter(name: str, value: Any) -> nn.Parameter:
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise bilevel.DtypeError(
            f"HyperparameterOptimization: expected {name} to be a floating-point tensor, got {got}; convert "
            "it with "
            ".double(), or make it an argument of data instead"
        )
    return nn.Parameter(value.detach().clone())
