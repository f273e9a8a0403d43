"""`bilevel imaml`: it learns, goes on bit for bit, survives being interrupted, and shares tasks between processes."""

from __future__ import annotations

import contextvars
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import bilevel
from bilevel.cli.main import main
from bilevel.meta import draw_glyphs
from bilevel.meta.equal_outputs import equalize_gradients, fitted, last_layer
from bilevel.meta.measured_descent import MeasuredDescent
from bilevel.meta.processes import Processes, _contexts, _contexts_dropped, processes
from bilevel.meta.recipe import Recipe, set_up
from bilevel.meta.released import ReleasedDescent
from bilevel.meta.safeguarded import SafeguardedCG
from bilevel.meta.training import Score, Trainer, read_checkpoint
from tests.states import damaged, edited, same

SMALL = Recipe(
    ways=3, queries=3, inner_steps=2, inner_lr=0.05, cg_steps=2, tasks_per_step=4, validation_tasks=5, validate_every=2, hold_out=1,
    average=0.0, decay_steps=0, mirrors=False, alphabets=0, class_distortion=0.0, image_distortion=0.0, equal_outputs=False, training_ways=0,
)  # fmt: skip
OPTIONS = (
    "--ways", 3, "--queries", 3, "--inner-steps", 2, "--cg-steps", 2, "--tasks-per-step", 4, "--validation-tasks", 5,
    "--validate-every", 2, "--hold-out", 1, "--test-tasks", 5, "--device", "cpu", "--training-ways", 0,
)  # fmt: skip
HERE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of characters, laid out like Omniglot's."""
    root = tmp_path_factory.mktemp("characters")
    glyphs = draw_glyphs(24, 8, seed=5)
    for number, (image, label) in enumerate(zip(glyphs.images, glyphs.labels.tolist(), strict=True)):
        place = root / f"Alphabet{label % 3}" / f"character{label:02}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - image.numpy()).save(place / f"{number:04}.png")
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.learner.parameters()])


def test_training_lowers_the_loss(folder: Path) -> None:
    recipe = replace(SMALL, validate_every=20)
    trainer = Trainer(str(folder), recipe, HERE)
    # The same tasks before and after: the loss of four drawn ones varies by a third.
    tasks = set_up(str(folder), recipe, HERE.device).training.sample(40)
    with torch.no_grad():
        before = float(trainer.learner(tasks))
    trainer.train(steps=60)
    with torch.no_grad():
        assert float(trainer.learner(tasks)) < 0.85 * before
    assert [step for step, _ in trainer.validations] == [20, 40, 60]
    record = trainer.history[-1]
    assert record.step == 60 and record.inner_residual > 0 and record.linear_residual > 0 and record.lam == SMALL.lam


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"learn_lam": True, "amp": True},
        pytest.param({"mode": "released"}, marks=pytest.mark.long),
        pytest.param({"hessian_free": True}, marks=pytest.mark.long),
        {"average": 0.9, "line_search": True, "safeguard": True},
        {
            "class_distortion": 1.0,
            "image_distortion": 0.7,
            "mirrors": True,
            "alphabets": 1,
            "equal_outputs": True,
            "training_ways": 4,
        },
        pytest.param({"average": 0.9, "inner_momentum": 0.5, "decay_steps": 8}, marks=pytest.mark.long),
    ],
)
def test_going_on_is_bit_for_bit(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = replace(SMALL, **changes)
    whole = Trainer(str(folder), recipe, HERE)
    whole.train(steps=4)
    first = Trainer(str(folder), recipe, HERE)
    first.train(steps=2)
    first.save(tmp_path / "c.pt")
    torch.rand(7)  # whatever another process would do before
    state, found = read_checkpoint(tmp_path / "c.pt")
    second = Trainer(state["data"], found, HERE)
    second.load(state)
    second.train(steps=4)
    assert torch.equal(weights(whole), weights(second))
    unlike = ("seconds", "tasks_per_second")
    for a, b in zip(whole.history, second.history, strict=True):
        assert {k: v for k, v in vars(a).items() if k not in unlike} == {
            k: v for k, v in vars(b).items() if k not in unlike
        }
    assert whole.validations == second.validations
    for a, b in zip(whole.averaged.parameters(), second.averaged.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_that_is_not_finite_is_not_taken(folder: Path) -> None:
    trainer = Trainer(str(folder), SMALL, HERE)
    before = weights(trainer)
    trainer.setup.training._images[:] = 0
    trainer.learner.loss = lambda made, target: torch.nn.functional.cross_entropy(made, target) * float("nan")
    record = trainer.train_step()
    assert torch.equal(weights(trainer), before)
    assert record.failed > 0


def test_a_score_has_an_interval() -> None:
    score = Score.of(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert score.mean == 0.5 and score.half_width == pytest.approx(1.96 * (1 / 3) ** 0.5 / 2) and score.tasks == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"ways": 1},
        {"lam": 0.0},
        {"inner_lr": float("inf")},
        {"cg_steps": 0},
        {"damping": -1.0},
        {"average": 1.0},
        {"inner_momentum": 1.0},
        {"decay_steps": -1},
        {"shots": 1.5},
        {"class_distortion": -1.0},
        {"image_distortion": float("nan")},
        {"alphabets": -1},
        {"training_ways": 3, "equal_outputs": False},
        {"training_ways": 1},
    ],
)
def test_recipes_that_are_none(settings: dict[str, Any]) -> None:
    with pytest.raises(bilevel.ArgumentError, match="expected"):
        Recipe(**settings)


def test_the_first_averages_are_plain_means() -> None:
    trainer, seen = Trainer("glyphs", replace(SMALL, average=0.99), HERE), []
    for _ in range(3):
        trainer.train_step()
        seen.append(weights(trainer))
    mean = torch.cat([p.detach().reshape(-1) for p in trainer.averaged.parameters()])
    torch.testing.assert_close(mean, torch.stack(seen).mean(0))
    assert not torch.equal(mean, seen[-1])


def test_an_average_decays() -> None:
    trainer = Trainer("glyphs", replace(SMALL, average=0.5), HERE)
    seen = []
    for _ in range(4):
        trainer.train_step()
        seen.append(weights(trainer))
    expected = (seen[0] + seen[1]) / 2  # shares 1, 1/2, then 1/2 for good
    for value in seen[2:]:
        expected = (expected + value) / 2
    mean = torch.cat([p.detach().reshape(-1) for p in trainer.averaged.parameters()])
    torch.testing.assert_close(mean, expected)


def test_without_an_average_the_learner_is_measured() -> None:
    trainer = Trainer("glyphs", SMALL, HERE)
    assert trainer.averaged is trainer.learner


def test_equal_outputs_stay_equal() -> None:
    trainer = Trainer("glyphs", replace(SMALL, equal_outputs=True, average=0.5), HERE)
    before = weights(trainer)
    trainer.train(steps=2)
    assert not torch.equal(weights(trainer), before)
    for learner in (trainer.learner, trainer.averaged):
        for parameter in last_layer(learner.model).parameters():
            assert torch.equal(parameter, parameter[:1].expand_as(parameter))
    tasks = trainer.setup.training.sample(4)
    # The outcome does not depend on how the classes are numbered.
    adapted = trainer.learner.predict(trainer.learner.adapt((tasks.support_x, tasks.support_y)), tasks.query_x)
    other = trainer.learner.adapt((tasks.support_x, (tasks.support_y + 1) % 3))
    renumbered = trainer.learner.predict(other, tasks.query_x)
    torch.testing.assert_close(renumbered.roll(-1, -1), adapted, atol=1e-4, rtol=1e-4)


def test_the_projected_gradient_is_that_of_the_shared_row() -> None:
    trainer = Trainer("glyphs", replace(SMALL, equal_outputs=True, clip=1e6), HERE)
    tasks, layer = trainer.setup.training.sample(2), last_layer(trainer.setup.model)
    trainer.learner(tasks).backward()
    single = layer.weight.grad.sum(0)  # the chain rule: each row is the one that is learned
    equalize_gradients(layer)
    torch.testing.assert_close(layer.weight.grad, single.expand(3, -1) / 3)


def test_no_more_classes_than_there_are(folder: Path) -> None:
    # 16 characters are left for training.
    assert set_up(str(folder), replace(SMALL, equal_outputs=True, training_ways=20), HERE.device).training.ways == 16
    assert set_up(str(folder), replace(SMALL, equal_outputs=True, training_ways=7), HERE.device).training.ways == 7
    assert set_up(str(folder), SMALL, HERE.device).training.ways == 3


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_training_on_tasks_of_more_classes(average: float, folder: Path) -> None:
    recipe = replace(SMALL, equal_outputs=True, training_ways=5, average=average)
    trainer = Trainer(str(folder), recipe, HERE)
    assert trainer.setup.training.sample(2).support_x.shape[:2] == (2, 5)
    trainer.train(steps=2)
    assert last_layer(trainer.learner.model).out_features == 5 and last_layer(trainer.averaged.model).out_features == 3
    assert trainer.validations[-1][1].tasks == 5
    if not average:
        for mean, value in zip(trainer.averaged.parameters(), trainer.learner.parameters(), strict=True):
            assert torch.equal(mean, fitted(value, mean))


def test_steps_that_are_too_long_are_shortened(folder: Path) -> None:
    def residual(**settings: Any) -> float:
        recipe = replace(SMALL, inner_lr=0.4, inner_steps=8, **settings)
        return Trainer(str(folder), recipe, HERE).train_step().inner_residual

    fixed = residual(adaptive=False, inner_momentum=0.0)
    # At equal steps; a line search may take twice as many evaluations.
    assert residual(adaptive=False, line_search=True) < 0.5 * fixed
    assert residual(adaptive=True) < 0.25 * fixed


def test_a_recipe_chooses_the_linear_solver() -> None:
    def solver(**settings: Any) -> Any:
        return replace(SMALL, **settings).learner(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss).linear_solver

    assert solver(safeguard=True) == SafeguardedCG(max_steps=2)
    assert solver() == bilevel.CG(max_steps=2)
    assert solver(damping=0.5) == bilevel.Damped(bilevel.CG(max_steps=2), damping=0.5)


def test_a_recipe_chooses_the_inner_solver() -> None:
    def solver(**settings: Any) -> Any:
        recipe = replace(SMALL, inner_momentum=0.5, **settings)
        return recipe.learner(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss).inner_layer.solver

    assert solver() == MeasuredDescent(SMALL.inner_lr, 2, 0.5)
    assert solver(adaptive=False) == bilevel.GradientDescent(SMALL.inner_lr, 2, momentum=0.5)
    assert solver(line_search=True) == bilevel.GradientDescent(SMALL.inner_lr, 2, line_search=True)
    assert solver(mode="released") == ReleasedDescent(SMALL.inner_lr, 2, SMALL.lam)
    assert isinstance(solver(hessian_free=True), bilevel.Newton)


def test_the_step_of_adam_decays_to_the_end_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, taken = Trainer("glyphs", replace(SMALL, outer_lr=0.4, decay_steps=4), HERE), []
    monkeypatch.setattr(trainer.optimizer, "step", lambda: taken.append(trainer.optimizer.param_groups[0]["lr"]))
    trainer.train(steps=9)
    half = 0.5**0.5  # cos(π/4)
    assert taken == pytest.approx([0.4, 0.2 * (1 + half), 0.2, 0.2 * (1 - half)]) and trainer.step == 4
    assert SMALL.outer_step(5000) == SMALL.outer_lr


def test_tasks_are_shared_evenly() -> None:
    with pytest.raises(bilevel.ArgumentError, match="multiple of the 3 processes"):
        Trainer("glyphs", SMALL, Processes(0, 3, torch.device("cpu")))
    with pytest.raises(bilevel.ArgumentError, match="device"), processes("warp"):
        pass


class Ended:
    def __init__(self, code: Any, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main(["imaml", *map(str, arguments)])
        captured = capsys.readouterr()
        return Ended(ended.value.code or 0, captured.out, captured.err)

    return run


def test_the_program_trains_resumes_and_evaluates(run: Any, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    ended = run("--data", folder, *OPTIONS, "--steps", 3, "--output", output, "-q")
    assert ended.code == 0 and ended.err == ""
    assert "accuracy" in ended.out and "after 3 meta-steps" in ended.out
    document = json.loads((output / "results.json").read_text())
    assert document["steps"] == 3 and len(document["history"]) == 3 and 0 <= document["test"]["mean"] <= 1
    assert document["recipe"]["ways"] == 3 and [v["step"] for v in document["validations"]] == [2]
    for picture in ("learning.png", "residuals.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    ended = run("--resume", output / "checkpoint.pt", "--steps", 5, "--test-tasks", 5, "--output", output, "-q")
    assert ended.code == 0 and "after 5 meta-steps" in ended.out
    first = run("evaluate", output / "checkpoint.pt", "--tasks", 4, "-q")
    other = run("evaluate", output / "checkpoint.pt", "--tasks", 4, "--data", folder, "--output", tmp_path / "e", "-q")
    assert first.code == other.code == 0 and "held-out classes" in first.out and str(folder) in other.out
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["tasks"] == 4


def test_a_model_with_equal_outputs_is_measured_at_other_ways(run: Any, folder: Path, tmp_path: Path) -> None:
    options = ("--data", folder, *OPTIONS[:-1], 4)
    assert run(*options, "--steps", 1, "--output", tmp_path / "out", "-q").code == 0
    accuracy = {}
    for ways in (2, 3, 6):
        output = tmp_path / str(ways)
        checkpoint = tmp_path / "out" / "checkpoint.pt"
        ended = run("evaluate", checkpoint, "--ways", ways, "--tasks", 40, "--output", output, "-q")
        assert ended.code == 0
        accuracy[ways] = json.loads((output / "evaluation.json").read_text())["mean"]
    assert accuracy[2] > accuracy[3] > accuracy[6] > 1 / 6
    ended = run("evaluate", tmp_path / "out" / "checkpoint.pt", "--ways", 1)
    assert ended.code == 2 and "expected ways to be a whole number >= 2" in ended.err
    assert (
        run("--data", folder, *OPTIONS, "--no-equal-outputs", "--steps", 0, "--output", tmp_path / "b", "-q").code == 0
    )
    ended = run("evaluate", tmp_path / "b" / "checkpoint.pt", "--ways", 4)
    assert ended.code == 2 and "expected ways to be 3, as in training" in ended.err


def test_the_bar_tells_of_losses_and_residuals(run: Any, folder: Path, tmp_path: Path) -> None:
    ended = run("--data", folder, *OPTIONS, "--steps", 2, "--output", tmp_path / "out")
    for word in ("step 2", "loss", "accuracy", "inner", "CG", "tasks/s", "unseen"):
        assert word in ended.err


def test_no_time_at_all(run: Any, folder: Path, tmp_path: Path) -> None:
    ended = run("--data", folder, *OPTIONS, "--minutes", 0, "--output", tmp_path / "out", "-q")
    assert ended.code == 0 and "after 0 meta-steps" in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "does not exist"),
        (("--resume", "nowhere.pt"), "does not exist"),
        (("--resume", __file__), "not a checkpoint"),
        (("--resume", "x.pt", "--ways", "3"), "--ways: expected no settings beside --resume"),
        (("--resume", "x.pt", "--data", "glyphs"), "--data: expected no settings"),
        (("--lam", "-1"), "expected lam"),
        (("--minutes", "-1"), "expected minutes"),
        (("--steps", "-1"), "expected steps"),
        (("--test-tasks", "0"), "expected test-tasks"),
        (("--mode", "other"), "'other'"),
        (("--no-equal-outputs",), "pass --training-ways 0"),
        (("--class-distortion", "-1"), "expected class-distortion"),
        (("--mode", "released", "--hessian-free"), "GradientDescent"),
        (("--ways", "many"), "--ways"),
        (("--device", "warp"), "device"),
        (("--device", "meta"), "take cpu"),
        (("--device", "lazy"), "take cpu"),
        (("--device", "cuda:99"), "take cpu"),
        (("--device", "cpu:-1"), "take cpu"),
        (("--seed", "1" + "0" * 29), "expected seed to be a whole number from"),
        (("--seed", "-1" + "0" * 29), "expected seed to be a whole number from"),
        (("evaluate", "nowhere.pt", "--seed", "1" + "0" * 29), "expected seed to be a whole number from"),
        (("--tasks-per-step", "1" + "0" * 29), "expected tasks-per-step to be a whole number from 1 to"),
        (("evaluate", "nowhere.pt"), "does not exist"),
        (("evaluate", __file__), "not a checkpoint"),
        (("evaluate",), "checkpoint"),
        (("--output", __file__), "cannot be written to"),
    ],
)
def test_misuse_ends_with_one_sentence(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bilevel.meta.recipe._GLYPH_CLASSES", 40)
    ended = run(*arguments)
    assert ended.code == 2
    assert message in ended.err and ended.err.startswith("bilevel: ") and ended.err.count("\n") == 1


def test_too_few_classes_and_images(run: Any, folder: Path, tmp_path: Path) -> None:
    ended = run("--data", folder, *OPTIONS[2:], "--ways", 200, "--steps", 1, "--output", tmp_path)
    assert ended.code == 2 and "at least 200 classes" in ended.err
    ended = run("--data", folder, "--shots", 9, "--hold-out", 1, "--steps", 1, "--output", tmp_path)
    assert ended.code == 2 and "images for shots and queries" in ended.err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)]
)
def test_an_interrupted_run_goes_on(run: Any, folder: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "bilevel.cli", "imaml", "--data", str(folder), *map(str, OPTIONS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--steps", "100000", "--output", str(output), "-q"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    for _ in range(600):  # until its loop runs
        if output.is_dir():
            break
        time.sleep(0.1)
    time.sleep(4)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert err.startswith("bilevel: interrupted after ") and err.count("\n") == 1
    state, _ = read_checkpoint(output / "checkpoint.pt")
    assert json.loads((output / "results.json").read_text())["steps"] == state["step"]
    ended = run(
        "--resume", output / "checkpoint.pt", "--steps", state["step"] + 1, "--test-tasks", 5, "--output", output, "-q"
    )
    assert ended.code == 0 and f"after {state['step'] + 1} meta-steps" in ended.out


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def torchrun(arguments: list[str], tmp_path: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", str(free_port()), *arguments,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=tmp_path)


GRADIENTS = """
import sys
import torch
from torch import nn
import bilevel
from bilevel.meta import SinusoidSampler, mlp
from bilevel.meta.processes import processes

with processes("cpu") as here:
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = mlp().to(dtype)
        learner = bilevel.IMAML(
            model, nn.functional.mse_loss, 2.0, bilevel.GradientDescent(0.01, 5), bilevel.CG(4), learn_lam=True,
            on_failure="ignore",
        )
        module = nn.parallel.DistributedDataParallel(learner) if here.world > 1 else learner
        tasks = SinusoidSampler(seed=1, dtype=dtype).sample(6, rank=here.rank, world=here.world)
        module(tasks).backward()
        if here.leads:
            found = torch.cat([p.grad.reshape(-1) for p in learner.parameters()])
            torch.save(found, f"{sys.argv[1]}-{str(dtype)[-2:]}.pt")
"""


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    script = tmp_path / "gradients.py"
    script.write_text(textwrap.dedent(GRADIENTS))
    ended = torchrun([str(script), "two"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    subprocess.run([sys.executable, str(script), "one"], check=True, cwd=tmp_path)
    for bits, tolerance in ((32, 1e-6), (64, 1e-10)):
        one, two = (torch.load(tmp_path / f"{name}-{bits}.pt", weights_only=True) for name in ("one", "two"))
        assert (one - two).norm() <= tolerance * one.norm()


def test_a_process_waits_for_what_other_threads_still_hold() -> None:
    # As torch's communication threads hold the context of a backward pass: one that drops it too late aborts the process.
    before = _contexts()
    held = [contextvars.copy_context()]
    thread = threading.Timer(0.3, held.clear)
    thread.start()
    assert _contexts_dropped(before)
    assert not held
    thread.join()
    mine = contextvars.copy_context()
    assert not _contexts_dropped(before, 0.05)
    del mine


def test_the_program_runs_under_torchrun_unchanged(folder: Path, tmp_path: Path) -> None:
    # In small steps: Adam divides gradients that are nothing but float32's rounding by their own size, and that differs between the two.
    common = ["imaml", "--data", str(folder), *map(str, OPTIONS), "--outer-lr", "1e-4", "--steps", "4", "-q"]
    ended = torchrun(["-m", "bilevel.cli", *common, "--output", str(tmp_path / "two")], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("accuracy") == 1
    one = subprocess.run(
        [sys.executable, "-m", "bilevel.cli", *common, "--output", str(tmp_path / "one")],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    assert "accuracy" in one.stdout
    documents = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert [document["processes"] for document in documents] == [1, 2]
    for a, b in zip(*(document["history"] for document in documents), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["accuracy"] == pytest.approx(b["accuracy"])


@pytest.fixture(scope="session")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of three steps, small enough to be read hundreds of times."""
    from dataclasses import replace

    path = tmp_path_factory.mktemp("checkpoint") / "c.pt"
    trainer = Trainer(str(folder), replace(SMALL, learn_lam=True), HERE)
    trainer.train(steps=3)
    trainer.save(path)
    return path


def refused(path: Path, original: dict[str, Any]) -> bool:
    """Return whether the checkpoint is refused in one sentence; what is read must be what was saved."""
    try:
        state, _ = read_checkpoint(path)
    except bilevel.ArgumentError as error:
        return str(path) in str(error) and "\n" not in str(error)
    assert same(state, {key: value for key, value in original.items() if key != "checksum"})
    return False


def test_no_edit_of_a_checkpoint_passes(checkpoint: Path, tmp_path: Path) -> None:
    original = torch.load(checkpoint, weights_only=True)
    for seed in range(60):
        path = tmp_path / "edited.pt"
        torch.save(edited(original, seed), path)
        assert refused(path, original), f"edit {seed} was taken for the run's own state"


def test_no_damage_to_a_checkpoint_changes_a_run(checkpoint: Path, tmp_path: Path) -> None:
    original, content = torch.load(checkpoint, weights_only=True), checkpoint.read_bytes()
    count = 0
    for seed in range(100):
        path = tmp_path / "damaged.pt"
        path.write_bytes(damaged(content, seed))
        count += refused(path, original)
    assert count > 75  # the others hit names and padding of the archive


@pytest.mark.parametrize("command", [("imaml", "--resume"), ("imaml", "evaluate")])
@pytest.mark.parametrize("change", ["entry", "number", "byte", "cut", "version", "checksum", "other"])
def test_the_command_refuses_such_a_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...], change: str
) -> None:
    state, path = torch.load(checkpoint, weights_only=True), tmp_path / "edited.pt"
    if change in ("byte", "cut"):
        content = checkpoint.read_bytes()
        middle = len(content) // 2
        path.write_bytes(
            content[:middle] + (b"" if change == "cut" else bytes([content[middle] ^ 1]) + content[middle + 1 :])
        )
    else:
        if change == "entry":
            del state["history"][0]["loss"]
        elif change == "number":
            state["learner"]["model.0.weight"][0, 0, 0, 0] = float("nan")
        elif change == "version":
            state["format"] = 7
        elif change == "checksum":
            del state["checksum"]
        torch.save([1, 2] if change == "other" else state, path)
    with pytest.raises(SystemExit) as ended:
        main([*command, str(path), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("bilevel: ") and said.count("\n") == 1 and str(path) in said


def test_a_validation_that_a_killed_run_owed_is_made_up_for(folder: Path, tmp_path: Path) -> None:
    whole = Trainer(str(folder), SMALL, HERE)
    whole.train(steps=6)
    killed = Trainer(str(folder), SMALL, HERE)
    killed.train(steps=3)
    killed.train_step()  # step 4 is one to validate after
    killed.save(tmp_path / "c.pt")
    state, recipe = read_checkpoint(tmp_path / "c.pt")
    resumed = Trainer(state["data"], recipe, HERE)
    resumed.load(state)
    told: list[int] = []
    resumed.train(steps=6, on_validation=lambda step, score: told.append(step))
    assert told == [4, 6]
    assert resumed.validations == whole.validations
    assert torch.equal(weights(whole), weights(resumed))
    # At the limit of steps, too, what is owed comes first, and only once.
    last = Trainer(state["data"], recipe, HERE)
    last.load(state)
    last.train(steps=4)
    last.train(steps=4)
    assert [step for step, _ in last.validations] == [2, 4]
