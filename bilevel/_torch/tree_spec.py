"""The children of a pytree's structure, under the name that each version of torch has for them."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils import _pytree as pytree

__all__ = ["children"]


def children(structure: pytree.TreeSpec) -> Sequence[pytree.TreeSpec]:
    """Return the structures one level below ``structure``.

    Examples
    --------
    >>> structure = pytree.tree_structure((1, [2, 3]))
    >>> [child.num_leaves for child in children(structure)]
    [1, 2]
    """
    # A method from torch 2.10 on; before, an attribute that later versions warn of.
    return structure.children() if hasattr(structure, "children") else structure.children_specs
