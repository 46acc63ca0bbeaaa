"""Work in a process of its own, which may be killed at any rename or flush."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path


def in_child(work: Callable[[], None], dies_at: int | None = None) -> int:
    """Start `work` in a process of its own, which is killed at its `dies_at`-th rename or flush; returns its id."""
    child = os.fork()
    if child:
        return child
    left = dies_at or 0

    def deadly(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        return call

    code = 99
    try:
        if dies_at is not None:
            Path.replace, os.fsync = deadly(Path.replace), deadly(os.fsync)  # type: ignore[method-assign, assignment]
        work()
        code = 0
    finally:
        os._exit(code)


def killed(child: int) -> bool:
    """Wait for a child: true where it was killed, false where it ended well."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)
