"""Bilevel methods on minibatches, in the manner of ``torch.optim``: one engine, and a file for each method.

What lives here: methods that move the inner variables, an adjoint and the outer variables by one minibatch after the other. What does
not: problems whose inner solution is found to a tolerance (:class:`bilevel.BilevelProblem`), and applications.

=====================  ====================================================================  ===================================
method                 outer direction                                                       passes of a step (forward, reverse)
=====================  ====================================================================  ===================================
:class:`SOBA`          single loop, adjoint by one gradient step                             2, 3
:class:`MASOBA`        and a moving average of the outer direction                           2, 3
:class:`SABA`          and SAGA's variance reduction; memories for each minibatch            2, 3
:class:`SRBA`          and SARAH's variance reduction; a large batch every ``period`` steps  4, 6
:class:`AmIGO`         T inner steps, N adjoint steps, warm-started                          T + 2, T + N + 3
:class:`ImplicitStep`  T steps of any optimiser, any linear solver, warm-started             T + 2, T + products + 3
:class:`StocBiO`       T inner steps, Neumann series of Q terms from cold                    T + 2, T + Q + 3
:class:`TTSA`          one inner step, one random Neumann term                               3, p + 4
:class:`ALSET`         T inner steps, one random Neumann term                                T + 2, T + p + 3
:class:`MRBO`          Neumann series with recursive momentum                                4, 2Q + 6
:class:`VRBO`          Neumann series with SPIDER's recursion in a double loop               (T + 2)·4, (T + 2)(2Q + 6)
:class:`F2SA`          penalty λ, first order; bias O(1/λ)                                   3T + 3, 3T + 3
:class:`BOME`          value-function gap with a dynamic barrier, first order                T + 2, T + 2
:class:`PZOBO`         differences of Q trajectories, first order                            (1 + Q)T + 1, (1 + Q)T + 1
=====================  ====================================================================  ===================================
"""

from bilevel.errors import NonFiniteError
from bilevel.stochastic._adjoint import AdjointMethod
from bilevel.stochastic._batches import Batch, Microbatches, Minibatches
from bilevel.stochastic._gauss_newton import OutputLoss
from bilevel.stochastic._method import StochasticMethod
from bilevel.stochastic._options import StepOptions, StepResult
from bilevel.stochastic.amigo import AmIGO
from bilevel.stochastic.bome import BOME
from bilevel.stochastic.f2sa import F2SA
from bilevel.stochastic.implicit import ImplicitStep
from bilevel.stochastic.masoba import MASOBA
from bilevel.stochastic.mrbo import MRBO
from bilevel.stochastic.pzobo import PZOBO
from bilevel.stochastic.saba import SABA
from bilevel.stochastic.soba import SOBA
from bilevel.stochastic.srba import SRBA
from bilevel.stochastic.stocbio import StocBiO
from bilevel.stochastic.ttsa import ALSET, TTSA
from bilevel.stochastic.vrbo import VRBO

__all__ = [
    "ALSET",
    "BOME",
    "F2SA",
    "MASOBA",
    "MRBO",
    "PZOBO",
    "SABA",
    "SOBA",
    "SRBA",
    "TTSA",
    "VRBO",
    "AdjointMethod",
    "AmIGO",
    "Batch",
    "ImplicitStep",
    "Microbatches",
    "Minibatches",
    "NonFiniteError",
    "OutputLoss",
    "StepOptions",
    "StepResult",
    "StocBiO",
    "StochasticMethod",
]
