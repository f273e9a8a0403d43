"""The failure policy, for failed solves and for misuse that makes gradients wrong: raise, warn, NaN or ignore."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from bilevel.errors import ArgumentError, BilevelError, BudgetWarning, FailureWarning, SolveError, SolveWarning
from bilevel.recording import ACTIVE, Recording
from bilevel.reports import SolveReport, Status

__all__ = ["POLICIES", "OnFailure", "apply_policy", "check_policy", "handle_misuse"]

OnFailure = Literal["raise", "warn", "nan", "ignore"]
POLICIES: tuple[str, ...] = get_args(OnFailure)


def check_policy(on_failure: str) -> OnFailure:
    """Return ``on_failure`` if it is one of the four policies, or raise :class:`ArgumentError`."""
    if on_failure not in POLICIES:
        raise ArgumentError(
            f"expected on_failure to be 'raise', 'warn', 'nan' or 'ignore', got {on_failure!r}; 'raise' is the default"
        )
    return on_failure  # type: ignore[return-value]  # mypy does not narrow str to a Literal


def apply_policy(
    report: SolveReport,
    x: torch.Tensor,
    on_failure: OnFailure,
    recordings: Sequence[Recording] = (),
    *,
    silent_budget: bool = False,
) -> torch.Tensor:
    """File the report and apply the policy to failed problems.

    Parameters
    ----------
    report
        The report, its tensors of shape ``batch``.
    x
        The solver's result, ``(*batch, n)``.
    on_failure
        The policy.
    recordings
        Recordings to file the report with, besides those open in this thread.
    silent_budget
        Whether a spent budget passes without :class:`~bilevel.BudgetWarning`.

    Returns
    -------
    torch.Tensor
        ``x``, with the rows of failed problems set to NaN under ``"nan"``.

    Raises
    ------
    SolveError
        If a problem failed and the policy is ``"raise"``.
    """
    seen: list[Recording] = []
    for recording in (*ACTIVE.stack, *recordings):
        if not any(recording is other for other in seen):
            seen.append(recording)
            recording.append(report)
    if bool((report.status_code == Status.CONVERGED).all()):
        return x
    failed = ~report.success
    if not bool(failed.any()):
        if not silent_budget and on_failure != "ignore" and bool((report.status_code == Status.BUDGET_SPENT).any()):
            warnings.warn(report.message, BudgetWarning, stacklevel=2)
        return x
    if on_failure == "raise":
        raise SolveError(report.message, report)
    if on_failure == "warn":
        warnings.warn(report.message, SolveWarning, stacklevel=2)
    if on_failure == "nan":
        return torch.where(failed.unsqueeze(-1), torch.full_like(x, float("nan")), x)
    return x


def handle_misuse(error: BilevelError, on_failure: OnFailure) -> bool:
    """Apply the policy to a fault that makes gradients wrong; return whether the result is to be NaN."""
    if on_failure == "raise":
        raise error
    if on_failure == "warn":
        warnings.warn(str(error), FailureWarning, stacklevel=2)
    return on_failure == "nan"
