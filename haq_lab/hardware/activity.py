"""Observe how busy this machine is: the share of the processors that others use, the load, the clock, throttling.

before = observe()
work()
others_share(before, observe())      # 0.4: other processes used 40 % of all processors' time
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

THROTTLING = Path("/sys/devices/system/cpu")  # Linux counts here how often each core was slowed because of heat
BUSY = ("user", "nice", "system", "irq", "softirq", "steal")  # parts of the processors' time; `steal`: other machines
IDLE = ("idle", "iowait")
QUIET = 0.1  # largest share of the processors that others use on a quiet machine
INTERVAL = 1.0  # seconds of one look while waiting; the system counts in steps of 10 ms


class Observation(NamedTuple):
    """The processors' time up to now.

    Attributes:
        busy: Seconds in which all processors worked, summed over them.
        total: Seconds of all processors, idle ones included.
        own: Seconds in which they worked for this process.
        throttled: How often a core was slowed because of heat. None if the system does not tell.
    """

    busy: float
    total: float
    own: float
    throttled: int | None


def observe() -> Observation:
    """Return the processors' time up to now."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    busy = sum(getattr(times, part, 0.0) for part in BUSY)
    total = busy + sum(getattr(times, part, 0.0) for part in IDLE)
    counts = []
    with suppress(OSError, ValueError):
        counts = [int(path.read_text()) for path in THROTTLING.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    return Observation(busy, total, own.user + own.system, sum(counts) if counts else None)


def others_share(before: Observation, after: Observation) -> float | None:
    """Return the share of all processors' time, 0 to 1, that others used. None if there was too little time to tell."""
    if (total := after.total - before.total) <= 0:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return min(max(others / total, 0.0), 1.0)


def activity(before: Observation, after: Observation) -> dict[str, float]:
    """Describe the machine between two observations. What the system does not tell is left out.

    Returns:
        - `others_share`: share of all processors' time that others used, 0 to 1
        - `load_1min`: number of processes that ran or waited for a processor, averaged over the last minute
        - `cpu_mhz`: the present clock, averaged over the processors
        - `throttled`: how often a core was slowed because of heat
    """
    found: dict[str, float | None] = {"others_share": others_share(before, after)}
    with suppress(OSError, NotImplementedError, AttributeError):
        found["load_1min"] = psutil.getloadavg()[0]
    with suppress(OSError, NotImplementedError, AttributeError, RuntimeError):
        found["cpu_mhz"] = clock.current if (clock := psutil.cpu_freq()) else None
    if before.throttled is not None and after.throttled is not None:
        found["throttled"] = after.throttled - before.throttled
    return {name: float(value) for name, value in found.items() if value is not None}


def wait_until_quiet(seconds: float, report: Callable[[float], None]) -> float:
    """Wait until others use at most the share `QUIET` of the processors, or until the time is over.

    Args:
        seconds: Longest time to wait. 0 returns at once.
        report: Called with the share that others use whenever it is too large.

    Returns:
        The seconds waited. Less than `seconds` if a quiet moment came.
    """
    start = time.perf_counter()
    before = observe()
    while (waited := time.perf_counter() - start) < seconds:
        time.sleep(min(INTERVAL, seconds - waited))
        after = observe()
        if (share := others_share(before, after)) is None or share <= QUIET:
            break
        report(share)
        before = after
    return time.perf_counter() - start
