"""Inner solvers: one file for each method, one contract for all (:mod:`bilevel.solvers._base`)."""
