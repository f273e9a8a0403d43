"""Hyperparameter optimisation: tune the settings of a training by the gradient of a validation loss.

:class:`HyperparameterOptimization` and the linear models need nothing but torch. The modules ``data``, ``table``,
``splits``, ``grid``, ``folds``, ``outcome``, ``tune``, ``report``, ``plots`` and ``command`` make up ``bilevel tune``;
they need the packages of ``pip install ".[cli]"``, in a clone, and are imported by name.
"""

from bilevel.hyperopt.linear_models import FOLD_DIMS, LinearModel, Logistic, Ridge, Softmax, WeightedData, fold_weights
from bilevel.hyperopt.problem import HyperparameterOptimization

__all__ = [
    "FOLD_DIMS",
    "HyperparameterOptimization",
    "LinearModel",
    "Logistic",
    "Ridge",
    "Softmax",
    "WeightedData",
    "fold_weights",
]
