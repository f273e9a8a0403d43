"""What a function does, noted operation by operation, and done again without the function.

A derivative under ``vmap`` is some hundred small operations, and on small problems most of its time goes into finding out which: through Python,
the transforms' layers and the autograd engine. Where a function can do but one thing (:mod:`bilevel.replay.purity`), that is known after one run.
What is noted lies below all transforms: operations of torch on plain tensors, those of the derivatives among them. Doing them again gives the
same numbers, bit for bit.

A run that could have gone another way for other numbers is not kept: one in which a number was read from a tensor, random numbers were drawn,
a shape followed from values, an argument was changed, or a tensor came from nowhere.
"""

from bilevel.replay.program import Program, StartedProgram
from bilevel.replay.recorder import note

__all__ = ["Program", "StartedProgram", "note"]
