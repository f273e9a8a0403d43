"""Parts that methods are made of: line searches, directions, quasi-Newton histories, and the bridge to scipy.

Nothing here is a solver by itself.
"""
