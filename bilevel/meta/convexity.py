"""Whether a task's loss is known to be convex in the model's parameters: a linear model with a convex loss."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

__all__ = ["is_convex"]


def is_convex(model: nn.Module, loss: Any) -> bool:
    """Return whether the loss of ``model`` is known to be convex in its parameters: linear in them, then a convex loss."""
    # A layer that is used in two places counts twice: the model is then not linear in its parameters.
    parts = [part for _, part in model.named_modules(remove_duplicate=False)]
    linear = [part for part in parts if type(part) is nn.Linear]
    plain = all(type(part) in (nn.Sequential, nn.Linear, nn.Flatten, nn.Identity) for part in parts)
    own = [*parts, loss] if isinstance(loss, nn.Module) else parts
    given = type(loss) if isinstance(loss, nn.Module) else loss
    return plain and len(linear) == 1 and given in _CONVEX_LOSSES and not any(_is_altered(part) for part in own)


def _is_altered(module: nn.Module) -> bool:
    """Return whether a call of this module does more than its class, for example by a hook or the older weight norm."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


_CONVEX_LOSSES = (
    nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.HuberLoss, nn.SmoothL1Loss, F.mse_loss, F.cross_entropy,
    F.binary_cross_entropy_with_logits, F.huber_loss, F.smooth_l1_loss,
)  # fmt: skip
