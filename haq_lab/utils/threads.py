"""Configure torch's threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def limit_thread_spinning() -> None:
    """Limit how long waiting OpenMP threads spin before they sleep. Call it before torch is imported.

    By default they spin for milliseconds. That is very slow if another process uses the same cores.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread within the block, which is faster for many small operations."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
