"""Return freed memory from the C library's heap to the operating system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    """Return glibc's `malloc_trim`, or None with another C library."""
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # the process has no loadable C library
        return None


def release_memory() -> None:
    """Return memory of freed tensors to the operating system.

    Tensors of up to 32 MB live in the heap, and the gaps that one layer leaves do not fit the next layer's tensors.
    Without this call the process would grow with every layer, although it holds only one at a time.
    """
    if (trim := _trim()) is not None:
        trim(0)
