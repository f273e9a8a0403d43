"""How wrong a solution, an adjoint and a hypergradient are: proofs where constants are known, estimates where they are not.

What a hypergradient's bounds need is declared by the problem, as :class:`bilevel.Constants`. The functions here find such constants,
or bound what does not come from a :class:`bilevel.BilevelProblem`.
"""

from bilevel.certificates.fixed_points import (
    Support,
    contraction_distance,
    identify_support,
    newton_on_support,
    proximal_distance,
)
from bilevel.certificates.lanczos import Spectrum, lanczos_spectrum
from bilevel.certificates.losses import LossConstants, logistic_constants, softmax_constants, squares_constants

__all__ = [
    "LossConstants",
    "Spectrum",
    "Support",
    "contraction_distance",
    "identify_support",
    "lanczos_spectrum",
    "logistic_constants",
    "newton_on_support",
    "proximal_distance",
    "softmax_constants",
    "squares_constants",
]
