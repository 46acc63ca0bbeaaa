"""Measure wall time by stage."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the wall time of each stage.

    Attributes:
        seconds: Seconds by stage.

    Example:
        >>> clock = Stopwatch()
        >>> with clock.stage("calibrate"):
        ...     pass
        >>> list(clock.seconds)
        ['calibrate']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's wall time to the stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
