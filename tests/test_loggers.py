"""Loggers: what each writes, by stand-ins for the packages, and what is said where one is absent."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import bilevel
from bilevel import stochastic
from bilevel.errors import ArgumentError
from bilevel.loggers import Logger, MLflowLogger, TensorBoardLogger, WandbLogger, numbers_of
from bilevel.stochastic import StepOptions, StepResult
from tests.stochastic.problems import SGD, Quadratic

F64 = torch.float64


class Nearest(bilevel.BilevelProblem):
    """φ* = θ; F is least at the data."""

    def inner_objective(self, inner, outer, data):
        return ((inner - outer) ** 2).sum()

    def outer_objective(self, inner, outer, data):
        return ((inner - data) ** 2).sum()


def minimized(callback: Any, **settings: Any) -> bilevel.OuterResult:
    zero, one = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
    return bilevel.minimize(
        Nearest(), zero, one, init=zero, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), callback=callback, **settings
    )


def stepped(steps: int, **options: Any) -> list[StepResult]:
    problem = Quadratic.random()
    method = stochastic.SOBA(
        problem.losses, torch.zeros(5, dtype=F64), torch.zeros(3, dtype=F64), inner_optimizer=SGD, options=StepOptions(**options)
    )  # fmt: skip
    return [method.step(torch.arange(8), torch.arange(8)) for _ in range(steps)]


class Kept(Logger):
    """Keeps what it is to write."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.rows: list[tuple[int, dict[str, float]]] = []

    def write(self, numbers: dict[str, float], step: int) -> None:
        self.rows.append((step, numbers))


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    written: list[Any] = []

    class SummaryWriter:
        def __init__(self, directory: str) -> None:
            written.append(directory)

        def add_scalar(self, name: str, number: float, step: int) -> None:
            written.append((name, number, step))

    module: Any = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return written


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("wandb")
    module.run, module.axes, module.rows = None, [], []
    module.made = SimpleNamespace(
        define_metric=lambda name, step_metric=None: module.axes.append((name, step_metric)), log=module.rows.append
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("mlflow")
    module.active, module.rows = None, []
    module.active_run = lambda: module.active
    module.log_metrics = lambda numbers, step: module.rows.append((step, numbers))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def test_each_step_of_a_stochastic_method_reaches_its_callbacks() -> None:
    logger, results = Kept(), []
    returned = stepped(3, callback=[logger, results.append])
    assert all(kept is given for kept, given in zip(results, returned, strict=True))
    assert [step for step, _ in logger.rows] == [1, 2, 3]
    for (_, numbers), result in zip(logger.rows, returned, strict=True):
        assert numbers["bilevel/inner_loss"] == float(result.inner_loss)
        assert numbers["bilevel/outer_loss"] == float(result.outer_loss)
        assert numbers["bilevel/hypergradient_norm"] == float(result.hypergradient_norm)
        assert numbers["bilevel/inner_gradient_norm"] == float(result.inner_gradient_norm)
        assert numbers["bilevel/adjoint_residual_norm"] == float(result.adjoint_residual_norm)  # type: ignore[arg-type]
        assert numbers["bilevel/skipped"] == 0.0


def test_a_skipped_step_reaches_the_callback_too() -> None:
    w, theta, results = torch.zeros(2), torch.zeros(2), []
    losses = (lambda w, t, c: c * ((w - t) ** 2).sum(), lambda w, t, c: c * (w**2).sum())
    options = StepOptions(on_nonfinite="skip", callback=results.append)
    method = stochastic.SOBA(losses, w, theta, options=options)
    for c in (1.0, float("nan"), 1.0):
        method.step(c, 1.0)
    assert [result.skipped for result in results] == [False, True, False]
    assert numbers_of(results[1])[1]["skipped"] == 1.0


def test_each_point_of_minimize_is_written() -> None:
    logger = Kept(prefix="")
    result = minimized(logger, max_steps=3)
    assert [step for step, _ in logger.rows] == [1, 2, 3, 4]
    for (_, numbers), point in zip(logger.rows, result.history, strict=True):
        assert numbers["corrected_value"] == point.corrected_value and numbers["gradient_norm"] == point.gradient_norm
        assert "error_bound" not in numbers and "step_size" not in numbers  # neither is known here
        assert numbers["seconds"] == point.seconds
    bounded = Kept(prefix="")
    found = minimized(bounded, max_steps=1, tolerance=bilevel.Tolerance(hypergradient=1e-6))
    assert bounded.rows[0][1]["error_bound"] == found.history[0].error_bound


def test_every_leaves_steps_out_and_their_numbers_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    monkeypatch.setattr("bilevel.loggers._as_floats", lambda found: read.append(found) or {})
    logger = Kept(every=3)
    stepped(7, callback=logger)
    assert [step for step, _ in logger.rows] == [3, 6] and len(read) == 2


def test_only_the_first_process_writes(monkeypatch: pytest.MonkeyPatch, tensorboard: list[Any]) -> None:
    results = stepped(1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    logger = TensorBoardLogger("runs")
    logger(results[0])
    assert tensorboard == []


def test_tensorboard(tensorboard: list[Any]) -> None:
    results = stepped(2, callback=TensorBoardLogger("runs/one", prefix="a/"))
    directory, *rows = tensorboard
    assert directory == "runs/one" and len(rows) == 12
    assert ("a/outer_loss", float(results[1].outer_loss), 2) in rows
    with pytest.raises(ArgumentError, match="a directory or a writer"):
        TensorBoardLogger(3)


def test_wandb(wandb: Any) -> None:
    logger = WandbLogger()
    with pytest.raises(ArgumentError, match=r"call wandb\.init"):
        stepped(1, callback=logger)
    wandb.run = wandb.made
    results = stepped(2, callback=logger)
    assert [row["bilevel/step"] for row in wandb.rows] == [1, 2]
    assert wandb.rows[1]["bilevel/outer_loss"] == float(results[1].outer_loss)
    assert ("bilevel/outer_loss", "bilevel/step") in wandb.axes and len(wandb.axes) == len(set(wandb.axes)) == 6
    given = WandbLogger(wandb.made)
    given(results[0])
    assert len(wandb.rows) == 3
    with pytest.raises(ArgumentError, match=r"wandb\.init"):
        WandbLogger("project")


def test_mlflow(mlflow: Any) -> None:
    logger = MLflowLogger()
    with pytest.raises(ArgumentError, match=r"call mlflow\.start_run"):
        stepped(1, callback=logger)
    assert mlflow.rows == []
    mlflow.active = object()
    results = stepped(2, callback=logger)
    assert [step for step, _ in mlflow.rows] == [1, 2]
    assert mlflow.rows[1][1]["bilevel/outer_loss"] == float(results[1].outer_loss)


@pytest.mark.parametrize(
    ("module", "make"),
    [("torch.utils.tensorboard", lambda: TensorBoardLogger("runs")), ("wandb", WandbLogger), ("mlflow", MLflowLogger)],
)
def test_an_absent_package_is_named_and_none_is_advised(
    monkeypatch: pytest.MonkeyPatch, module: str, make: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ArgumentError, match="cannot be imported") as caught:
        make()
    assert "pip" not in str(caught.value) and "its own documentation" in str(caught.value)


def test_what_is_no_callback_or_no_run_is_refused() -> None:
    for wrong in (3, [3], "print"):
        with pytest.raises(ArgumentError, match="callback"):
            StepOptions(callback=wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="pass what a callback receives"):
        numbers_of(3)  # type: ignore[arg-type]
    for every in (0, True, 1.5):
        with pytest.raises(ArgumentError, match="every"):
            Kept(every=every)


def test_a_stochastic_run_is_drawn_and_shown() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    from bilevel.display import ProgressBar, describe, plot_steps

    results: list[StepResult] = []
    with ProgressBar(max_steps=4) as bar:
        stepped(4, callback=[bar, results.append])
    task = bar._bar.tasks[0]
    assert task.completed == 4 and task.description == describe(results[-1])
    assert (
        f"outer loss {float(results[-1].outer_loss):.4g}" in task.description and "adjoint residual" in task.description
    )
    nan = torch.tensor(float("nan"))
    skipped = StepResult(nan, nan, nan, nan, step=2, skipped=True)
    losses, norms = plot_steps([*results, skipped], "$5").axes
    drawn = {line.get_label(): line.get_ydata().tolist() if hasattr(line.get_ydata(), "tolist") else list(line.get_ydata())
             for axes in (losses, norms) for line in axes.lines}  # fmt: skip
    assert drawn["outer loss"] == [float(result.outer_loss) for result in results]
    assert drawn["hypergradient"] == [float(result.hypergradient_norm) for result in results]
    assert len(drawn["skipped"]) == 1 and norms.get_yscale() == "log"
    with pytest.raises(ArgumentError, match="at least one step"):
        plot_steps([skipped])
