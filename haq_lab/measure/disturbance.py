"""Say whether other work disturbed a latency, from what the run recorded about its machine.

Tables mark a disturbed figure with `~`. The ratio to the full-precision model needs no mark when one thread decodes,
because both models then meet the same disturbance. With more threads, and in the prefill, the ratio changes too. See
experiments/latency_under_load.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from haq_lab.hardware.activity import QUIET

Metrics = Mapping[Any, Any] | pd.Series  # metrics by name, from `results.json` or as a row of `haq_lab.results.load`
WAITED = 1.05  # wall time over processor time; more means that the thread waited
SPREAD = 0.25  # 95th percentile of a decoded token over the median, minus 1
MARK = "~"
_MARKED = ("latency.prefill_ms", "latency.decode_ms_per_token.", "latency.tokens_per_s", "latency.speed_vs_fp.")
_DECODE_RATIO = "latency.speed_vs_fp.decode"


def disturbances(metrics: Metrics) -> list[str]:
    """Return the reasons why the latency of a run is not that of a quiet machine. Empty if there are none.

    Args:
        metrics: Metrics of the run by name. Names may be absent or NaN, as in a row of `haq_lab.results.load`.

    Example:
        >>> disturbances({"latency.wall_over_cpu": 1.4, "latency.machine.others_share": 0.02})
        ['wall time exceeds processor time by 40 %']
    """
    waited, spread, others, throttled = (
        _value(metrics, f"latency.{name}")
        for name in ("wall_over_cpu", "spread", "machine.others_share", "machine.throttled")
    )
    reasons = []
    if waited > WAITED:
        reasons.append(f"wall time exceeds processor time by {100 * (waited - 1):.0f} %")
    if spread > SPREAD:
        reasons.append(f"5 % of the tokens take {100 * spread:.0f} % longer than the median, or more")
    if others > QUIET:
        reasons.append(f"others used {100 * others:.0f} % of the processors")
    if throttled > 0:
        reasons.append(f"cores were slowed {throttled:.0f} times because of heat")
    return reasons


def mark(name: str, metrics: Metrics) -> str:
    """Return the mark before the figure of a metric: `~` if it is a latency and other work disturbed it, else nothing.

    Args:
        name: Full name of the metric.
        metrics: All metrics of the run by name.
    """
    if not name.startswith(_MARKED) or (name.startswith(_DECODE_RATIO) and _value(metrics, "latency.threads") == 1):
        return ""
    return MARK if disturbances(metrics) else ""


def advice(metrics: Metrics) -> str:
    """Return a sentence about the latency of a run if other work disturbed it, with what to do. Otherwise nothing.

    Args:
        metrics: Metrics of the run by name.
    """
    if not (reasons := disturbances(metrics)):
        return ""
    hints = []
    if math.isnan(_value(metrics, "latency.machine.waited_s")):
        hints.append("measure.latency.wait=60 waits for a quiet moment.")
    if math.isnan(_value(metrics, _DECODE_RATIO)):
        hints.append("measure.latency.against=none gives a ratio of decoding, which holds with OMP_NUM_THREADS=1.")
    elif mark(_DECODE_RATIO, metrics):
        hints.append("With OMP_NUM_THREADS=1 the ratio of decoding holds on a busy machine.")
    return " ".join([f"{MARK} the machine was busy when latency was measured: {', and '.join(reasons)}.", *hints])


def _value(metrics: Metrics, name: str) -> float:
    """Return a metric, or NaN if the run has none. NaN exceeds no limit."""
    value = metrics.get(name)
    return math.nan if value is None else float(value)
