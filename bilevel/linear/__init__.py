"""Linear solvers: one file for each method, one contract for all (:mod:`bilevel.linear._base`)."""
