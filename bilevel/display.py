"""Watching a run: a progress bar, and pictures of its history."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import bilevel
from bilevel.optional_packages import import_optional
from bilevel.stochastic import StepResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ProgressBar", "plot_history", "plot_steps"]

_REMEDY = 'run pip install ".[cli]" in a clone of bilevel'
_SECONDS_BETWEEN = 0.1  # between two readings of a device


class ProgressBar:
    """A callback that draws a bar with the values, the norm of the hypergradient and what is known of its error; a context manager.

    For :func:`bilevel.minimize` the error is the bound of ‖ĝ − g‖. For ``bilevel.stochastic.StepOptions(callback=bar)`` the bar has both
    losses, and the residual ‖H q − ∇_φ F‖ where the method has an adjoint q. Numbers are read from the device ten times a second at most.

    Parameters
    ----------
    max_steps
        What was given to ``minimize``, or the number of steps of your loop.

    Raises
    ------
    bilevel.ArgumentError
        If rich, of the extra ``cli``, is not installed.

    Examples
    --------
    >>> with ProgressBar(max_steps=50) as bar:  # doctest: +SKIP
    ...     result = bilevel.minimize(problem, outer, data, max_steps=50, callback=bar)
    """

    def __init__(self, max_steps: int) -> None:
        rich = import_optional("rich.progress", "ProgressBar", _REMEDY)
        columns = rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()
        self._bar: Any = rich.Progress(*columns, rich.TimeElapsedColumn())
        self._task = self._bar.add_task("", total=max_steps)
        self._last: StepResult | bilevel.OuterStep | None = None
        self._read = -math.inf

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._last is not None:
            self._bar.update(self._task, description=describe(self._last))
        self._bar.stop()

    def __call__(self, run: bilevel.OuterRun | StepResult) -> None:
        """Show the present point of a run, or what a step found."""
        last = self._last = run if isinstance(run, StepResult) else run.history[-1]
        self._bar.update(self._task, completed=last.step if isinstance(last, StepResult) else last.number - 1)
        if time.perf_counter() - self._read >= _SECONDS_BETWEEN:
            self._bar.update(self._task, description=describe(last))
            self._read = time.perf_counter()


def describe(step: bilevel.OuterStep | StepResult) -> str:
    """Return a point of an outer loop, or a step of a stochastic method, in a few words.

    Examples
    --------
    >>> basis = bilevel.Basis.ESTIMATED
    >>> describe(bilevel.OuterStep(1, 0.5, 0.5, 0.0, 0.2, 0.01, basis, 1e-3, 1e-3, 9, 5, math.nan, 1, 0.1))
    'outer value 0.5, gradient 0.2 ± 0.01'
    """
    if isinstance(step, StepResult):
        if step.skipped:
            return "skipped: a direction is not finite"
        residual = step.adjoint_residual_norm
        return (
            f"inner loss {float(step.inner_loss):.4g}, outer loss {float(step.outer_loss):.4g}, hypergradient "
            f"{float(step.hypergradient_norm):.3g}"
            + ("" if residual is None else f", adjoint residual {float(residual):.2g}")
        )
    error = f" ± {step.error_bound:.2g}" if math.isfinite(step.error_bound) else ""
    return f"outer value {step.corrected_value:.6g}, gradient {step.gradient_norm:.3g}{error}"


def plot_history(history: Sequence[bilevel.OuterStep], title: str = "") -> Figure:
    """Draw the outer values, the norms of the hypergradients with their error bars, and the accuracies of the solves.

    Parameters
    ----------
    history
        Of a :class:`bilevel.OuterResult`, or of a run that a callback sees.
    title
        Above the picture.

    Returns
    -------
    matplotlib.figure.Figure
        With a canvas of its own: ``figure.savefig("history.png")`` writes it.

    Raises
    ------
    bilevel.ArgumentError
        If there is no history, or matplotlib, of the extra ``cli``, is not installed.

    Examples
    --------
    >>> import math
    >>> basis = bilevel.Basis.ESTIMATED
    >>> point = bilevel.OuterStep(1, 0.5, 0.5, 0.0, 0.2, 0.01, basis, 1e-3, 1e-3, 9, 5, math.nan, 1, 0.1)
    >>> values = plot_history([point], title="a run").axes[0]
    >>> values.get_title(), len(values.lines)
    ('a run', 4)
    """
    if not history:
        raise bilevel.ArgumentError("plot_history: expected at least one point, got none; pass result.history")
    numbers = [step.number for step in history]
    figure = _figure(8.0)
    values, gradients, accuracies = figure.subplots(3, 1, sharex=True)
    _with_errors(values, numbers, [s.corrected_value for s in history], [s.value_error for s in history], "C0", None)
    values.plot(numbers, [step.value for step in history], "x", ms=4, color="0.6", label="as solved")
    values.set(ylabel="outer value, corrected", title=title.replace("$", r"\$"))
    values.legend()
    for basis, colour in zip(bilevel.Basis, ("C2", "C1", "C3", "0.5"), strict=False):
        those = [step for step in history if step.basis is basis]
        if those:
            _with_errors(
                gradients, [s.number for s in those], [s.gradient_norm for s in those], [s.error_bound for s in those],
                colour, _BASES.get(basis.name, basis.name.lower()),
            )  # fmt: skip
    gradients.set(ylabel="norm of hypergradient", yscale="log")
    gradients.legend()
    accuracies.semilogy(numbers, [step.delta for step in history], ".-", label="δ, inner solve")
    accuracies.semilogy(numbers, [step.delta_prime for step in history], ".-", label="δ′, linear solve")
    accuracies.set(xlabel="outer step", ylabel="asked, or residual reached")
    accuracies.legend()
    return figure


def plot_steps(results: Sequence[StepResult], title: str = "") -> Figure:
    """Draw a run of a stochastic method: both losses, the norms of its gradients, and the residual of its adjoint.

    Parameters
    ----------
    results
        What ``method.step`` returned; ``StepOptions(callback=results.append)`` gathers it in a list. Skipped steps are marked.
    title
        Above the picture.

    Returns
    -------
    matplotlib.figure.Figure
        With a canvas of its own: ``figure.savefig("run.png")`` writes it.

    Raises
    ------
    bilevel.ArgumentError
        If no step was made, or matplotlib, of the extra ``cli``, is not installed.

    Examples
    --------
    >>> import torch
    >>> method = bilevel.stochastic.SOBA(
    ...     (lambda x, a, _: ((x - a) ** 2).sum(), lambda x, a, _: ((x - 1) ** 2).sum()), torch.zeros(2), torch.zeros(2)
    ... )
    >>> losses, norms = plot_steps([method.step(None, None) for _ in range(3)]).axes
    >>> [line.get_label() for line in losses.lines], [int(step) for step in losses.lines[0].get_xdata()]
    (['outer loss', 'inner loss'], [1, 2, 3])
    """
    made = [result for result in results if not result.skipped]
    if not made:
        raise bilevel.ArgumentError(
            f"plot_steps: expected at least one step that was not skipped, got {len(results)} steps, all skipped; pass the results of "
            "method.step"
        )
    figure = _figure(6.4)
    losses, norms = figure.subplots(2, 1, sharex=True)
    lines = (
        (losses, "outer_loss", "outer loss"), (losses, "inner_loss", "inner loss"), (norms, "hypergradient_norm", "hypergradient"),
        (norms, "inner_gradient_norm", "inner gradient"), (norms, "adjoint_residual_norm", "residual of the adjoint"),
    )  # fmt: skip
    for axes, name, label in lines:
        known = [(result.step, float(getattr(result, name))) for result in made if getattr(result, name) is not None]
        if any(math.isfinite(number) for _, number in known):
            axes.plot(*zip(*known, strict=True), ".-", ms=3, lw=1, label=label)
    skipped = [result.step + 0.5 for result in results if result.skipped]
    if skipped:
        low = [0.0] * len(skipped)
        losses.plot(skipped, low, "|", ms=12, color="C3", transform=losses.get_xaxis_transform(), label="skipped")
    losses.set(ylabel="loss", title=title.replace("$", r"\$"))
    norms.set(ylabel="norm", xlabel="step")
    if any(y > 0 for line in norms.lines for y in line.get_ydata()):
        norms.set_yscale("log")
    losses.legend()
    norms.legend()
    return figure


def _figure(height: float) -> Figure:
    """Return an empty picture, so high in inches."""
    figure: Figure = import_optional("matplotlib.figure", "a picture", _REMEDY).Figure(
        figsize=(6.4, height), layout="constrained"
    )
    return figure


_BASES = {"RESIDUAL": "no error bound", "ESTIMATED": "± error, estimated", "CERTIFIED": "± error, certified"}


def _with_errors(
    axes: Any, numbers: list[int], values: list[float], errors: list[float], colour: str, label: str | None
) -> None:
    known = [error if math.isfinite(error) else 0.0 for error in errors]
    axes.errorbar(numbers, values, known, fmt=".", color=colour, capsize=2, lw=1, label=label)
