"""Whether a call of a user's function draws random numbers, whatever other threads do meanwhile.

All threads share a generator. If its state has not changed, no thread has drawn from it; this check is cheap. If it has changed, any thread
may have drawn, for example one that loads data. The function is then called once more, under a mode that sees only the operations of this thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CheckAfter", "GeneratorStates", "draws"]


class GeneratorStates:
    """The states of a device's own generator and of the CPU's, ``recorded`` when the object was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.recorded = self._states()

    def changed(self) -> bool:
        """Return whether any thread has drawn random numbers since."""
        return not all(map(torch.equal, self.recorded, self._states()))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Let the ``with`` block draw the random numbers that have been drawn since; the generators then go on from where they are now.

        Two evaluations with common random numbers: dropout's noise cancels in their difference. If nothing was drawn, nothing is done.
        """
        if not self.changed():
            yield
            return
        after = self._states()
        self.restore(self.recorded)
        try:
            yield
        finally:
            self.restore(after)

    def restore(self, states: Sequence[torch.Tensor]) -> None:
        """Set the generators to ``states``, such as :attr:`recorded`. That of a GPU stays as it is where ``states`` are of a CPU."""
        torch.default_generator.set_state(states[0])
        if self._device.type == "cuda" and len(states) > 1:
            torch.cuda.set_rng_state(states[1], self._device)

    def _states(self) -> list[torch.Tensor]:
        states = [torch.default_generator.get_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states


class CheckAfter(GeneratorStates):
    """Call ``check`` after all if the ``with`` block, a solve without a check, raises or draws random numbers.

    Both can depend on tensors' values.
    """

    def __init__(self, device: torch.device, check: Callable[[], object]) -> None:
        super().__init__(device)
        self._check = check

    def __enter__(self) -> None:
        """Do nothing more."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) or (error is None and self.changed()):
            self._check()  # finds out by whom


def draws(evaluate: Callable[[], object]) -> bool:
    """Return whether ``evaluate``, which is called once, draws random numbers from a global generator."""
    with _Draws() as seen:
        evaluate()
    return seen.any


class _Draws(TorchDispatchMode):
    """A ``TorchDispatchMode``, below all transforms, that notes in ``any`` whether an operation of this thread draws random numbers."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler to keep out of here; the boundary around a call (:func:`bilevel._torch.transforms.eager`) does so already.
        return False

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.any = self.any or (torch.Tag.nondeterministic_seeded in func.tags and _is_random(func, args, kwargs))
        return func(*args, **kwargs)


def _is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation that torch marks as random draws numbers, given these arguments, from torch's global generator."""
    arguments = func._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments}
    given |= {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    switched_off = (
        given.get("dropout_p") == 0 or given.get("train", True) is False or given.get("training", True) is False
    )
    return given.get("generator") is None and not switched_off
