"""Batches of dense convex quadratic programs: data, scaling, and Mehrotra's method."""
