"""Find wrong labels: learn one weight for each training example, so that training with these weights fits a small trusted set.

:func:`clean` is one call from data to weights, flagged rows and accuracies. It needs nothing but torch; :class:`ExampleWeighting` is
the bilevel problem behind it, for loops of one's own with :mod:`bilevel.stochastic`.
"""

from bilevel.cleaning.clean import Accuracies, Cleaned, clean
from bilevel.cleaning.models import convolutional, linear, mlp
from bilevel.cleaning.noise import Noise, corrupt
from bilevel.cleaning.problem import ExampleWeighting
from bilevel.cleaning.settings import CleaningSettings
from bilevel.cleaning.weights import ExampleWeights, SigmoidWeights, SimplexWeights

__all__ = [
    "Accuracies",
    "Cleaned",
    "CleaningSettings",
    "ExampleWeighting",
    "ExampleWeights",
    "Noise",
    "SigmoidWeights",
    "SimplexWeights",
    "clean",
    "convolutional",
    "corrupt",
    "linear",
    "mlp",
]
