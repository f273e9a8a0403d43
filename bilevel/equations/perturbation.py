"""Problems beside a given one, whose results show the effect of rounding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bilevel.equations.problem import Problem

__all__ = ["perturbed", "perturbed_copies"]


def perturbed(problem: Problem, seed: int, *more: torch.Tensor) -> tuple[Problem, list[torch.Tensor]]:
    """Return the problem with every number moved by a unit in its last place, with random signs, and ``more`` tensors alike.

    The change of a result shows the effect of rounding. Tensors of whole numbers stay: they are labels, counts and masks,
    which are exact and may be compared or converted.
    """
    generator = np.random.default_rng(seed)  # numpy's: torch's older vmap, which may surround this, refuses torch's own

    def perturb(t: torch.Tensor) -> torch.Tensor:
        up = torch.from_numpy(np.asarray(generator.random(tuple(t.shape)) < 0.5)).to(t.device)
        eps = torch.finfo(t.dtype).eps
        return torch.where(up, t * (1 + eps), t * (1 - eps))

    tensors = [_over_entries(perturb, t) if _is_fractional(t) else t for t in problem.tensors]
    return Problem(problem.system, tensors), [perturb(t) for t in more]


def perturbed_copies(
    problem: Problem, seed: int, draws: int, *more: torch.Tensor
) -> tuple[Problem, list[torch.Tensor]]:
    """Return ``draws`` copies near this float64 problem as one batch, with numbers that float32 holds exactly, and ``more`` (K, n) alike.

    Evaluate them in float32 and in float64. The difference is the rounding of float32, intermediate results included. That
    of float64 is smaller by the ratio of the two units.
    """
    generator = np.random.default_rng(seed)
    unit = torch.finfo(torch.float32).eps

    def perturb_copy(t: torch.Tensor) -> torch.Tensor:
        shift = torch.from_numpy(generator.random((draws, *t.shape))).to(t)
        return (t * (1 + unit * (2 * shift - 1))).float().double()

    # Sparse tensors cannot be batched: all copies share what float32 holds of them.
    moves = [t.layout is torch.strided and _is_fractional(t) for t in problem.tensors]
    tensors = [
        perturb_copy(t) if move else t.float().double() if _is_fractional(t) else t
        for t, move in zip(problem.tensors, moves, strict=True)
    ]
    copies = [perturb_copy(t).reshape(-1, t.shape[-1]) for t in more]
    return Problem(problem.system.lift(draws, tuple(moves)), tensors), copies


def _is_fractional(tensor: torch.Tensor) -> bool:
    """Return whether some number of ``tensor`` is not a whole number."""
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return tensor.dtype.is_floating_point and not bool((values == values.round()).all())


def _over_entries(function: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """Return ``function`` of ``tensor``; of a sparse tensor, of its stored entries."""
    if not tensor.is_sparse:
        return function(tensor)
    kept = tensor.coalesce()
    return torch.sparse_coo_tensor(
        kept.indices(), function(kept.values()), kept.shape, is_coalesced=True, check_invariants=False
    )
