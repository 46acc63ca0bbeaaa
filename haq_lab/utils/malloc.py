"""The C library's heap between layers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; other C libraries have none."""
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no library of the process's own to ask
        return None


def release_memory() -> None:
    """Return to the system the pages that freed tensors left behind.

    Tensors of up to 32 MB lie in the heap, and a layer's holes do not fit the next one's: without this a process
    grows with the number of layers that it has seen, though it holds one at a time.
    """
    if (trim := _trim()) is not None:
        trim(0)
