"""A mode in which torch's second derivatives of a user's function are right.

In torch 2.13 those of the fused weight norm are silently wrong, and fused attention has none. A reference that rested on them would
accuse a layer whose gradients are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["sound"]


class _PlainWeightNorm(TorchFunctionMode):
    """Makes w = g v / ‖v‖ of a norm and a division."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_weight_norm if func is torch._weight_norm else func)(*args, **(kwargs or {}))


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return v * g / torch.norm_except_dim(v, 2, dim)


@contextmanager
def sound() -> Iterator[None]:
    """Evaluate weight norm and attention by operations that torch differentiates rightly any number of times."""
    with sdpa_kernel(SDPBackend.MATH), _PlainWeightNorm():
        yield
