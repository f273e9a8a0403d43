"""A checksum of a saved state, so that a file that was edited or damaged is refused and does not change a run."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import torch

from bilevel.errors import ArgumentError

__all__ = ["sealed", "unsealed"]

_ENTRY = "checksum"


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state``, a tree of numbers, text, tensors, dicts, lists and tuples, with a checksum of all of it."""
    return {**state, _ENTRY: _digest(state)}


def unsealed(state: Any, *, what: str, form: int, remedy: str) -> dict[str, Any]:
    """Return what :func:`sealed` was given.

    Parameters
    ----------
    state
        What was read.
    what
        Of what it was read, as the sentence begins.
    form
        The version of the layout that is expected, which ``state`` holds as ``"format"``.
    remedy
        What to do, as half a sentence.

    Raises
    ------
    ArgumentError
        If it is of another version, lacks the checksum, or does not agree with it.
    """
    if not isinstance(state, Mapping) or type(state.get("format")) is not int or state["format"] != form:
        found = state.get("format") if isinstance(state, Mapping) else None
        raise ArgumentError(
            f"{what} to be the state of a run, of format {form}, got {type(state).__name__} of format {found!r}; {remedy}"
        )
    body = {key: value for key, value in state.items() if key != _ENTRY}
    kept = state.get(_ENTRY)
    if not isinstance(kept, str) or kept != _digest(body):
        raise ArgumentError(
            f"{what} to be as it was saved, got one whose checksum is {'wrong' if _ENTRY in state else 'missing'}: it was edited or "
            f"damaged; {remedy}"
        )
    return body


def _digest(state: Any) -> str:
    found = hashlib.blake2b(digest_size=16)
    _add(found, state)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    """Feed ``value`` to the hash ``found``, with its type and size, so that no two different trees give the same bytes."""
    if isinstance(value, torch.Tensor):
        dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
        flat = dense.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        found.update(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
        found.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        found.update(f"dict {len(value)}:".encode())
        for key in sorted(value, key=lambda key: (type(key).__name__, str(key))):
            _add(found, key)
            _add(found, value[key])
    elif isinstance(value, (list, tuple)):
        found.update(f"{'list' if isinstance(value, list) else 'tuple'} {len(value)}:".encode())
        for item in value:
            _add(found, item)
    elif isinstance(value, float):
        found.update(b"float " + struct.pack("<d", value))
    else:
        # Of what is none of these, such as an option of somebody's optimiser, the text may hold an address: its type has to do.
        plain = value is None or isinstance(value, (bool, int, str, torch.dtype, torch.device))
        text = (str(value) if plain else "").encode("utf-8", "surrogatepass")
        found.update(f"{type(value).__name__} {len(text)}:".encode() + text)
