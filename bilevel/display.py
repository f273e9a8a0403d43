"""Watching an outer loop: a progress bar, and a picture of its history with error bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import bilevel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ProgressBar", "plot_history"]


class ProgressBar:
    """A callback of :func:`bilevel.minimize` that draws a bar with the value, ‖ĝ‖ and its error; a context manager.

    Parameters
    ----------
    max_steps
        What was given to ``minimize``.

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
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        except ImportError as error:
            raise _missing("rich", "a progress bar") from error
        self._bar: Any = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )  # fmt: skip
        self._task = self._bar.add_task("outer value", total=max_steps)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def __call__(self, run: bilevel.OuterRun) -> None:
        """Show the present point of ``run``."""
        self._bar.update(self._task, completed=run.history[-1].number - 1, description=describe(run.history[-1]))


def describe(step: bilevel.OuterStep) -> str:
    """Return a point of an outer loop in a few words.

    Examples
    --------
    >>> basis = bilevel.Basis.ESTIMATED
    >>> describe(bilevel.OuterStep(1, 0.5, 0.5, 0.0, 0.2, 0.01, basis, 1e-3, 1e-3, 9, 5, math.nan, 1, 0.1))
    'outer value 0.5, gradient 0.2 ± 0.01'
    """
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
    """
    if not history:
        raise bilevel.ArgumentError("plot_history: expected at least one point, got none; pass result.history")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise _missing("matplotlib", "a picture") from error
    numbers = [step.number for step in history]
    figure = Figure(figsize=(6.4, 8.0), layout="constrained")
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


_BASES = {"RESIDUAL": "no error bound", "ESTIMATED": "± error, estimated", "CERTIFIED": "± error, certified"}


def _with_errors(
    axes: Any, numbers: list[int], values: list[float], errors: list[float], colour: str, label: str | None
) -> None:
    known = [error if math.isfinite(error) else 0.0 for error in errors]
    axes.errorbar(numbers, values, known, fmt=".", color=colour, capsize=2, lw=1, label=label)


def _missing(package: str, what: str) -> bilevel.ArgumentError:
    return bilevel.ArgumentError(
        f'{what} needs {package}, which is not installed; run pip install ".[cli]" in a clone of bilevel'
    )
