"""IMAML against dense references: quadratic tasks, networks with batch norm, both modes, ragged tasks and misuse."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import bilevel
from bilevel.meta import SinusoidSampler, Tasks, conv_network, mlp, pad_tasks
from bilevel.meta.safeguarded import SafeguardedCG
from tests.meta.references import conjugate_gradients, dense_hessian, descend, flat_loss, gradients, parameters, slope

EXACT = {"solver": bilevel.Newton(), "linear_solver": bilevel.Exact(), "tolerance": bilevel.Tolerance()}


def linear_tasks(
    tasks: int, examples: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((examples, size), (examples, 1), (examples + 1, size), (examples + 1, 1))
    return tuple(torch.randn(tasks, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def quadratic_reference(theta: torch.Tensor, lam: float, batch: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Return mean g, mean loss and mean dL/dλ for tasks of linear regression with intercept, in closed form."""
    total, value, by_lam = torch.zeros_like(theta), theta.new_zeros(()), theta.new_zeros(())
    eye = torch.eye(len(theta), dtype=theta.dtype)
    for x, y, qx, qy in zip(*batch, strict=True):
        design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        query = torch.cat([qx, torch.ones(len(qx), 1, dtype=x.dtype)], 1)
        hessian = 2 * design.T @ design / len(x)
        phi = torch.linalg.solve(hessian + lam * eye, 2 * design.T @ y[:, 0] / len(x) + lam * theta)
        v = 2 * query.T @ (query @ phi - qy[:, 0]) / len(qx)
        g = torch.linalg.solve(eye + hessian / lam, v)
        total, value = total + g, value + ((query @ phi - qy[:, 0]) ** 2).mean()
        by_lam = by_lam - g @ (phi - theta) / lam
    count = len(batch[0])
    return [total / count, value / count, by_lam / count]


@given(
    tasks=st.integers(1, 6),
    examples=st.integers(1, 8),
    size=st.integers(1, 5),
    lam=st.floats(0.05, 50.0),
    seed=st.integers(0, 2**20),
)
def test_quadratic_tasks_equal_the_closed_form(tasks: int, examples: int, size: int, lam: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(size, 1).double()
    batch = linear_tasks(tasks, examples, size, seed)
    learner = bilevel.IMAML(model, mse_loss, lam, learn_lam=True, **EXACT)
    loss = learner(batch)
    loss.backward()
    g, value, by_lam = quadratic_reference(parameters(model), lam, batch)
    torch.testing.assert_close(loss.detach(), value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(model), g, rtol=1e-10, atol=1e-10)
    assert learner.log_lam_all.grad is not None
    torch.testing.assert_close(learner.log_lam_all.grad, lam * by_lam, rtol=1e-8, atol=1e-10)


def test_in_float32() -> None:
    model = nn.Linear(3, 1)
    batch = linear_tasks(4, 6, 3, dtype=torch.float32)
    bilevel.IMAML(model, mse_loss, 0.8, **EXACT)(batch).backward()
    g = quadratic_reference(parameters(model).double(), 0.8, tuple(t.double() for t in batch))[0]
    torch.testing.assert_close(gradients(model).double(), g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lam", [0.7, {"0.weight": 0.5, "0.bias": 2.0, "2.weight": 1.0, "2.bias": 0.3}])
def test_learned_strengths_against_finite_differences(lam: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    batch = linear_tasks(3, 5, 2)
    learner = bilevel.IMAML(model, mse_loss, lam, learn_lam=True, **EXACT)
    learner(batch).backward()
    learned = {name: p for name, p in learner.named_parameters() if name.startswith("log_lam")}
    assert len(learned) == (4 if isinstance(lam, dict) else 1)
    for parameter in learned.values():
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step
                values.append(learner(batch))
                parameter -= step
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-9)


def test_a_strength_for_each_parameter() -> None:
    model = nn.Linear(2, 1).double()
    lam = {"weight": torch.tensor([[0.5, 2.0]], dtype=torch.float64), "bias": 3.0}
    batch = linear_tasks(2, 4, 2)
    bilevel.IMAML(model, mse_loss, lam, **EXACT)(batch).backward()
    strengths, theta = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64), parameters(model)
    expected = torch.zeros_like(theta)
    for x, y, qx, qy in zip(*batch, strict=True):
        hessian = dense_hessian(flat_loss(model, mse_loss, x, y), theta)
        pull = hessian + strengths.diag()
        phi = theta - torch.linalg.solve(pull, slope(flat_loss(model, mse_loss, x, y), theta))
        v = slope(flat_loss(model, mse_loss, qx, qy), phi)
        expected += strengths * torch.linalg.solve(pull, v) / 2
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-10)


def network_with_batch_norm() -> nn.Module:
    layers = [nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 2)]
    return nn.Sequential(*layers).double()


def classification(tasks: int = 3, seed: int = 0) -> Tasks:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, 6, 3, generator=generator, dtype=torch.float64)
    qx = torch.randn(tasks, 4, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 2, (tasks, 6), generator=generator)
    return Tasks(x, y, qx, torch.randint(0, 2, (tasks, 4), generator=generator))


def test_a_network_with_batch_norm_takes_the_steps_of_the_paper() -> None:
    # With nn.BatchNorm, differentiating vmap(grad(f)) from outside is 2 % wrong in torch 2.13: a loop shows it.
    model, batch = network_with_batch_norm(), classification()
    budget = {"solver": bilevel.GradientDescent(0.1, 7), "linear_solver": bilevel.CG(4)}
    learner = bilevel.IMAML(model, cross_entropy, 2.0, **budget)
    loss = learner(batch)
    loss.backward()
    theta = parameters(model)
    expected, value = torch.zeros_like(theta), 0.0
    for task in zip(*batch[:4], strict=True):
        support, query = flat_loss(model, cross_entropy, *task[:2]), flat_loss(model, cross_entropy, *task[2:])
        phi = descend(support, theta, 2.0, 0.1, 7)
        matrix = torch.eye(len(theta), dtype=theta.dtype) + dense_hessian(support, phi) / 2.0
        expected += conjugate_gradients(matrix, slope(query, phi), 4) / 3
        value += float(query(phi)) / 3
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-11)


def test_the_released_procedure_step_by_step() -> None:
    model, batch = network_with_batch_norm(), classification()
    lam, lr, c, d = 2.0, 0.1, 1.0, 10.0
    learner = bilevel.IMAML(model, cross_entropy, lam, bilevel.GradientDescent(lr, 5), bilevel.CG(3), mode="released")
    learner(batch).backward()
    theta = parameters(model)
    expected = torch.zeros_like(theta)
    for task in zip(*batch[:4], strict=True):
        support, query = flat_loss(model, cross_entropy, *task[:2]), flat_loss(model, cross_entropy, *task[2:])
        phi = descend(support, theta, 0.0, lr, 5)
        phi = phi - lr * lam * (phi - theta)
        eye = torch.eye(len(theta), dtype=theta.dtype)
        matrix = (1 + c) * eye + dense_hessian(support, phi) / (lam + d)
        expected += conjugate_gradients(matrix, slope(query, phi), 3) / 3
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-11)


def test_the_hessian_free_variant_reaches_the_same_minimum() -> None:
    model, batch = mlp(3, 1, (5,)).double(), linear_tasks(3, 6, 3)
    model[1] = nn.Softplus()
    found = []
    for solver in (bilevel.Newton(dense_limit=0), bilevel.Newton()):
        learner = bilevel.IMAML(model, mse_loss, 2.0, solver, bilevel.CG(), bilevel.Tolerance())
        model.zero_grad()
        learner(batch).backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-9)


def test_delta_prime_is_a_promise_about_g() -> None:
    model, lam = nn.Linear(4, 1).double(), 0.01
    batch = linear_tasks(5, 6, 4)
    for delta_prime in (1e-2, 1e-5):
        tolerance = bilevel.Tolerance(delta=1e-10, delta_prime=delta_prime, strong_convexity=lam)
        learner = bilevel.IMAML(model, mse_loss, lam, bilevel.Newton(), bilevel.CG(), tolerance)
        with bilevel.record() as reports:
            model.zero_grad()
            learner(batch).backward()
        g = quadratic_reference(parameters(model), lam, batch)[0]
        assert (gradients(model) - g).norm() <= delta_prime
        (report,) = reports.backward
        assert report.certified.all() and report.converged.all() and report.residual_norm.shape == (5,)
        # λ, and the mean's 1/T, stand between the bound on q and that on g of a task.
        assert (5 * lam * report.error_bound <= delta_prime).all()


def test_a_hypergradient_says_how_wrong_it_is() -> None:
    model, batch = nn.Linear(2, 1).double(), linear_tasks(3, 5, 2)
    tolerance = bilevel.Tolerance(delta=1e-3, delta_prime=1e-3, strong_convexity=0.5)
    learner = bilevel.IMAML(model, mse_loss, 0.5, bilevel.GradientDescent(0.1, 500), bilevel.CG(), tolerance)
    result = learner.hypergradient(batch)
    g, value, _ = quadratic_reference(parameters(model), 0.5, batch)
    found = torch.cat([result.grad["parameters"][name].reshape(-1) for name in ("weight", "bias")])
    assert result.certified
    assert (found - g).norm() <= result.error_bound
    assert abs(result.corrected_value - value) < abs(result.value - value)
    assert result.report.forward.residual_norm.shape == (3,)
    assert model.weight.grad is None


class Bent(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * super().forward(x))


def once_more(linear: nn.Linear) -> nn.Module:
    return nn.Sequential(linear, linear)


def hooked(linear: nn.Linear) -> nn.Module:
    linear.register_forward_hook(lambda module, given, output: torch.sin(3 * output))
    return linear


def hooked_before(linear: nn.Linear) -> nn.Module:
    linear.register_forward_pre_hook(lambda module, given: (torch.sin(linear.weight.sum()) * given[0],))
    return linear


def rebound(linear: nn.Linear) -> nn.Module:
    linear.forward = lambda x: torch.sin(3 * nn.functional.linear(x, linear.weight, linear.bias))  # type: ignore[method-assign]
    return linear


@pytest.mark.parametrize("made", [once_more, Bent, hooked, hooked_before, rebound])
def test_of_a_model_that_only_looks_linear_nothing_is_claimed(made: Any) -> None:
    """Claimed of these, μ = λ could have made false bounds, or constants that nobody had given were refuted."""
    torch.manual_seed(0)
    batch = linear_tasks(3, 6, 2)
    settings: dict[str, Any] = {"solver": bilevel.GradientDescent(0.01, max_steps=3), "linear_solver": bilevel.Exact()}
    plain = bilevel.IMAML(nn.Linear(2, 1).double(), mse_loss, 0.5, **settings)
    assert plain.constants(*plain.objective_arguments(batch)).strong_convexity == 0.5
    model = made(nn.Linear(2, 2).double())
    batch = tuple(part.expand(*part.shape[:-1], 2) for part in batch)
    learner = bilevel.IMAML(model, mse_loss, 0.5, on_failure="ignore", **settings)
    known = learner.constants(*learner.objective_arguments(batch))
    assert known.strong_convexity is None and not known.convex
    assert not learner.hypergradient(batch).inner_bound.certified


def test_budgets_are_no_failure_and_no_warning() -> None:
    learner = bilevel.IMAML(nn.Linear(2, 1), mse_loss, 2.0, bilevel.GradientDescent(0.01, 2), bilevel.CG(1))
    with bilevel.record() as reports:
        learner(linear_tasks(2, 5, 2, dtype=torch.float32)).backward()
    for report in reports:
        assert set(report.status) == {bilevel.Status.BUDGET_SPENT}
        assert (report.residual_norm > 0).all() and not report.certified.any()


@pytest.mark.parametrize("per_pass", [1, 2, 4, 100])
def test_the_number_of_tasks_a_pass_changes_nothing(per_pass: int) -> None:
    model, batch = network_with_batch_norm(), classification(tasks=5)
    reference = bilevel.IMAML(model, cross_entropy, 2.0)
    reference(batch).backward()
    expected = gradients(model)
    model.zero_grad()
    learner = bilevel.IMAML(model, cross_entropy, 2.0, tasks_per_pass=per_pass)
    loss, predictions = learner(batch, predictions=True)
    loss.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-12)
    adapted = learner.adapt(batch)
    torch.testing.assert_close(learner.predict(adapted, batch.query_x), predictions, rtol=1e-10, atol=1e-12)
    for name, value in reference.adapt(batch[:2]).items():
        torch.testing.assert_close(adapted[name], value, rtol=1e-10, atol=1e-12)
        assert not adapted[name].requires_grad


@pytest.mark.parametrize("together", [1, 2, 4])
def test_the_parts_of_a_query_equal_the_whole(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = network_with_batch_norm(), classification(tasks=5)
    learner = bilevel.IMAML(model, cross_entropy, 2.0)
    found = []
    numbers = batch.query_x.numel() + batch.query_y.numel()
    for most in (numbers, numbers * together // 5 + 1):
        monkeypatch.setattr("bilevel.meta.tasks._NUMBERS_AT_ONCE", most)
        model.zero_grad()
        loss, predictions = learner(batch, predictions=True)
        loss.backward()
        found.append((loss.detach(), predictions, gradients(model)))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


@given(sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_ragged_tasks_equal_their_separate_losses(sizes: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    model = mlp(2, 1, (3,)).double()
    model[1] = nn.Tanh()
    tasks = []
    for support, query in sizes:
        x, qx = torch.randn(support, 2, dtype=torch.float64), torch.randn(query, 2, dtype=torch.float64)
        tasks.append((x, x.sum(1, keepdim=True), qx, qx.prod(1, keepdim=True)))
    learner = bilevel.IMAML(model, mse_loss, 1.5, bilevel.GradientDescent(0.05, 6), bilevel.CG(4), on_failure="ignore")
    loss = learner(pad_tasks(tasks))
    loss.backward()
    together = gradients(model)
    model.zero_grad()
    apart = sum(learner(tuple(part[None] for part in task)) for task in tasks) / len(tasks)
    apart.backward()
    torch.testing.assert_close(loss, apart, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(together, gradients(model), rtol=1e-8, atol=1e-10)


def test_padding_is_refused_where_it_would_be_wrong() -> None:
    one, two = (torch.zeros(n, 3, dtype=torch.float64) for n in (1, 2))
    labels = [torch.zeros(n, dtype=torch.int64) for n in (1, 2)]
    ragged = pad_tasks([(one, labels[0], one, labels[0]), (two, labels[1], two, labels[1])])
    with pytest.raises(bilevel.ArgumentError, match="batch norm"):
        bilevel.IMAML(network_with_batch_norm(), cross_entropy)(ragged)
    summed = bilevel.IMAML(nn.Linear(3, 2).double(), lambda p, y: cross_entropy(p, y, reduction="sum"))
    tasks = pad_tasks([(two, labels[1], two, labels[1]), (one, labels[0], one, labels[0])])
    with pytest.raises(bilevel.ArgumentError, match="expected loss to be the mean"):
        summed(tasks)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 1), nn.Linear(3, 1)
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.first(a) + self.second(b) + self.shift}


@pytest.mark.parametrize("named", [False, True])
def test_several_inputs_buffers_and_dicts(named: bool) -> None:
    model = TwoInputs().double()
    a, b = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 4, 3, dtype=torch.float64)
    x: Any = {"b": b, "a": a} if named else (a, b)
    y = {"out": torch.randn(3, 4, 1, dtype=torch.float64)}
    learner = bilevel.IMAML(model, lambda made, target: mse_loss(made["out"], target["out"]), 1.0, **EXACT)
    batch = {"support_x": x, "support_y": y, "query_x": x, "query_y": y}
    learner(batch).backward()
    joined = nn.Linear(5, 1).double()
    with torch.no_grad():
        joined.weight.copy_(torch.cat([model.first.weight, model.second.weight], 1))
        joined.bias.copy_(model.first.bias + model.second.bias + 0.5)
    plain = torch.cat([a, b], -1)
    # The two biases move together, so that the joint one feels half the pull.
    lam = {"weight": 1.0, "bias": 0.5}
    bilevel.IMAML(joined, mse_loss, lam, **EXACT)((plain, y["out"], plain, y["out"])).backward()
    made = torch.cat([model.first.weight.grad, model.second.weight.grad], 1)
    torch.testing.assert_close(made, joined.weight.grad, rtol=1e-9, atol=1e-11)
    assert learner.predict(learner.adapt((x, y)), x)["out"].shape == (3, 4, 1)


def test_frozen_parameters_stay_and_tied_ones_move_together() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    model[2].weight = model[0].weight
    model[4].requires_grad_(False)
    batch = linear_tasks(3, 5, 2)
    learner = bilevel.IMAML(model, mse_loss, 2.0)
    learner(batch).backward()
    assert model[4].weight.grad is None and model[0].weight.grad is not None
    assert set(learner.adapt(batch[:2])) == {"0.weight", "0.bias", "2.bias"}


def test_running_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    with pytest.raises(bilevel.ArgumentError, match="track_running_stats=False"):
        bilevel.IMAML(model, cross_entropy)
    learner = bilevel.IMAML(model.eval(), cross_entropy)  # constants now
    learner(classification()).backward()
    learner.train()
    with pytest.raises(bilevel.ArgumentError, match="running"):
        learner(classification())


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (
            lambda p, y: (p.argmax(-1) == y).sum(),
            r"floating-point scalar, got torch.int64 of shape \(\); return the mean",
        ),
        (lambda p, y: None, "floating-point scalar, got NoneType"),
        (
            lambda p, y: cross_entropy(p, y, reduction="none"),
            r"floating-point scalar, got torch.float32 of shape \(5,\)",
        ),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, words: str) -> None:
    x, y = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(bilevel.ShapeError, match=words):
        bilevel.IMAML(nn.Linear(4, 3), loss)((x, y, x, y))


@pytest.mark.parametrize("place", ["support", "query"])
@pytest.mark.parametrize("label", [-1, 3])
def test_a_class_out_of_range_is_refused(place: str, label: int) -> None:
    x, y = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)
    wrong = y.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(label))
    batch = (x, wrong, x, y) if place == "support" else (x, y, x, wrong)
    learner = bilevel.IMAML(nn.Linear(4, 3), cross_entropy)
    for act in (learner, learner.hypergradient):
        with pytest.raises(
            bilevel.ArgumentError, match=f"{label} is out of bounds.*number the classes of each task from 0"
        ):
            act(batch)


def test_tasks_of_inference_mode_are_tasks() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 1)
    with torch.inference_mode():
        made = x.clone(), y.clone()
    learner = bilevel.IMAML(nn.Linear(4, 1), mse_loss)
    found = []
    for support, query in ((made, (x, y)), ((x, y), made), ((x, y), (x, y))):
        learner.zero_grad()
        learner((*support, *query)).backward()
        found.append(learner.model.weight.grad.clone())
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])
    assert torch.isfinite(learner.hypergradient((*made, *made)).value)


def test_dropout_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    learner = bilevel.IMAML(model, cross_entropy)
    with pytest.raises(bilevel.StochasticObjectiveError, match="deterministic"):
        learner(classification())
    learner.eval()
    learner(classification()).backward()


def test_an_indefinite_task_is_reported_alone() -> None:
    # cos has curvature −1 at 0 and 1 at π: with λ = 0.5 a task about 0 is indefinite.
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cos(self.w + x)

    x = torch.tensor([[0.0], [torch.pi]], dtype=torch.float64)
    batch = (x, torch.zeros_like(x), x + 1, torch.zeros_like(x))
    learner = bilevel.IMAML(Scalar(), lambda made, target: (made - target).mean(), 0.5, on_failure="ignore")
    with bilevel.record() as reports:
        learner(batch).backward()
    assert reports.backward[0].status[0] is bilevel.Status.INDEFINITE
    assert reports.backward[0].status[1] is not bilevel.Status.INDEFINITE
    strict = bilevel.IMAML(Scalar(), lambda made, target: (made - target).mean(), 0.5)
    loss = strict(batch)
    with pytest.raises(bilevel.SolveError, match="not positive definite in 1 of 2"):
        loss.backward()


def test_it_is_an_ordinary_module() -> None:
    batch = linear_tasks(4, 5, 2)
    learner = bilevel.IMAML(nn.Linear(2, 1).double(), mse_loss, 0.9, learn_lam=True, **EXACT)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = learner(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert sorted(learner.state_dict()) == ["log_lam_all", "model.bias", "model.weight"]
    kept = io.BytesIO()
    torch.save(learner.state_dict(), kept)
    kept.seek(0)
    other = bilevel.IMAML(nn.Linear(2, 1).double(), mse_loss, 5.0, learn_lam=True, **EXACT)
    other.load_state_dict(torch.load(kept, weights_only=True))
    assert torch.equal(other(batch), learner(batch))
    assert torch.equal(copy.deepcopy(learner)(batch), learner(batch))
    assert other.lam.item() == pytest.approx(learner.lam.item())
    assert "lam=" in repr(learner)


def test_the_papers_network_in_bfloat16() -> None:
    model = conv_network(3, filters=4)
    x, y = torch.rand(2, 3, 1, 28, 28), torch.arange(3).expand(2, -1)
    learner = bilevel.IMAML(
        model, cross_entropy, 2.0, bilevel.GradientDescent(0.05, 2), bilevel.CG(2), on_failure="ignore"
    )
    learner((x, y, x, y)).backward()
    plain = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = learner((x, y, x, y))
    loss.backward()
    rough = gradients(model)
    assert torch.isfinite(rough).all() and rough.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rough, plain, dim=0) > 0.9


X, Y = torch.zeros(2, 3, 2), torch.zeros(2, 3, 1)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, Y), "got 2 items"),
        (X, "got Tensor"),
        ((X, Y[:, :2], X, Y), "one number of examples|one of examples"),
        ((X, Y, X[:1], Y[:1]), "as many tasks in the query"),
        ((X[0], Y[0], X[0], Y), "query|support"),
        ((X[:0], Y[:0], X[:0], Y[:0]), "none of them 0"),
        ((X[:, :0], Y[:, :0], X, Y), "none of them 0"),
        ({"support_x": X, "support_y": Y, "query": X}, "rename"),
        ((1.0, 2.0, 3.0, 4.0), "float"),
    ],
)
def test_batches_that_are_none(batch: Any, message: str) -> None:
    learner = bilevel.IMAML(nn.Linear(2, 1), mse_loss)
    with pytest.raises(bilevel.ShapeError, match=message):
        learner(batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": 0.0}, "positive finite number"),
        ({"lam": -1.0}, "positive finite number"),
        ({"lam": float("nan")}, "positive finite number"),
        ({"lam": torch.ones(3)}, "shape"),
        ({"lam": {"weight": 1.0}}, "name the model's trainable parameters"),
        ({"lam": {"weight": torch.ones(7), "bias": 1.0}}, "shape"),
        ({"mode": "papers"}, '"paper" or "released"'),
        ({"mode": "released", "solver": bilevel.Newton()}, "GradientDescent"),
        ({"mode": "released", "learn_lam": True}, "one positive number"),
        ({"mode": "released", "lam": {"weight": 1.0, "bias": 1.0}}, "one positive number"),
        ({"tasks_per_pass": 0}, "tasks_per_pass"),
        ({"model": "net"}, "torch.nn.Module"),
        ({"model": nn.ReLU()}, "parameters that require grad"),
        ({"loss": 3}, "expected loss to be a function"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    given = {"model": nn.Linear(2, 1), "loss": mse_loss} | settings
    with pytest.raises(bilevel.ArgumentError, match=message):
        bilevel.IMAML(**given)


def test_a_support_that_is_none() -> None:
    learner = bilevel.IMAML(nn.Linear(2, 1), mse_loss)
    with pytest.raises(bilevel.ShapeError, match="expected the support as"):
        learner.adapt(X)
    with pytest.raises(bilevel.ShapeError, match="at least one task"):
        pad_tasks([])
    with pytest.raises(bilevel.ShapeError, match=r"4|four"):
        pad_tasks([(X[0], Y[0])])
    with pytest.raises(bilevel.ShapeError, match="one number of examples"):
        pad_tasks([(X[0], Y[0][:1], X[0], Y[0])])


def test_a_learner_is_transformed_as_the_refusal_of_its_hypergradient_says() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 5, n, generator=generator, dtype=torch.float64) for n in (2, 1))
    learner = bilevel.IMAML(torch.nn.Linear(2, 1).double(), torch.nn.functional.mse_loss, lam=1.0)
    parameters = dict(learner.named_parameters())
    with pytest.raises(bilevel.TransformError, match=r"functional_call where outer is the problem's own parameters"):
        torch.func.grad(lambda p: learner.hypergradient((x, y, x, y)).value)(parameters)
    found = torch.func.grad(lambda p: torch.func.functional_call(learner, p, ((x, y, x, y),)))(parameters)
    expected = learner.hypergradient((x, y, x, y)).grad["parameters"]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"model.{name}"], gradient, rtol=1e-10, atol=1e-12)


PAPER = {"solver": bilevel.GradientDescent(lr=0.1, max_steps=16), "linear_solver": bilevel.CG(max_steps=5)}
SEARCHED = bilevel.GradientDescent(lr=0.1, max_steps=16, line_search=True)


def sinusoids(seed: int) -> tuple[nn.Module, Tasks]:
    torch.manual_seed(seed)
    return mlp(), SinusoidSampler(shots=10, queries=10, seed=seed).sample(25)


@pytest.mark.parametrize("seed", range(4))
def test_the_default_learns_from_sinusoids(seed: int) -> None:
    model, tasks = sinusoids(seed)
    learner = bilevel.IMAML(model, mse_loss, lam=2.0)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = learner(tasks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] < 10.0


def test_negative_curvature_names_what_helps_and_that_does_help() -> None:
    model, tasks = sinusoids(1)
    with pytest.raises(
        bilevel.SolveError, match=r"I \+ H/lam.*Damped\(.*raise lam.*smaller step size or line_search=True"
    ):
        bilevel.IMAML(model, mse_loss, lam=2.0, **PAPER)(tasks).backward()
    remedies: list[dict[str, Any]] = [
        {"solver": PAPER["solver"]},  # linear_solver left out
        {"solver": SEARCHED, "linear_solver": bilevel.Damped(bilevel.CG(5), damping=10.0)},
        {
            "solver": bilevel.GradientDescent(lr=0.01, max_steps=16),
            "linear_solver": bilevel.Damped(bilevel.CG(5), damping=10.0),
        },
        {"lam": 20.0, "solver": SEARCHED, "linear_solver": bilevel.CG(5)},
        {"lam": 20.0, "solver": bilevel.GradientDescent(lr=0.01, max_steps=16), "linear_solver": bilevel.CG(5)},
    ]
    for settings in remedies:
        model.zero_grad()
        bilevel.IMAML(model, mse_loss, **({"lam": 2.0} | settings))(tasks).backward()
        assert torch.isfinite(gradients(model)).all()


def test_an_adaptation_that_diverges_names_the_step_size() -> None:
    model, tasks = sinusoids(0)
    with pytest.raises(bilevel.SolveError, match=r"lower lr, which is 0.1, pass line_search=True"):
        bilevel.IMAML(model, mse_loss, lam=2.0, **PAPER)(tasks)
    bilevel.IMAML(model, mse_loss, lam=2.0, solver=bilevel.GradientDescent(lr=0.01, max_steps=16))(tasks)
    bilevel.IMAML(model, mse_loss, lam=2.0, solver=SEARCHED)(tasks)


def test_where_curvature_is_positive_the_default_is_conjugate_gradients() -> None:
    operator = bilevel.operators.DenseOperator(torch.diag(torch.tensor([1.0, 3.0, 9.0, 20.0])).double(), symmetric=True)
    rhs = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    budget = bilevel.Tolerance(delta=None, delta_prime=None)
    assert torch.equal(
        SafeguardedCG(max_steps=3)(operator, rhs, budget), bilevel.CG(max_steps=3)(operator, rhs, budget)
    )


def test_one_indefinite_task_is_damped_alone() -> None:
    matrices = torch.stack([torch.diag(torch.tensor([4.0, 1.0, low])) for low in (2.0, -0.5)]).double()
    operator = bilevel.operators.DenseOperator(matrices, symmetric=True)
    rhs = torch.ones(2, 3, dtype=torch.float64)
    budget = torch.zeros(2, dtype=torch.float64)
    found = SafeguardedCG(max_steps=3).solve(operator, rhs, budget)
    torch.testing.assert_close(found.x[0], 1 / matrices[0].diagonal())
    # Some γ between 1/2 and ‖A‖ = 4 solves the other one.
    gamma = 1 / found.x[1, 0] - 4.0
    assert 0.5 < gamma <= 4.0
    torch.testing.assert_close(found.x[1], 1 / (matrices[1].diagonal() + gamma))
    assert (
        found.status.tolist() == [bilevel.Status.MAX_STEPS] * 2 or not (found.status >= bilevel.Status.INDEFINITE).any()
    )
    # Where an accuracy is asked for, another system's answer is none.
    strict = SafeguardedCG(max_steps=3).solve(operator, rhs, budget + 1e-3)
    assert strict.status[1] == bilevel.Status.INDEFINITE


def test_a_singular_task_is_damped_unless_it_is_solved() -> None:
    matrix = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    operator = bilevel.operators.DenseOperator(matrix.expand(2, 3, 3), symmetric=True)
    rhs = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    found = SafeguardedCG(max_steps=3).solve(operator, rhs, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found.x[0], torch.tensor([0.25, 1.0, 0.0], dtype=torch.float64))
    gamma = 1 / found.x[1, 0] - 4.0
    assert 0.0 < gamma <= 4.0
    torch.testing.assert_close(found.x[1], 1 / (matrix.diagonal() + gamma))


def test_an_accuracy_asked_for_is_not_met_by_damping() -> None:
    model, tasks = sinusoids(1)
    settings = {"solver": PAPER["solver"], "tolerance": bilevel.Tolerance(delta=None, delta_prime=1e-3)}
    learner = bilevel.IMAML(model, mse_loss, lam=2.0, on_failure="ignore", **settings)
    with bilevel.record() as reports:
        learner(tasks).backward()
    assert bilevel.Status.INDEFINITE in reports.backward[0].status
    assert not reports.backward[0].success.any()


def test_a_strength_that_is_no_number_and_parameters_that_are_not_adapted_are_refused() -> None:
    model = nn.Linear(2, 1)
    for lam in ("a", None):
        with pytest.raises(bilevel.ArgumentError, match="lam to be a positive finite number, got"):
            bilevel.IMAML(model, nn.functional.mse_loss, lam=lam)  # type: ignore[arg-type]
    learner = bilevel.IMAML(model, nn.functional.mse_loss)
    with pytest.raises(bilevel.ArgumentError, match=r"expected adapted to hold the parameters .*, got \[\]; pass what"):
        learner.predict({}, torch.zeros(1, 3, 2))
