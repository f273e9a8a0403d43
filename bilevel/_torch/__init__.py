"""What torch computes wrongly, refuses, or computes slowly, and what the library does about it.

Each file names the fault or the saving. Nothing here knows of solvers or problems.
"""
