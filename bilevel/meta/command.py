"""``bilevel imaml``: options, progress bar, interruption, and where results go."""

# No `from __future__ import annotations` here: typer reads the annotations when the command is registered.

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import bilevel
from bilevel.cli.output import prepare_output, versions, write_document
from bilevel.meta.processes import processes
from bilevel.meta.recipe import GLYPHS, OMNIGLOT, Recipe, characters, set_up, unseen
from bilevel.meta.seeds import check_seed
from bilevel.meta.training import Score, StepRecord, Trainer, evaluate, read_checkpoint, trained

__all__ = ["imaml"]

_DEFAULT = Recipe()
_MINUTES = 30.0
_TEST_TASKS = 600
_WIDTH = 140
_SAVE_EVERY = 60.0
"""Seconds of training between checkpoints."""

imaml = typer.Typer(invoke_without_command=True, help="Meta-learn with implicit gradients.")


class Mode(str, Enum):
    """The procedure of the paper, or that of the authors' released code."""

    PAPER = "paper"
    RELEASED = "released"


@imaml.callback()
def train(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            help=f"{GLYPHS} (drawn here), {OMNIGLOT} (downloaded), or a folder or zip file of alphabet/character/*.png."
        ),
    ] = GLYPHS,
    ways: Annotated[int, typer.Option(help="Classes of a task.")] = _DEFAULT.ways,
    shots: Annotated[int, typer.Option(help="Support images of each class.")] = _DEFAULT.shots,
    queries: Annotated[int, typer.Option(help="Query images of each class, in training.")] = _DEFAULT.queries,
    inner_steps: Annotated[int, typer.Option(help="Steps of adaptation.")] = _DEFAULT.inner_steps,
    inner_lr: Annotated[float, typer.Option(help="Step size of adaptation.")] = _DEFAULT.inner_lr,
    inner_momentum: Annotated[
        float, typer.Option(help="Momentum of adaptation; none with --line-search or the released code.")
    ] = _DEFAULT.inner_momentum,
    adaptive: Annotated[
        bool, typer.Option("--adaptive/--no-adaptive", help="Shorten inner steps by the curvature that they meet.")
    ] = _DEFAULT.adaptive,
    hessian_free: Annotated[
        bool, typer.Option("--hessian-free", help="Adapt by Newton-CG with a line search.")
    ] = _DEFAULT.hessian_free,
    line_search: Annotated[
        bool, typer.Option("--line-search/--no-line-search", help="Shorten a step that does not descend.")
    ] = _DEFAULT.line_search,
    cg_steps: Annotated[int, typer.Option(help="Steps of conjugate gradients.")] = _DEFAULT.cg_steps,
    damping: Annotated[
        float, typer.Option(help="Added to the linear system's eigenvalues; 0 for the paper's.")
    ] = _DEFAULT.damping,
    safeguard: Annotated[
        bool, typer.Option("--safeguard/--no-safeguard", help="Damp the tasks whose curvature is negative.")
    ] = _DEFAULT.safeguard,
    lam: Annotated[float, typer.Option(help="Strength of the proximal term.")] = _DEFAULT.lam,
    learn_lam: Annotated[bool, typer.Option("--learn-lam", help="Learn it too.")] = _DEFAULT.learn_lam,
    mode: Annotated[Mode, typer.Option(help="The paper's procedure, or the released code's.")] = Mode.PAPER,
    tasks_per_step: Annotated[int, typer.Option(help="Tasks of a meta-step.")] = _DEFAULT.tasks_per_step,
    outer_lr: Annotated[float, typer.Option(help="Step size of Adam.")] = _DEFAULT.outer_lr,
    clip: Annotated[float, typer.Option(help="Norm that the meta-gradient is clipped to.")] = _DEFAULT.clip,
    decay_steps: Annotated[
        int, typer.Option(help="Meta-steps over which Adam's step falls to 0, where training ends; 0: it stays.")
    ] = _DEFAULT.decay_steps,
    average: Annotated[
        float, typer.Option(help="Decay of the running mean of the parameters that is measured; 0 for none.")
    ] = _DEFAULT.average,
    rotations: Annotated[
        bool, typer.Option("--rotations/--no-rotations", help="Turned characters as classes of their own.")
    ] = _DEFAULT.rotations,
    mirrors: Annotated[
        bool, typer.Option("--mirrors/--no-mirrors", help="Mirrored characters as classes of their own.")
    ] = _DEFAULT.mirrors,
    alphabets: Annotated[
        int, typer.Option(help="Alphabets that the characters of a training task come from; 0: all.")
    ] = _DEFAULT.alphabets,
    class_distortion: Annotated[
        float, typer.Option(help="Strength of the affine map of each class of a training task; 0 for none.")
    ] = _DEFAULT.class_distortion,
    image_distortion: Annotated[
        float, typer.Option(help="Strength of the affine map of each training image; 0 for none.")
    ] = _DEFAULT.image_distortion,
    equal_outputs: Annotated[
        bool, typer.Option("--equal-outputs/--no-equal-outputs", help="All outputs begin equal in a task.")
    ] = _DEFAULT.equal_outputs,
    training_ways: Annotated[
        int, typer.Option(help="Classes of a training task, with --equal-outputs; 0: as --ways.")
    ] = _DEFAULT.training_ways,
    hold_out: Annotated[int, typer.Option(help="Alphabets held out for validation.")] = _DEFAULT.hold_out,
    validation_tasks: Annotated[int, typer.Option(help="Unseen tasks to validate on.")] = _DEFAULT.validation_tasks,
    validate_every: Annotated[int, typer.Option(help="Meta-steps between validations.")] = _DEFAULT.validate_every,
    test_tasks: Annotated[int, typer.Option(help="Unseen tasks to measure on at the end.")] = _TEST_TASKS,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = _DEFAULT.seed,
    amp: Annotated[bool, typer.Option("--amp", help="Evaluate the model in bfloat16.")] = _DEFAULT.amp,
    minutes: Annotated[
        float | None, typer.Option(help=f"Training time in all; {_MINUTES:g} if no --steps.", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Meta-steps in all.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default=False)] = None,
    output: Annotated[Path, typer.Option(help="Directory for checkpoint, results.json and plots.")] = Path(
        "imaml-output"
    ),
    resume: Annotated[
        Path | None, typer.Option(help="Go on from this checkpoint, with its data and settings.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Meta-train a network by iMAML and measure it on classes that it has never seen.

    Ctrl-C and SIGTERM end training after the step at hand with a checkpoint to --resume from. Under torchrun the tasks
    of each meta-step are shared between the processes.
    """
    if context.invoked_subcommand is not None:
        return
    given = {item.name: context.params[item.name] for item in fields(Recipe)} | {"mode": mode.value}
    recipe, state = Recipe(**given), None
    if resume is not None:
        _refuse_settings(context)
        state, recipe = read_checkpoint(resume)
        data = state["data"]
    if minutes is not None and not minutes >= 0:
        raise bilevel.ArgumentError(
            f"expected minutes to be a number >= 0, got {minutes}; pass for example --minutes 60"
        )
    if steps is not None and steps < 0:
        raise bilevel.ArgumentError(
            f"expected steps to be a whole number >= 0, got {steps}; pass for example --steps 1000"
        )
    if test_tasks < 1:
        raise bilevel.ArgumentError(
            f"expected test-tasks to be a whole number > 0, got {test_tasks}; pass for example --test-tasks 600"
        )
    if minutes is None and steps is None:
        minutes = _MINUTES
    seconds = None if minutes is None else 60 * minutes
    with processes(device) as here, _interruptions() as interrupted:
        if here.leads:
            prepare_output(output)
        trainer = Trainer(data, recipe, here)
        if state is not None:
            trainer.load(state)
        _run(trainer, steps, seconds, interrupted, output, test_tasks, shown=not quiet and here.leads)


@imaml.command("evaluate")
def measure(
    checkpoint: Annotated[Path, typer.Argument(help="What `bilevel imaml` saved.")],
    data: Annotated[
        str | None,
        typer.Option(help="Characters to measure on; the held-out ones of training by default.", show_default=False),
    ] = None,
    ways: Annotated[
        int | None,
        typer.Option(help="Classes of a task, other than in training, after --equal-outputs.", show_default=False),
    ] = None,
    tasks: Annotated[int, typer.Option(help="How many tasks.")] = _TEST_TASKS,
    seed: Annotated[int, typer.Option(help="Of the tasks.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default=False)] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for evaluation.json.", show_default=False)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Measure a trained model on unseen tasks, or on another folder of characters."""
    check_seed("", seed)
    state, recipe = read_checkpoint(checkpoint)
    if tasks < 1:
        raise bilevel.ArgumentError(
            f"expected tasks to be a whole number > 0, got {tasks}; pass for example --tasks 600"
        )
    if output is not None:
        prepare_output(output)
    with processes(device) as here:
        setup = set_up(state["data"], recipe, here.device)
        learner = trained(state, recipe, setup, ways or recipe.ways).to(here.device)
        sampler = setup.validation(ways or recipe.ways)
        if data is not None:
            sampler = unseen(characters(data), recipe, here.device, seed=seed, ways=ways)
        else:
            sampler.generator.manual_seed(seed)
        with _Bar(shown=not quiet and here.leads) as bar:
            bar.begin("measuring", tasks)
            score = evaluate(learner, sampler, tasks, bar.reach)
    if here.leads:
        print(f"{_sentence(score)} on {data or 'held-out classes of ' + state['data']}")
        if output is not None:
            document = {"checkpoint": str(checkpoint), "data": data or state["data"]}
            write_document(document | asdict(score), output / "evaluation.json")


def _refuse_settings(context: typer.Context) -> None:
    """Raise if a setting was given beside --resume: it would not be used."""
    names = [item.name for item in fields(Recipe)] + ["data"]
    # The class of the source is private to typer; its members' names are not.
    typed = [n for n in names if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"]
    if typed:
        options = ", ".join("--" + name.replace("_", "-") for name in typed)
        raise bilevel.ArgumentError(
            f"{options}: expected no settings beside --resume, which takes the checkpoint's; leave them out, or begin anew"
        )


def _run(
    trainer: Trainer,
    steps: int | None,
    seconds: float | None,
    interrupted: list[int],
    output: Path,
    test_tasks: int,
    *,
    shown: bool,
) -> None:
    checkpoint, leads = output / "checkpoint.pt", trainer.here.leads
    saved = trainer.seconds
    with _Bar(shown=shown) as bar:
        bar.begin("training", steps if steps is not None else int(seconds or 0))

        def on_step(record: StepRecord) -> None:
            nonlocal saved
            bar.step(record, record.step if steps is not None else int(record.seconds))
            if record.seconds - saved > _SAVE_EVERY:
                saved = record.seconds
                trainer.save(checkpoint)

        trainer.train(
            steps=steps,
            seconds=seconds,
            stopped=lambda: bool(interrupted),
            on_step=on_step,
            on_validation=lambda step, score: bar.validated(score),
        )
        trainer.save(checkpoint)
        # All processes took part in every step, so that one's signal ended them all.
        if trainer.here.any(bool(interrupted)):
            bar.end()
            if leads:
                _write(trainer, output, None)
                print(
                    f"bilevel: interrupted after {trainer.step} meta-steps; go on with --resume {checkpoint}",
                    file=sys.stderr,
                )
            sys.exit(128 + (interrupted[0] if interrupted else signal.SIGTERM))
        bar.begin("measuring", test_tasks)
        sampler = trainer.setup.validation()
        sampler.generator.manual_seed(trainer.recipe.seed + 2)  # not the tasks that were validated on
        score = evaluate(trainer.averaged, sampler, test_tasks, bar.reach)
    if leads:
        _write(trainer, output, score)
        print(
            f"{_sentence(score)} on unseen tasks of {trainer.data}, after {trainer.step} meta-steps "
            f"of {trainer.recipe.tasks_per_step} tasks in {trainer.seconds / 60:.1f} minutes"
        )
        print(f"Written: {', '.join(str(path) for path in sorted(output.iterdir()))}")


def _write(trainer: Trainer, output: Path, score: Score | None) -> None:
    from bilevel.meta.plots import write_plots

    document = {
        "versions": versions("torch", "numpy"),
        "data": trainer.data,
        "recipe": asdict(trainer.recipe),
        "device": str(trainer.here.device),
        "processes": trainer.here.world,
        "steps": trainer.step,
        "seconds": trainer.seconds,
        "test": None if score is None else asdict(score),
        "validations": [{"step": step} | asdict(found) for step, found in trainer.validations],
        "history": [asdict(record) for record in trainer.history],
    }
    write_document(document, output / "results.json")
    write_plots(trainer.history, trainer.validations, output)


def _sentence(score: Score) -> str:
    return f"accuracy {100 * score.mean:.2f} ± {100 * score.half_width:.2f} % (95 %, {score.tasks} tasks)"


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that the step at hand is finished; a second one is not waited for."""
    seen: list[int] = []

    def notice(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Bar:
    """The progress bar, on standard error."""

    def __init__(self, *, shown: bool) -> None:
        console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[told]}"),
            console=console if console.is_terminal else Console(stderr=True, highlight=False, width=_WIDTH),
            disable=not shown,
        )
        self._task: Any = None
        self._told = self._validated = ""

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def begin(self, title: str, total: int) -> None:
        self._progress.start()
        self._task = self._progress.add_task(title, total=total or None, told="")

    def reach(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def step(self, record: StepRecord, done: int) -> None:
        failed = f" {record.failed} indefinite" if record.failed else ""
        told = (
            f"step {record.step} loss {record.loss:.3f} accuracy {record.accuracy:.3f} inner {record.inner_residual:.1e} "
            f"CG {record.linear_residual:.1e}{failed} {record.tasks_per_second:.0f} tasks/s"
        )
        self._told = told
        self._progress.update(self._task, completed=done, told=told + self._validated)

    def validated(self, score: Score) -> None:
        self._validated = f" | unseen: {_sentence(score).partition(' (')[0]}"
        self._progress.update(self._task, told=self._told + self._validated)

    def end(self) -> None:
        self._progress.stop()
