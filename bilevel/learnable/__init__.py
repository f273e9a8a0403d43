"""What can be learned about the training of a model: modules whose parameters are the outer variables.

Each has the two losses as ``objectives``, for any method of :mod:`bilevel.stochastic`, with the model as ``inner`` and the module as
``outer``. The first of the two is an :class:`~bilevel.stochastic.OutputLoss`, so that ``hessian=bilevel.GaussNewtonHessian()`` works.
Learning rates are learned by unrolling, and have a call instead.

========================  ===================================================================  ========================
module                    learns                                                               training data
========================  ===================================================================  ========================
:class:`ExampleWeights`   a weight for each example: wrong labels, rare classes                inputs, targets, rows
:class:`LossWeights`      the weights of auxiliary losses                                      inputs, targets
:class:`WeightDecay`      a weight decay for each layer, tensor or entry                       inputs, targets
:class:`Augmentation`     the strengths of random changes of images                            images, targets
:class:`DistilledData`    a few examples that train a model                                    None
:class:`SharedBody`       a representation with a head for each task                           inputs, targets by task
:class:`Architecture`     the operation at each place of a network                             inputs, targets
:class:`LearningRates`    the rate of each tensor                                              inputs, targets
========================  ===================================================================  ========================

What does not live here: the methods themselves. These modules are written on the public API, as one of your own would be: derive it
from :class:`Learnable`.
"""

from bilevel.learnable._base import Learnable
from bilevel.learnable.architecture import Architecture, MixedOperation
from bilevel.learnable.augmentation import Augmentation
from bilevel.learnable.distilled_data import DistilledData
from bilevel.learnable.example_weights import ExampleWeights
from bilevel.learnable.learning_rates import LearningRates
from bilevel.learnable.loss_weights import LossWeights
from bilevel.learnable.shared_body import SharedBody, TaskHeads
from bilevel.learnable.weight_decay import WeightDecay

__all__ = [
    "Architecture",
    "Augmentation",
    "DistilledData",
    "ExampleWeights",
    "Learnable",
    "LearningRates",
    "LossWeights",
    "MixedOperation",
    "SharedBody",
    "TaskHeads",
    "WeightDecay",
]
