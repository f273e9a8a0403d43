"""Bilevel problems: the outer loss at the solution of an inner problem, and its hypergradient.

``problem`` holds the class that users override; ``hypergradient`` its result; ``batching`` lays K inner problems out as one batch; ``adaptive/`` takes
both solves as far as a wanted accuracy of the hypergradient needs.
"""
