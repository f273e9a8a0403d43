"""Quadratic programs as differentiable functions of their data: ``bilevel.quadratic_program``.

A call goes from ``quadratic_program`` (checks, ``_arguments``) to the two autograd Functions of ``_rule``, whose solves are a ``_call``'s:
``_dense`` for batches (Mehrotra's method of :mod:`bilevel.solvers`, a polish, rays) or ``_clarabel`` for sparse programs, and the KKT factors
of ``_kkt`` or ``_sparse_kkt``. The rule knows no solver; a solver knows no layer.
"""
