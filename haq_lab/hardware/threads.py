"""Configure torch's threads."""

from __future__ import annotations

import os


def limit_thread_spinning() -> None:
    """Limit how long waiting OpenMP threads spin before they sleep. Call it before torch is imported.

    By default they spin for milliseconds. That is very slow if another process uses the same cores.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
