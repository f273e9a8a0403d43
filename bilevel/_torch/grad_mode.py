"""Switches of the gradient mode that cost nothing where they change nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["no_graph"]

_NOTHING: AbstractContextManager[None] = nullcontext()


def no_graph() -> AbstractContextManager[None]:
    """Return :func:`torch.no_grad`, or a context that does nothing where no graph is recorded anyway, as in most of a solve."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING
