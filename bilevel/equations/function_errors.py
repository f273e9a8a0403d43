"""Errors about the user's function: they name its tensors that do not fit, its numpy arrays, or its missing dependence."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.errors import ArgumentError, BilevelError, DtypeError, ShapeError
from bilevel.pytree import Arguments, Raveler, is_numpy, leaf_names

__all__ = ["explain", "explained", "unconnected"]

# The words of errors about operands that do not fit, and about indices, such as class labels, that are too large.
_DTYPES = re.compile(r"dtype|scalar type|not implemented for", re.IGNORECASE)
_MISFIT = re.compile(rf"\b(sizes?|shapes?|dimensions?|batch_size|[0-9]D|vector)\b|{_DTYPES.pattern}", re.IGNORECASE)
_RANGE = re.compile(r"(?<!Dimension )out of (bounds|range)", re.IGNORECASE)
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
    if _mixes_numpy(error):
        return _numpy_refusal(where, noun, arrays)
    refused = _wrong_count(function, args, kwargs)
    if refused is not None:
        return ArgumentError(
            f"{where}: expected an initial guess and then the other arguments of {noun}, got an initial guess and "
            f"{len(args)} more, {len(kwargs)} by name, and Python says: {refused}; pass the initial guess first, then the others"
        )
    # Such as "'int' object is not callable", of array.size().
    if arrays and isinstance(error, (TypeError, AttributeError)):
        return _numpy_refusal(where, noun, arrays)
    paths, _ = pytree.tree_flatten_with_path(raveler.unravel(flat.detach()))
    given = [("init" + pytree.keystr(path), leaf) for path, leaf in paths]
    given += zip(arguments.names, arguments.given(tensors), strict=True)
    return _explain_misfit(error, where, noun, given)


def _wrong_count(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> TypeError | None:
    """Return Python's error if ``function`` cannot take an unknown with these arguments."""
    try:
        inspect.signature(function).bind(None, *args, **kwargs)
    except TypeError as refused:
        return refused
    except ValueError:
        pass  # the function has no signature, as some of C have none
    return None


def _explain_misfit(
    error: Exception, where: str, noun: str, given: Sequence[tuple[str, torch.Tensor]]
) -> BilevelError | None:
    """Return an error with the names, shapes and dtypes ``given`` to the function ``noun``, which raised ``error``.

    None if ``error`` is about something else than shapes, dtypes or indices.
    """
    said = " ".join(str(error).split())
    if isinstance(error, (BilevelError, TypeError, AttributeError)) or "memory" in said:
        return None
    kind: type[BilevelError]
    if _RANGE.search(said):
        kind, what, remedy = ArgumentError, "indices in their range", (
            "number classes and rows from 0, and let the model have an output for each class"
        )  # fmt: skip
    elif _DTYPES.search(said):
        kind, what, remedy = DtypeError, "dtypes that fit together", "give them dtypes that fit"
    elif _MISFIT.search(said):
        kind, what, remedy = ShapeError, "shapes that fit together", "give them shapes that fit"
    else:
        return None
    listed = [f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in given]
    more = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
    wanted = given[0][1].dtype if given else None  # that of init, where there is one
    others = [name for name, t in given if t.is_floating_point() and t.dtype != wanted and not name.startswith("init")]
    example = f", for example {others[0]}.to({wanted})" if others and kind is DtypeError else ""
    return kind(
        f"{where}: expected the arguments of {noun} to have {what}, got {', '.join(listed[:_MOST_LISTED])}{more}, and the error says: {said}; "
        f"{remedy}{example}"
    )


def _explain_call(error: Exception, where: str, noun: str, given: Mapping[str, Any]) -> BilevelError | None:
    """Return an error that says what is wrong with a call of the function ``noun``, which raised ``error``; None as above."""
    leaves = [
        (name + pytree.keystr(path), leaf)
        for name, tree in given.items()
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]
    ]
    if _mixes_numpy(error):
        return _numpy_refusal(where, noun, [name for name, leaf in leaves if is_numpy(leaf)])
    return _explain_misfit(
        error, where, noun, [(name, leaf) for name, leaf in leaves if isinstance(leaf, torch.Tensor)]
    )


@contextmanager
def explained(where: str, noun: str, given: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Raise an error that says what is wrong, where that can be said, for a call of the function ``noun`` in the ``with`` block.

    ``given`` returns the function's arguments by their names; it is called where there is an error.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        refused = _explain_call(error, where, noun, given())
        if refused is None:
            raise
        raise refused from error


def _mixes_numpy(error: Exception) -> bool:
    """Return whether ``error`` comes from a torch operation on a numpy array, or a numpy operation on a tensor."""
    said = str(error)
    return "call numpy() on Tensor" in said or "numpy.ndarray" in said


def _numpy_refusal(where: str, noun: str, arrays: Sequence[str]) -> DtypeError:
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
