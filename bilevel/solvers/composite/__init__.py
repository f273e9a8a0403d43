"""Problems with proximal terms: Newton's method on the active manifold, working sets, and proofs of supports.

:mod:`bilevel.solvers.composite.judge` is the entry.
"""
