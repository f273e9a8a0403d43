"""Proximal terms g of min f(x) + g(x): norms that make solutions sparse or simple, and indicator functions of sets.

=================  ==============================================================================================
norms              :class:`L1`, :class:`ElasticNet`, :class:`GroupL2`, :class:`LInf`, :class:`NuclearNorm`, :class:`TotalVariation1D`
bounds             :class:`NonNegative`, :class:`Box`
balls, simplices   :class:`Simplex`, :class:`L1Ball`, :class:`L2Ball`, :class:`TransportPolytope`
linear sets        :class:`AffineSet`, :class:`HalfSpace`
cones              :class:`SecondOrderCone`, :class:`PSDCone`
others             :class:`Zero`, :class:`Custom` (a prox of the user's own)
=================  ==============================================================================================

One file for each family, all on one contract, :class:`Term`. A term knows its value, its prox, the manifold that a solution lies on, and how near
a solution is to a kink. Parameters are numbers or tensors, with derivatives. A term knows no objective, solver or layer: none is imported here.
"""

from bilevel.prox._base import Manifold, Term
from bilevel.prox.affine import AffineSet, HalfSpace
from bilevel.prox.ball import L2Ball, SecondOrderCone
from bilevel.prox.box import Box, NonNegative
from bilevel.prox.group import GroupL2
from bilevel.prox.l1 import L1, ElasticNet
from bilevel.prox.linf import LInf
from bilevel.prox.nuclear import NuclearNorm
from bilevel.prox.plain import Custom, Zero
from bilevel.prox.psd import PSDCone
from bilevel.prox.simplex import L1Ball, Simplex
from bilevel.prox.total_variation import TotalVariation1D
from bilevel.prox.transport import TransportPolytope

__all__ = [
    "L1",
    "AffineSet",
    "Box",
    "Custom",
    "ElasticNet",
    "GroupL2",
    "HalfSpace",
    "L1Ball",
    "L2Ball",
    "LInf",
    "Manifold",
    "NonNegative",
    "NuclearNorm",
    "PSDCone",
    "SecondOrderCone",
    "Simplex",
    "Term",
    "TotalVariation1D",
    "TransportPolytope",
    "Zero",
]
