"""Proximal terms g of min f(x) + g(x): norms that make solutions sparse, and indicator functions of sets.

One file for each family; all on one contract, :class:`Term` (``_base``). A term knows its value, its prox, the manifold that a solution lies on, and
how near a solution is to a kink. It knows no objective, no solver and no layer: nothing of those may be imported here.
"""

from bilevel.prox._base import Manifold, Term
from bilevel.prox.box import Box, NonNegative
from bilevel.prox.l1 import L1, ElasticNet

__all__ = [
    "L1",
    "Box",
    "ElasticNet",
    "Manifold",
    "NonNegative",
    "Term",
]
