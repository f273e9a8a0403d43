"""Hypergradients to an accuracy that the user asks for, ``Tolerance(hypergradient=...)``.

A small problem is solved to full accuracy by the ordinary solves; ``direct`` then estimates the error. For a large one, ``search`` alternates the
inner and the linear solve until the error is small enough, and ``driver`` runs it with the settings of a call. Both share ``iterate``, which
evaluates G and F at a point, ``error_model``, which estimates the error, and ``state``, which one call leaves to the next. ``quasi_newton``
preconditions the solves of the search.
"""
