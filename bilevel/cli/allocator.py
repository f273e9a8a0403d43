"""Keeping freed memory in the process, where a program makes and drops large tensors all the time.

The C library returns a freed block of some megabytes to the system at once. For the next tensor of that size the system has to clear and map
pages one by one, which took a quarter of the time of a meta-step on a virtual machine. Only command lines and benchmarks call this, because it
changes the whole process.
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
