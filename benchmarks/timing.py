"""Interleaved timing of several functions that compute the same thing."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch

# In its first calls a layer looks at the function, notes what it does, and compares: a benchmark is of those after.
_NOT_COUNTED = 4


def rounds(default: int) -> int:
    """Return how many rounds the command line asks for, and use as many threads as it says: one, if nothing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options.rounds


def compare(
    title: str, contestants: Mapping[str, Callable[[], object]], floor: str, count: int, repeat: int = 1
) -> None:
    """Time every contestant once in each round, and print medians and ratios to ``floor``.

    Parameters
    ----------
    title
        Printed above.
    contestants
        Functions of no argument.
    floor
        The name of the one that ratios are taken to.
    count
        Rounds, after those that are not counted.
    repeat
        Calls of a function for one timing.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-_NOT_COUNTED, count):
        for name, function in contestants.items():
            begin = time.perf_counter()
            for _ in range(repeat):
                function()
            if turn >= 0:
                times[name].append((time.perf_counter() - begin) / repeat)
    print(f"\n{title}  ({count} rounds, {torch.get_num_threads()} thread(s))")
    print(f"  {'':44s} {'median ms':>10s} {'ratio':>8s} {'(quartiles)':>16s}")
    for name, taken in times.items():
        ratios = sorted(mine / base for mine, base in zip(taken, times[floor], strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        print(f"  {name:44s} {1e3 * statistics.median(taken):10.3f} {middle:8.2f} {f'({low:.2f}–{high:.2f})':>16s}")


def check(name: str, mine: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    """Stop unless ``mine`` agrees with ``reference``: times of wrong answers are worth nothing."""
    error = float((mine - reference).abs().max() / reference.abs().max().clamp_min(1e-300))
    if not error <= tolerance:
        raise SystemExit(f"{name}: relative error {error:.2e} exceeds {tolerance:.0e}; its time would mean nothing")
    print(f"  {name:44s} relative error {error:.1e}")
