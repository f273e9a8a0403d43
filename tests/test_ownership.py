"""A tensor is written in place only where nobody else can see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bilevel._torch.ownership import owned
from bilevel.stochastic._lists import add_into, subtract_from


class Keeping(torch.autograd.Function):
    """Multiply by a tensor whose memory the gradient shares."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(kept)
        return (x * kept).sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0], None


def test_fresh_tensors_and_their_transposes_are_owned() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    (slope,) = torch.autograd.grad((torch.randn(5, 4) @ weight.T).square().sum(), weight)
    found = [torch.ones(3) + 1, slope]
    del slope
    assert owned(found) == [True, True]


def _seen_elsewhere() -> dict[str, tuple[list[torch.Tensor], Any]]:
    x, cotangent, kept = torch.ones(3, requires_grad=True), torch.arange(3.0), torch.arange(3.0)
    named, base, viewed = torch.arange(3.0), torch.ones(2, 2), torch.arange(4.0)
    whole = torch.ones(2, 2) + 0
    return {
        "a second name": ([named], named),
        "a cotangent handed on": (list(torch.autograd.grad([x + 1], [x], [cotangent])), cotangent),
        "saved by a backward": (list(torch.autograd.grad(Keeping.apply(x, kept), [x])), kept),
        "expanded": (list(torch.autograd.grad(x.sum(), [x])), None),
        "a transpose of a named tensor": ([base.t()], base),
        "a view": ([viewed[:3]], viewed),
        "detached": ([whole.detach()], whole),
        "requires grad": ([torch.ones(3, requires_grad=True)], None),
    }


@pytest.mark.parametrize("case", _seen_elsewhere())
def test_what_is_seen_elsewhere_is_left_alone(case: str) -> None:
    left, other = _seen_elsewhere()[case]
    before = None if other is None else other.clone()
    expected = left[0].detach() - 2.0
    assert owned(left) == [False]
    (result,) = subtract_from(left, [torch.full_like(left[0], 2.0).detach()])
    torch.testing.assert_close(result.detach(), expected)
    assert other is None or torch.equal(other, before)


@pytest.mark.parametrize("factor", [0.5, torch.tensor(0.5, dtype=torch.float64)], ids=["number", "tensor"])
def test_a_sum_is_written_into_the_tensor_given_up(factor: Any) -> None:
    left = [torch.ones(3) + 1, torch.ones(2, dtype=torch.float64) + 1]
    places = [tensor.data_ptr() for tensor in left]
    result = add_into(left, [torch.ones(3), torch.ones(2, dtype=torch.float64)], factor)
    assert [tensor.data_ptr() for tensor in result] == places
    torch.testing.assert_close(result[0], torch.full((3,), 2.5))
    wider = add_into([torch.ones(3) + 1], [torch.ones(3, dtype=torch.float64)], 0.5)
    assert wider[0].dtype == torch.float64
