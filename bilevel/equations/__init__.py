"""The equation R(x, θ) = 0 that a solution satisfies: described by the user's function, bound to tensors, and linearised.

``system`` describes a batch of equations. ``problem`` binds their tensors; solvers see a problem. ``linearization`` holds R with its graph
at one point. No solver is imported here.
"""
