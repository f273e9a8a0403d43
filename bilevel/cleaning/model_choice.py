"""The models that ``bilevel clean`` knows by name, and those of the user."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bilevel
from bilevel.cleaning.data import LabelledData
from bilevel.cleaning.models import convolutional, linear, mlp

__all__ = ["MODELS", "choose_model"]

MODELS = ("linear", "mlp", "conv")
"""Names of the models that are here."""


def choose_model(name: str, data: LabelledData) -> Callable[[], nn.Module]:
    """Return a function that makes the model.

    Parameters
    ----------
    name
        One of :data:`MODELS`, or ``module:function`` for a function of the shape of one input and the number of classes.
    data
        The model is tried on two of its examples.

    Raises
    ------
    bilevel.ArgumentError
        If there is no such model, or it does not fit the data.
    """
    shape, classes = tuple(data.inputs.shape[1:]), len(data.classes)
    features = data.inputs[0].numel()
    if name == "linear":
        return partial(_flat, partial(linear, features, classes))
    if name == "mlp":
        return partial(_flat, partial(mlp, features, classes))
    if name == "conv":
        if not data.images:
            raise bilevel.ArgumentError(
                f"the model conv needs images, and {data.name} has none; pass --model linear or mlp"
            )
        return partial(convolutional, shape[0], shape[1], classes)
    make = partial(_imported(name), shape, classes)
    _try(name, make, data.inputs[:2].float(), classes)
    return make


def _flat(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), make())


def _imported(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise bilevel.ArgumentError(
            f"there is no model called {name!r}; pass {', '.join(MODELS)}, or module:function for one of your own"
        )
    folder = str(Path.cwd())
    if folder not in sys.path:  # which a console script does not look into
        sys.path.insert(0, folder)
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise bilevel.ArgumentError(
            f"the module {module} of the model {name} cannot be imported ({type(error).__name__}: {error}); correct its name or its code"
        ) from error
    make = getattr(found, attribute, None)
    if not callable(make):
        raise bilevel.ArgumentError(f"the module {module} has no function {attribute}; correct the name of the model")
    return make


def _try(name: str, make: Callable[[], Any], inputs: torch.Tensor, classes: int) -> None:
    """Raise :class:`bilevel.ArgumentError` unless the model gives scores (n, classes)."""
    with torch.random.fork_rng():
        try:
            model = make()
            scores = model(inputs)
        except Exception as error:
            raise bilevel.ArgumentError(
                f"the model {name} failed on inputs of shape {tuple(inputs.shape)} ({type(error).__name__}: {error}); it is called "
                "with the shape of one input and the number of classes"
            ) from error
    if (
        not isinstance(model, nn.Module)
        or not isinstance(scores, torch.Tensor)
        or scores.shape != (len(inputs), classes)
    ):
        got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise bilevel.ArgumentError(
            f"expected the model {name} to be a module with scores of shape {(len(inputs), classes)}, got {got} from "
            f"{type(model).__name__}; return one score for each class"
        )
