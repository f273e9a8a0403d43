"""What learned weights are compared with: small-loss selection and confident learning.

Both judge a training example by classifiers that were not trained on it: those of a cross-validation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from bilevel.cleaning.settings import CleaningSettings
from bilevel.cleaning.training import Examples, train_classifier

__all__ = ["confident_learning", "cross_validated_probabilities", "has_cleanlab", "small_loss"]


def cross_validated_probabilities(
    make: Callable[[], nn.Module],
    training: Examples,
    trusted: Examples,
    *,
    settings: CleaningSettings,
    folds: int = 5,
    on_fold: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Return p(class | x_i) (n, classes) by a classifier that was trained on the other folds and the trusted examples."""
    inputs, labels = training
    generator = torch.Generator().manual_seed(settings.seed)
    fold = torch.randperm(len(labels), generator=generator) % folds
    parts = []
    for number in range(folds):
        kept = fold != number
        model = train_classifier(make, (inputs[kept], labels[kept]), settings=settings, trusted=trusted)
        with torch.no_grad():
            parts.append(model(inputs[~kept]).softmax(-1))
        if on_fold is not None:
            on_fold()
    probabilities = parts[0].new_empty(len(labels), parts[0].shape[1])
    for number, part in enumerate(parts):
        probabilities[fold == number] = part
    return probabilities


def small_loss(probabilities: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Flag the ``count`` examples with the largest loss −log p(y_i | x_i); return bool (n,).

    References
    ----------
    Han et al., "Co-teaching: Robust training of deep neural networks with extremely noisy labels", NeurIPS 2018 (the selection of
    small-loss examples, here by one network).

    Examples
    --------
    >>> import torch
    >>> small_loss(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]]), torch.tensor([0, 1, 1]), 1)
    tensor([False,  True, False])
    """
    losses = -probabilities.gather(1, labels[:, None]).squeeze(1).clamp(min=torch.finfo(probabilities.dtype).tiny).log()
    flagged = torch.zeros(len(labels), dtype=torch.bool)
    flagged[losses.argsort(descending=True, stable=True)[:count]] = True
    return flagged


def has_cleanlab() -> bool:
    """Return whether confident learning can be run; the first call imports ``cleanlab``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own dependencies
            import cleanlab.filter  # noqa: F401
    except ImportError:
        return False
    return True


def confident_learning(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Flag what ``cleanlab`` takes for wrong, with its default settings; return bool (n,).

    References
    ----------
    Northcutt, Jiang, Chuang, "Confident learning: estimating uncertainty in dataset labels", JAIR 2021.
    """
    from cleanlab.filter import find_label_issues

    normalised = probabilities.double()
    normalised = normalised / normalised.sum(-1, keepdim=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = find_label_issues(labels.numpy(), normalised.numpy(), n_jobs=1)
    return torch.as_tensor(found, dtype=torch.bool)
