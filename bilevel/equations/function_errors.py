"""Errors about the user's function: they name its tensors that do not fit, its numpy arrays, or its missing dependence."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.errors import ArgumentError, BilevelError, DtypeError, ShapeError
from bilevel.pytree import Arguments, Raveler, is_numpy, leaf_names

__all__ = ["explain", "mixes_numpy", "numpy_refusal", "unconnected"]

# The words of torch's errors about operands that do not fit.
_DTYPES = re.compile(r"dtype|scalar type", re.IGNORECASE)
_MISFIT = re.compile(rf"\b(sizes?|shapes?|dimensions?|batch_size)\b|{_DTYPES.pattern}", re.IGNORECASE)
_MOST_LISTED = 8


def explain(
    error: Exception,
    where: str,
    noun: str,
    function: Callable[..., Any],
    raveler: Raveler,
    flat: torch.Tensor,
    arguments: Arguments,
    tensors: Sequence[torch.Tensor],
) -> BilevelError | None:
    """Return an error that says what is wrong with a call of ``function``, which raised ``error``; None if nothing better can be said.

    The call was one with the unknown ``flat`` (n,) and the ``arguments`` that hold ``tensors``. ``noun`` names the function.
    """
    args, kwargs = arguments.rebuild(tensors)
    paths, _ = pytree.tree_flatten_with_path((args, kwargs))
    arrays = leaf_names([(path, leaf) for path, leaf in paths if is_numpy(leaf)])
    if mixes_numpy(error):
        return numpy_refusal(where, noun, arrays)
    refused = _wrong_count(function, args, kwargs)
    if refused is not None:
        return ArgumentError(
            f"{where}: expected an initial guess and then the other arguments of {noun}, got an initial guess and "
            f"{len(args)} more, {len(kwargs)} by name, and Python says: {refused}; pass the initial guess first, then the others"
        )
    # Such as "'int' object is not callable", of array.size().
    if arrays and isinstance(error, (TypeError, AttributeError)):
        return numpy_refusal(where, noun, arrays)
    said = str(error)
    if isinstance(error, (TypeError, AttributeError)) or not _MISFIT.search(said):
        return None
    paths, _ = pytree.tree_flatten_with_path(raveler.unravel(flat.detach()))
    given = [("init" + pytree.keystr(path), leaf) for path, leaf in paths]
    given += zip(arguments.names, arguments.given(tensors), strict=True)
    return _misfit(where, noun, given, said)


def _wrong_count(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> TypeError | None:
    """Return Python's error if ``function`` cannot take an unknown with these arguments."""
    try:
        inspect.signature(function).bind(None, *args, **kwargs)
    except TypeError as refused:
        return refused
    except ValueError:
        pass  # the function has no signature, as some of C have none
    return None


def _misfit(where: str, noun: str, given: Sequence[tuple[str, torch.Tensor]], said: str) -> BilevelError:
    listed = [f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in given]
    more = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
    kind, what = (DtypeError, "dtypes") if _DTYPES.search(said) else (ShapeError, "shapes")
    wanted = given[0][1].dtype  # that of init
    others = [name for name, t in given if t.is_floating_point() and t.dtype != wanted and not name.startswith("init")]
    example = f", for example {others[0]}.to({wanted})" if others and kind is DtypeError else ""
    return kind(
        f"{where}: expected init and the arguments to have {what} that fit together in {noun}, got "
        f"{', '.join(listed[:_MOST_LISTED])}{more}, and torch says: {' '.join(said.split())}; give them {what} that fit{example}"
    )


def mixes_numpy(error: Exception) -> bool:
    """Return whether ``error`` comes from a torch operation on a numpy array, or a numpy operation on a tensor."""
    said = str(error)
    return "call numpy() on Tensor" in said or "numpy.ndarray" in said


def numpy_refusal(where: str, noun: str, arrays: Sequence[str]) -> DtypeError:
    """Return the error for numpy in a user's function; ``arrays`` names its numpy arguments."""
    got = f"a numpy array at {', '.join(arrays)}" if arrays else "a numpy array or a function of numpy in it"
    return DtypeError(
        f"{where}: expected {noun} to be of torch's operations on tensors, as numpy's cannot be differentiated, got {got}; convert it with "
        "torch.as_tensor(...), and use torch's functions"
    )


def unconnected(where: str, noun: str) -> ArgumentError:
    """Return the error for a function whose result does not depend on its first argument."""
    return ArgumentError(
        f"{where}: expected the result of {noun} to depend on its first argument, and no graph leads "
        "there; look for .detach(), .item(), numpy or torch.no_grad inside it"
    )
