"""Layers: ``argmin``, ``root``, ``fixed_point`` and ``linear_solve`` turn a function into a differentiable solve.

``api`` holds the public functions. ``layer`` prepares a call, ``arguments`` checks what it is given, ``settings`` holds what it is asked, and
``call`` makes its solves. ``checks`` looks for faults in the user's function. ``inspector`` decides when that is done, and what may be replayed.
Nothing here knows of bilevel problems.
"""

from bilevel.layers.api import Layer, Solution, argmin, fixed_point, root
from bilevel.layers.linear_layer import LinearLayer
from bilevel.layers.linear_solve import linear_solve

__all__ = ["Layer", "LinearLayer", "Solution", "argmin", "fixed_point", "linear_solve", "root"]
