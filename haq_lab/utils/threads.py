"""How torch's threads share the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def wait_briefly() -> None:
    """Before torch loads: a thread that waits for the others spins for microseconds, then sleeps.

    By default it spins for milliseconds, and two threads beside any other busy process collapse.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes on one thread: many small operations take longer to share out than to do."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
