"""Quadratic programs as differentiable functions."""
