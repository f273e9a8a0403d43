"""Bilevel problems: the outer loss at the solution of an inner problem, and its hypergradient.

``problem`` holds the class that users override, ``definition`` its objectives as one call sees them. ``hypergradient`` computes, ``result`` is what
comes back. ``batching`` lays K inner problems out as one batch.
``adaptive/`` solves to a wanted accuracy of the hypergradient.
"""
