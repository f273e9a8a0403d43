"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_python_blocks_run_in_order() -> None:
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    layer = namespace["layer"]
    a = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    layer(torch.zeros(2, dtype=torch.float64), a).sum().backward()
    assert bool(torch.isfinite(a.grad).all())


@pytest.mark.parametrize("name", ["by_scipy", "jacobi"])
def test_a_users_solver_takes_fewer_than_twenty_lines(name: str) -> None:
    block = re.search(rf"```python\n(def {name}.*?)(?:\n\n\S|```)", README.read_text(), flags=re.DOTALL)
    assert block is not None
    assert len(block.group(1).splitlines()) < 20
