"""Operations whose second derivatives torch does not have, or has wrong, replaced by ones that it differentiates any number of times.

A hypergradient is a second derivative. In torch 2.13 the second derivative of the fused weight norm
(``torch.nn.utils.weight_norm`` and the one in ``parametrizations``) is silently wrong, on plain tensors too;
``gradgradcheck`` shows it. Fused attention kernels have no second derivative. A function is rewritten only after its
graph has shown such an operation, because intercepting every operation takes time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bilevel._torch.determinants import DETERMINANTS
from bilevel._torch.graph_features import GraphFeature, has_graph_feature
from bilevel._torch.products import PRODUCTS
from bilevel._torch.sparse import SPARSE
from bilevel._torch.transforms import uncompiled

__all__ = ["Repeatable"]


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    if dim == -1:  # torch means the norm of all
        return v * (g / torch.linalg.vector_norm(v))
    others = [axis for axis in range(v.ndim) if axis != dim % v.ndim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True)) if others else v * (g / v.abs())


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, **options: Any,
) -> torch.Tensor:  # fmt: skip
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # which says where to look; the operation adds it up
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    made: Any = torch._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, **options
    )
    result: torch.Tensor = made[0]
    return result


def _many_heads(*args: Any, **kwargs: Any) -> Any:
    # A mode does not see what is called inside; with weights asked for, that is no fused kernel.
    call = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    with_weights = call.arguments.get("need_weights", True)
    call.arguments["need_weights"] = True
    output, weights = F.multi_head_attention_forward(*call.args, **call.kwargs)
    return output, weights if with_weights else None


_WRITTEN: dict[Any, Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _many_heads,
    **SPARSE,
    **PRODUCTS,
    **DETERMINANTS,
}


class Repeatable(TorchFunctionMode):
    """Inside, these operations have right derivatives of every order. ``used`` says whether one was met."""

    used = False

    @uncompiled
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        written = _WRITTEN.get(func)
        if written is None:
            return func(*args, **(kwargs or {}))
        self.used = True
        return written(*args, **(kwargs or {}))

    @staticmethod
    def around(function: Callable[..., Any]) -> AbstractContextManager[Any]:
        """Return the mode for a user's ``function`` that was seen to need it, or a context that does nothing."""
        return Repeatable() if has_graph_feature(function, GraphFeature.REWRITTEN) else nullcontext()
