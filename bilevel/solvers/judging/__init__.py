"""What decides whether a solve has succeeded: estimates of the error, points that are no minima, and who takes over.

No method of solving lives here. :mod:`bilevel.solvers.judging.judge` is the entry.
"""
