"""Hypergradients to a wanted accuracy, ``Tolerance(hypergradient=...)``: the search, its error model and its state.

``driver`` binds a problem's settings to the search; ``search`` alternates the two solves; ``error_model`` decides when they are accurate enough;
``quasi_newton`` reuses products; ``state`` is what one call leaves to the next.
"""
