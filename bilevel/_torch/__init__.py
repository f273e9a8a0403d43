"""Workarounds for operations that torch computes wrongly, refuses, or computes slowly.

Each file names the fault or the saving. Nothing here knows of solvers or problems.
"""
