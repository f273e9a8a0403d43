"""Problems with bounds, equalities and inequalities: their conditions, the search for active constraints, and regularity.

:mod:`bilevel.solvers.constrained.solve` is the entry. The methods themselves stand one folder up.
"""
