"""Keeping freed memory in the process, where a program makes and drops large tensors all the time.

The C library gives a freed block of some megabytes back to the system at once, and the next tensor of that size is then made of pages that the
system has to clear and map one by one: a quarter of the time of a meta-step on a virtual machine. What is to be done about it is a
program's choice, not a library's: only command lines and benchmarks call this.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# From glibc's malloc.h. A threshold of −1 is the largest there is.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Ask the C library to keep what is freed for what is allocated next; return whether it does as asked.

    For the whole process, from now on: its memory stays at its peak. Without effect on other systems than Linux with glibc.

    Examples
    --------
    >>> keep_freed_memory() in (True, False)
    True
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, -1)) and bool(mallopt(_MMAP_MAX, 0))
