"""Minimising the outer loss with hypergradients whose accuracy is chosen step by step."""
