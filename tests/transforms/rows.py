"""The rows of the matrix: ways to use a layer, each a function of a column's solve that returns tensors.

A row runs twice: with the library in the column's dtype, and with the oracle in float64. What it returns has to agree, or it
has to be refused with the error that the row names. Rows that are about torch's machinery (hooks, checkpoints, compilation)
say beside it what plain derivatives of the oracle are to come out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import bilevel

from . import distributed
from .problems import F32, Column, Solve

Function = Callable[[torch.Tensor], torch.Tensor]
Run = Callable[[Column, Solve, torch.Tensor, torch.Tensor, torch.Tensor], Any]


@dataclass(frozen=True)
class Refusal:
    """An error that a row has to end in."""

    error: type[Exception]
    match: str


@dataclass(frozen=True)
class Row:
    """One way to use a layer.

    Parameters
    ----------
    name, group
        As the documentation prints them.
    run
        (column, solve, start, θ, data) ↦ tensors.
    expect
        The same for the oracle; ``run`` itself if None.
    refusal
        The error that is expected in place of an answer.
    refused
        In which columns; in all by default.
    order
        How many derivatives are taken: what float32 can be expected to give.
    arithmetic
        The dtype that the answer is as accurate as, where that is not the column's.
    needs_start
        Whether it makes sense only for problems that have a start.
    """

    name: str
    group: str
    run: Run
    expect: Run | None = None
    refusal: Refusal | None = None
    refused: Callable[[Column], bool] = lambda column: True
    order: int = 1
    arithmetic: torch.dtype | None = None
    needs_start: bool = False


ROWS: list[Row] = []


def row(name: str, group: str, *, expect: Run | None = None, **about: Any) -> Callable[[Run], Run]:
    """Enter a function as a row."""

    def enter(run: Run) -> Run:
        ROWS.append(Row(name, group, run, expect, **about))
        return run

    return enter


def scalar(x: torch.Tensor) -> torch.Tensor:
    """Weigh every entry of ``x`` differently, nonlinearly, so that no error cancels."""
    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape)
    return (weights * (x + 0.5 * x**2)).sum()


# torch.func: each transform as a map of functions θ ↦ tensor, so that any nests in any.


def of_grad(f: Function) -> Function:
    return grad(lambda t: scalar(f(t)))


def of_vjp(f: Function) -> Function:
    def pulled(t: torch.Tensor) -> torch.Tensor:
        x, pull = vjp(f, t)
        return pull(torch.linspace(1, 2, x.numel(), dtype=x.dtype).reshape(x.shape))[0]

    return pulled


def of_jvp(f: Function) -> Function:
    return lambda t: jvp(f, (t,), (torch.tensor([1.0, -2.0], dtype=t.dtype),))[1]


def of_vmap(f: Function) -> Function:
    return lambda t: vmap(lambda factor: f(factor * t))(torch.tensor([1.0, 0.8, 1.1], dtype=t.dtype))


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "grad": of_grad,
    "vjp": of_vjp,
    "jvp": of_jvp,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "vmap": of_vmap,
}
ORDERS = {"vmap": 0, "hessian": 2}
FORWARD = ("jvp", "jacfwd", "hessian")  # torch's hessian is jacfwd of jacrev
TWICE_FORWARD = Refusal(bilevel.TransformError, r"two, for which torch silently returns zero .*jacfwd\(jacrev\(f\)\)")


def composed(*names: str) -> Run:
    """Return the row of the first transform of the second of …, as functions of θ."""

    def run(column: Column, solve: Solve, start: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        function: Function = lambda t: solve(start, t, X)
        for name in reversed(names):
            function = TRANSFORMS[name](function)
        return function(t)

    return run


def enter_composed(*names: str, group: str) -> None:
    refusal = TWICE_FORWARD if sum(name in FORWARD for name in names) > 1 else None
    order = sum(ORDERS.get(name, 1) for name in names)
    ROWS.append(Row(" of ".join(names), group, composed(*names), refusal=refusal, order=order))


@row("the solution", "Plain autograd", order=0)
def _solution(column, solve, start, t, X):
    return solve(start, t, X)


@row(".backward()", "Plain autograd")
def _backward(column, solve, start, t, X):
    t, X = t.clone().requires_grad_(True), X.clone().requires_grad_(True)
    scalar(solve(start, t, X)).backward()
    return t.grad, X.grad


@row(".backward() twice, retaining the graph", "Plain autograd")
def _retained(column, solve, start, t, X):
    t = t.clone().requires_grad_(True)
    x = solve(start, t, X)
    scalar(x).backward(retain_graph=True)
    scalar(x).backward()
    return t.grad


@row("autograd.grad(create_graph=True), twice", "Plain autograd", order=2)
def _twice(column, solve, start, t, X):
    t, X = t.clone().requires_grad_(True), X.clone().requires_grad_(True)
    first = torch.autograd.grad(scalar(solve(start, t, X)), (t, X), create_graph=True)
    return torch.autograd.grad(scalar(first[0]) + scalar(first[1]), (t, X), create_graph=True)


@row("autograd.grad(is_grads_batched=True)", "Plain autograd")
def _grads_batched(column, solve, start, t, X):
    t = t.clone().requires_grad_(True)
    x = solve(start, t, X)
    cotangents = torch.eye(x.numel(), dtype=x.dtype).reshape(x.numel(), *x.shape)
    return torch.autograd.grad(x, t, cotangents, is_grads_batched=True)


@row("autograd.functional.hessian", "Plain autograd", order=2)
def _functional_hessian(column, solve, start, t, X):
    return torch.autograd.functional.hessian(lambda t: scalar(solve(start, t, X)), t)


@row("autograd.functional.jacobian(vectorize=True)", "Plain autograd")
def _functional_jacobian(column, solve, start, t, X):
    return torch.autograd.functional.jacobian(lambda t: solve(start, t, X), t, vectorize=True)


@row('autograd.functional.jacobian(strategy="forward-mode")', "Plain autograd")
def _functional_forward(column, solve, start, t, X):
    forward = {"vectorize": True, "strategy": "forward-mode"}
    return torch.autograd.functional.jacobian(lambda t: solve(start, t, X), t, **forward)


@row("dual numbers of autograd.forward_ad", "Plain autograd")
def _dual(column, solve, start, t, X):
    with torch.autograd.forward_ad.dual_level():
        made = torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))
        return torch.autograd.forward_ad.unpack_dual(solve(start, made, X)).tangent


@row("dual numbers over autograd.grad(create_graph=True)", "Plain autograd", order=2)
def _dual_over_reverse(column, solve, start, t, X):
    with torch.autograd.forward_ad.dual_level():
        leaf = t.clone().requires_grad_(True)
        made = torch.autograd.forward_ad.make_dual(leaf, torch.ones_like(t))
        (slope,) = torch.autograd.grad(scalar(solve(start, made, X)), made, create_graph=True)
        return torch.autograd.forward_ad.unpack_dual(slope).tangent


for _name in TRANSFORMS:
    enter_composed(_name, group="One transform")
for _outer, _inner in itertools.product(TRANSFORMS, TRANSFORMS):
    enter_composed(_outer, _inner, group="Two transforms")
enter_composed("jacrev", "jacrev", "jacrev", group="More than two")
enter_composed("vmap", "jacfwd", "vmap", group="More than two")
enter_composed("grad", "grad", "grad", "grad", group="More than two")


# vmap: what may be batched, and where the axis lies.

FACTORS = (1.0, 0.8, 1.1)


def spread(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return torch.stack([factor * tensor for factor in FACTORS], dim)


def looped(column: Column, solve: Solve, *inputs: torch.Tensor, which: tuple[int, ...]) -> torch.Tensor:
    """Return the solutions for each factor applied to the inputs at ``which``."""
    rows = []
    for factor in FACTORS:
        scaled = (factor * t if i in which else t for i, t in enumerate(inputs))
        rows.append(solve(*scaled))
    return torch.stack(rows)


def enter_vmap(name: str, which: tuple[int, ...], dims: tuple[int | None, ...], **how: Any) -> None:
    def run(column, solve, *inputs):
        wide = [t if dim is None else spread(t, dim) for t, dim in zip(inputs, dims, strict=True)]
        return vmap(solve, in_dims=dims, **how)(*wide).movedim(how.get("out_dims", 0), 0)

    def expect(column, solve, *inputs):
        return looped(column, solve, *inputs, which=which)

    ROWS.append(Row(name, "vmap", run, expect, order=0, needs_start=which == (0,)))


enter_vmap("only θ batched", (1,), (None, 0, None))
enter_vmap("only the data batched", (2,), (None, None, 0))
enter_vmap("only the start batched", (0,), (0, None, None))
enter_vmap("everything batched", (0, 1, 2), (0, 0, 0))
enter_vmap("axes in the middle and at the end", (1, 2), (None, 1, -1))
enter_vmap("out_dims=1", (1,), (None, 0, None), out_dims=1)
enter_vmap("chunk_size=2", (1,), (None, 0, None), chunk_size=2)


@row(
    "per-sample gradients: vmap of grad, θ shared, data batched", "vmap",
    expect=lambda column, solve, start, t, X: torch.stack(
        [grad(lambda t: scalar(solve(start, t, factor * X)))(t) for factor in FACTORS]
    ),
)  # fmt: skip
def _per_sample(column, solve, start, t, X):
    return vmap(grad(lambda t, X: scalar(solve(start, t, X))), in_dims=(None, 0))(t, spread(X))


@row(
    "the gradient of a vmap sums over what is shared", "vmap",
    expect=lambda column, solve, start, t, X: grad(lambda t: scalar(looped(column, solve, start, t, X, which=(2,))))(t),
)  # fmt: skip
def _shared(column, solve, start, t, X):
    return grad(lambda t: scalar(vmap(lambda X: solve(start, t, X))(spread(X))))(t)


@row(
    "a batch of no problems", "vmap", order=0,
    expect=lambda column, solve, start, t, X: solve(start, t, X).new_zeros(0, *solve(start, t, X).shape),
)  # fmt: skip
def _empty(column, solve, start, t, X):
    return vmap(lambda t: solve(start, t, X))(t.new_zeros(0, 2))


@row(
    "the Jacobians of a batch of no problems", "vmap",
    expect=lambda column, solve, start, t, X: [solve(start, t, X).new_zeros(0, *solve(start, t, X).shape, 2)] * 2,
)  # fmt: skip
def _empty_jacobians(column, solve, start, t, X):
    nothing = t.new_zeros(0, 2)
    return [vmap(way(lambda t: solve(start, t, X)))(nothing) for way in (jacrev, jacfwd)]


# Modules and hooks.


class Layered(torch.nn.Module):
    """A module with θ as its parameter and a layer inside."""

    def __init__(self, solve: Solve, start: torch.Tensor, t: torch.Tensor) -> None:
        super().__init__()
        self.solve, self.start, self.t = solve, start, torch.nn.Parameter(t.clone())

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.solve(self.start, self.t, X)


def plain_gradient(column: Column, solve: Solve, start: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    return grad(lambda t: scalar(solve(start, t, X)))(t)


@row("a module's parameters", "Modules and hooks", expect=plain_gradient)
def _module(column, solve, start, t, X):
    module = Layered(solve, start, t)
    scalar(module(X)).backward()
    return module.t.grad


@row("grad of functional_call", "Modules and hooks", expect=plain_gradient)
def _functional_call(column, solve, start, t, X):
    module = Layered(solve, start, torch.zeros_like(t))
    return grad(lambda named: scalar(functional_call(module, named, (X,))))({"t": t})["t"]


@row(
    "tensor hooks on θ and on the solution", "Modules and hooks",
    expect=lambda *inputs: (6 * plain_gradient(*inputs), 1.0 * torch.ones(2, dtype=torch.float64)),
)  # fmt: skip
def _tensor_hooks(column, solve, start, t, X):
    calls = []
    t = t.clone().requires_grad_(True)
    t.register_hook(lambda g: (calls.append("θ"), 3 * g)[1])
    x = solve(start, t, X)
    x.register_hook(lambda g: (calls.append("x"), 2 * g)[1])
    scalar(x).backward()
    return t.grad, torch.tensor([float(calls.count("θ")), float(calls.count("x"))], dtype=t.dtype)


@row(
    "module hooks, forward and full backward", "Modules and hooks",
    expect=lambda column, solve, start, t, X: (
        grad(lambda t: scalar(2 * solve(start, t, X)))(t),
        grad(lambda x: scalar(2 * x))(solve(start, t, X)),
    ),
)  # fmt: skip
def _module_hooks(column, solve, start, t, X):
    seen = []
    module = Layered(solve, start, t)
    module.register_full_backward_hook(lambda m, into, out: seen.append(out[0]))
    module.register_forward_hook(lambda m, args, out: 2 * out)
    # The input has to be part of the graph for a full backward hook; the hook sees what comes in behind the factor.
    scalar(module(X.clone().requires_grad_(True))).backward()
    return module.t.grad, 2 * seen[0]


@row("saved-tensor hooks that move tensors away and back", "Modules and hooks", expect=plain_gradient)
def _saved_hooks(column, solve, start, t, X):
    t = t.clone().requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda s: s.numpy(force=True).copy(), torch.from_numpy):
        loss = scalar(solve(start, t, X))
    loss.backward()
    return t.grad


@row("autograd.graph.save_on_cpu", "Modules and hooks", expect=plain_gradient)
def _save_on_cpu(column, solve, start, t, X):
    t = t.clone().requires_grad_(True)
    with torch.autograd.graph.save_on_cpu():
        loss = scalar(solve(start, t, X))
    loss.backward()
    return t.grad


@row("a gradient edge hook (post-accumulate)", "Modules and hooks", expect=plain_gradient)
def _accumulated(column, solve, start, t, X):
    found = []
    t = t.clone().requires_grad_(True)
    t.register_post_accumulate_grad_hook(lambda t: found.append(t.grad.clone()))
    scalar(solve(start, t, X)).backward()
    return found[0]


def enter_checkpoint(reentrant: bool) -> None:
    def run(column, solve, start, t, X):
        t = t.clone().requires_grad_(True)
        x = checkpoint(lambda t: solve(start, t, X.clone()), t, use_reentrant=reentrant)
        scalar(x).backward()
        return t.grad

    ROWS.append(Row(f"utils.checkpoint(use_reentrant={reentrant})", "Modules and hooks", run, plain_gradient))


enter_checkpoint(True)
enter_checkpoint(False)


@row(
    "second derivative through utils.checkpoint(use_reentrant=False)", "Modules and hooks", order=2,
    expect=lambda column, solve, start, t, X: hessian(lambda t: scalar(solve(start, t, X)))(t).sum(0),
)  # fmt: skip
def _checkpoint_twice(column, solve, start, t, X):
    t = t.clone().requires_grad_(True)
    loss = scalar(checkpoint(lambda t: solve(start, t, X), t, use_reentrant=False))
    (slope,) = torch.autograd.grad(loss, t, create_graph=True)
    return torch.autograd.grad(slope.sum(), t)[0]


@row(
    "DistributedDataParallel, two processes", "Modules and hooks",
    expect=lambda column, solve, start, t, X: torch.stack(
        [grad(lambda t: scalar(solve(start, t, distributed.share(X, rank))))(t) for rank in range(distributed.WORLD)]
    ).mean(0),
)  # fmt: skip
def _distributed(column, solve, start, t, X):
    return distributed.gradients()[column.name]


# Modes.


@row("no_grad", "Modes", order=0)
def _no_grad(column, solve, start, t, X):
    t = t.clone().requires_grad_(True)
    with torch.no_grad():
        x = solve(start, t, X)
    assert not x.requires_grad
    return x


@row("torch.func.grad inside no_grad", "Modes", expect=plain_gradient)
def _grad_in_no_grad(column, solve, start, t, X):
    with torch.no_grad():
        return grad(lambda t: scalar(solve(start, t, X)))(t)


@row("inference_mode", "Modes", order=0)
def _inference(column, solve, start, t, X):
    with torch.inference_mode():
        x = solve(start.clone(), t.clone(), X.clone())
    assert not x.requires_grad
    return x.clone()


@row("set_grad_enabled(False) around, enable_grad inside", "Modes", expect=plain_gradient)
def _enabled_inside(column, solve, start, t, X):
    t = t.clone().requires_grad_(True)
    with torch.set_grad_enabled(False), torch.enable_grad():
        loss = scalar(solve(start, t, X))
    loss.backward()
    return t.grad


@row("backward in another thread", "Modes", expect=plain_gradient)
def _thread(column, solve, start, t, X):
    import threading

    t = t.clone().requires_grad_(True)
    loss = scalar(solve(start, t, X))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    return t.grad


BFLOAT = {"device_type": "cpu", "dtype": torch.bfloat16}


@row(
    "autocast to bfloat16, at the default accuracy", "Modes", expect=plain_gradient,
    refusal=Refusal(bilevel.SolveError, "under autocast to bfloat16: the (forward|backward) solve"),
    refused=lambda column: column.dtype == F32,  # autocast leaves float64 alone
)  # fmt: skip
def _autocast(column, solve, start, t, X):
    t = t.clone().requires_grad_(True)
    with torch.autocast(**BFLOAT):
        loss = scalar(solve(start, t, X))
    loss.backward()
    return t.grad


@row(
    "autocast to bfloat16, at an accuracy asked", "Modes", expect=plain_gradient, arithmetic=torch.bfloat16
)  # fmt: skip
def _autocast_asked(column, solve, start, t, X):
    t = t.clone().requires_grad_(True)
    solve = column.solve(tolerance=bilevel.Tolerance(delta=0.03, delta_prime=0.03))
    with torch.autocast(**BFLOAT):
        loss = scalar(solve(start, t, X))
    loss.backward()
    return t.grad


@row("autocast around the call, switched off in the function", "Modes", expect=plain_gradient)
def _autocast_off_inside(column, solve, start, t, X):
    def function(*inputs):
        with torch.autocast("cpu", enabled=False):
            return column.kind.function(*inputs)

    t = t.clone().requires_grad_(True)
    with torch.autocast(**BFLOAT):
        x = column.solve(function)(start, t, X)
        (slope,) = torch.autograd.grad(scalar(x), t)
    return slope


# torch.compile. Compiled code can drop a custom Function's backward (pytorch/pytorch#193279) or jvp (#192985), and give
# wrong gradients for one that works in place (#180642): a layer breaks the compiler's graph, and its function may be compiled.


# Inside a transform the compiler, with this backend, takes no tensor that is neither a leaf nor a view, with or without a layer
# (tests/transforms/test_compiler.py). Here it is what torch.stack makes of the players' unknowns, on its way from one frame to the next.
NEITHER_LEAF_NOR_VIEW = Refusal(AssertionError, "^False != True")


def of_players(column: Column) -> bool:
    return column.kind.name == "equilibrium"


def compiled(function: Callable[..., Any], backend: str, **how: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, **how)


def enter_compiled(backend: str) -> None:
    group = f'torch.compile(backend="{backend}")'

    @row("around a caller, .backward()", group, expect=plain_gradient)
    def _caller(column, solve, start, t, X):
        t = t.clone().requires_grad_(True)
        loss = compiled(lambda t: scalar(solve(start, t * 1.0, X).sin().asin()), backend)(t)
        loss.backward()
        return t.grad

    @row(
        "around a caller, second derivative", group, order=2,
        expect=lambda column, solve, start, t, X: hessian(lambda t: scalar(solve(start, t, X)))(t).sum(0),
        refusal=(
            Refusal(RuntimeError, "torch.compile with aot_autograd does not currently support double backward")
            if backend != "eager" else None
        ),
    )  # fmt: skip
    def _caller_twice(column, solve, start, t, X):
        t = t.clone().requires_grad_(True)
        loss = compiled(lambda t: scalar(solve(start, t * 1.0, X)), backend)(t)
        (slope,) = torch.autograd.grad(loss, t, create_graph=True)
        return torch.autograd.grad(slope.sum(), t)[0]

    @row(
        "around a caller, fullgraph=True", group,
        refusal=Refusal(torch._dynamo.exc.Unsupported, "bilevel solves outside compiled code"),
    )  # fmt: skip
    def _whole(column, solve, start, t, X):
        return compiled(lambda t: scalar(solve(start, t, X)), backend, fullgraph=True)(t)

    beside_leaves = NEITHER_LEAF_NOR_VIEW if backend == "eager" else None

    @row("of torch.func.grad", group, expect=plain_gradient, refusal=beside_leaves, refused=of_players)
    def _grad(column, solve, start, t, X):
        return compiled(grad(lambda t: scalar(solve(start, t, X))), backend)(t)

    @row("of torch.func.jvp", group, expect=composed("jvp"))
    def _jvp(column, solve, start, t, X):
        return compiled(of_jvp(lambda t: solve(start, t, X)), backend)(t)

    @row("of vmap of jacrev", group, expect=composed("vmap", "jacrev"))
    def _vmap(column, solve, start, t, X):
        return compiled(of_vmap(jacrev(lambda t: solve(start, t, X))), backend)(t)

    @row(
        "of the function, second derivative", group, order=2,
        expect=lambda column, solve, start, t, X: hessian(lambda t: scalar(solve(start, t, X)))(t),
        refusal=beside_leaves, refused=of_players,
    )  # fmt: skip
    def _function(column, solve, start, t, X):
        solve = column.solve(compiled(column.kind.function, backend))
        return jacrev(jacrev(lambda t: scalar(solve(start, t, X))))(t)


enter_compiled("eager")
enter_compiled("aot_eager")
