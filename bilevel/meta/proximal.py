"""½‖a‖² as one function of a vector, for the proximal term of each step of each task."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

__all__ = ["half_square"]


class _HalfSquare(torch.autograd.Function):
    """½‖a‖² (...) of a (..., n): a pass over a forward, one backward, and one for each product with its Hessian.

    torch's own ways take two to three each, which at a hundred thousand parameters times sixteen tasks is a tenth of a step.
    """

    @staticmethod
    def forward(a: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.linalg.vector_norm(a, dim=-1).square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:
        (a,) = ctx.saved_tensors
        return cotangent.unsqueeze(-1) * a

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        (a,) = ctx.saved_tensors
        return (a * tangent).sum(-1)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], a: torch.Tensor) -> tuple[torch.Tensor, int]:
        return _HalfSquare.apply(a.movedim(in_dims[0], 0)), 0


# Torch works it out at each call otherwise, which for a small network is felt.
_HalfSquare.forward.__signature__ = inspect.signature(_HalfSquare.forward)  # type: ignore[attr-defined]


def half_square(a: torch.Tensor) -> torch.Tensor:
    """Return ½‖a‖² of a vector (n,), differentiable any number of times in either mode.

    Examples
    --------
    >>> import torch
    >>> half_square(torch.tensor([3.0, 4.0]))
    tensor(12.5000)
    """
    if has_torch_function_unary(a):  # somebody looks at what functions do, and is to be told of this one
        seen: torch.Tensor = handle_torch_function(half_square, (a,), a)
        return seen
    value: torch.Tensor = _HalfSquare.apply(a)
    return value


# The same in operations of torch's, for a look that believes in no derivative which somebody wrote.
half_square.written_out = lambda a: 0.5 * (a * a).sum(-1)  # type: ignore[attr-defined]
