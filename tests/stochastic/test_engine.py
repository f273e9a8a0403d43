"""What all methods share: passes, states, optimisers, modules and pytrees, options, and what bad input is told."""

from __future__ import annotations

import copy
import io
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import bilevel
from bilevel import stochastic
from bilevel.errors import ArgumentError, CapturedTensorError, DtypeError, NonFiniteError, ShapeError
from bilevel.stochastic import Batch, Microbatches, Minibatches, StepOptions
from tests.stochastic.problems import SGD, Quadratic

SMALL: dict[str, dict[str, Any]] = {
    "SOBA": {},
    "MASOBA": {},
    "SABA": {},
    "SRBA": {"period": 3},
    "AmIGO": {"inner_steps": 3, "adjoint_steps": 2},
    "StocBiO": {"inner_steps": 3, "terms": 2},
    "TTSA": {"max_terms": 4},
    "ALSET": {"max_terms": 4, "inner_steps": 2},
    "MRBO": {"terms": 2},
    "VRBO": {"terms": 2, "inner_steps": 1, "period": 3},
    "F2SA": {"inner_steps": 2},
    "BOME": {"inner_steps": 2},
    "PZOBO": {"inner_steps": 2, "directions": 2},
    "ImplicitStep": {"inner_steps": 2, "linear_solver": bilevel.CG(max_steps=2)},
}
# (forward, reverse) passes of the steps 2 to 4 with these settings, one batch for each level.
PASSES = {
    "SOBA": (6, 9),
    "MASOBA": (6, 9),
    "SABA": (6, 9),
    "SRBA": (2 * 4 + 2, 2 * 6 + 3),
    "AmIGO": (15, 3 * (3 + 2 + 3)),
    "StocBiO": (15, 3 * (3 + 2 + 3)),
    "MRBO": (12, 3 * 10),
    "VRBO": (3 * 3 * 4 + 2, 3 * 3 * 10 + 5),
    "F2SA": (27, 27),
    "BOME": (12, 12),
    "PZOBO": (21, 21),
}


def made(name: str, problem: Quadratic, *, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    z, x = torch.zeros(5, dtype=dtype), torch.zeros(3, dtype=dtype)
    chosen = {"inner_optimizer": SGD, "outer_optimizer": partial(torch.optim.SGD, lr=0.05), **SMALL[name], **settings}
    return getattr(stochastic, name)(problem.losses, z, x, **chosen)


def rows(count: int = 8, size: int = 2, seed: int = 0) -> Minibatches:
    return Minibatches(torch.arange(count), size, seed=seed)


def test_every_method_is_tried() -> None:
    abstract = {"AdjointMethod", "StochasticMethod"}
    methods = {n for n in stochastic.__all__ if isinstance(getattr(stochastic, n), type)
               and issubclass(getattr(stochastic, n), stochastic.StochasticMethod)}  # fmt: skip
    assert methods - abstract == set(SMALL)


@pytest.mark.parametrize("name", PASSES)
def test_a_step_makes_the_passes_it_must_and_no_more(name: str) -> None:
    problem = Quadratic.random()
    calls = [0]

    def counted(objective: Any) -> Any:
        def evaluate(z: Any, x: Any, data: Any) -> torch.Tensor:
            calls[0] += 1
            return objective(z, x, data)

        return evaluate

    z, x = torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    method = getattr(stochastic, name)(
        tuple(map(counted, problem.losses)), z, x, inner_optimizer=SGD, outer_optimizer=SGD, **SMALL[name]
    )
    method.step(problem.all, problem.all)
    calls[0], before = 0, method.passes
    for _ in range(3):
        method.step(problem.all, problem.all)
    after = method.passes
    assert (calls[0], after["reverse"] - before["reverse"]) == PASSES[name]
    assert after["forward"] - before["forward"] == calls[0]


@pytest.mark.parametrize("name", SMALL)
def test_a_resumed_run_goes_on_bit_for_bit(name: str) -> None:
    problem = Quadratic.random()
    options = StepOptions(ema_decay=0.9, seed=4)
    adam = partial(torch.optim.Adam, lr=0.02)
    inner = SGD if name == "PZOBO" else partial(torch.optim.Adam, lr=0.05)

    def start() -> tuple[Any, Minibatches, Minibatches]:
        method = made(name, problem, inner_optimizer=inner, outer_optimizer=adam, options=options)
        return method, rows(seed=1), rows(seed=2)

    moments = torch.randperm(9, generator=torch.Generator().manual_seed(len(name)))[:3].tolist()
    method, lower, upper = start()
    saved = {}
    for step in range(11):
        if step in moments:
            stream = io.BytesIO()
            torch.save([method.state_dict(), lower.state_dict(), upper.state_dict()], stream)
            saved[step] = stream
        method.step(lower, upper)
    end = [method.inner.detach().clone(), method.outer.detach().clone()]
    with method.averaged():
        end.append(method.outer.detach().clone())
    for step, stream in saved.items():
        stream.seek(0)
        states = torch.load(stream, weights_only=True)
        method, lower, upper = start()
        for part, state in zip((method, lower, upper), states, strict=True):
            part.load_state_dict(state)
        assert method.steps == step
        for _ in range(step, 11):
            method.step(lower, upper)
        assert torch.equal(method.inner, end[0]) and torch.equal(method.outer, end[1])
        with method.averaged():
            assert torch.equal(method.outer, end[2])


@pytest.mark.parametrize("name", SMALL)
def test_a_resumed_run_draws_the_dropout_of_one_that_was_not_stopped(name: str) -> None:
    def start() -> tuple[Any, Any, torch.Tensor]:
        _, weights, losses, data = network()
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3))
        method = getattr(stochastic, name)(
            losses, model, weights, inner_optimizer=partial(torch.optim.SGD, lr=0.1), **SMALL[name]
        )
        return partial(method.step, data, data), method, weights

    step, method, weights = start()
    for number in range(6):
        if number == 3:
            stream = io.BytesIO()
            torch.save(method.state_dict(), stream)
        step()
    end = [tensor.detach().clone() for tensor in (*method.inner.parameters(), weights)]
    stream.seek(0)
    step, method, weights = start()
    torch.rand(5)
    method.load_state_dict(torch.load(stream, weights_only=True))
    for _ in range(3):
        step()
    assert all(map(torch.equal, end, (*method.inner.parameters(), weights)))


@pytest.mark.parametrize("make", [lambda: bilevel.Nystrom(2), lambda: bilevel.Kronecker([(5,)], probes=2)])
def test_a_resumed_run_goes_on_with_the_kept_preconditioner(make: Any) -> None:
    problem = Quadratic.random()

    def start() -> tuple[Any, Minibatches]:
        linear = bilevel.CG(max_steps=2, preconditioner=bilevel.Kept(make(), refresh=4))
        return made("ImplicitStep", problem, linear_solver=linear), rows(seed=1)

    method, lower = start()
    for step in range(8):
        if step == 2:
            stream = io.BytesIO()
            torch.save([method.state_dict(), lower.state_dict()], stream)
        method.step(lower, problem.all)
    again, rows_again = start()
    stream.seek(0)
    for part, state in zip((again, rows_again), torch.load(stream, weights_only=True), strict=True):
        part.load_state_dict(state)
    for _ in range(2, 8):
        again.step(rows_again, problem.all)
    assert torch.equal(again.outer, method.outer) and torch.equal(again.inner, method.inner)


def test_a_state_is_a_copy_and_can_be_loaded_twice() -> None:
    problem = Quadratic.random()
    method = made("SABA", problem, inner_optimizer=torch.optim.Adam)
    method.step(problem.all, problem.all)
    state = method.state_dict()
    first = []
    for _ in range(2):
        method.load_state_dict(state)
        method.step(problem.all, problem.all)
        first.append(method.outer.detach().clone())
    assert torch.equal(*first)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_streams_and_modules_and_pytrees_agree(name: str, dtype: torch.dtype) -> None:
    """A linear module and a dict of tensors are one problem, and take the same steps."""
    data = torch.randn(12, 4, dtype=dtype), torch.randn(12, 1, dtype=dtype)

    def weigh(outer: Any) -> torch.Tensor:
        return (outer.log if isinstance(outer, nn.Module) else outer["log"]).exp()

    def predict(inner: Any, inputs: torch.Tensor) -> torch.Tensor:
        return inner(inputs) if isinstance(inner, nn.Module) else inputs @ inner["weight"].T + inner["bias"]

    def lower(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
        parameters = inner.parameters() if isinstance(inner, nn.Module) else inner.values()
        penalty = sum((p**2).sum() for p in parameters)
        return ((predict(inner, batch[0]) - batch[1]) ** 2).mean() + weigh(outer) * penalty

    def upper(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
        return ((predict(inner, batch[0]) - batch[1]) ** 2).mean()

    module = nn.Linear(4, 1).to(dtype)
    owner = nn.Module()
    owner.log = nn.Parameter(torch.tensor(-1.0, dtype=dtype))
    tree = {"weight": module.weight.detach().clone(), "bias": module.bias.detach().clone()}
    outer_tree = {"log": owner.log.detach().clone()}
    ends = []
    for inner, outer in ((module, owner), (tree, outer_tree)):
        method = getattr(stochastic, name)(
            (lower, upper), inner, outer, inner_optimizer=SGD, outer_optimizer=SGD, **SMALL[name]
        )
        train, valid = Minibatches(data, 4, seed=1), Minibatches(data, 4, seed=2)
        for _ in range(7):
            result = method.step(train, valid)
        assert torch.isfinite(result.hypergradient_norm) and result.step == 7
        assert method.inner is inner and method.outer is outer
        ends.append((inner, outer))
    torch.testing.assert_close(module.weight.detach(), tree["weight"].detach())
    torch.testing.assert_close(owner.log.detach(), outer_tree["log"].detach())
    assert owner.log.item() != -1.0 and owner.log.dtype == dtype


def test_saba_converges_linearly_where_soba_stalls() -> None:
    problem = Quadratic.random(samples=6, spread=0.6)
    errors: dict[str, list[float]] = {}
    for name in ("SOBA", "SABA"):
        method = made(name, problem, outer_optimizer=SGD)
        train, valid = rows(6, 1, seed=1), rows(6, 1, seed=2)
        errors[name] = []
        for _ in range(8):
            for _ in range(50):
                method.step(train, valid)
            errors[name].append(float((method.outer.detach() - problem.best()).norm()))
    assert errors["SABA"][-1] < 1e-8
    assert min(errors["SOBA"]) > 1e-3
    # Linear: the logarithm falls by about as much in the second half as in the first.
    logs = torch.tensor(errors["SABA"]).log()
    assert logs[0] - logs[3] > 4 and logs[3] - logs[6] > 0.5 * (logs[0] - logs[3]), logs


@pytest.mark.parametrize("name", ["SRBA", "VRBO"])
def test_a_reference_is_the_batch_of_a_beginning(name: str) -> None:
    problem = Quadratic.random()
    method = made(name, problem, reference=lambda: (problem.all, problem.all))
    train = rows(seed=1)
    assert method.wants_large_batch
    other = made(name, problem)
    method.step(train[0], train[1])
    if name == "SRBA":
        other.step(problem.all, problem.all)
        assert torch.equal(method.inner, other.inner) and not method.wants_large_batch


def test_saba_knows_minibatches_by_number_and_by_content() -> None:
    problem = Quadratic.random()
    stream = rows(seed=1)
    order = [0, 1, 2, 3, 0, 2, 1, 3, 3]
    numbered, plain = made("SABA", problem), made("SABA", problem)
    by_samples = made("SABA", problem)
    for place in order:
        batch = stream[place].data
        numbered.step(Batch(data=batch, index=place), Batch(data=batch, index=place))
        by_samples.step(Batch(data=batch, index=batch), Batch(data=batch, index=batch))
        plain.step(batch.clone(), batch.clone())
    assert torch.equal(numbered.outer, plain.outer) and torch.equal(numbered.outer, by_samples.outer)
    assert len(plain._lower["slots"]) == 4
    few = made("SABA", problem, max_batches=2)
    with pytest.raises(ArgumentError, match=r"at most 2 different inner minibatches.*Minibatches"):
        for _ in range(4):
            few.step(stream, problem.all)


def test_schedulers_drive_inner_outer_and_adjoint() -> None:
    problem = Quadratic.random()
    method = made("SOBA", problem)
    inner = torch.optim.lr_scheduler.StepLR(method.inner_optimizer, 1, gamma=0.5)
    outer = torch.optim.lr_scheduler.ExponentialLR(method.outer_optimizer, 0.1)
    for _ in range(3):
        before = method.outer.detach().clone()
        method.step(problem.all, problem.all)
        inner.step()
        outer.step()
    assert method.inner_optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert method.adjoint_optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)  # tied at the beginning of a step
    assert (method.outer.detach() - before).norm() < 0.05 * 0.01 * 10
    own = made("SOBA", problem, adjoint_optimizer=partial(torch.optim.SGD, lr=0.3))
    own.step(problem.all, problem.all)
    assert own.adjoint_optimizer.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("name", SMALL)
def test_microbatches_are_one_batch(name: str) -> None:
    problem = Quadratic.random()
    whole, parts, split = made(name, problem), made(name, problem), None
    split = made(name, problem, options=StepOptions(accumulate=3))
    for _ in range(4):
        whole.step(problem.all, problem.all)
        pieces = Microbatches([problem.all[:2], problem.all[2:]], weights=[0.25, 0.75])
        parts.step(pieces, pieces)
        split.step(problem.all, problem.all)
    torch.testing.assert_close(parts.outer.detach(), whole.outer.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(split.outer.detach(), whole.outer.detach(), rtol=1e-10, atol=1e-12)


def test_clipping_and_averages() -> None:
    problem = Quadratic.random()
    options = StepOptions(max_norm=1e-3, inner_max_norm=1e-2, adjoint_max_norm=1e-2, ema_decay=0.5)
    method = made("SOBA", problem, options=options)
    result = method.step(problem.all, problem.all)
    assert result.hypergradient_norm > 0.1
    torch.testing.assert_close(method.outer.detach().norm().item(), 0.05 * 1e-3)
    torch.testing.assert_close(method.inner.detach().norm().item(), 0.1 * 1e-2)
    now = method.outer.detach().clone()
    with method.averaged():
        torch.testing.assert_close(method.outer.detach(), 0.5 * now)
    assert torch.equal(method.outer, now)
    with pytest.raises(ArgumentError, match="ema_decay"), made("SOBA", problem).averaged():
        pass


def poisoned(problem: Quadratic) -> tuple[Any, Any]:
    def lower(z: Any, x: Any, data: Any) -> torch.Tensor:
        return problem.inner_objective(z, x, data[0]) * (float("nan") if data[1] else 1.0)

    return lower, lambda z, x, data: problem.outer_objective(z, x, data[0])


@pytest.mark.parametrize("name", SMALL)
def test_what_is_not_finite_is_an_error_or_left_out(name: str) -> None:
    problem = Quadratic.random()
    good, bad = (problem.all, False), (problem.all, True)

    def start(**options: Any) -> Any:
        z, x = torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        return getattr(stochastic, name)(
            poisoned(problem),
            z,
            x,
            inner_optimizer=SGD,
            outer_optimizer=SGD,
            options=StepOptions(**options),
            **SMALL[name],
        )

    with pytest.raises(NonFiniteError, match=rf"{name}, step 1: expected a finite .*on_nonfinite='skip'"):
        start().step(bad, good)
    clean, skipping = start(), start(on_nonfinite="skip")
    for _ in range(2):
        clean.step(good, good)
        skipping.step(good, good)
    result = skipping.step(bad, good)
    assert result.skipped and result.step == 2 and torch.isnan(result.inner_loss)
    # TTSA and ALSET have drawn their random term, VRBO has made its outer step.
    if name not in ("TTSA", "ALSET", "VRBO"):
        clean.step(good, good)
        skipping.step(good, good)
        torch.testing.assert_close(clean.outer.detach(), skipping.outer.detach())
    ignoring = start(on_nonfinite="ignore")
    ignoring.step(bad, good)


def network() -> tuple[nn.Module, torch.Tensor, Any, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    weights = torch.zeros(12)
    data = torch.randn(12, 4), torch.randint(3, (12,))

    def lower(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
        losses = nn.functional.cross_entropy(inner(batch[0]), batch[1], reduction="none")
        penalty = sum((p**2).sum() for p in inner.parameters())
        return (outer.sigmoid() * losses).mean() + 0.01 * penalty

    def upper(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(inner(batch[0]), batch[1])

    return model, weights, (lower, upper), data


@pytest.mark.parametrize("name", [name for name in SMALL if name != "PZOBO"])
def test_any_optimiser_moves_a_network(name: str) -> None:
    model, weights, losses, data = network()
    method = getattr(stochastic, name)(
        losses, model, weights, inner_optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        outer_optimizer=torch.optim.RMSprop, **SMALL[name],
    )  # fmt: skip
    first = method.step(data, data)
    for _ in range(25):
        last = method.step(data, data)
    assert last.outer_loss < first.outer_loss
    # At first one direction makes both losses smaller, and BOME has no use for the weights.
    assert name == "BOME" or weights.detach().abs().min() > 0
    assert not last.inner_loss.requires_grad and all(p.grad is None for p in model.parameters())
    assert name in repr(method) and "AdamW" in repr(method)


@pytest.mark.parametrize("name", SMALL)
def test_batch_norm_in_training(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    _, weights, (_, upper), data = network()

    def lower(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
        return (outer.sigmoid() * nn.functional.cross_entropy(inner(batch[0]), batch[1], reduction="none")).mean()

    method = getattr(stochastic, name)((lower, upper), model, weights, inner_optimizer=SGD, **SMALL[name])
    for _ in range(3):
        result = method.step(data, data)
    assert torch.isfinite(result.hypergradient_norm)
    assert model[1].num_batches_tracked > 0
    state = method.state_dict()
    tracked, mean = model[1].num_batches_tracked.clone(), model[1].running_mean.clone()
    method.step(data, data)
    method.load_state_dict(state)
    assert torch.equal(model[1].running_mean, mean) and torch.equal(model[1].num_batches_tracked, tracked)


def test_an_old_point_does_not_count_in_running_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    _, weights, _, data = network()

    def lower(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
        return (outer.sigmoid() * nn.functional.cross_entropy(inner(batch[0]), batch[1], reduction="none")).mean()

    def upper(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(inner(batch[0]), batch[1])

    method = stochastic.SRBA((lower, upper), model, weights, inner_optimizer=SGD)
    for count in (1, 2, 3):
        method.step(data, data)
        assert model[1].num_batches_tracked == 2 * count


def test_autocast_and_scaled_losses() -> None:
    for options in (
        StepOptions(autocast=torch.bfloat16),
        StepOptions(grad_scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)),
        StepOptions(autocast=torch.float16, grad_scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)),
    ):
        directions = []
        for given in (StepOptions(), options):
            model, weights, losses, data = network()
            method = stochastic.SOBA(losses, model, weights, inner_optimizer=SGD, options=given)
            for _ in range(3):
                result = method.step(data, data)
            directions.append(torch.stack([result.hypergradient_norm, result.inner_gradient_norm]))
            assert all(p.dtype == torch.float32 for p in model.parameters())
        rtol = 5e-2 if options.autocast else 1e-4
        torch.testing.assert_close(directions[0], directions[1], rtol=rtol, atol=1e-4)


def test_an_overflow_reduces_the_scale_and_growth_restores_it() -> None:
    problem = Quadratic.random(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
    z, x = torch.zeros(5), torch.zeros(3)
    losses = (
        lambda z, x, data: 1e3 * problem.inner_objective(z, x, data),
        problem.outer_objective,
    )
    method = stochastic.SOBA(losses, z, x, inner_optimizer=partial(torch.optim.SGD, lr=1e-4),
                             options=StepOptions(grad_scaler=scaler))  # fmt: skip
    result = method.step(problem.all, problem.all)
    assert result.skipped and scaler.get_scale() == 2.0**126
    while method.step(problem.all, problem.all).skipped:
        pass
    before = scaler.get_scale()
    method.step(problem.all, problem.all)
    assert scaler.get_scale() == 2 * before and torch.isfinite(method.outer).all()


@pytest.mark.parametrize("name", ["SOBA", "MRBO", "F2SA", "BOME"])
def test_compiled_models(name: str) -> None:
    ends = []
    for compile_it in (False, True):
        model, weights, losses, data = network()
        inner = torch.compile(model, backend="eager") if compile_it else model
        method = getattr(stochastic, name)(losses, inner, weights, inner_optimizer=SGD, **SMALL[name])
        for _ in range(3):
            method.step(data, data)
        ends.append(weights.detach().clone())
    torch.testing.assert_close(*ends)


def test_memory_is_flat_in_inner_steps_and_in_steps() -> None:
    model, weights, losses, data = network()

    def kept(steps: int, inner_steps: int) -> int:
        method = stochastic.ImplicitStep(
            losses, copy.deepcopy(model), weights.clone(), inner_optimizer=torch.optim.Adam, inner_steps=inner_steps
        )
        method.step(data, data)
        seen = _live_tensors()
        for _ in range(steps):
            method.step(data, data)
        return _live_tensors() - seen

    assert kept(1, 2) == kept(6, 2) == kept(1, 30) == 0


def _live_tensors() -> int:
    import gc

    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def test_the_peak_does_not_grow_with_inner_steps() -> None:
    """Graphs of inner steps would keep every activation: counted as bytes that autograd saves at one time."""
    model, weights, losses, data = network()
    peaks = []
    for inner_steps in (2, 3, 5, 20, 40, 80):
        method = stochastic.ImplicitStep(
            losses, copy.deepcopy(model), weights.clone(), inner_optimizer=SGD, inner_steps=inner_steps
        )
        held, peak = [0], [0]

        class Saved:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor, self.size = (
                    tensor.detach(),
                    tensor.numel(),
                )  # an output that is kept by its own node never dies
                held[0] += self.size
                peak[0] = max(peak[0], held[0])

            def __del__(self) -> None:
                held[0] -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            method.step(data, data)
        peaks.append(peak[0])
    assert peaks[0] == peaks[1] > 0, peaks


@pytest.mark.parametrize("name", ["MASOBA", "SABA", "SRBA", "MRBO", "VRBO"])
def test_optimisers_that_change_gradients_do_not_change_memories(name: str) -> None:
    """SGD with nesterov and foreach adds the momentum to the gradient in place."""
    problem, ends = Quadratic.random(), []
    for foreach in (True, False):
        nesterov = partial(torch.optim.SGD, lr=0.05, momentum=0.5, nesterov=True, foreach=foreach)
        method = made(name, problem, inner_optimizer=nesterov, outer_optimizer=nesterov)
        train = rows(seed=1)
        for _ in range(9):
            method.step(train, problem.all)
        ends.append(method.outer.detach().clone())
    torch.testing.assert_close(*ends)


def test_a_problem_and_a_pair_of_functions_are_the_same() -> None:
    problem = Quadratic.random()

    class Problem(bilevel.BilevelProblem):
        inner_objective = staticmethod(problem.inner_objective)
        outer_objective = staticmethod(problem.outer_objective)

    one = made("SOBA", problem)
    other = stochastic.SOBA(Problem(), torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64),
                            inner_optimizer=SGD, outer_optimizer=partial(torch.optim.SGD, lr=0.05))  # fmt: skip
    for method in (one, other):
        for _ in range(3):
            method.step(problem.all, problem.all)
    assert torch.equal(one.outer, other.outer)
    with pytest.raises(ArgumentError, match="batch_dims=0"):
        stochastic.SOBA(Problem(batch_dims=0), torch.zeros(5), torch.zeros(3))


def test_leaves_that_do_not_require_grad_stay_where_others_do() -> None:
    problem = Quadratic.random()
    z, x, constant = torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), torch.ones(2)
    losses = (
        lambda inner, outer, data: problem.inner_objective(inner[0], outer, data),
        lambda inner, outer, data: problem.outer_objective(inner[0], outer, data),
    )
    method = stochastic.SOBA(losses, [z.requires_grad_(), constant, "a name"], x)
    method.step(problem.all, problem.all)
    assert torch.equal(constant, torch.ones(2)) and not constant.requires_grad and z.detach().norm() > 0


def test_preconditioned_steps_are_sama_s() -> None:
    """One step from zero: q = lr ∇_φ F / (√v̂ + ε), and the outer direction ∇_θ F − Bᵀ q."""
    problem = Quadratic.random()
    for make in (torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.SGD):
        method = made("ImplicitStep", problem, inner_optimizer=partial(make, lr=0.01), inner_steps=1, linear_solver=None,
                      adjoint_steps=1, warm_start=False, preconditioned=True)  # fmt: skip
        method.step(problem.all, problem.all)
        z = method.inner.detach()
        first = problem.a.mean(0)  # ∇_φ G at zero
        scale = {
            "Adam": first.abs() + 1e-8, "RMSprop": (0.01 * first**2).sqrt() + 1e-8, "Adagrad": first.abs() + 1e-10,
            "SGD": torch.ones(5, dtype=torch.float64),
        }[make.__name__]  # fmt: skip
        q = 0.01 * problem.slope(z) / scale
        torch.testing.assert_close(method.adjoint[0], q)
    with pytest.raises(ArgumentError, match=r"diagonal preconditioner .* got NAdam"):
        method = made("ImplicitStep", problem, inner_optimizer=torch.optim.NAdam, preconditioned=True)
        method.step(problem.all, problem.all)


def test_the_linear_solve_says_how_it_ended() -> None:
    problem = Quadratic.random()
    method = made("ImplicitStep", problem, linear_solver=bilevel.CG())
    result = method.step(problem.all, problem.all)
    assert result.linear_status is bilevel.Status.CONVERGED and result.adjoint_residual_norm < 1e-10
    saddle = (lambda z, x, data: z[0] ** 2 - z[1] ** 2 + z @ x, lambda z, x, data: z.sum() + (x**2).sum())
    method = stochastic.ImplicitStep(saddle, torch.zeros(2), torch.ones(2), linear_solver=bilevel.CG())
    assert method.step(None, None).linear_status is bilevel.Status.INDEFINITE


def test_projection_of_the_adjoint() -> None:
    problem = Quadratic.random()
    method = made("SRBA", problem, adjoint_radius=0.01)
    for _ in range(5):
        method.step(problem.all, problem.all)
        assert method.adjoint[0].norm() <= 0.01 * (1 + 1e-12)


def test_minibatches_are_a_partition_in_new_orders() -> None:
    stream = Minibatches({"x": torch.arange(7)}, 3, seed=1)
    assert stream.count == 3 and stream.full["x"].numel() == 7
    epochs = [[next(stream) for _ in range(3)] for _ in range(5)]
    for epoch in epochs:
        assert sorted(torch.cat([batch.data["x"] for batch in epoch]).tolist()) == list(range(7))
    orders = {tuple(batch.index for batch in epoch) for epoch in epochs}
    assert len(orders) > 1
    with pytest.raises(ShapeError, match="same positive number of rows"):
        Minibatches((torch.zeros(3), torch.zeros(2)), 1)
    with pytest.raises(ArgumentError, match="positive integer"):
        Minibatches(torch.zeros(3), 0)
    with pytest.raises(ArgumentError, match="7 rows"):
        stream.load_state_dict(Minibatches(torch.zeros(3), 1).state_dict())


Z, X = torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
FIT = Quadratic.random()
CAPTURED = torch.ones(5, dtype=torch.float64, requires_grad=True)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no problem": (lambda: stochastic.SOBA(None, Z, X), ArgumentError, "a pair of functions"),
    "numbers": (lambda: stochastic.SOBA(FIT.losses, [1.0, 2.0], X), ArgumentError, "inner to be a module or a pytree"),
    "integers": (
        lambda: stochastic.SOBA(FIT.losses, torch.zeros(5, dtype=torch.int64), X),
        DtypeError,
        "floating-point",
    ),
    "complex": (
        lambda: stochastic.SOBA(FIT.losses, torch.zeros(5, dtype=torch.complex64, requires_grad=True), X),
        DtypeError,
        "real tensor",
    ),
    "not a leaf": (
        lambda: stochastic.SOBA(FIT.losses, Z.clone().requires_grad_() * 2, X),
        ArgumentError,
        "a leaf tensor",
    ),
    "frozen": (
        lambda: stochastic.SOBA(FIT.losses, nn.Linear(2, 2).requires_grad_(False), X),
        ArgumentError,
        "unfreeze",
    ),
    "shared": (lambda: stochastic.SOBA(FIT.losses, Z, Z), ArgumentError, "share no tensor"),
    "optimiser's name": (
        lambda: stochastic.SOBA(FIT.losses, Z, X, inner_optimizer="sgd"),
        ArgumentError,
        "inner_optimizer to be an optimiser",
    ),
    "optimiser's options": (
        lambda: stochastic.SOBA(FIT.losses, Z, X, outer_optimizer=partial(torch.optim.SGD, lr=-1.0)),
        ArgumentError,
        "outer_optimizer to make an optimiser",
    ),
    "no optimiser": (lambda: stochastic.SOBA(FIT.losses, Z, X, inner_optimizer=list), ArgumentError, "got list"),
    "LBFGS": (lambda: stochastic.SOBA(FIT.losses, Z, X, inner_optimizer=torch.optim.LBFGS), ArgumentError, "got LBFGS"),
    "others' optimiser": (
        lambda: stochastic.SOBA(
            FIT.losses, Z, X, inner_optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        ),
        ArgumentError,
        "holds 0 of them and 1 others",
    ),
    "maximise": (
        lambda: stochastic.SOBA(FIT.losses, Z, X, inner_optimizer=partial(torch.optim.SGD, lr=0.1, maximize=True)),
        ArgumentError,
        "maximize=True",
    ),
    "options": (lambda: stochastic.SOBA(FIT.losses, Z, X, options={}), ArgumentError, "StepOptions"),
    "policy": (lambda: StepOptions(on_nonfinite="warn"), ArgumentError, "'raise', 'skip' or 'ignore'"),
    "clip": (lambda: StepOptions(max_norm=0.0), ArgumentError, "max_norm"),
    "autocast": (lambda: StepOptions(autocast=torch.float32), ArgumentError, "bfloat16"),
    "accumulate": (lambda: StepOptions(accumulate=0), ArgumentError, "accumulate"),
    "no parts": (lambda: Microbatches([]), ArgumentError, "at least one part"),
    "weights": (lambda: Microbatches([1], weights=[1.0, 2.0]), ArgumentError, "one weight"),
    "steps": (lambda: stochastic.AmIGO(FIT.losses, Z, X, inner_steps=-1), ArgumentError, "inner_steps"),
    "weight": (lambda: stochastic.MASOBA(FIT.losses, Z, X, weight=2.0), ArgumentError, "weight"),
    "reference": (lambda: stochastic.SRBA(FIT.losses, Z, X, reference=3), ArgumentError, "reference"),
    "momentum": (
        lambda: stochastic.PZOBO(FIT.losses, Z, X, inner_optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
        ArgumentError,
        "without momentum",
    ),
    "directions": (
        lambda: stochastic.PZOBO(FIT.losses, Z, X, directions=4, orthogonal=True),
        ArgumentError,
        "at most 3 orthogonal",
    ),
    "solver": (lambda: stochastic.ImplicitStep(FIT.losses, Z, X, linear_solver=bilevel.CG), ArgumentError, "instance"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_named(case: str) -> None:
    make, error, words = BAD[case]
    with pytest.raises(error, match=words):
        make()


STEPS: dict[str, tuple[Any, type[Exception], str]] = {
    "no scalar": (
        (lambda z, x, d: z * 2, FIT.outer_objective),
        ShapeError,
        "inner_objective to return .* got a tensor",
    ),
    "a number": ((FIT.inner_objective, lambda z, x, d: 3.0), ShapeError, "outer_objective .* got 3.0"),
    "cut": ((lambda z, x, d: z.detach().sum(), FIT.outer_objective), ArgumentError, "without .detach"),
    "no inner": ((lambda z, x, d: x.sum(), FIT.outer_objective), ArgumentError, "inner_objective to depend on inner"),
    "no outer": ((lambda z, x, d: (z**2).sum(), lambda z, x, d: z.sum()), ArgumentError, "no graph leads to outer"),
    "captured": (
        (FIT.inner_objective, lambda z, x, d: (CAPTURED * z).sum()),
        CapturedTensorError,
        r"outer_objective to reach no tensor .* shape \(5,\)",
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_bad_objectives_are_named(case: str) -> None:
    losses, error, words = STEPS[case]
    method = stochastic.SOBA(losses, torch.zeros_like(Z), torch.zeros_like(X))
    with pytest.raises(error, match=words):
        method.step(FIT.all, FIT.all)


def test_bad_batches_and_states_are_named() -> None:
    method = made("SOBA", FIT)
    with pytest.raises(ArgumentError, match="got a DataLoader; pass a batch of it, or iter"):
        method.step(torch.utils.data.DataLoader(FIT.all), FIT.all)
    with pytest.raises(ArgumentError, match="it ended; pass itertools"):
        method.step(iter([]), FIT.all)
    method.step(itertools.cycle([FIT.all]), FIT.all)
    split = made("SOBA", FIT, options=StepOptions(accumulate=9))
    with pytest.raises(ShapeError, match="at least 9 examples"):
        split.step(FIT.all, FIT.all)
    with pytest.raises(ArgumentError, match="got one of SOBA"):
        made("AmIGO", FIT).load_state_dict(method.state_dict())
    with pytest.raises(ArgumentError, match="state_dict"):
        method.load_state_dict({})
    with pytest.raises(ArgumentError, match=r"inner variables of shapes \[\(2,\)\]"):
        stochastic.SOBA(FIT.losses, torch.zeros(2), torch.zeros(3)).load_state_dict(method.state_dict())
    with pytest.raises(ArgumentError, match="the optimisers that it had"):
        made(
            "SOBA", FIT, inner_optimizer=lambda z: torch.optim.SGD([{"params": z, "lr": 0.1}, {"params": []}])
        ).load_state_dict(method.state_dict())
    with pytest.raises(ArgumentError, match="ema_decay"):
        made("SOBA", FIT, options=StepOptions(ema_decay=0.5)).load_state_dict(method.state_dict())
