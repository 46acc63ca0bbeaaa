"""Lock a file for this process, and describe the holder of the lock to other processes."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


class LockedError(Exception):
    """Another process holds the lock. The message describes this process."""


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold a lock within the block. The operating system releases it if the process dies.

    Args:
        path: The lock file. Its folder must exist. `<path>.holder` describes the process that holds the lock.

    Raises:
        LockedError: Another process holds the lock.
    """
    # Not thread-local, because the garbage collector can release it in another thread.
    lock, holder = FileLock(path, thread_local=False), path.with_name(f"{path.name}.holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LockedError(_read_holder(holder)) from None
    try:
        with suppress(OSError):  # a full disk: the lock works without the description
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            holder.write_text(f"process {os.getpid()} on {platform.node()} since {started}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _read_holder(path: Path) -> str:
    with suppress(OSError, ValueError):
        if holder := path.read_text(encoding="utf-8"):
            return holder
    return "another process"
