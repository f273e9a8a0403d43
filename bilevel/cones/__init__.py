"""Cones, and cone programs as differentiable functions of their data: ``bilevel.cone_program``.

============================  =========================================
linear programs               :class:`Zero` (equations), :class:`Nonnegative` (inequalities)
norms, quadratic constraints  :class:`SecondOrder`
semidefinite programs         :class:`PSDTriangle`
exponentials, entropies       :class:`Exponential`
powers, geometric means       :class:`Power`
============================  =========================================

A call goes from ``cone_program`` (checks, ``_arguments``) to the rule of ``bilevel.implicit`` for the equations of ``_conditions``. Its
``_call`` solves with Clarabel and polishes the answer (``_solve``). A cone knows its projection and where that has kinks, and no solver.
"""

from bilevel.cones._cone import Cone, Nonnegative, SecondOrder, Zero
from bilevel.cones._exponential import Exponential
from bilevel.cones._power import Power
from bilevel.cones._psd import PSDTriangle

__all__ = ["Cone", "Exponential", "Nonnegative", "PSDTriangle", "Power", "SecondOrder", "Zero"]
