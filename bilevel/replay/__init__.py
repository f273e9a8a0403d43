"""Replays: evaluations of a user's function that are recorded once and repeated without the function.

A derivative under ``vmap`` is some hundred small operations. On small problems most of the time goes into Python, the layers of the transforms and
the autograd engine. A recording lies below all of them: it lists torch's operations on plain tensors. Repeating the list gives the same numbers, bit
for bit.

:mod:`~bilevel.replay.purity` decides which functions may be recorded (with :mod:`~bilevel.replay.reading`, :mod:`~bilevel.replay.pure_modules`,
:mod:`~bilevel.replay.pure_names` and :mod:`~bilevel.replay.opcodes`), and :mod:`~bilevel.replay.inspection_cache` keeps what was found.
:mod:`~bilevel.replay.recorder` records one run as a :mod:`~bilevel.replay.tape`, and :mod:`~bilevel.replay.program` compiles it: what no input
reaches is made once (:mod:`~bilevel.replay.folding`), and results are written over what is no longer read (:mod:`~bilevel.replay.memory`).
:mod:`~bilevel.replay.cache` compares a replay with a fresh evaluation before it trusts it. :mod:`~bilevel.replay.switch` turns replays off.
The rest of the library imports the names below, and none of these modules.

A run is not recorded if it read a number from a tensor, drew random numbers, took a shape from values, changed an argument, or used a tensor of
unknown origin.
"""

from bilevel.replay.cache import ReplayCache
from bilevel.replay.inspection_cache import InspectionCache
from bilevel.replay.program import Program, StartedProgram
from bilevel.replay.purity import Reach, follow, has_plain_structure, reach, reachable_objects
from bilevel.replay.recorder import note
from bilevel.replay.switch import allowed, replaying

__all__ = [
    "InspectionCache",
    "Program",
    "Reach",
    "ReplayCache",
    "StartedProgram",
    "allowed",
    "follow",
    "has_plain_structure",
    "note",
    "reach",
    "reachable_objects",
    "replaying",
]
